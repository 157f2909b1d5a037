"""Writes tables of Markdown, and the figures in them."""

from __future__ import annotations

from collections.abc import Iterable

from results import Sample, median_of


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wall(samples: list[Sample], key: str) -> str:
    """The median in seconds, with the best in brackets."""
    least, middle = min(sample[key] for sample in samples), median_of(samples, key)
    return f"{middle:.2f} (min {least:.2f})" if middle >= 0.01 else f"{middle:.4f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def mb(count: float) -> str:
    return f"{count / 1e6:.0f}"
