"""Tensors of a module that are views of one another with other dtypes, or that begin within an element of one another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from support import same_bits


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "floats": base,
        "integers": base.view(torch.int32),
        "transposed": base.t().view(torch.int32),
        "bytes": base.view(torch.uint8),
        "halves": base.view(torch.float16)[:, 1:5],
        "within": base.view(torch.uint8).reshape(-1)[5:14].view(3, 3),
        "column": base[:, 1],
    }


def module(seed: int, chosen: list[str]) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Module()
    all_views = views(torch.randn(4, 6))
    for name in chosen:
        made.register_buffer(name, all_views[name])
    return made


@pytest.mark.parametrize("seed", range(12))
def test_views_of_other_dtypes(tmp_path: Path, seed: int) -> None:
    """Catches a module that was saved and cannot be loaded, because one tensor has the bytes of another under another dtype."""
    chosen = random.Random(seed).sample(list(views(torch.zeros(4, 6))), 3)
    source, target = module(seed, chosen), module(seed + 100, chosen)
    shardsave.save(source, tmp_path / "x", durable=False)
    shardsave.load_model(target, tmp_path / "x")
    for name, tensor in source.state_dict().items():
        assert same_bits(tensor, target.state_dict()[name]), name


def test_bytes_that_differ(tmp_path: Path) -> None:
    """Catches values that the second of two such tensors overwrites without a word."""
    source = {name: tensor.clone() for name, tensor in views(torch.randn(4, 6)).items()}
    source["bytes"][3, 23] += 1
    shardsave.save({name: source[name] for name in ("floats", "bytes")}, tmp_path / "x", durable=False)
    target = module(1, ["floats", "bytes"])
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(
        shardsave.UnsupportedTensorError, match="it shares a part of it with '(floats|bytes)' and not the values on disk"
    ):
        shardsave.load_model(target, tmp_path / "x")
    assert all(same_bits(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_cast_is_refused(tmp_path: Path) -> None:
    """Catches bytes of the file that are compared although the load changes them."""
    source = {name: tensor.clone() for name, tensor in views(torch.randn(4, 6)).items() if name in ("floats", "bytes")}
    shardsave.save({**source, "floats": source["floats"].double()}, tmp_path / "x", durable=False)
    with pytest.raises(shardsave.ShardSaveError):
        shardsave.load_model(module(1, ["floats", "bytes"]), tmp_path / "x")
