"""The text and the table about saves from a training loop."""

from __future__ import annotations

import textwrap
from statistics import median

from loop_results import LoopResults
from results import Sample
from rivals.background import NO_SAVE
from tables import table


def loops_text(loops: LoopResults) -> str:
    saves = [save for way in loops.loops for save in loops.later(way)]
    tensors = max(loop["tensors"] for measured in loops.loops.values() for loop in measured)
    shortest, longest = _quantiles(saves, "step")
    copies = [save["memcpy"] for save in saves]
    sentences = [
        "A transformer in float32 trains on one core with a fused AdamW;",
        f"both together have {loops.nbytes() / 1e6:.0f} MB in {tensors} tensors.",
        f"A step without a save takes {shortest * 1e3:.0f} to {longest * 1e3:.0f} ms,",
        f"and copying all tensors in memory {median(copies) * 1e3:.0f} ms.",
        "Figures are medians of all saves but the first of each process; those of the first saves are in brackets.",
        f"The row *{NO_SAVE}* shows how far two measurements of the same steps differ.",
    ]
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def _quantiles(saves: list[Sample], key: str) -> tuple[float, float]:
    values = sorted(save[key] for save in saves)
    return values[len(values) // 10], values[-1 - len(values) // 10]


def loops_table(loops: LoopResults) -> str:
    rows = []
    for way, measured in loops.loops.items():
        if not measured:
            if reason := loops.failures.get(way):
                rows.append([way, f"failed: {reason}", *[""] * 7])
            continue
        later, first = loops.later(way), loops.first(way)
        durable = measured[0]["durable"]
        rows.append(
            [
                way,
                _milliseconds(later, first, "stall"),
                _milliseconds(later, first, "lost"),
                _milliseconds(later, [], "worst_step"),
                "" if way == NO_SAVE else _seconds(later, first, "finished") + " not durable" * (not durable),
                f"{_middle(later, 'cpu_call'):.2f}",
                f"{_middle(later, 'cpu_background'):.2f}",
                _megabytes(later, first, "peak_extra"),
                measured[0]["keeps"],
            ]
        )
    head = ["way to save", "stall, ms", "training lost, ms", "longest step, ms", "until durable, s", "processor in the call, s"]
    return table([*head, "processor in the background, s", "extra memory, MB", "of it kept"], rows)


def _middle(saves: list[Sample], key: str) -> float:
    if key == "worst_step":
        return median(max(ended - began for began, ended in save["steps"]) for save in saves)
    return median(save[key] for save in saves)


def _milliseconds(later: list[Sample], first: list[Sample], key: str) -> str:
    value = _middle(later, key) * 1e3
    text = f"{value:.1f}" if 0 <= value < 10 else f"{value:.0f}"
    return text + (f" ({_middle(first, key) * 1e3:.0f})" if first else "")


def _seconds(later: list[Sample], first: list[Sample], key: str) -> str:
    return f"{_middle(later, key):.2f} ({_middle(first, key):.2f})"


def _megabytes(later: list[Sample], first: list[Sample], key: str) -> str:
    return f"{_middle(later, key) / 1e6:.0f} ({_middle(first, key) / 1e6:.0f})"
