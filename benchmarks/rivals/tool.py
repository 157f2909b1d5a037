"""What the benchmark needs to know about a tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Tool:
    """A tool, and how the benchmark calls it.

    ``ready()`` imports what the tool needs. ``save(model, directory)`` saves. ``loads``: each way to load → its function. A way that
    begins with ``into`` is called with (model, directory) and fills the model. A way that begins with ``new`` is called with (directory)
    and returns a mapping from names to tensors.

    ``packages``: the packages whose versions the report lists. ``durable``: whether a finished save survives a loss of power.
    ``atomic``: whether a crash during an overwrite leaves the old files intact. ``checked``: who finds a flipped bit. These three are
    read from the tool's sources. ``mapped``: the ways to load that return mapped tensors, and so return before the data is read.
    ``through_map``: the ways that read through a mapping; its pages count as memory of the process, but belong to the page cache.
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
    saved_by: str = ""  # the tool whose files this one loads, if it cannot save
    compared_with: tuple[str, ...] = ("shardsave",)  # the tools of ours that are measured in turns with this one
    finish: Callable[[Any], object] = lambda result: None  # waits for what a save, which returned ``result``, does afterwards
