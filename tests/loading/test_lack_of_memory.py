"""Loads of tensors that no memory can be allocated for; the address space is limited, as for an attack."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from shardsave._common.memory_errors import memory_for
from support import limited_memory

#: Elements of a tensor of 1 GB; the file is sparse.
ELEMENTS = 1 << 28


class OfMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.empty(ELEMENTS, device="meta"))
        self.register_buffer("y", torch.empty(ELEMENTS, device="meta"))


class LoadsItself(OfMeta):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        pass


VERBS: dict[str, Callable[[Path], object]] = {
    "load": shardsave.load,
    "load of the second": lambda path: shardsave.load(path, names=["y"]),
    "load_model": lambda path: shardsave.load_model(OfMeta(), path),
    "load_model through a routine": lambda path: shardsave.load_model(LoadsItself(), path),
    "mmap": lambda path: shardsave.load(path, mmap=True),
    "open": lambda path: shardsave.open(path)["x"],
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_memory_that_cannot_be_allocated(verb: Callable[[Path], object], tmp_path: Path) -> None:
    """Catches torch's own error, which names neither the tensor nor the file."""
    nbytes = 4 * ELEMENTS
    entries = {
        name: {"dtype": "F32", "shape": [ELEMENTS], "data_offsets": [n * nbytes, (n + 1) * nbytes]}
        for n, name in enumerate("xy")
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2 * nbytes)
    with (
        limited_memory(),
        pytest.raises(
            shardsave.ShardSaveError,
            match="^cannot load '[xy]': 1.1 GB of memory on .* were expected|^cannot read .*mmap: Cannot allocate",
        ),
    ):
        verb(path)


def test_other_errors_of_torch() -> None:
    """Catches an error that has nothing to do with memory and is called a lack of it; a device that is full is one."""
    with pytest.raises(RuntimeError, match="^something else$"), memory_for("x", 1, None):
        raise RuntimeError("something else")
    with pytest.raises(shardsave.ShardSaveError, match="1 B of memory on the device cuda:1 were expected"):
        with memory_for("x", 1, torch.device("cuda:1")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
