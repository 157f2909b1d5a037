"""One piece of a run: ranks that save and load one sharded model with some tools, in turns, next to the limits of the disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
from pieces import HERE, WORKER_SECONDS, path_of, run_worker, settle
from results import RANKS as RANKS_PIECE
from rivals.ranks import DCP, OURS, RANKS

SIZE = 4  # ranks of a job
THREADS = (1, 2)  # of each process that measures a limit

#: What ranks load → how `ranks.py` is told. All files were saved by ``SIZE`` ranks.
LOADS = {
    f"load on {SIZE} ranks": ("--ranks", str(SIZE)),
    "load on 2 ranks": ("--ranks", "2"),
    "load of rows": ("--layout", "rows"),
    "load of columns": ("--layout", "columns"),
    "load of replicas": ("--layout", "replicas"),
}
COMPARED = tuple(LOADS)[:2]


def rank_pieces() -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """For each piece by name: its tools, and what they load. Our own tools are alone in the first, with all layouts; both are compared
    with DCP's own files, the others with the faster one.
    """
    rivals = {name: [name, *(OURS if name == DCP else OURS[:1])] for name in RANKS if name not in OURS}
    return {
        RANKS_PIECE: (list(OURS), tuple(LOADS)),
        **{f"{RANKS_PIECE}, {name}": (tools, COMPARED) for name, tools in rivals.items()},
    }


class RanksPiece:
    """Measures ``tools`` in turns. ``samples``: the measurements so far."""

    def __init__(self, name: str, tools: list[str], loads: tuple[str, ...], folder: Path, raw: Path) -> None:
        self.samples: list[dict[str, Any]] = []
        self._name = name
        self._tools = tools
        self._loads = loads
        self._folder = folder
        self._raw = raw

    def turn(self, number: int, size: int) -> None:
        """One turn: each operation of all tools, one after the other, and the limit of as many processes."""
        labels = {"piece": self._name, "turn": number, "size": size}
        first = number % len(self._tools)
        tools = [*self._tools[first:], *self._tools[:first]]
        for tool in tools:
            shutil.rmtree(path_of(self._folder, tool), ignore_errors=True)
            settle(self._folder)
            self._job(tool, "save", size, labels | {"operation": "save"})
        nbytes = max((sample["bytes"] for sample in self.samples if "bytes" in sample), default=size)
        self._limit("write", nbytes, labels)
        for load in self._loads:
            for tool in tools if load in COMPARED else OURS[:1]:
                if path_of(self._folder, tool).exists():
                    measure.make_cold(path_of(self._folder, tool))
                    check = ("--check",) if number == 0 else ()
                    self._job(tool, "load", size, labels | {"operation": load, "cache": "cold"}, *LOADS[load], *check)
        self._limit("read", nbytes, labels)
        if self._tools[0] == OURS[0]:
            shutil.rmtree(self._folder)
            settle(self._folder)
            self._job(OURS[0], "stall", size, labels | {"operation": "stall"})
        shutil.rmtree(self._folder, ignore_errors=True)
        settle(self._folder)

    def _job(self, tool: str, operation: str, size: int, labels: dict[str, Any], *arguments: str) -> None:
        script = [sys.executable, str(HERE / "ranks.py"), tool, operation, str(path_of(self._folder, tool)), str(size)]
        self._record(run_worker([*script, *arguments]), labels | {"tool": tool})

    def _limit(self, operation: str, nbytes: int, labels: dict[str, Any]) -> None:
        """Measures what as many processes reach together that only write, or read, a part of the bytes each."""
        files = [self._folder / f"raw-{rank}.bin" for rank in range(SIZE)]
        for threads in THREADS:
            if operation == "write":
                for file in files:
                    file.unlink(missing_ok=True)
                settle(self._folder)
            else:
                for file in files:
                    measure.make_cold(file)
            measure.touch_free_memory(nbytes * 5 // 4)
            figures = together([[str(self._raw), operation, str(f), str(-(-nbytes // SIZE)), str(threads)] for f in files])
            self._record(figures, labels | {"tool": "limit", "operation": operation, "threads": threads})

    def _record(self, figures: dict[str, Any], labels: dict[str, Any]) -> None:
        self.samples.append(labels | figures)
        label = " ".join(str(labels[key]) for key in ("tool", "operation", "threads") if key in labels)
        print(f"  {label:60} {figures.get('failed') or format(figures['wall'], '8.3f') + ' s'}", flush=True)


def together(commands: list[list[str]]) -> dict[str, Any]:
    """Runs programs of ``raw.c`` that begin at the same time; returns the figures of all of them together."""
    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [stack.enter_context(subprocess.Popen([*command, "together"], **pipes)) for command in commands]
        try:
            ready = [process.stdout.readline() == "ready\n" for process in processes]
            for process in processes if all(ready) else ():
                process.stdin.write("\n")
                process.stdin.flush()
            outputs = [process.communicate(timeout=WORKER_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        return {"failed": "a process that measures the limit has failed"}
    figures = [json.loads(output) for output in outputs]
    return {
        "wall": max(figure["end"] for figure in figures) - min(figure["begin"] for figure in figures),
        "cpu": sum(figure["cpu"] for figure in figures),
        "bytes": sum(figure["bytes"] for figure in figures),
    }
