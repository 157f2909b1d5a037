"""Looks up the results of a run by name; computes medians over all turns, and ratios within each turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Sample = dict[str, Any]

#: How many turns a comparison needs. One turn says little: the first use of new memory, for example, may take twice as long as in the next.
ENOUGH_TURNS = 3


#: The pieces with tables of their own: models with their optimizers, saves from a training loop, and all whose names begin with "ranks".
TRAINING, LOOP, RANKS = "training", "loop", "ranks"


class Results:
    """The content of ``results.json``: the pieces of the group ``only``, or all pieces but those with tables of their own."""

    def __init__(self, path: Path, *, only: str | None = None) -> None:
        self.all: dict[str, Any] = json.loads(path.read_text())
        pieces = [piece for name, piece in self.all["pieces"].items() if _group(name) == only]
        self.samples: list[Sample] = [sample for piece in pieces for sample in piece["samples"]]
        self.size: int = self.all.get("ranks", 0) if only == RANKS else self.all["size"]
        self.nbytes: int = self.all["bytes"]

    def of(self, tool: str, operation: str, cache: str | None = None, size: int | None = None) -> list[Sample]:
        """The samples that did not fail, one for each turn of each piece that the tool took part in."""
        key = (tool, operation, cache, size or self.size)
        return [
            sample
            for sample in self.samples
            if (sample["tool"], sample["operation"], sample.get("cache"), sample.get("size", self.size)) == key
            and "failed" not in sample
        ]

    def failure(self, tool: str, operation: str, cache: str | None = None) -> str:
        for sample in self.samples:
            if (sample["tool"], sample["operation"], sample.get("cache")) == (tool, operation, cache) and "failed" in sample:
                return str(sample["failed"])
        return ""

    def limit(self, operation: str) -> list[Sample]:
        """The samples of a limit with the number of threads that was fastest."""
        return min(self.limits(operation).values(), key=lambda samples: median_of(samples, "wall"), default=[])

    def limits(self, operation: str) -> dict[int, list[Sample]]:
        """The samples of a limit for each number of threads."""
        by_threads: dict[int, list[Sample]] = {}
        for sample in self.samples:
            if sample["tool"] == "limit" and sample["operation"] == operation and "failed" not in sample:
                by_threads.setdefault(sample["threads"], []).append(sample)
        return by_threads


def _group(piece: str) -> str | None:
    """Which of the pieces with tables of their own ``piece`` is; None if it has none."""
    return next((group for group in (TRAINING, LOOP, RANKS) if piece.split(",")[0] == group), None)


def median_of(samples: list[Sample], key: str) -> float:
    return median(sample[key] for sample in samples)


def ratios(above: list[Sample], below: list[Sample], key: str, key_below: str | None = None) -> list[float]:
    """The ratios of samples that were measured in the same turn."""
    divisors = {(sample["piece"], sample["turn"]): sample[key_below or key] for sample in below}
    pairs = [(sample[key], divisors.get((sample["piece"], sample["turn"]))) for sample in above]
    return [value / divisor for value, divisor in pairs if divisor]


def ratio(above: list[Sample], below: list[Sample], key: str, key_below: str | None = None) -> float | None:
    """The median of `ratios`; None if the two were never measured in the same turn."""
    values = ratios(above, below, key, key_below)
    return median(values) if values else None


def extra_memory(sample: Sample) -> int:
    """The peak extra memory, without the new tensors that a load creates."""
    return int(sample["peak_extra"] - sample.get("new_bytes", 0))


def largest(samples: list[Sample], of: Callable[[Sample], float]) -> float:
    return max((of(sample) for sample in samples), default=0)
