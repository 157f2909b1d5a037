"""Runs the benchmark and writes its results to one JSON file. Each operation runs in its own process.

    python benchmarks/run.py --size 2GB --repeat 3 --out bench-out

Each repetition runs all tools, and begins with a different one. A tool saves, its files are loaded cold and warm, then they are removed
and the disk gets time to settle. The limits of disk and memory are measured after shardsave. ``report.py`` writes tables and pictures.
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
    """Starts workers one after another and collects their measurements."""

    def __init__(self, folder: Path, raw: Path) -> None:
        self.samples: list[dict[str, Any]] = []
        self._folder = folder
        self._raw = raw

    def limits(self, nbytes: int, repetition: int) -> None:
        """Measures the limits of disk and memory with each number of threads."""
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
                self._record(command, {"tool": "limit", "operation": operation, "threads": threads, "repetition": repetition})
        self._remove(path)

    def tool(self, name: str, loaders: list[str], size: int, repetition: int, ways: list[str] | None) -> None:
        """Saves with a tool, loads its files cold and warm in each of the tool's ways (or only in ``ways``), and removes them.

        ``loaders`` are tools that can only load; they load the same files.
        """
        path = self._fresh(name)
        self._settle()
        common_labels = {"size": size, "repetition": repetition}
        saved = self._worker(name, "save", path, size, common_labels | {"tool": name, "operation": "save"})
        for loader in [name, *loaders] if saved else ():
            tool = TOOLS[loader]
            for way in (way for way in tool.loads if ways is None or way in ways):
                for cache in ("cold", "warm") if way not in tool.mapped else ("warm",):
                    (measure.make_cold if cache == "cold" else measure.make_warm)(path)
                    labels = common_labels | {"tool": loader, "operation": way, "cache": cache}
                    self._worker(loader, way, path, size, labels, check=repetition == 0)
        self._remove(path)

    def script(self, script: str, *arguments: str) -> dict[str, Any]:
        """Runs another script of this folder and returns its measurements."""
        print(f"  {script} {' '.join(arguments)}", flush=True)
        return _run([sys.executable, str(HERE / script), *arguments])

    def _worker(self, tool: str, operation: str, path: Path, size: int, labels: dict[str, Any], *, check: bool = False) -> bool:
        command = [
            sys.executable,
            str(HERE / "worker.py"),
            tool,
            operation,
            str(path),
            str(size),
            *(["--check"] if check else []),
        ]
        return self._record(command, labels)

    def _record(self, command: list[str], labels: dict[str, Any]) -> bool:
        result = _run(command)
        self.samples.append(labels | result)
        label = " ".join(str(labels[key]) for key in ("tool", "operation", "cache", "threads") if key in labels)
        print(f"  {label:45} {result.get('failed') or format(result['wall'], '8.3f') + ' s'}", flush=True)
        return "failed" not in result

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_size, default=_size("2GB"), help="bytes of the model (default 2GB)")
    parser.add_argument("--small", type=_size, default=_size("500MB"), help="a second size, for extra memory; 0 for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[*TOOLS], help="only these tools")
    parser.add_argument("--loads", nargs="*", help="only these ways to load, for example: into")
    parser.add_argument("--no-costs", action="store_true", help="leave out checksums, 100,000 tensors, import and GPU")
    parser.add_argument("--raw", type=Path, required=True, help="the compiled raw.c")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    started = time.time()
    folder = options.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, options.raw)
    tools = [name for name in TOOLS if not options.only or name in options.only]
    savers = [name for name in tools if not TOOLS[name].saved_by]
    loaders = {name: [other for other in tools if TOOLS[other].saved_by == name] for name in savers}
    described = machine.describe(options.out, sorted({package for name in tools for package in TOOLS[name].packages}))
    costs: dict[str, Any] = {}

    def nbytes() -> int:
        return max((sample.get("bytes", 0) for sample in runner.samples), default=0) or options.size

    def write() -> None:
        """Writes the results so far, so that an interrupted run keeps them."""
        result = {
            "size": options.size,
            "bytes": nbytes(),
            "small": options.small,
            "repeat": options.repeat,
            "minutes": (time.time() - started) / 60,
            "machine": described,
            "not_run": NOT_RUN,
            "samples": runner.samples,
            "costs": costs,
        }
        (options.out / "results.json").write_text(json.dumps(result, indent=1))

    if not options.no_costs:
        print("costs", flush=True)
        costs["many"] = runner.script("costs.py", "many", str(folder / "costs"))
        costs["import"] = runner.script("costs.py", "import")
        costs["checksums"] = runner.script("costs.py", "checksums", str(folder / "costs"), str(options.size))
        costs["gpu"] = runner.script("gpu.py", str(folder / "gpu"), str(options.size))
    if options.small:
        print("the small model, for extra memory", flush=True)
        for name in (name for name in savers if name.startswith("shardsave")):
            runner.tool(name, [], options.small, 0, options.loads)
    for repetition in range(options.repeat):
        print(f"repetition {repetition + 1} of {options.repeat}", flush=True)
        # Each repetition begins with a different tool. The limits run right after shardsave, which is compared with them.
        turn = repetition * len(savers) // options.repeat
        for name in [*savers[turn:], *savers[:turn]]:
            runner.tool(name, loaders[name], options.size, repetition, options.loads)
            if name == savers[0]:
                runner.limits(nbytes(), repetition)
            write()
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {options.out / 'results.json'} after {(time.time() - started) / 60:.1f} minutes")


def _size(text: str) -> int:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if text.upper().endswith(unit):
            return int(float(text[:-2]) * factor)
    return int(text)


if __name__ == "__main__":
    main()
