"""Draws the pictures of RESULTS.md."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

import style
import timeline
from loop_results import LoopResults
from results import Results, extra_memory, median_of, ratio
from rivals import TOOLS
from style import LIMIT, OTHER, OTHER_LIGHT, OURS, OURS_LIGHT


def draw(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Draws all pictures but that of the training loops; returns the title and file of each."""
    style.begin()
    pictures = [
        ("Saving: wall time until the data is on disk", folder / "save.png", _saves),
        ("Loading into an existing model", folder / "load.png", _loads),
        ("Processor time and extra memory", folder / "cost.png", _costs),
    ]
    for title, path, picture in pictures:
        picture(results, title)
        style.write(path)
    return [(title, path) for title, path, _ in pictures]


def draw_loops(loops: LoopResults, folder: Path) -> tuple[str, Path]:
    """Draws the picture of the training loops; returns its title and file."""
    style.begin()
    title, path = "Training steps beside a save", folder / "loop.png"
    timeline.draw(loops, f"{title} of {loops.nbytes() / 1e6:.0f} MB")
    style.write(path)
    return title, path


def _bars(axes: Axes, rows: list[tuple[str, float, str]], xlabel: str, unit: str = " ×") -> None:
    """Draws a bar for each (label, value, remark), the shortest on top. Bars of shardsave have their own colour."""
    rows = sorted(rows, key=lambda row: -row[1])
    longest = max((value for _, value, _ in rows), default=1)
    for place, (label, value, remark) in enumerate(rows):
        ours = label.startswith("shardsave")
        axes.barh(place, value, height=0.66, color=OURS if ours else OTHER)
        number = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        text = axes.text(value + longest * 0.012, place, f"{number}{unit}", va="center", weight="bold" if ours else "normal")
        if remark:
            axes.annotate(f"  {remark}", (1, 0.5), xycoords=text, va="center", color=LIMIT, fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    for tick, (label, _, _) in zip(axes.get_yticklabels(), rows):
        tick.set_weight("bold" if label.startswith("shardsave") else "normal")
    axes.set_xlabel(xlabel)
    axes.set_xlim(0, longest * (1.5 if any(remark for _, _, remark in rows) else 1.2))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e9ee")
    axes.set_axisbelow(True)


def _limit_line(axes: Axes, name: str) -> None:
    axes.axvline(1, color=LIMIT, linestyle="--", linewidth=1.2)
    axes.text(1, axes.get_ylim()[1], f" {name}", color=LIMIT, fontsize=8, va="bottom", ha="left")


def _saves(results: Results, title: str) -> None:
    """Draws the call in full colour; behind it, in a lighter colour, the call with the fsync that a careful caller must add."""
    raw = results.limit("write")
    rows = []
    for name, tool in TOOLS.items():
        samples = results.of(name, "save")
        if samples and raw:
            rows.append((name, ratio(samples, raw, "wall") or 0, ratio(samples, raw, "wall_synced", "wall") or 0, tool))
    rows.sort(key=lambda row: -row[2])
    _, axes = plt.subplots(figsize=(10, 0.46 * len(rows) + 1.6))
    longest = max((row[2] for row in rows), default=1)
    for place, (name, call, synced, tool) in enumerate(rows):
        ours = name.startswith("shardsave")
        axes.barh(place, synced, height=0.66, color=OURS_LIGHT if ours else OTHER_LIGHT)
        axes.barh(place, call, height=0.66, color=OURS if ours else OTHER)
        text = axes.text(synced + longest * 0.012, place, f"{synced:.2f} ×", va="center", weight="bold" if ours else "normal")
        marks = [] if tool.durable else ["not durable by itself"]
        marks += [] if tool.atomic == "yes" else ["not atomic"]
        axes.annotate(f"  {', '.join(marks)}", (1, 0.5), xycoords=text, va="center", color=LIMIT, fontsize=8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_weight("bold" if row[0].startswith("shardsave") else "normal")
    axes.set_xlabel(f"wall time, relative to a raw O_DIRECT write ({median_of(raw, 'wall'):.2f} s)" if raw else "wall time")
    axes.set_xlim(0, longest * 1.35)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e9ee")
    axes.set_axisbelow(True)
    axes.legend(
        handles=[Patch(color=OTHER, label="the call"), Patch(color=OTHER_LIGHT, label="fsync added, until all is on disk")],
        loc="upper right",
        frameon=False,
    )
    _limit_line(axes, "raw write")
    axes.set_title(f"{title}, {results.nbytes / 1e9:.1f} GB", loc="left", weight="bold", fontsize=13, pad=22)


def _loads(results: Results, title: str) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.2))
    for axes, cache, limit, name in ((panels[0], "cold", "read", "raw direct read"), (panels[1], "warm", "memcpy", "memcpy")):
        raw = results.limit(limit)
        rows = []
        for tool in TOOLS.values():
            for way in tool.loads:
                value = ratio(results.of(tool.name, way, cache), raw, "wall")
                if way.startswith("into") and value is not None:
                    rows.append((tool.name + (", mmap" if "mapped" in way else ""), value, ""))
        seconds = f" ({median_of(raw, 'wall'):.2f} s)" if raw else ""
        _bars(axes, rows, f"{cache}: wall time, relative to {name}{seconds}")
        _limit_line(axes, name)
    figure.suptitle(f"{title}, {results.nbytes / 1e9:.1f} GB", x=0.02, ha="left", weight="bold", fontsize=13)
    figure.tight_layout()


def _costs(results: Results, title: str) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.6))
    saving = [(name, median_of(s, "cpu_synced"), "") for name in TOOLS if (s := results.of(name, "save"))]
    _bars(panels[0], saving, "save to disk: processor seconds", " s")
    loading = [(name, median_of(s, "cpu"), "") for name in TOOLS if (s := results.of(name, "into", "cold"))]
    _bars(panels[1], loading, "cold load into the model: processor seconds", " s")
    memory = [
        (name, max(map(extra_memory, samples)) / 1e6, "mapped file" if "into" in tool.through_map else "")
        for name, tool in TOOLS.items()
        if (samples := results.of(name, "into", "warm"))
    ]
    _bars(panels[2], memory, "load into the model: extra memory, MB", " MB")
    figure.suptitle(f"{title}, {results.nbytes / 1e9:.1f} GB", x=0.02, ha="left", weight="bold", fontsize=13)
    figure.tight_layout()
