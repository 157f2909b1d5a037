"""Calls where torch's operators are replaced: in FakeTensorMode, in transforms of torch.func, and in traces."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import shardsave


def within(transform: str, action: Any) -> None:
    """Calls ``action`` where torch's operators are replaced."""

    def function(x: torch.Tensor) -> torch.Tensor:
        action()
        return x.sum()

    if transform == "FakeTensorMode":
        with FakeTensorMode(allow_non_fake_inputs=True):
            action()
    elif transform == "make_fx":
        make_fx(function)(torch.ones(2))
    elif transform == "jvp":
        torch.func.jvp(function, (torch.ones(3),), (torch.ones(3),))
    elif transform == "trace":
        torch.jit.trace(function, torch.ones(2), check_trace=False)
    else:
        getattr(torch.func, transform)(function)(torch.ones(2, 2) if transform == "vmap" else torch.ones(2))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ["FakeTensorMode", "vmap", "grad", "functionalize", "jvp", "trace", "make_fx"])
def test_where_operators_are_replaced(tmp_path: Path, transform: str) -> None:
    """Catches an error of torch, a crash, or a checkpoint of tensors that have no memory."""
    model = nn.Linear(2, 2)
    shardsave.save(model, tmp_path / "ckpt", architecture=True, program=((torch.ones(1, 2),), {}), durable=False)
    files = sorted(os.listdir(tmp_path / "ckpt"))
    opened = shardsave.open(tmp_path / "ckpt")
    calls: list[Callable[[], Any]] = [
        lambda: shardsave.save(model, tmp_path / "ckpt"),
        lambda: shardsave.save({"x": torch.ones(2)}, tmp_path / "ckpt"),
        lambda: shardsave.load(tmp_path / "ckpt"),
        lambda: shardsave.load(tmp_path / "ckpt", mmap=True),
        lambda: shardsave.load_model(model, tmp_path / "ckpt"),
        lambda: shardsave.build_model(tmp_path / "ckpt"),
        lambda: shardsave.load_program(tmp_path / "ckpt"),
        lambda: shardsave.convert(tmp_path / "ckpt", tmp_path / "new"),
        lambda: shardsave.diff(tmp_path / "ckpt", tmp_path / "ckpt"),
        lambda: opened["weight"],
        lambda: opened.slice("weight")[0],
    ]
    refused = []

    def call_all() -> None:
        for call in calls:
            with pytest.raises(
                shardsave.UnsupportedTensorError, match="torch's own operators were expected, .* call it outside; "
            ):
                call()
            refused.append(call)

    within(transform, call_all)
    assert len(refused) >= len(calls) and sorted(os.listdir(tmp_path / "ckpt")) == files and not (tmp_path / "new").exists()
    with FlopCounterMode(display=False):  # a mode that only counts operators is no reason to refuse
        assert torch.equal(shardsave.load(tmp_path / "ckpt")["weight"], model.weight.detach())


def test_messages_name_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message with a relative path, which means nothing in a log of another directory."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    calls: list[Callable[[], Any]] = [
        lambda: shardsave.save(model, "ckpt"),
        lambda: shardsave.load("ckpt"),
        lambda: shardsave.load_model(model, "ckpt"),
        lambda: shardsave.build_model("ckpt"),
        lambda: shardsave.load_program("ckpt"),
        lambda: shardsave.convert("ckpt", "new"),
        lambda: shardsave.diff("ckpt", "ckpt"),
    ]
    for call in calls:
        with (
            FakeTensorMode(),
            pytest.raises(shardsave.UnsupportedTensorError, match=f" {tmp_path}/ckpt: torch's own operators"),
        ):
            call()
        with pytest.raises(shardsave.ShardSaveError, match=f" {tmp_path}/ckpt: ") if call is not calls[0] else nullcontext():
            call()
        shutil.rmtree("ckpt", ignore_errors=True)
