"""Looks up the saves of the training loops; computes medians over all saves, and ratios within each turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from results import Results, Sample
from rivals.background import WAYS

Figure = Callable[[Sample], float]


class LoopResults:
    """The training loops of a run: for each way, one process in each turn, with several saves."""

    def __init__(self, results: Results) -> None:
        self.loops: dict[str, list[Sample]] = {
            way: [sample for sample in results.samples if sample["tool"] == way and "failed" not in sample] for way in WAYS
        }
        self.failures: dict[str, str] = {
            sample["tool"]: sample["failed"]
            for sample in results.samples
            if "failed" in sample and not self.loops[sample["tool"]]
        }

    def measured(self) -> bool:
        return any(self.loops.values())

    def nbytes(self) -> int:
        """The bytes of one save."""
        return max(loop["bytes"] for loops in self.loops.values() for loop in loops)

    def later(self, way: str) -> list[Sample]:
        """The saves after the first one of their process."""
        return [save for loop in self.loops[way] for save in loop["saves"][1:]]

    def first(self, way: str) -> list[Sample]:
        return [loop["saves"][0] for loop in self.loops[way]]

    def typical(self, way: str) -> Sample:
        """The later save in the middle, by the training that it cost."""
        saves = sorted(self.later(way), key=lambda save: save["lost"])
        return saves[len(saves) // 2]

    def ratios(self, above: str, below: str, key: str) -> list[float]:
        """For each turn with both ways: the median of ``key`` of the later saves, ``above`` relative to ``below``.

        Where ``below`` has no positive value, which only noise can bring about, no ratio can be small: infinity.
        """
        divisors = {loop["turn"]: _median(loop["saves"][1:], key) for loop in self.loops[below]}
        pairs = [
            (_median(loop["saves"][1:], key), divisors[loop["turn"]]) for loop in self.loops[above] if loop["turn"] in divisors
        ]
        return [value / divisor if divisor > 0 else math.inf for value, divisor in pairs]


def _median(saves: list[Sample], key: str) -> float:
    return median(save[key] for save in saves)
