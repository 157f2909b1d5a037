"""Runs the benchmark: every operation in a fresh process, operations in turn, the limits beside them, and writes one JSON file.

    python benchmarks/run.py --size 2GB --repeat 3 --out bench-out

Each repetition goes through all tools, beginning with another one each time; a tool saves, its files are loaded cold and warm,
then they are removed and the disk is left to settle. ``report.py`` makes the tables and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import machine  # noqa: E402
import measure  # noqa: E402
from rivals import NOT_RUN, TOOLS  # noqa: E402

WORKER_SECONDS = 600
LIMITS = {
    "write": (1, 2, 4),
    "read": (1, 2, 4),
    "fresh": (2, 4),
    "warm": (1, 2),
    "memcpy": (1, 2),
}  # operation → numbers of threads
SETTLE_SECONDS = 0.5


class Runner:
    """Starts workers one after the other and collects what they measured."""

    def __init__(self, folder: Path, raw: Path) -> None:
        self.samples: list[dict[str, Any]] = []
        self._folder = folder
        self._raw = raw

    def limits(self, nbytes: int, repetition: int) -> None:
        """What the disk and the memory give, with each number of threads."""
        path = self._fresh("limits")
        path.mkdir(parents=True)
        file = path / "raw.bin"
        for operation, counts in LIMITS.items():
            for threads in counts:
                if operation == "write":
                    file.unlink(missing_ok=True)
                    self._settle()
                elif operation in ("read", "fresh"):
                    measure.make_cold(file)
                elif operation == "warm":
                    measure.make_warm(file)
                measure.touch_free_memory(nbytes * 5 // 4)
                command = [str(self._raw), operation, str(file), str(nbytes), str(threads)]
                self._note(command, {"tool": "limit", "operation": operation, "threads": threads, "repetition": repetition})
        self._remove(path)

    def tool(self, name: str, loaders: list[str], size: int, repetition: int, ways: list[str] | None) -> None:
        """Saves with a tool, loads what it saved in each of its ways (or in ``ways`` alone), cold and warm, and removes it.

        ``loaders`` are tools that can only load and are given the same files.
        """
        path = self._fresh(name)
        self._settle()
        where = {"size": size, "repetition": repetition}
        saved = self._worker(name, "save", path, size, where | {"tool": name, "operation": "save"})
        for loader in [name, *loaders] if saved else ():
            tool = TOOLS[loader]
            for way in (way for way in tool.loads if ways is None or way in ways):
                for cache in ("cold", "warm") if way not in tool.mapped else ("warm",):
                    (measure.make_cold if cache == "cold" else measure.make_warm)(path)
                    what = where | {"tool": loader, "operation": way, "cache": cache}
                    self._worker(loader, way, path, size, what, check=repetition == 0)
        self._remove(path)

    def other(self, script: str, *arguments: str) -> dict[str, Any]:
        """What one of the other scripts of this folder measures."""
        print(f"  {script} {' '.join(arguments)}", flush=True)
        return _run([sys.executable, str(HERE / script), *arguments])

    def _worker(self, tool: str, operation: str, path: Path, size: int, what: dict[str, Any], *, check: bool = False) -> bool:
        command = [
            sys.executable,
            str(HERE / "worker.py"),
            tool,
            operation,
            str(path),
            str(size),
            *(["--check"] if check else []),
        ]
        return self._note(command, what)

    def _note(self, command: list[str], what: dict[str, Any]) -> bool:
        found = _run(command)
        self.samples.append(what | found)
        label = " ".join(str(what[key]) for key in ("tool", "operation", "cache", "threads") if key in what)
        print(f"  {label:45} {found.get('failed') or format(found['wall'], '8.3f') + ' s'}", flush=True)
        return "failed" not in found

    def _fresh(self, name: str) -> Path:
        path = self._folder / "".join(letter if letter.isalnum() else "-" for letter in name)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self._settle()

    def _settle(self) -> None:
        os.sync()
        time.sleep(SETTLE_SECONDS)


def _run(command: list[str]) -> dict[str, Any]:
    """The last line of what ``command`` prints, JSON; or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WORKER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end within {WORKER_SECONDS} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_size, default=_size("2GB"), help="bytes of the model (default 2GB)")
    parser.add_argument("--small", type=_size, default=_size("500MB"), help="a second size, for extra memory; 0 for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[*TOOLS], help="these tools alone")
    parser.add_argument("--loads", nargs="*", help="these ways to load alone, such as: into")
    parser.add_argument("--no-costs", action="store_true", help="leave out checksums, 100,000 tensors, import and GPU")
    parser.add_argument("--raw", type=Path, required=True, help="the compiled raw.c")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    asked = parser.parse_args()
    started = time.time()
    folder = asked.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, asked.raw)
    tools = [name for name in TOOLS if not asked.only or name in asked.only]
    savers = [name for name in tools if not TOOLS[name].saved_by]
    loaders = {name: [other for other in tools if TOOLS[other].saved_by == name] for name in savers}
    described = machine.describe(asked.out, sorted({package for name in tools for package in TOOLS[name].packages}))
    costs: dict[str, Any] = {}

    def nbytes() -> int:
        return max((sample.get("bytes", 0) for sample in runner.samples), default=0) or asked.size

    def write() -> None:
        """So that a run that is cut off leaves the figures that it has."""
        result = {
            "size": asked.size,
            "bytes": nbytes(),
            "small": asked.small,
            "repeat": asked.repeat,
            "minutes": (time.time() - started) / 60,
            "machine": described,
            "not_run": NOT_RUN,
            "samples": runner.samples,
            "costs": costs,
        }
        (asked.out / "results.json").write_text(json.dumps(result, indent=1))

    if not asked.no_costs:
        print("costs", flush=True)
        costs["many"] = runner.other("costs.py", "many", str(folder / "costs"))
        costs["import"] = runner.other("costs.py", "import")
        costs["checksums"] = runner.other("costs.py", "checksums", str(folder / "costs"), str(asked.size))
        costs["gpu"] = runner.other("gpu.py", str(folder / "gpu"), str(asked.size))
    if asked.small:
        print("the small model, for extra memory", flush=True)
        for name in (name for name in savers if name.startswith("shardsave")):
            runner.tool(name, [], asked.small, 0, asked.loads)
    for repetition in range(asked.repeat):
        print(f"repetition {repetition + 1} of {asked.repeat}", flush=True)
        # The limits stand beside the first tool, shardsave, which is compared with them; each time another one begins.
        turn = repetition * len(savers) // asked.repeat
        for name in [*savers[turn:], *savers[:turn]]:
            runner.tool(name, loaders[name], asked.size, repetition, asked.loads)
            if name == savers[0]:
                runner.limits(nbytes(), repetition)
            write()
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {asked.out / 'results.json'} after {(time.time() - started) / 60:.1f} minutes")


def _size(text: str) -> int:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if text.upper().endswith(unit):
            return int(float(text[:-2]) * factor)
    return int(text)


if __name__ == "__main__":
    main()
