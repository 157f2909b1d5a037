"""One piece of a run: some tools in turns, each operation in a process of its own, next to the limits of disk and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measure
from results import TRAINING as TRAINING_PIECE
from rivals import TOOLS
from rivals.training import TRAINING

HERE = Path(__file__).resolve().parent

WORKER_SECONDS = 600
LIMITS = {
    "write": (1, 2, 4),
    "read": (1, 2, 4),
    "fresh": (2, 4),
    "warm": (1, 2),
    "memcpy": (1, 2),
}  # operation → numbers of threads
SETTLE_SECONDS = 0.5


class Piece:
    """Measures some tools in turns: on models, or, in the piece of that name, on trainings. ``samples``: the measurements so far."""

    def __init__(self, name: str, tools: list[str], folder: Path, raw: Path | None, ways: list[str] | None) -> None:
        """``tools``: the first says which ways to load are measured. ``raw``: the program that measures the limits, None to leave them
        out. ``ways``: only these ways to load.
        """
        self.samples: list[dict[str, Any]] = []
        self._training = name == TRAINING_PIECE
        self._known = TRAINING if self._training else TOOLS
        self._name = name
        self._tools = tools
        self._folder = folder
        self._raw = raw
        self._ways = ways

    def turn(self, number: int, size: int) -> None:
        """One turn: each operation of all tools, one after the other, and next to it the limit of disk or memory."""
        first = number % len(self._tools)
        tools = [*self._tools[first:], *self._tools[:first]]
        labels = {"piece": self._name, "turn": number, "size": size}
        savers = [tool for tool in tools if self._known[tool].save is not None]
        for tool in savers:
            shutil.rmtree(path_of(self._folder, tool), ignore_errors=True)
            settle(self._folder)
            self._worker(tool, "save", size, labels)
        nbytes = max((sample["bytes"] for sample in self.samples if "bytes" in sample), default=size)
        self._limits(("write",), nbytes, labels)
        for cache, limits in (("cold", ("read", "fresh")), ("warm", ("warm", "memcpy"))):
            for way in self._known[self._tools[0]].loads:
                for tool in tools if self._ways is None or way in self._ways else ():
                    if way in self._known[tool].loads and not (cache == "cold" and way in self._known[tool].mapped):
                        self._load(tool, way, cache, size, labels)
            self._limits(limits, nbytes, labels)
        for tool in savers:
            if path_of(self._folder, tool).exists():
                settle(self._folder)
                self._worker(tool, "overwrite", size, labels)
        shutil.rmtree(self._folder, ignore_errors=True)
        settle(self._folder)

    def _load(self, tool: str, way: str, cache: str, size: int, labels: dict[str, Any]) -> None:
        path = path_of(self._folder, self._known[tool].saved_by or tool)
        if path.exists():
            (measure.make_cold if cache == "cold" else measure.make_warm)(path)
            self._worker(tool, way, size, labels | {"cache": cache}, check=labels["turn"] == 0)

    def _worker(self, tool: str, operation: str, size: int, labels: dict[str, Any], *, check: bool = False) -> None:
        path = path_of(self._folder, self._known[tool].saved_by or tool)
        command = [
            sys.executable,
            str(HERE / "worker.py"),
            tool,
            operation,
            str(path),
            str(size),
            *(["--check"] if check else []),
            *(["--training"] if self._training else []),
        ]
        self._record(command, labels | {"tool": tool, "operation": operation})

    def _limits(self, operations: Iterable[str], nbytes: int, labels: dict[str, Any]) -> None:
        """Measures the limits of disk and memory with each number of threads."""
        if self._raw is None:
            return
        file = self._folder / "raw.bin"
        for operation in operations:
            for threads in LIMITS[operation]:
                if operation == "write":
                    file.unlink(missing_ok=True)
                    settle(self._folder)
                elif operation in ("read", "fresh"):
                    measure.make_cold(file)
                elif operation == "warm":
                    measure.make_warm(file)
                measure.touch_free_memory(nbytes * 5 // 4)
                command = [str(self._raw), operation, str(file), str(nbytes), str(threads)]
                self._record(command, labels | {"tool": "limit", "operation": operation, "threads": threads})

    def _record(self, command: list[str], labels: dict[str, Any]) -> None:
        result = run_worker(command)
        self.samples.append(labels | result)
        label = " ".join(str(labels[key]) for key in ("tool", "operation", "cache", "threads") if key in labels)
        print(f"  {label:45} {result.get('failed') or format(result['wall'], '8.3f') + ' s'}", flush=True)


def path_of(folder: Path, tool: str) -> Path:
    """Where ``tool`` saves."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in tool)


def settle(folder: Path) -> None:
    """Waits until the disk has nothing more to do; makes ``folder``."""
    os.sync()
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(SETTLE_SECONDS)


def run_worker(command: list[str]) -> dict[str, Any]:
    """Runs ``command``; returns the JSON in the last line of its output, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WORKER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end within {WORKER_SECONDS} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
