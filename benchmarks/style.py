"""The colours and fonts of all pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

OURS, OURS_LIGHT, OTHER, OTHER_LIGHT, LIMIT, INK = "#0b6e4f", "#8cc5ae", "#7a869a", "#c6ccd6", "#c0392b", "#22272e"


def begin() -> None:
    """Sets the style of the pictures that are drawn from now on."""
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.edgecolor": "#b0b7c3",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "figure.dpi": 120,
        }
    )


def write(path: Path) -> None:
    """Writes the current picture to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close()
