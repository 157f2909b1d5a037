"""Draws the steps of each training loop along the time, before, during and after a save."""

from __future__ import annotations

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loop_results import LoopResults
from results import Sample
from rivals.background import NO_SAVE
from style import INK, OTHER, OTHER_LIGHT, OURS, OURS_LIGHT
from style import LIMIT as STALL

HEIGHT = 0.44  # of a row's steps


def draw(loops: LoopResults, title: str) -> None:
    """Draws a row for each way: its typical later save. Time is counted from the call."""
    ways = [way for way in loops.loops if loops.later(way)]
    saves = [loops.typical(way) for way in ways]
    durable = [loops.loops[way][0]["durable"] for way in ways]
    right = max(save["finished"] for save in saves) * 1.04
    _, axes = plt.subplots(figsize=(13, 0.72 * len(ways) + 1.7))
    for place, (way, save, safe) in enumerate(zip(ways, saves, durable)):
        _row(axes, len(ways) - 1 - place, way, save, safe, right)
    axes.set_yticks(range(len(ways)), ways[::-1])
    for tick in axes.get_yticklabels():
        tick.set_weight("bold" if tick.get_text().startswith("shardsave") else "normal")
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(min(save["before"][0][0] for save in saves), right)
    axes.set_ylim(-0.75, len(ways) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds since the call; a bar is a step of the training")
    axes.set_title(title, loc="left", weight="bold", fontsize=13, pad=34)
    _legend(axes)


def _row(axes: Axes, place: int, way: str, save: Sample, durable: bool, right: float) -> None:
    ours = way.startswith("shardsave")
    for began, ended in [*save["before"], *save["steps"]]:
        beside = way != NO_SAVE and 0 <= began < save["finished"]
        colour = (OURS if ours else OTHER) if beside else (OURS_LIGHT if ours else OTHER_LIGHT)
        if began < right:
            axes.barh(place, ended - began, left=began, height=HEIGHT, color=colour, edgecolor="white", linewidth=0.7)
    if way == NO_SAVE:
        return
    axes.barh(place, save["stall"], left=0, height=HEIGHT, color=STALL)
    line = place - HEIGHT / 2 - 0.1
    axes.plot([save["stall"], save["staged"]], [line, line], color=STALL, linewidth=2.5, solid_capstyle="butt")
    axes.plot([save["staged"], save["finished"]], [line, line], color=INK, linewidth=1)
    axes.plot(save["finished"], line, marker="D", markersize=5, color=INK, markerfacecolor=INK if durable else "white")
    end = "durable" if durable else "finished"
    text = f"  stall {_ms(save['stall'])}, {_ms(save['lost'])} of training lost, {end} after {save['finished']:.2f} s"
    axes.text(0, place + HEIGHT / 2 + 0.05, text, fontsize=8, va="bottom", color=INK)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _legend(axes: Axes) -> None:
    diamond = {"marker": "D", "markersize": 5, "color": INK, "linewidth": 1}
    axes.legend(
        handles=[
            Patch(color=STALL, label="the call stops the training"),
            Line2D([], [], color=STALL, linewidth=2.5, label="bytes still leave the training's memory"),
            Line2D([], [], **diamond, label="until it is durable"),
            Line2D([], [], **diamond, markerfacecolor="white", label="until it is finished; not durable"),
            Patch(color=OTHER, label="a step beside the save"),
            Patch(color=OTHER_LIGHT, label="another step"),
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=6,
        fontsize=8,
        frameon=False,
    )
