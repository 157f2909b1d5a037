"""Real processes that begin with everything imported and end as every interpreter does.

Method: one process imports torch, saves once, and then forks a child for each program; the child runs it and falls off the end of the
main script.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

_ZYGOTE = """if True:
    import atexit, gc, os, signal, sys, tempfile, threading, time
    import multiprocessing
    import torch, shardsave
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        with shardsave.CheckpointManager(folder, save_every=1, asynchronous=True, keep_last=1) as manager:
            for step in (1, 2):
                manager.step(step, {"x": torch.ones(2)}, training={"y": step})

    def full(value, size=8):
        return {"x": torch.full((size,), float(value))}

    def hold(done, total):
        '''For `progress`: waits until the test lets the save go on.'''
        say("held")
        while not os.path.exists(f"{folder}/go"):
            time.sleep(0.002)

    def say(*words):
        os.write(1, " ".join(map(str, words)).encode() + b"\\n")

    gc.collect()
    gc.freeze()  # a child that visited all of torch would copy its memory
    for line in sys.stdin:
        command, *words = line.split()
        if command == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
    else:
        os._exit(0)
    folder, output = words
    ckpt = f"{folder}/ckpt"
    os.dup2(os.open(f"{output}.out", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(f"{output}.err", os.O_WRONLY | os.O_CREAT), 2)
    signal.alarm(60)
exec(compile(open(f"{output}.py").read(), "program", "exec"))
"""


class Running:
    """A process that runs a program. ``out``, ``error``: what it has written."""

    def __init__(self, zygote: Zygote, pid: int, output: str) -> None:
        self.pid = pid
        self._zygote = zygote
        self._output = output

    @property
    def out(self) -> str:
        return Path(f"{self._output}.out").read_text()

    @property
    def error(self) -> str:
        return Path(f"{self._output}.err").read_text()

    def until(self, words: str, *, seconds: float = 30) -> None:
        """Waits until the process has written ``words``."""
        deadline = time.monotonic() + seconds
        while not (Path(f"{self._output}.err").exists() and words in self.out + self.error):
            assert time.monotonic() < deadline, (words, self.out, self.error)
            time.sleep(0.002)

    def wait(self) -> int:
        """Waits for the end, and returns the exit code."""
        return int(self._zygote.ask(f"wait {self.pid}"))


class Zygote:
    """Starts programs; see above. For one thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory()
        self._number = 0

    def run(self, program: str, folder: Path) -> Running:
        """Starts ``program``, which may use ``folder``, ``ckpt`` in it, ``full``, ``hold`` and ``say``."""
        self._number += 1
        output = f"{self._folder.name}/{self._number}"
        Path(f"{output}.py").write_text(textwrap.dedent(program))
        return Running(self, int(self.ask(f"run {folder} {output}")), output)

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()
