"""Sub-modules that load themselves: hooks, overridden routines, extra state, parametrizations."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_load_model import Doubling
from torch import nn
from torch.nn.utils import parametrizations

import shardsave
from support import same_bits, same_state


class Renaming(nn.Linear):
    """Has ``weight`` in memory and ``w`` on disk."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._register_state_dict_hook(
            lambda _self, state, prefix, _meta: state.update({prefix + "w": state.pop(prefix + "weight")})
        )
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: state.update({prefix + "weight": state.pop(prefix + "w")})
        )


def test_shared_sub_modules(tmp_path: Path) -> None:
    """Catches one module with two names that is stored twice, or a second name that bypasses its loading routine."""
    for kind, factor in ((nn.Linear, 1), (Doubling, 2)):
        shared = nn.Linear(3, 3)
        shardsave.save(nn.ModuleDict({"a": shared, "b": shared}), tmp_path)
        assert shardsave.inspect(tmp_path).ties == {"b.weight": "a.weight", "b.bias": "a.bias"}
        own = kind(3, 3)
        shardsave.load_model(nn.ModuleDict({"b": own, "a": own}), tmp_path)
        assert torch.equal(own.weight, shared.weight * factor) and torch.equal(own.bias, shared.bias)


def test_hooks_that_rename(tmp_path: Path) -> None:
    """Catches names that only hooks know and that are refused as unexpected, or whose flags are lost."""
    source = nn.Sequential(Renaming(3, 2), nn.Linear(2, 2))
    source[0].weight.requires_grad_(False)
    shardsave.save(source, tmp_path)
    assert shardsave.inspect(tmp_path).names == ("0.bias", "0.w", "1.weight", "1.bias")
    fresh = nn.Sequential(Renaming(3, 2), nn.Linear(2, 2))
    report = shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, source) and not fresh[0].weight.requires_grad and fresh[0].bias.requires_grad
    assert (report.tensors, report.frozen) == (4, 1)


class Renamed(nn.Module):
    """Has ``layer`` in place of ``old`` and ``parts`` in place of ``left`` and ``right``, and drops or hides what else it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.parts = nn.Parameter(torch.zeros(4))
        self.hidden = nn.Parameter(torch.zeros(2))
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}layer.{name}"] = state.pop(f"{prefix}old.{name}")
        state[f"{prefix}parts"] = torch.cat([state.pop(f"{prefix}left"), state.pop(f"{prefix}right")]).contiguous()
        state[f"{prefix}hidden"] = torch.tensor(state.pop(f"{prefix}secret").tolist())
        state.pop(f"{prefix}dropped")


def old_state(frozen: set[str]) -> dict[str, nn.Parameter]:
    shapes = {"old.weight": (2, 3), "old.bias": (2,), "left": (2,), "right": (2,), "secret": (2,), "dropped": (1,)}
    return {f"0.{name}": nn.Parameter(torch.rand(shape), name not in frozen) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ({"old.weight"}, {"0.layer.weight"}),
        ({"old.weight", "old.bias", "left"}, {"0.layer.weight", "0.layer.bias"}),
        ({"left", "right", "secret", "dropped"}, {"0.parts"}),
    ],
)
def test_flags_follow_what_a_module_renames(frozen: set[str], expected: set[str], tmp_path: Path) -> None:
    """Catches a flag that is lost because the module gives its tensor another name while it loads, or joins it with others; and one
    that cannot follow, because the module hides where the values go, without a note."""
    state = old_state(frozen)
    shardsave.save(state, tmp_path)
    model = nn.Sequential(Renamed())
    report = shardsave.load_model(model, tmp_path)
    assert torch.equal(model[0].layer.weight, state["0.old.weight"]) and torch.equal(model[0].parts[2:], state["0.right"])
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == expected
    assert report.notes == (
        "the flags of 0.dropped, 0.secret were not restored: the module loads these itself, and no parameter is known to hold them",
    )
    assert not shardsave.load_model(model, tmp_path, restore_frozen=False).notes


def test_flags_of_names_that_are_exchanged(tmp_path: Path) -> None:
    """Catches a flag that stays with a name although the module gives its tensor to another parameter."""

    def exchange(state: dict[str, Any], prefix: str, *_: object) -> None:
        state[f"{prefix}a"], state[f"{prefix}b"] = state[f"{prefix}b"], state[f"{prefix}a"]

    shardsave.save({"a": nn.Parameter(torch.zeros(2), False), "b": nn.Parameter(torch.ones(2))}, tmp_path)
    model = nn.ParameterDict({"a": nn.Parameter(torch.rand(2)), "b": nn.Parameter(torch.rand(2))})
    model._register_load_state_dict_pre_hook(exchange)
    shardsave.load_model(model, tmp_path)
    assert model["a"].requires_grad and not model["b"].requires_grad and torch.equal(model["b"], torch.zeros(2))


def test_flags_of_an_old_weight_norm(tmp_path: Path) -> None:
    """Catches frozen weight_g and weight_v that are trainable in the parametrization that has replaced them, also on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    old[0].weight_g.requires_grad_(False)
    shardsave.save(old, tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            new = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
        report = shardsave.load_model(new, tmp_path)
        frozen = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
        assert frozen == ["0.parametrizations.weight.original0"] and report.frozen == 1 and not report.notes


def test_renamed_without_a_way_back(tmp_path: Path) -> None:
    """Catches an unclear error if a module saves names that it does not accept."""

    class OneWay(nn.Linear):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {f"saved.{name}": value for name, value in super().state_dict(*arguments, **options).items()}

    shardsave.save(OneWay(2, 2), tmp_path)
    words = r"2 missing from the checkpoint: bias, weight; 2 not in the module: saved.bias, saved"
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=words):
        shardsave.load_model(OneWay(2, 2), tmp_path)


def test_a_loading_routine_that_refuses(tmp_path: Path) -> None:
    """Catches a refusal after the rest of the module was filled, or one that does not name the sub-module."""
    shardsave.save({"0.bias": torch.ones(3), "0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 3)}, tmp_path)
    module = nn.Sequential(Doubling(3, 3), nn.Linear(3, 2, bias=False))
    before = module[1].weight.detach().clone()
    words = r"cannot load '0': its own load_state_dict .*RuntimeError.*size mismatch.*; the module is partly loaded, 0 of 3"
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=words):
        shardsave.load_model(module, tmp_path)
    assert same_bits(module[1].weight, before)


def test_loading_routines_report_without_strict(tmp_path: Path) -> None:
    """Catches names that a sub-module's own routine reports missing, and that the report lacks."""
    shardsave.save({"0.weight": torch.ones(3, 3), "0.more": torch.ones(1)}, tmp_path)
    report = shardsave.load_model(nn.Sequential(Doubling(3, 3)), tmp_path, strict=False)
    assert report.missing == ("0.bias",) and report.unexpected == ("0.more",)


def test_one_sub_module_at_a_time(tmp_path: Path) -> None:
    """Catches the copies of more than one sub-module in memory at a time, if several load themselves."""
    alive: list[int] = []
    copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    class Watching(nn.Linear):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            copies.add(state_dict[prefix + "weight"])
            alive.append(len(copies))
            super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    model = nn.Sequential(*(Watching(4, 4) for _ in range(5)))
    shardsave.save(model, tmp_path)
    shardsave.load_model(model, tmp_path)
    assert alive == [1] * 5


class Meddling(nn.Module):
    """Does something to another module's tensors while it is loaded."""

    def __init__(self, other: nn.Linear, meddle: Callable[[nn.Linear], object]) -> None:
        super().__init__()
        self.own, self.other, self.meddle = nn.Parameter(torch.rand(2)), [other], meddle

    def _load_from_state_dict(self, *rest: Any) -> None:
        super()._load_from_state_dict(*rest)  # type: ignore[no-untyped-call]
        self.meddle(self.other[0])


def meddled_with(meddle: Callable[[nn.Linear], object]) -> nn.Sequential:
    other = nn.Linear(3, 3)
    return nn.Sequential(Meddling(other, meddle), other)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda other: setattr(other, "weight", nn.Parameter(torch.zeros(3, 3))),
        lambda other: setattr(other, "weight", nn.Parameter(torch.zeros(3, 3, device="meta"))),
        lambda other: setattr(other.weight, "data", torch.zeros(3, 3)),
        lambda other: other.weight.detach().zero_(),
        lambda other: setattr(other, "bias", nn.Parameter(torch.zeros(3, requires_grad=True))),
    ],
    ids=["replaces", "replaces by meta", "other memory", "writes", "trains"],
)
def test_a_loading_routine_that_replaces_tensors_of_another_module(
    tmp_path: Path, meddle: Callable[[nn.Linear], object]
) -> None:
    """Catches values and flags that are written to a tensor which is no longer in the module."""
    source = meddled_with(lambda other: None)
    source[1].weight.requires_grad_(False)
    source[1].bias.requires_grad_(False)
    shardsave.save(source, tmp_path)
    fresh = meddled_with(meddle)
    report = shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, source) and report.frozen == 2


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        (lambda other: delattr(other, "weight"), "1.weight was removed"),
        (lambda other: setattr(other, "bias", nn.Parameter(torch.ones(5))), r"1.bias \[3\] on disk, \[5\] in the module"),
        (lambda other: setattr(other.weight, "data", torch.ones(1, 1).expand(3, 3)), "'1.weight' .* it is expanded; .*"),
    ],
    ids=["gone", "another shape", "expanded"],
)
def test_a_loading_routine_that_makes_another_module_unfit(
    tmp_path: Path, meddle: Callable[[nn.Linear], object], words: str
) -> None:
    """Catches a load that ends without an error, or with a bare traceback, if a tensor that it should fill was removed."""
    shardsave.save(meddled_with(lambda other: None), tmp_path)
    words = rf"{words}; the loading routine of another sub-module caused this; the module is partly loaded, 1 of 3 tensors$"
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=words):
        shardsave.load_model(meddled_with(meddle), tmp_path)


class Counting(nn.Linear):
    """Has extra state that is a tensor."""

    count = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.count])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count = int(state)


def test_extra_state(tmp_path: Path) -> None:
    """Catches lost extra state; extra state that is not a tensor would need pickle, and is refused by name."""
    source = nn.Sequential(Counting(3, 2), nn.Linear(2, 2))
    source[0].count = 7
    shardsave.save(source, tmp_path)
    assert "0._extra_state" in shardsave.inspect(tmp_path).names
    fresh = nn.Sequential(Counting(3, 2), nn.Linear(2, 2))
    shardsave.load_model(fresh, tmp_path)
    assert fresh[0].count == 7 and same_state(fresh, source)
    source[0].get_extra_state = lambda: {"count": 7}
    with pytest.raises(shardsave.UnsupportedTensorError, match=r"'0._extra_state': .* it is a dict, which would need pickle"):
        shardsave.save(source, tmp_path)


class Remembering(nn.Linear):
    """Has extra state that is plain data, or whatever it was set to."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_of_an_architecture(tmp_path: Path) -> None:
    """Catches extra state in an architecture that load_model ignores, and extra state with objects that counts as plain data."""

    def model() -> nn.Module:
        return nn.ModuleDict({"a": nn.Sequential(Remembering(2, 2)), "b": nn.Sequential(Remembering(2, 2), nn.Linear(2, 2))})

    source, bare = model(), nn.Sequential(nn.Linear(2, 2))
    source["a"][0].state = {"steps": [1, (2, 3)], "kinds": {"x"}, "dtype": torch.float16, 5: OrderedDict(inf=float("inf"))}
    source["b"][0].state = 7
    shardsave.save(source, tmp_path / "whole", architecture=True)
    fresh = model()
    shardsave.load_model(fresh, tmp_path / "whole")
    assert [fresh[name][0].state for name in "ab"] == [source[name][0].state for name in "ab"]
    assert fresh["a"][0].weight.equal(source["a"][0].weight) and fresh["b"][1].weight.equal(source["b"][1].weight)
    part = model()["b"]
    shardsave.load_model(part, tmp_path / "whole", prefix="b.")
    assert part[0].state == 7
    compiled = model()
    compiled["b"] = torch.compile(compiled["b"])
    shardsave.load_model(compiled, tmp_path / "whole")
    assert compiled["b"].get_submodule("_orig_mod.0").state == 7

    source["b"][0].state = {"scale": torch.ones(2), "steps": 3}
    shardsave.save(source, tmp_path / "tensors", architecture=True)
    fresh = model()
    before = fresh["a"][0].weight.detach().clone()
    words = (
        r"'b.0._extra_state' has tensors or objects in it; build the whole model with build_model.*; the module is unchanged$"
    )
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=words):
        shardsave.load_model(fresh, tmp_path / "tensors")
    assert same_bits(fresh["a"][0].weight, before)
    report = shardsave.load_model(fresh, tmp_path / "tensors", strict=False)
    assert report.missing == ("b.0._extra_state",) and fresh["a"][0].state == source["a"][0].state
    assert shardsave.load_model(bare, tmp_path / "whole", strict=False).missing == ("0.bias", "0.weight")


class Replacing(nn.Module):
    """Has extra state and no tensor, and replaces a tensor of another module when the extra state is set."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def get_extra_state(self) -> int:
        return 7

    def set_extra_state(self, state: int) -> None:
        self.others[0].weight = nn.Parameter(torch.zeros(2, 2))


def test_extra_state_alone_that_replaces_a_tensor_of_another_module(tmp_path: Path) -> None:
    """Catches destinations that are planned again only after a routine that received tensors."""
    other, again = nn.Linear(2, 2), nn.Linear(2, 2)
    source, fresh = nn.Sequential(Replacing(other), other), nn.Sequential(Replacing(again), again)
    shardsave.save(source, tmp_path, architecture=True)
    shardsave.load_model(fresh, tmp_path)
    assert fresh[1].weight.equal(source[1].weight)


def weight_normed(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: deprecated, and still in many models
        make = {
            "weight_norm": parametrizations.weight_norm,
            "old weight_norm": torch.nn.utils.weight_norm,
            "spectral_norm": parametrizations.spectral_norm,
            "old spectral_norm": torch.nn.utils.spectral_norm,
            "orthogonal": parametrizations.orthogonal,
        }[kind]
        return nn.Sequential(make(nn.Linear(3, 2)), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("weight_norm", "weight_norm"),
        ("old weight_norm", "old weight_norm"),
        ("old weight_norm", "weight_norm"),
        ("spectral_norm", "spectral_norm"),
        ("old spectral_norm", "old spectral_norm"),
        ("orthogonal", "orthogonal"),
    ],
)
def test_parametrizations(tmp_path: Path, saved: str, loaded: str) -> None:
    """Catches parametrized weights that are not restored, also across the renaming that torch does itself."""
    source, fresh = weight_normed(saved).eval(), weight_normed(loaded).eval()
    shardsave.save(source, tmp_path)
    shardsave.load_model(fresh, tmp_path)
    inputs = torch.randn(5, 3)
    assert torch.equal(source(inputs), fresh(inputs))


class Hooked(nn.Linear):
    """Loads itself, as torch's linear layer does."""

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hooked(32, 32),
        lambda: nn.InstanceNorm1d(64, affine=True),
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    ],
    ids=["override", "instance norm", "parametrization"],
)
def test_freed_memory_of_a_sub_module_that_loads_itself(make: Callable[[], nn.Module], size: int, tmp_path: Path) -> None:
    """Catches a loading routine that copies into memory that was freed or made smaller: torch writes beyond its end."""
    module = nn.Sequential(make())
    shardsave.save(module, tmp_path, durable=False)
    last = list(module.parameters())[-1]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if tensor.data_ptr() != last.data_ptr()}
    last.untyped_storage().resize_(size)
    for strict in (True, False):
        with pytest.raises(
            shardsave.UnsupportedTensorError, match="its storage was freed or made smaller; the module is unchan"
        ):
            shardsave.load_model(module, tmp_path, strict=strict)
    now = module.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
