"""Method: a trusted module has classes with every kind of code that Python runs of its own accord; a file asks for them, with its values.

The build ends in exactly the error that the table says, or in a model; none of the code has run, then or when all is thrown away.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import traps
from making import Json
from test_architectures import edit_architecture
from torch import nn

import shardsave

UNFIT = (
    "cannot build $ARCH: classes that can safely be made from data expected, it asks for {} (its __del__ would run with what the file "
    "says); nothing was built"
)


def asks(*objects: Json, imports: tuple[str, ...] = (), **attributes: Any) -> Callable[[Json], object]:
    """More objects in the table, from number 1 on, and attributes of the root, which is number 0."""

    def change(document: Json) -> None:
        made = [node["object"] for node in objects if "object" in node]
        document["imports"].update({f"traps:{name}" if ":" not in name else name: None for name in (*made, *imports)})
        document["objects"].extend(
            {**node, "object": f"traps:{node['object']}"} if "object" in node else node for node in objects
        )
        document["objects"][0]["attributes"].update(attributes)

    return change


def pair(name: str) -> Json:
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
        UNFIT.format("traps.Closes"),
    ),
    "all that have one, and all that is missing": (
        asks({"object": "Closes"}, {"object": "Gone"}, imports=("ClosingPair",)),
        "cannot build $ARCH: what it is made of was expected to be there, not found: traps.Gone (saved without a version; module traps has "
        "no Gone); for what was renamed say classes={'old.Name': NewClass}; classes that can safely be made from data expected, it asks "
        "for traps.Closes (its __del__ would run with what the file says), traps.ClosingPair (its __del__ would run with what the file "
        "says); nothing was built",
    ),
}


@pytest.fixture(autouse=True)
def ran() -> list[str]:
    traps.ran.clear()
    return traps.ran


@pytest.mark.parametrize("name", CASES)
def test_runs_nothing(name: str, tmp_path: Path, ran: list[str]) -> None:
    """Catches code of a trusted class that a file can run with its own values by way of Python: at the end of an object's life, as keys."""
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


def test_a_finaliser_is_refused_at_save(tmp_path: Path, ran: list[str]) -> None:
    """Catches an architecture that is written, and is refused when somebody builds it."""
    model = nn.Linear(2, 2)
    model.log, model.inner = traps.ClosesToo(), traps.Net()  # type: ignore[assignment]
    with pytest.raises(shardsave.UnsupportedModuleError) as raised:
        shardsave.save(model, tmp_path, architecture=True)
    assert str(raised.value) == (
        "cannot save the architecture: model.inner: a traps.Net: its __del__ would run with what the file says; "
        "model.log: a traps.ClosesToo: its __del__ would run with what the file says; nothing was written"
    )
