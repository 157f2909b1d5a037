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


@pytest.mark.parametrize("fullgraph", [False, True])
def test_in_a_compiled_function(tmp_path: Path, fullgraph: bool) -> None:
    """Catches verbs that torch's compiler traces: errors of its numpy or its tracer, or values that are not those of the file.

    Where the caller allows no break of the graph, the compiler's own error names the verb.
    """
    model = nn.Linear(2, 2)
    path = tmp_path / "ckpt"
    shardsave.save(model, path, architecture=True, program=((torch.ones(1, 2),), {}), durable=False)
    opened = shardsave.open(path)
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: shardsave.save(model, path, architecture=True, program=((torch.ones(1, 2),), {}), durable=False),
        "load": lambda: shardsave.load(path)["weight"],
        "load_model": lambda: shardsave.load_model(model, path),
        "build_model": lambda: shardsave.build_model(path).weight,
        "load_program": lambda: shardsave.load_program(path),
        "convert": lambda: shardsave.convert(path, tmp_path / "new", durable=False),
        "diff": lambda: shardsave.diff(path, path),
        "open": lambda: shardsave.open(path)["weight"],
        "__getitem__": lambda: opened["weight"],
        "_part": lambda: opened.slice("weight")[:],
        "inspect": lambda: shardsave.inspect(path),
        "verify": lambda: shardsave.verify(path),
        "clean": lambda: shardsave.clean(path),
    }
    for name, call in calls.items():
        results: list[Any] = []
        torch._dynamo.reset()  # it would give up after eight functions

        def function(x: torch.Tensor, call: Callable[[], Any] = call, results: list[Any] = results) -> torch.Tensor:
            results.append(call())
            return x + 1

        compiled = torch.compile(function, backend="eager", fullgraph=fullgraph)
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name} .*since it was wrapped.*reads or writes files"):
                compiled(torch.ones(2))
            continue
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
        assert results and (not isinstance(results[0], torch.Tensor) or torch.equal(results[0], model.weight))
