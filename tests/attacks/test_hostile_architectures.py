"""Method: a good architecture is saved, one thing in it is changed, and every checksum is corrected, as anyone with write access can do.

A build must raise exactly the error in the table, import nothing that is not trusted, and call nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import BAD, CASES, MISSING, TRUST, edit_architecture, node
from tampering import Json, rewrite
from torch import nn

import shardsave
import zoo


def refusal(folder: Path, error: type[shardsave.ShardSaveError] = shardsave.CorruptCheckpointError, **options: Any) -> str:
    """The message of the ``error`` that a build raises, with ``$ARCH`` for the architecture and its directory."""
    with pytest.raises(error) as raised:
        shardsave.build_model(folder, **options)
    return str(raised.value).replace(f"the architecture in {folder}", "$ARCH")


Events = list[tuple[str, Any]]
_watching: Events | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event in ("import", "os.system", "exec", "subprocess.Popen", "compile"):
        _watching.append((event, arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture
def events() -> Iterator[Events]:
    """What was imported or run during a build."""
    global _watching
    _watching = []
    yield _watching
    _watching = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shardsave.save(zoo.Property(), tmp_path, architecture=True, durable=False)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, folder: Path, events: Events) -> None:
    """Catches a document that makes the builder import, call or set something that it must not, and a wrong message."""
    change, message = CASES[name]
    edit_architecture(folder, change)
    build_model = shardsave.build_model  # imports, and perhaps compiles, its module
    events.clear()
    with pytest.raises(shardsave.ShardSaveError) as raised:
        build_model(folder, trust=TRUST)
    assert str(raised.value) == message.replace("$ARCH", f"the architecture in {folder}")
    assert [event for event in events if event[1] not in sys.modules] == []
    assert zoo.Property.changed == []


@pytest.mark.parametrize("layers", [5, 10**9, 1.0, "x", None])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_more_layers_than_tensors(kind: type[nn.RNNBase], layers: Any, tmp_path: Path) -> None:
    """Catches a small file that makes torch loop over layers for hours."""
    shardsave.save(kind(2, 2), tmp_path, architecture=True, durable=False)

    def change(document: Json) -> None:
        last = len(document["objects"])
        document["objects"][0]["attributes"].update(num_layers=layers, _all_weights={"ref": last})
        document["objects"].extend([{"list": [{"ref": last + 1}]}, {"list": [None]}])

    edit_architecture(tmp_path, change)
    shown = repr(layers) if isinstance(layers, str) else json.dumps(layers)
    assert refusal(tmp_path) == BAD.format("num_layers expected to be at most 4, the number of tensors", f"it is {shown}")


def test_array_of_a_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    """Catches an error of torch for an array whose tensor numpy cannot represent."""
    model = nn.Module()
    model.register_buffer("scratch", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
    shardsave.save(model, tmp_path, architecture=True, durable=False)
    edit_architecture(tmp_path, lambda document: document["objects"].append({"array": "scratch"}))
    assert refusal(tmp_path) == BAD.format("'scratch' expected to have a dtype that numpy has", "it has torch.bfloat16")


@pytest.mark.parametrize("group", ["attributes", "parameters", "buffers", "children"])
def test_computed_tensor_with_the_name_of_another(group: str, tmp_path: Path) -> None:
    """Catches an AssertionError of torch for a computed tensor whose name something else in the module has."""
    shardsave.save(torch.nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), tmp_path, architecture=True, durable=False)
    edit_architecture(
        tmp_path,
        lambda document: (
            document["objects"][0][group].update(
                weight={
                    "attributes": 1,
                    "parameters": document["objects"][0]["parameters"]["bias"],
                    "buffers": document["objects"][0]["parameters"]["bias"],
                    "children": document["objects"][0]["children"]["parametrizations"],
                }[group]
            )
            if group in document["objects"][0]
            else document["objects"][0].update({group: {"weight": document["objects"][0]["parameters"]["bias"]}})
        ),
    )
    assert refusal(tmp_path) == BAD.format("parametrized expected to list names that nothing else has", "it is ['weight']")


@pytest.mark.parametrize("name", ["_from_public_api", "hook", "with_module", "module"])
def test_hooks_with_attributes_that_torch_sets(name: str, tmp_path: Path) -> None:
    """Catches a hook that replaces the checked one, and an error of torch for it."""
    model = torch.nn.utils.spectral_norm(nn.Linear(2, 2))
    shardsave.save(model, tmp_path, architecture=True, durable=False)

    def change(document: Json) -> None:
        document["imports"]["math:factorial"] = None
        kind = "NormStateDictHook" if name == "_from_public_api" else "LoadStateDictPreHook"
        node(document, "object", kind)["attributes"][name] = {"import": "math:factorial"}

    edit_architecture(tmp_path, change)
    assert refusal(tmp_path) == BAD.format("hooks expected to have no attributes that torch sets on hooks", f"one has {name!r}")


@pytest.mark.parametrize("exception", ["ValueError('no such mode')", "SystemExit(3)"])
def test_trusted_module_that_raises_when_imported(exception: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exception of an imported module that is not turned into an error of this package, and a process that it ends."""
    (tmp_path / "refuses.py").write_text(f"raise {exception}\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "model"
    shardsave.save(nn.Linear(2, 2), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["imports"].update({"refuses:Net": "refuses 1.0"}))
    reason = "ValueError: no such mode" if "Value" in exception else "SystemExit: 3"
    message = refusal(folder, shardsave.IncompatibleCheckpointError, trust=["refuses"])
    assert message == MISSING.format("refuses.Net", f"saved with refuses 1.0; {reason}")


@pytest.mark.parametrize(
    "opening, closing", [('{"tuple":[', "]}"), ('{"frozenset":[{"tuple":[', "]}]}"), ('{"slice":[1,2,', "]}")]
)
@pytest.mark.parametrize("verb", ["build", "inspect", "load"])
def test_values_of_any_depth(verb: str, opening: str, closing: str, tmp_path: Path) -> None:
    """Catches a depth at which Python's own error for too deep a recursion appears."""
    outcomes = set()
    for depth in [1, *range(50, 1000, 90), 50_000]:
        shardsave.save(zoo.Remembers(), tmp_path, architecture=True, durable=False)

        def change(document: Json) -> bytes:
            document["objects"][0].update(attributes={"deep": "DEEP"}, extra_state="DEEP")
            return json.dumps(document).replace('"DEEP"', opening * depth + "1" + closing * depth).encode()

        edit_architecture(tmp_path, change)
        try:
            if verb == "build":
                shardsave.build_model(tmp_path, trust=["zoo.Remembers"])
            elif verb == "inspect":
                shardsave.inspect(tmp_path, architecture=True)
            else:
                shardsave.load_model(zoo.Remembers(), tmp_path, strict=False)
            outcomes.add("done")
        except shardsave.ShardSaveError:
            outcomes.add("refused")
    assert outcomes == {"done", "refused"}


def test_setstate_that_raises(folder: Path) -> None:
    """Catches an exception of ``__setstate__`` that is not turned into an error of this package."""
    shardsave.save(zoo.Remembers(), folder, architecture=True)
    edit_architecture(folder, lambda document: document["objects"][0].update(attributes={"cache": 1}, extra_state={"ref": 0}))
    assert shardsave.build_model(folder, trust=["zoo.Remembers"]).cache == "made again"
    edit_architecture(folder, lambda document: document["objects"][0]["attributes"].update(cache="raises"))
    assert refusal(folder, shardsave.IncompatibleCheckpointError, trust=["zoo.Remembers"]) == (
        "cannot build $ARCH: __setstate__ of zoo.Remembers was expected to accept what was saved with an unknown version, it raised "
        "ValueError: a cache that raises; nothing was built"
    )


@pytest.mark.parametrize("name", ["_all_weights", "_flat_weights"])
@pytest.mark.parametrize("value", [None, {"ref": 0}, {"tuple": []}, {"ref": 20}, {"ref": 21}])
def test_weights_of_a_recurrent_layer_that_are_something_else(name: str, value: Any, tmp_path: Path) -> None:
    """Catches code of torch that iterates or looks up whatever a file gives as the weights of a layer."""
    shardsave.save(nn.LSTM(2, 2, bias=False), tmp_path, architecture=True, durable=False)

    def change(document: Json) -> None:
        document["objects"][0]["attributes"][name] = value
        document["objects"].extend([{"list": []} for _ in range(20 - len(document["objects"]))])
        document["objects"].extend([{"dict": []}, {"list": [{"ref": 0}, 1]}])

    edit_architecture(tmp_path, change)
    wanted = "a list of tensors" if name == "_flat_weights" else "lists of names"
    assert refusal(tmp_path).startswith(f"corrupt $ARCH: {name} expected to be {wanted}, it is ")


def test_changed_bytes_are_noticed(folder: Path) -> None:
    """Catches bytes of an architecture that are not checked against the index: each one is flipped, and the file is cut and lengthened."""
    name = shardsave.inspect(folder).parts["architecture"]
    content = (folder / name).read_bytes()
    for place in range(len(content)):
        rewrite(folder / name, content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        for verb in (shardsave.verify, lambda path: shardsave.build_model(path, trust=["zoo"])):
            with pytest.raises(
                shardsave.CorruptCheckpointError, match=f"corrupt shard {name}: the index says a header with checksum"
            ):
                verb(folder)
    for other_content in (content[:-1], content + b" "):
        rewrite(folder / name, other_content)
        with pytest.raises(
            shardsave.CorruptCheckpointError, match=f"corrupt shard {name}: the index says {len(content)} bytes"
        ):
            shardsave.verify(folder)
    (folder / name).unlink()
    with pytest.raises(shardsave.CorruptCheckpointError, match=f"the index names {name}, there is no such file"):
        shardsave.verify(folder)


def test_changed_extra_tensors_are_noticed(tmp_path: Path) -> None:
    """Catches a non-persistent buffer that is loaded although one of its bytes is wrong."""
    model = nn.Module()
    model.register_buffer("scratch", torch.arange(4.0), persistent=False)
    shardsave.save(model, tmp_path, architecture=True)
    path = tmp_path / shardsave.inspect(tmp_path).parts["extra tensors"]
    content = path.read_bytes()
    rewrite(path, content[:-1] + b"\x01")
    for verb in (shardsave.verify, shardsave.build_model):
        with pytest.raises(shardsave.CorruptCheckpointError, match=f"corrupt shard {path.name}: tensor 'scratch' has checksum"):
            verb(tmp_path)
