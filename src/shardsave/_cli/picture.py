"""Draws a picture of a checkpoint. The only module that imports matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from shardsave._common.words import count, human_bytes
from shardsave._printable import printable
from shardsave._storage.checkpoint import Checkpoint, Located

#: Freeze flag → colour. The colours differ in lightness, so they stay distinct in grey print and for colour-blind readers.
COLOURS: dict[bool | None, str] = {True: "#1d4e79", False: "#f5b54a", None: "#c9ced6"}
INK, EDGE = "#22272e", "#ffffff"
_INK_ON: dict[bool | None, str] = {True: "#ffffff", False: INK, None: INK}

#: The height of a row, and the greatest height of all rows together, in inches.
_ROW, _HIGHEST = 0.42, 30.0

#: The width of a letter of a tensor's name, in inches.
_LETTER = 0.075


def formats() -> Sequence[str]:
    """The file endings that can be written; without pgf, which needs LaTeX."""
    return sorted(FigureCanvasAgg.get_supported_filetypes().keys() - {"pgf"})


def draw(checkpoint: Checkpoint, width: float) -> Figure:
    """Draws shards as rows and tensors as rectangles to scale, in file order."""
    shards = checkpoint.shards
    flags = checkpoint.stored_flags or {}
    by_shard: dict[str, list[Located]] = {shard: [] for shard in shards}
    places = (place for tensor in checkpoint.tensors.values() for place in tensor.places)
    for place in sorted(places, key=lambda place: place.offset):
        by_shard[place.shard].append(place)
    height = min(max(len(shards), 1) * _ROW, _HIGHEST)
    row = height / max(len(shards), 1)
    longest = max((sum(t.nbytes for t in tensors) for tensors in by_shard.values()), default=0) or 1
    names_width = max((min(len(shard), 48) for shard in shards), default=0) * 0.068 + 0.3
    figure = Figure(figsize=(width, height + 1.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((names_width / width, 0.55 / (height + 1.5), 0.98 - names_width / width, height / (height + 1.5)))
    _rectangles(axes, by_shard, flags, bytes_per_inch=longest / (width * 0.98 - names_width), lines=row > 0.15)
    axes.set_xlim(0, longest)
    axes.set_ylim(len(shards), 0)
    step = max(1, round(0.16 / row))  # if not all names fit, every n-th one is shown
    axes.set_yticks([place + 0.5 for place in range(0, len(shards), step)], [_short(shard, 48) for shard in shards[::step]])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0, labelsize=8, labelfontfamily="monospace")
    axes.tick_params(axis="x", labelsize=8, color="#b0b7c3")
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b0b7c3")
    _explain(figure, checkpoint, height)
    return figure


def _rectangles(
    axes: Axes, by_shard: dict[str, list[Located]], flags: Mapping[str, bool], bytes_per_inch: float, lines: bool
) -> None:
    corners, colours = [], []
    for place, tensors in enumerate(by_shard.values()):
        begin = 0
        for tensor in tensors:
            end, frozen = begin + tensor.nbytes, flags.get(tensor.name)
            corners.append([(begin, place + 0.08), (end, place + 0.08), (end, place + 0.92), (begin, place + 0.92)])
            colours.append(COLOURS[frozen])
            room = int(tensor.nbytes / bytes_per_inch / _LETTER) - 1
            if lines and room >= 6:
                text = _label(tensor.name, room)
                middle, ink = (begin + end) / 2, _INK_ON[frozen]
                axes.text(middle, place + 0.5, text, color=ink, fontsize=7, ha="center", va="center", parse_math=False)
            begin = end
    # A rectangle thinner than its white edge would not be visible, so it gets an edge of its own colour.
    wide = [EDGE if lines and (c[1][0] - c[0][0]) / bytes_per_inch > 0.03 else colour for c, colour in zip(corners, colours)]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=wide, linewidths=0.4))


def _label(name: str, room: int) -> str:
    """The end of a name, at most ``room`` letters; it begins after a dot if possible."""
    name = printable(name)
    if len(name) <= room:
        return name
    end = name[-(room - 1) :]
    return "…" + (end[end.index(".") + 1 :] if "." in end[: len(end) // 2] else end)


def _short(name: str, room: int) -> str:
    name = printable(name)
    return name if len(name) <= room else f"{name[: room // 2]}…{name[-(room // 2 - 1) :]}"


def _explain(figure: Figure, checkpoint: Checkpoint, height: float) -> None:
    flags, sizes = checkpoint.stored_flags, dict.fromkeys(COLOURS, 0)
    for tensor in checkpoint.tensors.values():
        sizes[(flags or {}).get(tensor.name)] += tensor.nbytes
    total = sum(sizes.values())
    title = f"{os.path.basename(os.path.normpath(checkpoint.path))}: {human_bytes(total)}, "
    title += f"{count(len(checkpoint.tensors), 'tensor')} in {count(len(checkpoint.shards), 'shard')}"
    figure.text(
        0.01, 1 - 0.3 / (height + 1.5), _short(title, 110), fontsize=12, weight="bold", color=INK, va="center", parse_math=False
    )
    names = {True: "frozen", False: "trainable", None: "no parameter" if flags is not None else "freeze flags unknown"}
    handles = [
        Patch(color=COLOURS[kind], label=f"{names[kind]}, {human_bytes(size)} ({size / total:.0%})")
        for kind, size in sizes.items()
        if size
    ]
    if handles:
        top = 1 - 0.46 / (height + 1.5)
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.004, top), ncols=3, frameon=False, fontsize=9)


def write(figure: Figure, path: str) -> None:
    """Writes the picture. Raises OSError."""
    figure.savefig(path, facecolor="white", metadata={"Software": None} if path.lower().endswith(".png") else None)
