"""The plan of a load as a value: a table of modules, stored tensors and the plan expected for them; no file is read, no module changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from test_load_model import Doubling
from torch import nn

from shardsave._format.dtypes import BY_TORCH, logical_shape
from shardsave._loading.disk_layout import IdentityLayout, Join
from shardsave._loading.module_plan import ModulePlan, Routine, plan_again, plan_module
from shardsave._loading.slots import take_again, take_inventory
from shardsave._storage.checkpoint import Located


def located(name: str, *shape: int, dtype: torch.dtype = torch.float32, shard: str = "file") -> Located:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return Located(name, BY_TORCH[dtype].name, logical_shape(tensor.dtype, tensor.shape), tensor.nbytes, shard, 0, None)


def linear(prefix: str = "") -> dict[str, Located]:
    """What is stored of a linear layer with three inputs and two outputs."""
    return {f"{prefix}weight": located(f"{prefix}weight", 2, 3), f"{prefix}bias": located(f"{prefix}bias", 2)}


def tied() -> nn.Module:
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2, bias=False)})
    module["b"].weight = module["a"].weight
    return module


def tied_to_a_routine() -> nn.Module:
    module = nn.ModuleDict({"own": Doubling(3, 2, bias=False), "plain": nn.Linear(3, 2, bias=False)})
    module["plain"].weight = module["own"].weight
    return module


class Scaled(nn.Linear):
    """Has extra state, and so a loading routine of its own."""

    def get_extra_state(self) -> Any:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def scratch() -> nn.Module:
    module = nn.Linear(3, 2)
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    return module


class Case(NamedTuple):
    """``wanted``: the fields of the plan that are not empty."""

    module: Callable[[], nn.Module]
    stored: Mapping[str, Located]
    wanted: dict[str, Any]
    options: Mapping[str, Any] = {}


SAME = {"weight": None, "bias": None}
LINEAR = lambda: nn.Linear(3, 2)

CASES = {
    "all names match": Case(LINEAR, linear(), {"destinations": SAME}),
    "order of the module, not of the files": Case(LINEAR, dict(reversed(linear().items())), {"destinations": SAME}),
    "missing": Case(LINEAR, {"bias": linear()["bias"]}, {"destinations": {"bias": None}, "missing": ("weight",)}),
    "unexpected": Case(
        LINEAR, {**linear(), "z": located("z", 1), "y": located("y", 1)}, {"destinations": SAME, "unexpected": ("y", "z")}
    ),
    "doubtful": Case(LINEAR, {**linear(), "z": located("z", 1)}, {"destinations": SAME}, {"doubtful": ["z"]}),
    "mismatched": Case(
        LINEAR,
        {**linear(), "weight": located("weight", 5, 3)},
        {"destinations": {"bias": None}, "mismatched": {"weight": "weight [5, 3] on disk, [2, 3] in the module"}},
    ),
    "a scalar of one dimension": Case(
        lambda: nn.ParameterDict({"x": torch.tensor(0.0)}), {"x": located("x", 1)}, {"destinations": {"x": None}}
    ),
    "a batch norm's counter": Case(
        lambda: nn.BatchNorm1d(2, affine=False),
        {"running_mean": located("running_mean", 2), "running_var": located("running_var", 2)},
        {"destinations": {"running_mean": None, "running_var": None}},
    ),
    "a buffer that is not saved": Case(scratch, linear(), {"destinations": SAME}),
    "a stored buffer that the state dict lacks": Case(
        scratch, {**linear(), "scratch": located("scratch", 3)}, {"destinations": SAME, "unexpected": ("scratch",)}
    ),
    "casts": Case(
        lambda: nn.Linear(3, 2).to(torch.bfloat16),
        {**linear(), "bias": located("bias", 2, dtype=torch.bfloat16)},
        {"destinations": SAME, "differing": {"weight": (torch.float32, torch.bfloat16)}},
    ),
    "tied here, one on disk": Case(
        tied,
        {**(stored := linear("a.")), "b.weight": stored["a.weight"]},
        {"destinations": {"a.weight": None, "a.bias": None}},
    ),
    "tied here, two on disk": Case(
        tied,
        {**linear("a."), "b.weight": located("b.weight", 2, 3)},
        {"destinations": {"a.weight": None, "a.bias": None}, "must_equal": (("a.weight", "b.weight"),)},
    ),
    "tied here, one name on disk": Case(
        tied,
        {"a.bias": located("a.bias", 2), "b.weight": located("b.weight", 2, 3)},
        {"destinations": {"a.bias": None, "b.weight": None}},
    ),
    "a routine takes all below its name": Case(
        lambda: nn.Sequential(Doubling(3, 2), nn.Linear(3, 2)),
        {**linear("0."), "0.more": located("0.more", 1), **linear("1.")},
        {
            "routines": (Routine("0", {"0.weight": "weight", "0.bias": "bias", "0.more": "more"}, {}),),
            "destinations": {"1.weight": None, "1.bias": None, "0.weight": "0", "0.bias": "0"},
        },
    ),
    "the whole module is a routine": Case(
        lambda: Doubling(3, 2),
        linear(),
        {
            "routines": (Routine("", {"weight": "weight", "bias": "bias"}, {}),),
            "destinations": {"weight": "", "bias": ""},
        },
    ),
    "a routine for which nothing is stored": Case(
        lambda: nn.Sequential(Doubling(3, 2), nn.Linear(3, 2)),
        linear("1."),
        {"destinations": {"1.weight": None, "1.bias": None}, "missing": ("0.bias", "0.weight")},
    ),
    "extra state that is plain data": Case(
        lambda: nn.Sequential(Scaled(3, 2, bias=False)),
        {},
        {"routines": (Routine("0", {}, {"_extra_state": 7}),)},
        {"extra_states": {"0._extra_state": 7}},
    ),
    "a tensor that a routine and the rest fill": Case(
        tied_to_a_routine,
        {"own.weight": located("own.weight", 2, 3), "plain.weight": located("plain.weight", 2, 3)},
        {
            "routines": (Routine("own", {"own.weight": "weight"}, {}),),
            "destinations": {"plain.weight": None},
            "must_equal": (("plain.weight", "own.weight"),),
        },
    ),
    "flags": Case(LINEAR, linear(), {"destinations": SAME, "flags": {"weight": True}}, {"flags": {"weight": True}}),
    "flags of what does not fit": Case(
        LINEAR,
        {**linear(), "weight": located("weight", 5, 3)},
        {
            "destinations": {"bias": None},
            "mismatched": {"weight": "weight [5, 3] on disk, [2, 3] in the module"},
            "flags": {"bias": False},
        },
        {"flags": {"weight": True, "bias": False}},
    ),
}

FIELDS = ("routines", "destinations", "must_equal", "missing", "unexpected", "mismatched", "differing", "flags")


@pytest.mark.parametrize("name", CASES)
def test_plans(name: str) -> None:
    """Catches a name with a wrong destination, or with none, and planning that changes the module."""
    case = CASES[name]
    module = case.module()
    before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    plan = plan_module(take_inventory(module, "file"), IdentityLayout(case.stored), **case.options)
    planned = {field: getattr(plan, field) for field in FIELDS}
    assert {field: value for field, value in planned.items() if value} == case.wanted
    assert list(plan.destinations) == list(case.wanted.get("destinations", {}))
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())


class Halves(IdentityLayout):
    """A layout in which ``weight`` is stored as two tensors, and the bias may be missing."""

    def __init__(self) -> None:
        super().__init__({"weight": located("weight", 2, 3, shard="")})
        halves = (located("top", 1, 3), located("bottom", 1, 3))
        self.joins = (Join(("weight",), halves, lambda parts: {"weight": torch.cat([*parts])}),)

    def may_be_missing(self, name: str) -> bool:
        return name == "bias"

    def flags(self, on_disk: Mapping[str, bool]) -> Mapping[str, bool]:
        return {"weight": all(on_disk.values())}


def test_a_layout_with_joins() -> None:
    """Catches a join whose target is read in place of its sources, and a layout that is not asked about flags or missing names."""
    plan = plan_module(take_inventory(nn.Linear(3, 2), "file"), Halves(), flags={"top": True, "bottom": False})
    assert [source.name for source in plan.reads] == ["top", "bottom"] and plan.in_place == ("weight",)
    assert plan.missing == () and plan.flags == {"weight": False}
    other = plan_module(take_inventory(nn.Linear(5, 2), "file"), Halves())
    assert other.reads == [] and list(other.mismatched) == ["weight"]


def reads(plan: ModulePlan) -> list[str]:
    return [stored.name for stored in plan.reads]


def test_what_is_read() -> None:
    """Catches a tensor that is read twice or not at all: routines come first, one tensor of several names is read once."""
    module = nn.ModuleDict({"tied": tied(), "own": Doubling(3, 2)})
    stored = {**linear("tied.a."), "tied.b.weight": located("tied.b.weight", 2, 3), **linear("own.")}
    plan = plan_module(take_inventory(module, "file"), IdentityLayout(stored))
    assert reads(plan) == ["own.weight", "own.bias", "tied.a.weight", "tied.a.bias"]
    assert plan.routed == {"own.weight", "own.bias"} and plan.notes() == ()


def test_planned_again() -> None:
    """Catches a plan that still contains tensors that a routine replaced, and one that fills tensors that the report calls mismatched."""
    module = nn.Sequential(Doubling(3, 2), nn.Linear(3, 2), nn.Linear(3, 2))
    stored = {**linear("0."), **linear("1."), **linear("2."), "2.bias": located("2.bias", 7)}
    inventory = take_inventory(module, "file")
    plan = plan_module(inventory, IdentityLayout(stored))
    module[1].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float16))
    module[2].weight, module[2].bias = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(7))
    again = plan_again(plan, take_again(inventory))
    assert again.in_place == ("1.weight", "1.bias") and list(again.mismatched) == ["2.bias", "2.weight"]
    assert again.notes() == ("1 cast from float32 to float16",) and plan.notes() == ()
    assert plan.in_place == ("1.weight", "1.bias", "2.weight") and again.routines == plan.routines
