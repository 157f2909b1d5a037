"""Runs the benchmark in pieces and writes its results to one JSON file. Each operation runs in its own process.

    python benchmarks/run.py --raw build/benchmarks/raw --out bench-out [--minutes 20]

A piece measures one rival together with ours, in turns: the rival saves, we save, the disk's limit is measured, the rival overwrites, we
overwrite, and so on, three times, each time in another order. So whatever the machine does meanwhile affects all of them. A
run continues what an earlier run left undone; with ``--minutes`` it ends before a piece that would take it beyond that time.
``report.py`` writes tables and pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import machine  # noqa: E402
from pieces import Piece, run_worker  # noqa: E402
from rank_pieces import RanksPiece, rank_pieces  # noqa: E402
from results import LOOP  # noqa: E402
from results import TRAINING as TRAINING_PIECE  # noqa: E402
from rivals import NOT_RUN, OURS, TOOLS  # noqa: E402
from rivals.background import WAYS  # noqa: E402
from rivals.training import TRAINING  # noqa: E402

#: What is measured with no rival → the script of this folder and its arguments (FOLDER and SIZE stand for their values).
COSTS = {
    "many": ("costs.py", "many", "FOLDER"),
    "optimizer": ("costs.py", "optimizer", "FOLDER"),
    "import": ("costs.py", "import"),
    "checksums": ("costs.py", "checksums", "FOLDER", "SIZE"),
    "frozen": ("costs.py", "frozen", "FOLDER", "SIZE"),
    "gpu": ("gpu.py", "FOLDER", "SIZE"),
    "ranks": ("rank_costs.py", "FOLDER"),
    "rank zero": ("rank_zero.py", "FOLDER"),
}


class Run:
    """A run of several pieces, which continues the results of earlier runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._file: Path = options.out / "results.json"
        self._folder: Path = options.out / "data"
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {"size": options.size, "small": options.small, "ranks": options.ranks, "turns": options.turns}
        settings["ways"] = options.loads
        packages = sorted({package for tool in TOOLS.values() for package in tool.packages})
        settings |= {"machine": machine.describe(options.out, packages), "not_run": NOT_RUN}
        self._results = {**settings, "bytes": 0, "pieces": {}, "costs": {}}
        if self._file.exists() and not options.fresh:
            earlier = json.loads(self._file.read_text())
            changed = [name for name, value in settings.items() if earlier.get(name) != json.loads(json.dumps(value))]
            if changed:
                raise SystemExit(f"{self._file} was measured with another {', '.join(changed)}: --fresh starts again")
            self._results = earlier

    def pieces(self) -> dict[str, Callable[[], None]]:
        """Every piece by name."""
        pieces: dict[str, Callable[[], None]] = {f"cost {what}": self._cost(what) for what in COSTS}
        if self._options.small:
            pieces["small"] = self._comparison("small", OURS, self._options.small, turns=1, limits=False)
        pieces["limits"] = self._comparison("limits", OURS[:1], self._options.size)
        pieces[TRAINING_PIECE] = self._comparison(TRAINING_PIECE, list(TRAINING), self._options.size)
        pieces[LOOP] = self._loops()
        for name, tool in TOOLS.items():
            if name not in OURS:
                together = [name, *([tool.saved_by] if tool.saved_by else []), *tool.compared_with]
                pieces[name] = self._comparison(name, together, self._options.size)
        for name in rank_pieces() if self._options.ranks else ():
            pieces[name] = self._ranks(name)
        return pieces

    def measure(self) -> None:
        """Measures the wanted pieces, or those that are not there yet, as long as there is time."""
        started = time.monotonic()
        pieces = self.pieces()
        names = self._options.pieces or [name for name in pieces if name not in self._done()]
        longest = 0.0
        for number, name in enumerate(names):
            began = time.monotonic()
            if self._options.minutes and began - started + longest > 60 * self._options.minutes:
                print(f"{len(names) - number} pieces are left: {', '.join(names[number:])}; run this again")
                break
            print(f"{name} ({number + 1} of {len(names)})", flush=True)
            pieces[name]()
            longest = max(longest, time.monotonic() - began)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._results["left"] = [name for name in pieces if name not in self._done()]
        self._write()
        print(f"wrote {self._file} after {(time.monotonic() - started) / 60:.1f} minutes")

    def _done(self) -> set[str]:
        return {*self._results["pieces"], *(f"cost {what}" for what in self._results["costs"])}

    def _comparison(self, name: str, tools: list[str], size: int, *, turns: int = 0, limits: bool = True) -> Callable[[], None]:
        def measure_piece() -> None:
            began = time.monotonic()
            piece = Piece(name, tools, self._folder / "piece", self._options.raw if limits else None, self._options.loads)
            for number in range(turns or self._options.turns):
                piece.turn(number, size)
            measured = [sample["bytes"] for sample in piece.samples if "bytes" in sample and size == self._options.size]
            measured = [] if name == TRAINING_PIECE else measured
            self._results["bytes"] = max([self._results["bytes"], *measured])
            self._results["pieces"][name] = {"minutes": (time.monotonic() - began) / 60, "samples": piece.samples}
            self._write()

        return measure_piece

    def _loops(self) -> Callable[[], None]:
        """Measures a training loop with each way to save, one after the other, in each turn in another order."""

        def measure_loops() -> None:
            began, samples = time.monotonic(), []
            ways = list(WAYS)
            for number in range(self._options.turns):
                for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
                    arguments = [way, str(self._folder / LOOP), str(self._options.size // 4)]
                    result = run_worker(
                        [sys.executable, str(HERE / "loop.py"), *arguments, *(["--check"] if number == 0 else [])]
                    )
                    samples.append({"piece": LOOP, "turn": number, "tool": way, "operation": LOOP} | result)
                    print(f"  {way:45} {result.get('failed') or format(result['wall'], '8.3f') + ' s'}", flush=True)
            self._results["pieces"][LOOP] = {"minutes": (time.monotonic() - began) / 60, "samples": samples}
            self._write()

        return measure_loops

    def _ranks(self, name: str) -> Callable[[], None]:
        """Measures ranks of one job that save and load one model together."""

        def measure_ranks() -> None:
            began = time.monotonic()
            tools, loads = rank_pieces()[name]
            piece = RanksPiece(name, tools, loads, self._folder / "ranks", self._options.raw)
            for number in range(self._options.turns):
                piece.turn(number, self._options.ranks)
            self._results["pieces"][name] = {"minutes": (time.monotonic() - began) / 60, "samples": piece.samples}
            self._write()

        return measure_ranks

    def _cost(self, what: str) -> Callable[[], None]:
        def measure_cost() -> None:
            script, *arguments = COSTS[what]
            values = {"FOLDER": str(self._folder / "costs"), "SIZE": str(self._options.size)}
            command = [sys.executable, str(HERE / script), *(values.get(argument, argument) for argument in arguments)]
            self._results["costs"][what] = run_worker(command)
            self._write()

        return measure_cost

    def _write(self) -> None:
        """Writes the results so far, so that an interrupted run keeps them."""
        temporary = self._file.with_suffix(".part")
        temporary.write_text(json.dumps(self._results, indent=1))
        temporary.replace(self._file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_size, default=_size("2GB"), help="bytes of the model (default 2GB)")
    parser.add_argument("--small", type=_size, default=_size("500MB"), help="a second size, for extra memory; 0 for none")
    parser.add_argument("--ranks", type=_size, default=_size("1GB"), help="bytes of the model of four ranks; 0 for none")
    parser.add_argument(
        "--turns", type=int, default=3, help="how often each comparison is measured; with less than 3 none counts"
    )
    parser.add_argument("--minutes", type=float, default=0, help="stop before a piece that would take longer than this in all")
    parser.add_argument(
        "--pieces",
        nargs="*",
        help="only these, even if they were measured before: 'cost many', small, limits, training, loop, ranks, rivals",
    )
    parser.add_argument("--loads", nargs="*", help="only these ways to load, for example: into")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--raw", type=Path, required=True, help="the compiled raw.c")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    run = Run(options)
    unknown = [name for name in options.pieces or () if name not in run.pieces()]
    if unknown:
        parser.error(f"no piece {unknown[0]!r}; there are: {', '.join(run.pieces())}")
    run.measure()


def _size(text: str) -> int:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if text.upper().endswith(unit):
            return int(float(text[:-2]) * factor)
    return int(text)


if __name__ == "__main__":
    main()
