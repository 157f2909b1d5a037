"""The files with which the fuzzers begin: written by shardsave and by safetensors, and the attack corpus."""

from __future__ import annotations

import sys
import tempfile
from math import nan
from pathlib import Path

import safetensors.numpy
import torch
from torch import nn

import shardsave
from shardsave._format.dtypes import BY_TORCH, DType
from shardsave._format.index import Moment

sys.path.append(str(Path(__file__).resolve().parent.parent / "attacks"))

from header_cases import HEADERS
from index_cases import INDEXES
from tampering import INDEX, LONE, Case, entry, foreign, saved, shard_bytes

from training_state import save_with_training

#: The largest seed in bytes; a larger one makes the fuzzer slower, and no better.
LARGEST = 20_000


def shards() -> list[bytes]:
    """Whole safetensors files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = {str(dtype): torch.zeros(16, dtype=torch.uint8).view(dtype) for dtype in BY_TORCH}
        shardsave.save(every, folder, durable=False)
        saved(folder / "saved")
        files = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
        files += _attacks(folder, HEADERS, LONE)
    files.append(safetensors.numpy.save({"x": torch.ones(2, 3).numpy(), "y": torch.ones(0).numpy()}, {"format": "np"}))
    packed = ",".join(f'"{row.name}":{entry(row.name, [2, 8], (at, at + 2 * row.bits))}' for row, at in _places())
    end = sum(2 * row.bits for row in BY_TORCH.values())
    files.append(shard_bytes("{" + packed + "}", bytes(end)))
    return files


def _places() -> list[tuple[DType, int]]:
    places, at = [], 0
    for row in BY_TORCH.values():
        places.append((row, at))
        at += 2 * row.bits
    return places


def indexes() -> list[bytes]:
    """Whole index files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved(folder / "saved")
        shared = nn.Parameter(torch.ones(2))
        state = {f"layers.{n}.weight": nn.Parameter(torch.ones(2), requires_grad=n > 2) for n in range(5)}
        shardsave.save(
            {**state, "tied": shared, "tie": shared, "buffer": torch.ones(1)}, folder / "flags", metadata={"é": [1.5, None]}
        )
        save_with_training(
            state, folder / "training", moment=Moment(3, 1.5, {"loss": 0.5, "gap": nan}, 2, "2026-11-30T05:40:00Z")
        )
        (folder / "foreign").mkdir()
        foreign(folder / "foreign")
        files = [path.read_bytes() for path in sorted(folder.rglob(INDEX))]
        return files + _attacks(folder, INDEXES, INDEX)


def _attacks(folder: Path, cases: list[Case], name: str) -> list[bytes]:
    files = []
    for number, case in enumerate(cases):
        place = folder / f"{name}-{number}"
        place.mkdir()
        case.make(place)
        if (place / name).stat().st_size <= LARGEST:
            files.append((place / name).read_bytes())
    return files
