"""Wrappers in any order, around a module and inside it: what `save` accepts, `load_model` loads, with the same wrappers and without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

import shardsave
from support import same_bits, same_state

accelerate = pytest.importorskip("accelerate")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Counts(nn.Linear):
    """Loads itself, and has extra state that is a tensor."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.calls = torch.randint(100, (2,))

    def get_extra_state(self) -> torch.Tensor:
        return self.calls

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.calls = state


def beside(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), module, nn.BatchNorm1d(2))


def under_a_wrapper_s_name(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"module": module, "0": nn.Linear(2, 2)})


#: Around a module; each but `beside` and `under_a_wrapper_s_name` computes what the module computes.
LAYERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": torch.compile,
    "parallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "average": AveragedModel,
    "accelerate": accelerate.cpu_offload,
    "beside": beside,
    "named": under_a_wrapper_s_name,
}
WITHOUT_NAMES = {"compile", "parallel", "checkpoint", "offload", "accelerate"}


def nested(layers: list[str], seed: int, kind: type[nn.Linear]) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = kind(2, 3)
    for layer in layers:
        model = LAYERS[layer](model)
        for parameter in model.parameters():
            parameter.requires_grad_(bool(torch.rand(()) < 0.5))
    return model


def possible(layers: list[str]) -> bool:
    """torch.compile refuses to wrap its own result; accelerate offloads a model once, and cannot run one with checkpoints inside."""
    once = layers.count("compile") < 2 and layers.count("accelerate") < 2
    inside = layers[: layers.index("accelerate")] if "accelerate" in layers else []
    return once and not {"checkpoint", "offload"} & set(inside)


def values(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    shardsave.save(model, folder, durable=False)
    return shardsave.load(folder)


NESTINGS = st.lists(st.sampled_from(sorted(LAYERS)), max_size=5).filter(possible)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=NESTINGS, kind=st.sampled_from([nn.Linear, Counts]))
@example(layers=["compile", "checkpoint", "beside"], kind=nn.Linear)
@example(layers=["parallel", "checkpoint", "compile"], kind=Counts)
@example(layers=["average", "average", "parallel"], kind=nn.Linear)
@example(layers=["accelerate", "checkpoint", "average"], kind=nn.Linear)
def test_any_nesting(memory: Path, layers: list[str], kind: type[nn.Linear]) -> None:
    """Catches a nesting of wrappers that saves and does not load into itself, or into a module without the wrappers; a name of a wrapper
    on disk; a flag that is lost; and a state dict of it that the same nesting does not accept."""
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        source = nested(layers, 0, kind)
        saved = values(source, folder / "saved")
        bare = nested([layer for layer in layers if layer not in WITHOUT_NAMES], 1, kind)
        assert set(saved) == {name for name in bare.state_dict()}
        targets = [nested(layers, 1, kind), bare]
        for target in targets:
            shardsave.load_model(target, folder / "saved")
            loaded = values(target, folder / "loaded")
            assert loaded.keys() == saved.keys() and all(same_bits(loaded[name], saved[name]) for name in saved)
            assert shardsave.inspect(folder / "loaded").frozen == shardsave.inspect(folder / "saved").frozen
        if "accelerate" not in layers:
            shardsave.save(source.state_dict(keep_vars=True), folder / "state dict", durable=False)
            shardsave.load_model(target := nested(layers, 2, kind), folder / "state dict")
            loaded = values(target, folder / "again")
            assert all(same_bits(loaded[name], saved[name]) for name in saved)
            assert shardsave.inspect(folder / "again").frozen == shardsave.inspect(folder / "saved").frozen


def test_names_that_fit_as_they_are(tmp_path: Path) -> None:
    """Catches names that are taken for a wrapper's although the module has them itself, or two names that become one."""
    source = nn.DataParallel(under_a_wrapper_s_name(nn.Linear(2, 2)))
    shardsave.save(source, tmp_path)
    assert shardsave.inspect(tmp_path).names == ("module.weight", "module.bias", "0.weight", "0.bias")
    shardsave.save({"module.weight": torch.zeros(2, 2), "weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path)
    report = shardsave.load_model(model := nn.DataParallel(nn.Linear(2, 2)), tmp_path, strict=False)
    assert report.unexpected == ("module.weight",) and same_bits(model.module.weight.data, torch.ones(2, 2))


def test_hooks_on_a_wrapper(tmp_path: Path) -> None:
    """Catches a load hook of the user on a wrapper that is not run because only the wrapper's own is known."""
    shardsave.save(nn.Linear(2, 2), tmp_path)
    model, calls = checkpoint_wrapper(nn.Linear(2, 2)), []
    model.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    shardsave.load_model(model, tmp_path)
    assert calls


@pytest.mark.parametrize("layers", [["checkpoint"], ["checkpoint", "beside"], ["compile", "offload", "parallel", "beside"]])
def test_architectures(tmp_path: Path, layers: list[str]) -> None:
    """Catches a wrapper in an architecture: a build would ask for trust in torch's private classes."""
    source = nested(layers, 0, nn.Linear)
    shardsave.save(source, tmp_path, architecture=True)
    model = shardsave.build_model(tmp_path)
    assert {type(part) for part in model.modules()} <= {nn.Linear, nn.Sequential, nn.BatchNorm1d}
    bare = nested([layer for layer in layers if layer not in WITHOUT_NAMES], 1, nn.Linear)
    shardsave.load_model(bare, tmp_path)
    assert same_state(model, bare)
