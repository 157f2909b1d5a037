"""What the benchmark needs to know of a tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Tool:
    """``save(model, directory)``; ``loads``: a name that begins with ``into`` is called with (model, directory) and fills the
    model, one that begins with ``new`` with (directory) and gives a mapping of names to tensors.

    ``ready`` imports what the tool needs. ``packages`` are those whose versions the report names. The words say what a loss
    of power or a crash in the middle of an overwrite does (``durable``, ``atomic``) and who finds a flipped bit (``checked``),
    as the tool's sources have it. ``mapped``: ways to load that give mapped tensors, and so come back before the data is
    read; ``through_map``: those that read by way of a map, whose pages count as the process's though they are the cache's.
    """

    name: str
    packages: tuple[str, ...]
    ready: Callable[[], object]
    save: Callable[[nn.Module, Path], object] | None
    loads: Mapping[str, Callable[..., Any]]
    durable: bool
    atomic: str
    checked: str
    mapped: frozenset[str] = frozenset()
    through_map: frozenset[str] = frozenset()
    saved_by: str = ""  # the tool whose files this one loads, when it cannot save
