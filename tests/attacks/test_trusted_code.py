"""Method: a trusted module has classes with every kind of code that Python calls implicitly, and a file names them, with its own values.

A build must end in exactly the error in the table, or in a model. None of the code may run, neither during the build nor when the objects
are destroyed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import traps
from architecture_cases import BAD, edit_architecture
from tampering import Json
from torch import nn
from torch.nn.utils import parametrizations

import shardsave
from support import same_bits

UNFIT = (
    "cannot build $ARCH: classes that can safely be built from data expected, it asks for {} (its __del__ would run with values from the "
    "file); nothing was built"
)
KEYS = BAD.format("keys expected to be simple values", "one is a{}")


def asks(*objects: Json, imports: tuple[str, ...] = (), **attributes: Any) -> Callable[[Json], object]:
    """Adds objects to the table, from number 1 on, and sets attributes of the root, which is number 0."""

    def change(document: Json) -> None:
        kinds = [node["object"] for node in objects if "object" in node]
        document["imports"].update({f"traps:{name}" if ":" not in name else name: None for name in (*kinds, *imports)})
        document["objects"].extend(
            {**node, "object": f"traps:{node['object']}"} if "object" in node else node for node in objects
        )
        document["objects"][0]["attributes"].update(attributes)

    return change


def pair(name: str) -> Json:
    """An instance of a named tuple of `traps`."""
    return {"namedtuple": [f"traps:{name}", ["chosen", 1]]}


CASES: dict[str, tuple[Callable[[Json], object], str]] = {
    "an object with a finaliser": (asks({"object": "Closes", "attributes": {"path": "/"}}), UNFIT.format("traps.Closes")),
    "an object whose base has a finaliser": (asks({"object": "ClosesToo"}), UNFIT.format("traps.ClosesToo")),
    "a build that is refused half-way": (asks({"object": "Closes"}, a={"no such tag": 1}), UNFIT.format("traps.Closes")),
    "a module with a finaliser": (
        lambda document: (document["imports"].update({"traps:Net": None}), document["objects"].append({"module": "traps:Net"})),
        UNFIT.format("traps.Net"),
    ),
    "a named tuple with a finaliser": (
        asks(imports=("ClosingPair",), a=pair("ClosingPair")),
        UNFIT.format("traps.ClosingPair"),
    ),
    "a factory with a finaliser": (
        asks({"dict": [], "type": "defaultdict", "factory": {"import": "traps:Closes"}}, imports=("Closes",)),
        "cannot build $ARCH: only trusted code is used, it asks for traps.Closes (the model could call it, with values from the file); "
        "if you trust it, pass trust=['traps', 'traps.Closes']; nothing was imported",
    ),
    "several finalisers, and a missing class": (
        asks({"object": "Closes"}, {"object": "Gone"}, imports=("ClosingPair",)),
        "cannot build $ARCH: its classes and functions were expected to be importable, not found: traps.Gone (saved without a version; "
        "module traps has no Gone); if one was renamed, pass classes={'old.Name': NewClass}; classes that can safely be built from data "
        "expected, it asks for traps.Closes (its __del__ would run with values from the file), traps.ClosingPair (its __del__ would run "
        "with values from the file); nothing was built",
    ),
    "a key with a hash of its own": (asks({"set": [pair("Hashed")]}, imports=("Hashed",)), KEYS.format(" Hashed")),
    "a key with a comparison of its own": (
        asks({"dict": [[pair("Compared"), 1], [pair("Compared"), 2]]}, imports=("Compared",)),
        KEYS.format(" Compared"),
    ),
    "a key within a key": (
        asks(imports=("Hashed",), a={"frozenset": [{"tuple": [pair("Hashed")]}]}),
        KEYS.format(" tuple"),
    ),
    "a key with an __iter__ of its own": (asks({"set": [pair("Iterated")]}, imports=("Iterated",)), ""),
    "an unnamed value of a flag": (
        asks(imports=("Guesses",), a={"flag": ["traps:Guesses", 3]}),
        BAD.format("the value of a member of Guesses expected", "it is 3"),
    ),
    "an unnamed value of a flag with a __setattr__": (
        asks(imports=("Sets",), a={"flag": ["traps:Sets", 3]}),
        BAD.format("the value of a member of Sets expected", "it is 3"),
    ),
    "a key that looks up its name": (
        asks({"set": [{"enum": ["traps:Looks", "ONE"]}]}, imports=("Looks",)),
        KEYS.format(" Looks"),
    ),
    "a member that looks up its name": (asks(imports=("Looks",), a={"enum": ["traps:Looks", "ONE"]}), ""),
    "a slot of another class": (asks({"object": "BorrowsSlot", "attributes": {"slot": 1}}), ""),
    "a module with a metaclass": (
        lambda document: (
            document["imports"].update({"traps:Made": None}),
            document["objects"].append({"module": "traps:Made"}),
        ),
        "",
    ),
    "a member of a flag": (asks(imports=("Guesses",), a={"flag": ["traps:Guesses", 2]}), ""),
    "a metaclass with a __call__ of its own": (asks(imports=("Called",), a={"flag": ["traps:Called", 1]}), ""),
    "a dict with an items method of its own": (
        asks({"object": "Listed", "items": [["a", 1]], "attributes_are_items": True}),
        "",
    ),
    "a state with a function in place of a method": (
        asks(
            {"object": "Reader", "state": {"ref": 2}},
            {"dict": [["read", {"import": "math:factorial"}]]},
            imports=("math:factorial",),
        ),
        BAD.format("attributes of a Reader expected", "'read' would replace its method"),
    ),
    "a class with a __getattribute__ of its own": (
        asks({"object": "Watches", "attributes": {"a": 1}}, {"list": [{"ref": 1}]}, a={"ref": 1}),
        "",
    ),
    "a state that is not a dict, with a __repr__ of its own": (
        asks({"object": "Reader", "state": pair("Said")}, imports=("Said",)),
        BAD.format("the state of a Reader expected to be a dict", "it is a Said"),
    ),
    "a size of an object with an __index__ of its own": (
        asks({"object": "Number"}, a={"size": [{"ref": 1}]}),
        BAD.format("a size expected", "it is [{'ref': 1}]"),
    ),
    "a range of an object with an __index__ of its own": (
        asks({"object": "Number"}, a={"range": [0, {"ref": 1}, 1]}),
        BAD.format("a range expected", "it is [0, {'ref': 1}, 1]"),
    ),
    "a key with a __getattribute__ of its own": (asks({"object": "Watches"}, {"set": [{"ref": 1}]}), KEYS.format(" Watches")),
}


@pytest.fixture(autouse=True)
def ran() -> list[str]:
    """What ran, in words."""
    traps.ran.clear()
    return traps.ran


@pytest.mark.parametrize("name", CASES)
def test_runs_no_code(name: str, tmp_path: Path, ran: list[str]) -> None:
    """Catches code of a trusted class that Python runs with values from a file: when an object is destroyed, or used as a key."""
    change, message = CASES[name]
    shardsave.save(nn.Dropout(), tmp_path, architecture=True, durable=False)
    edit_architecture(tmp_path, change)
    if message:
        with pytest.raises(shardsave.ShardSaveError) as raised:
            shardsave.build_model(tmp_path, trust=["traps"])
        assert str(raised.value) == message.replace("$ARCH", f"the architecture in {tmp_path}")
        del raised
    else:
        shardsave.build_model(tmp_path, trust=["traps"])
    gc.collect()
    assert ran == []


@pytest.mark.parametrize("kind", ["Registers", "Answers"])
def test_hooks_and_computed_tensors_look_nothing_up(kind: str, tmp_path: Path, ran: list[str]) -> None:
    """Catches a registration that runs a method of the module's class, and a parametrized module that loses its own methods as hooks."""
    model = parametrizations.orthogonal(traps.Registers(2, 2))
    nn.Module.register_forward_pre_hook(model, model.before)
    shardsave.save(model, tmp_path, architecture=True, durable=False)

    def change(document: Json) -> None:
        document["imports"] = {name.replace("Registers", kind): version for name, version in document["imports"].items()}
        document["objects"][0]["module"] = f"traps:{kind}"

    edit_architecture(tmp_path, change)
    ran.clear()
    again = shardsave.build_model(tmp_path, trust=["traps", f"traps.{kind}.before"])
    assert ran == []
    [hook] = again.__dict__["_forward_pre_hooks"].values()
    assert hook.__self__ is again and same_bits(type(again).weight.fget(again), model.weight)
    assert type(again).__name__ == f"Parametrized{kind}" and type(again).__module__ == type(model).__module__
    if kind == "Registers":
        assert type(copy.deepcopy(again)) is type(again)


def test_a_class_that_ignores_its_state(tmp_path: Path) -> None:
    """Catches an exception of torch, while it works on a module of a trusted class, that is not turned into an error of this package."""
    model = traps.Registers(2, 2)
    nn.Module.register_forward_pre_hook(model, model.before)
    shardsave.save(model, tmp_path, architecture=True, durable=False)

    def change(document: Json) -> None:
        document["imports"]["traps:Empty"] = None
        document["objects"][0]["module"] = "traps:Empty"

    edit_architecture(tmp_path, change)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        shardsave.build_model(tmp_path, trust=["traps", "traps.Empty", "traps.Empty.before"])
    assert str(raised.value) == (
        f"cannot build the architecture in {tmp_path}: registering hooks of traps.Empty was expected to accept what was saved with an "
        "unknown version, it raised KeyError: '_forward_pre_hooks'; nothing was built"
    )


def test_keys_and_flags_are_refused_at_save(tmp_path: Path) -> None:
    """Catches an architecture that is written although a build would refuse its keys or flags."""
    model = nn.Linear(2, 2)
    model.flag, model.pairs = traps.Guesses.ONE | traps.Guesses.TWO, {traps.Hashed(1, 2)}  # type: ignore[assignment]
    model.numbers = {(2**61 - 1) * factor: 0 for factor in range(101)}  # type: ignore[assignment]
    with pytest.raises(shardsave.UnsupportedModuleError) as raised:
        shardsave.save(model, tmp_path, architecture=True)
    assert str(raised.value) == (
        "cannot save the architecture: model.flag: <Guesses.ONE|TWO: 3>, which has no name in its enum; "
        "model.pairs: a key or element Hashed(left=1, right=2), which is looked up by identity and not by value; "
        "model.numbers: more than 100 keys or elements with the same hash; nothing was written"
    )


def test_a_finaliser_is_refused_at_save(tmp_path: Path, ran: list[str]) -> None:
    """Catches an architecture that is written although a build would refuse its class."""
    model = nn.Linear(2, 2)
    model.log, model.inner = traps.ClosesToo(), traps.Net()  # type: ignore[assignment]
    with pytest.raises(shardsave.UnsupportedModuleError) as raised:
        shardsave.save(model, tmp_path, architecture=True)
    assert str(raised.value) == (
        "cannot save the architecture: model.inner: a traps.Net: its __del__ would run with values from the file; "
        "model.log: a traps.ClosesToo: its __del__ would run with values from the file; nothing was written"
    )
