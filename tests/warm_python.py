"""Processes of Python that begin with torch imported: each is forked from a server, since importing torch takes more than a second.

A process runs ``-c PROGRAM …`` or ``-m MODULE …`` as Python does, and ends as every interpreter does.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

_SERVER = """
def serve():
    import gc, importlib, json, os, sys
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a child that visited all of torch would copy its memory
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
    else:
        os._exit(0)
    arguments, environment, folder, action, output = asked
    files = os.open(os.devnull, os.O_RDONLY), *(os.open(f"{output}.{n}", os.O_WRONLY) for n in (1, 2))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if action:
        import warnings
        warnings.simplefilter(action)
        sys.warnoptions[:] = [action]
    option, program, *rest = arguments
    sys.path[:1] = ["" if option == "-c" else folder, *environment["PYTHONPATH"].split(os.pathsep)]
    sys.argv[:] = [option, *rest] if option == "-c" else [program, *rest]
    return program if option == "-c" else f"import runpy; runpy.run_module({program!r}, run_name='__main__', alter_sys=True)"

exec(compile(serve(), "<string>", "exec"))
"""


class Server:
    """A process that answers each line that it reads. It ends, with its children, when it does not answer. For one thread."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        atexit.register(self.close)

    def ask(self, request: object) -> str:
        """The next line of what the server prints. Raises AssertionError if it has ended."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            return self.line()
        except BaseException:
            self.kill()
            raise

    def line(self) -> str:
        try:
            line = self._answers.readline()
            assert line, f"the server has ended: {self._process.args}"
            return line
        except BaseException:
            self.kill()
            raise

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        if self.lives:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Lets the server end."""
        if self.lives:
            self._requests.close()
            self._process.wait(30)
        self._answers.close()


class Running:
    """A process that was started. ``out``, ``error``: what it has written."""

    def __init__(self, server: Server, pid: int, output: str) -> None:
        self.pid = pid
        self._server = server
        self._output = output

    @property
    def out(self) -> str:
        return Path(f"{self._output}.1").read_text()

    @property
    def error(self) -> str:
        return Path(f"{self._output}.2").read_text()

    def until(self, words: str, *, seconds: float = 30) -> None:
        """Waits until the process has written ``words``."""
        deadline = time.monotonic() + seconds
        while words not in self.out + self.error:
            assert time.monotonic() < deadline, (words, self.out, self.error)
            time.sleep(0.002)

    def wait(self) -> int:
        """Waits for the end, and returns the exit code."""
        return int(self._server.ask(self.pid))


class WarmPython(Server):
    """See above. ``modules``: what is imported before. ``preload``: the libraries of LD_PRELOAD."""

    def __init__(self, modules: Sequence[str], preload: str) -> None:
        self._paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        self._preload = {"LD_PRELOAD": preload} if preload else {}
        self._outputs = tempfile.TemporaryDirectory()
        self._number = 0
        super().__init__([sys.executable, "-c", _SERVER, *modules], self._environment({}))

    def _environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": self._paths, **self._preload, **changes}

    def start(self, arguments: Sequence[object], folder: Path | None = None, action: str = "", **environment: str) -> Running:
        """Starts ``python -W action arguments`` in ``folder``; ``environment`` is added to that of this process."""
        self._number += 1
        output = f"{self._outputs.name}/{self._number}"
        for stream in (1, 2):
            Path(f"{output}.{stream}").touch()
        request = [*map(str, arguments)], self._environment(environment), str(folder or Path.cwd()), action, output
        return Running(self, int(self.ask(request)), output)

    def run(
        self, arguments: Sequence[object], folder: Path | None = None, action: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with ``capture_output`` and ``text``."""
        running = self.start(arguments, folder, action, **environment)
        code = running.wait()
        return subprocess.CompletedProcess([*map(str, arguments)], code, running.out, running.error)

    def close(self) -> None:
        super().close()
        self._outputs.cleanup()


@cache
def _known(modules: tuple[str, ...], preload: str) -> list[WarmPython]:
    return []


def warm_python(*modules: str, preload: str = "") -> WarmPython:
    """The server that has imported torch and ``modules``; all tests of this process share it."""
    known = _known(modules, preload)
    if not known or not known[-1].lives:
        known.append(WarmPython(["torch", *modules], preload))
    return known[-1]
