"""Runs scripts of a folder as ``python script.py …`` does, but in processes that begin with everything imported.

Method: one process imports torch, what is asked for, and then forks a child for each script.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from warm_python import Server

_SERVER = """if True:
    import gc, importlib, json, os, runpy, subprocess, sys, traceback
    folder, *modules = sys.argv[1:]
    sys.path[0] = folder
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a child that visited all of torch would copy its memory

    def run(argv, out, err):
        '''The exit code of a script that writes to the files ``out`` and ``err``.'''
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        code = 1
        try:
            sys.argv[:] = argv
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    started = subprocess.run

    def start(command, **options):
        '''As `subprocess.run`; a script that a script starts is forked too.'''
        if command[0] != sys.executable or command[1:2] == ["-c"]:
            return started(command, **options)
        out, err = (f"{output}.{number}" for number in (1, 2))
        code = run(command[1:], out, err)
        done = subprocess.CompletedProcess(command, code, open(out).read(), open(err).read())
        os.unlink(out), os.unlink(err)
        return done

    subprocess.run = start
    for line in sys.stdin:
        argv, output = json.loads(line)
        print(run(argv, output + ".out", output + ".err"), flush=True)
"""


class WarmScripts(Server):
    """Runs scripts of ``folder``; see above. ``modules``: what is imported before. For one thread."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self._folder = folder
        self._outputs = tempfile.TemporaryDirectory()
        self._number = 0
        super().__init__([sys.executable, "-c", _SERVER, str(folder), *modules], os.environ)

    def run(self, script: str, *arguments: object) -> str:
        """What the script prints. Raises AssertionError with what it writes to stderr if it fails."""
        self._number += 1
        output = f"{self._outputs.name}/{self._number}"
        code = self.ask([[str(self._folder / script), *map(str, arguments)], output]).strip()
        assert code == "0", f"{script}: {code}: {Path(output + '.err').read_text()}"
        return Path(output + ".out").read_text()

    def close(self) -> None:
        super().close()
        self._outputs.cleanup()


def last_line(printed: str) -> Any:
    """The figures that a script prints."""
    return json.loads(printed.splitlines()[-1])
