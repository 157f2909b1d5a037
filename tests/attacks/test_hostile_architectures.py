"""Method: a good architecture is saved, one thing in it is changed, and every checksum is corrected, as anyone with write access can do.

A build must raise exactly the error in the table, import nothing that is not trusted, and call nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import Json, crc, edit_index, rewrite
from torch import nn

import shardsave
import zoo

Change = Callable[[Json], object]


def edit_architecture(folder: Path, change: Change) -> None:
    """Changes the parsed document and corrects its checksums. ``change`` may return bytes to write instead."""
    name = shardsave.inspect(folder).parts["architecture"]
    document = json.loads((folder / name).read_bytes())
    result = change(document)
    content = result if isinstance(result, bytes) else json.dumps(document).encode()
    rewrite(folder / name, content)
    record = [name, len(content), len(content), crc(content)]
    edit_index(folder, lambda index: index["shardsave"]["parts"].update(architecture=record))


def node(document: Json, kind: str, ending: str = "") -> Json:
    """The first object of the table that is a ``kind``, and whose class has a name with this ending."""
    node: Json = next(node for node in document["objects"] if kind in node and str(node[kind]).endswith(ending))
    return node


def root(**changes: Any) -> Change:
    """Changes members of the root module."""
    return lambda document: document["objects"][0].update(changes)


def attribute(name: str, value: Any) -> Change:
    """Sets an attribute of the root module."""
    return lambda document: document["objects"][0].setdefault("attributes", {}).update({name: value})


def imported(name: str, value: Any) -> Change:
    """Sets an attribute of the root module, and lists ``name`` among the imports."""

    def change(document: Json) -> None:
        document["imports"][name] = None
        attribute("a", value)(document)

    return change


def refusal(folder: Path, error: type[shardsave.ShardSaveError] = shardsave.CorruptCheckpointError, **options: Any) -> str:
    """The message of the ``error`` that a build raises, with ``$ARCH`` for the architecture and its directory."""
    with pytest.raises(error) as raised:
        shardsave.build_model(folder, **options)
    return str(raised.value).replace(f"the architecture in {folder}", "$ARCH")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"tuple": [value]}
    return value


#: What is trusted in all cases.
TRUST = ["zoo", "zoo.double", "zoo.Property.load_state_dict"]


def untrusted(name: str, reason: str = "the model could call it, with values from the file", of: str = "") -> str:
    """The message for ``name``, of which ``reason`` says what would run. ``of``: the package that would be enough to trust."""
    asked, entries = (f"{name} ({reason})" if reason else name), sorted([*TRUST, of or name])
    return (
        f"cannot build $ARCH: only trusted code is used, it asks for {asked}; if you trust it, pass trust={entries}; "
        "nothing was imported"
    )


BAD = "corrupt $ARCH: {}, {}; nothing was built"
NOT_DEFINED = "corrupt $ARCH: {} expected to be a class or a function that {} defines, it is {}; nothing was built"
MISSING = (
    "cannot build $ARCH: its classes and functions were expected to be importable, not found: {} ({}); "
    "if one was renamed, pass classes={{'old.Name': NewClass}}; nothing was built"
)
FORM = "corrupt $ARCH: names of the form 'module:Class' expected, it asks for {}; nothing was imported"

#: The change, and the whole message.
CASES: dict[str, tuple[Change, str]] = {
    "os.system": (imported("os:system", {"import": "os:system"}), untrusted("os.system")),
    "posix.system": (imported("posix:system", {"import": "posix:system"}), untrusted("posix.system")),
    "builtins.eval": (
        imported("builtins:eval", {"import": "builtins:eval"}),
        untrusted("builtins.eval"),
    ),
    "torch.load": (imported("torch:load", {"import": "torch:load"}), untrusted("torch.load")),
    "torch.from_file": (
        imported("torch:from_file", {"import": "torch:from_file"}),
        untrusted("torch.from_file"),
    ),
    "torch.hub": (
        imported("torch.hub:load", {"import": "torch.hub:load"}),
        untrusted("torch.hub.load"),
    ),
    "a name that begins like a trusted module": (
        imported("zoology:Net", {"import": "zoology:Net"}),
        untrusted("zoology.Net"),
    ),
    "a module instead of a class": (
        imported("torch.nn.functional:torch", 1),
        NOT_DEFINED.format("torch.nn.functional.torch", "torch.nn.functional", "the module torch"),
    ),
    "through a module": (
        imported("torch.nn.functional:importlib.import_module", 1),
        MISSING.format(
            "torch.nn.functional.importlib.import_module",
            "saved without a version; module torch.nn.functional has no importlib.import_module",
        ),
    ),
    "something that a trusted module imports": (
        imported("zoo:Path", 1),
        NOT_DEFINED.format("zoo.Path", "zoo", "type of pathlib"),
    ),
    "partial as a class": (
        lambda document: (
            document["imports"].update({"zoo:functools.partial": None}),
            document["objects"].append({"object": "zoo:functools.partial"}),
        ),
        MISSING.format("zoo.functools.partial", "saved without a version; module zoo has no functools.partial"),
    ),
    "partial of something that is not imported": (
        attribute("a", {"partial": [{"import": "os:system"}, ["touch /tmp/x"], []]}),
        BAD.format("names expected to be listed in imports", "'os:system' is not"),
    ),
    "partial of a value": (
        attribute("a", {"partial": ["os.system", [], []]}),
        BAD.format("a partial of an import or a method expected", "it is of 'os.system'"),
    ),
    "partial in place of forward": (
        lambda document: (
            document["imports"].update({"zoo:double": None}),
            attribute("forward", {"partial": [{"import": "zoo:double"}, [1], []]})(document),
        ),
        BAD.format("attributes of a Property expected", "'forward' would replace its method"),
    ),
    "a function in place of a method of torch": (
        lambda document: (
            document["imports"].update({"zoo:double": None}),
            attribute("_compiled_call_impl", {"import": "zoo:double"})(document),
        ),
        BAD.format("attributes of a Property expected", "'_compiled_call_impl' would replace its method"),
    ),
    "a method of every module": (
        attribute("a", {"method": [{"ref": 0}, "load_state_dict"]}),
        BAD.format("a method of an object's own class expected", "it is 'load_state_dict'"),
    ),
    "a method of a list": (
        lambda document: (
            document["objects"].append({"list": []}),
            attribute("a", {"method": [{"ref": 1}, "append"]})(document),
        ),
        BAD.format("a method of an object's own class expected", "it is 'append'"),
    ),
    "a hook": (
        lambda document: (
            document["imports"].update({"zoo:double": None}),
            root(hooks={"_forward_pre_hooks": [[{"import": "zoo:double"}, False]]})(document),
        ),
        BAD.format("hooks expected to be methods of the module or objects of torch.nn.utils", "one is a function"),
    ),
    "a hook of another kind": (
        root(hooks={"_forward_hooks": []}),
        BAD.format(
            "hooks expected to be in _forward_pre_hooks, _state_dict_hooks, _load_state_dict_pre_hooks",
            "they are in '_forward_hooks'",
        ),
    ),
    "dunder attribute": (
        attribute("__class__", 1),
        BAD.format("attributes expected to have no names that Python reserves", "one is '__class__'"),
    ),
    "dunder name": (imported("zoo:__builtins__", 1), FORM.format("'zoo:__builtins__'")),
    "dunder in a path": (imported("zoo:Property.__init__.__globals__", 1), FORM.format("'zoo:Property.__init__.__globals__'")),
    "dunder module": (imported("zoo.__main__:x", 1), FORM.format("'zoo.__main__:x'")),
    "no colon": (imported("zoo", 1), FORM.format("'zoo'")),
    "a path as a module": (imported("../zoo:x", 1), FORM.format("'../zoo:x'")),
    "property": (attribute("level", 3), BAD.format("attributes of a Property expected", "'level' is a property of its class")),
    "torch's own attribute": (attribute("_modules", {}), BAD.format("a value with one tag expected", "it is {}")),
    "torch's own dict": (
        attribute("_forward_hooks", 5),
        BAD.format("attributes of the module itself expected", "'_forward_hooks' is one of torch's"),
    ),
    "a class that is not a module": (
        lambda document: (document["imports"].update({"zoo:Config": None}), root(module="zoo:Config")(document)),
        BAD.format("a subclass of Module expected", "'zoo:Config' is not one"),
    ),
    "an instance of a builtin": (
        lambda document: (
            document["imports"].update({"builtins:int": None}),
            document["objects"].append({"object": "builtins:int"}),
        ),
        BAD.format("an instance of a class written in Python expected", "builtins.int is not one"),
    ),
    "a class of torch.nn that is not a module": (
        imported("torch.nn.parallel.distributed:_DDPSink", 1),
        "cannot build $ARCH: classes that can safely be built from data expected, it asks for torch.nn.parallel.distributed._DDPSink "
        "(torch.nn.parallel calls objects that the file chooses); nothing was built",
    ),
    **{
        f"a function of torch.nn that does more than compute: {name}": (
            imported(name, {"import": name}),
            untrusted(name.replace(":", ".")),
        )
        for name in (
            "torch.nn.utils.stateless:_functional_call",
            "torch.nn.functional:triplet_margin_with_distance_loss",
        )
    },
    "a private module of torch.nn": (
        imported("torch.nn.utils._deprecation_utils:lazy_deprecated_import", 1),
        untrusted("torch.nn.utils._deprecation_utils.lazy_deprecated_import", ""),
    ),
    "deep nesting": (
        attribute("a", nested(400)),
        BAD.format("values that are nested less deeply expected", "they are nested too deeply"),
    ),
    "deeper nesting": (
        lambda document: b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        BAD.format("JSON expected", "it is nested too deeply"),
    ),
    "a number out of the table": (
        attribute("a", {"ref": 99}),
        BAD.format("the number of an object, below 1, expected", "it is 99"),
    ),
    "a number below the table": (
        attribute("a", {"ref": -1}),
        BAD.format("the number of an object, below 1, expected", "it is -1"),
    ),
    "true as a number": (attribute("a", {"ref": True}), BAD.format("the number of an object, below 1, expected", "it is true")),
    "an unknown tag": (
        attribute("a", {"pickle": "gASVAAA="}),
        BAD.format("a value with a known tag expected", "it is {'pickle': 'gASVAAA='}"),
    ),
    "two tags": (
        attribute("a", {"tuple": [], "list": []}),
        BAD.format("a value with one tag expected", "it is {'list': [], 'tuple': []}"),
    ),
    "an unknown object": (
        lambda document: document["objects"].append({"code": "print()"}),
        BAD.format("an object of a known kind expected", "it is {'code': 'print()'}"),
    ),
    "a mutable key": (
        lambda document: document["objects"].extend([{"list": []}, {"dict": [[{"ref": 1}, 1]]}]),
        BAD.format("keys expected to be simple values", "one is a list"),
    ),
    "a missing tensor": (
        lambda document: document["objects"].append({"tensor": "elsewhere", "kind": "parameter"}),
        BAD.format("tensor 'elsewhere' expected in the checkpoint", "it is missing, or its shape does not allow the strides"),
    ),
    "an enum that is not one": (
        lambda document: (
            document["imports"].update({"zoo:Config": None}),
            attribute("a", {"enum": ["zoo:Config", "x"]})(document),
        ),
        BAD.format("a subclass of Enum expected", "'zoo:Config' is not one"),
    ),
    "a dtype that is a function": (attribute("a", {"dtype": "load"}), BAD.format("a torch.dtype expected", "it is 'load'")),
    "a range of text": (attribute("a", {"range": [0, "x", 1]}), BAD.format("a range expected", "it is [0, 'x', 1]")),
    "a root that is not a module": (
        lambda document: document["objects"].insert(0, {"list": []}),
        BAD.format("a module expected at the root", "it is a list"),
    ),
    **{
        f"a scalar of {name} and {value}": (
            attribute("a", {"scalar": [name, value]}),
            BAD.format(*wanted),
        )
        for name, value, wanted in [
            (",", 1, ("the name of a numpy number type and a number expected", "it is [',', 1]")),
            ("f4,f4", 1, ("the name of a numpy number type and a number expected", "it is ['f4,f4', 1]")),
            ("V8", 1, ("the name of a numpy number type and a number expected", "it is ['V8', 1]")),
            (
                "int64",
                {"tuple": [1, 2]},
                ("the name of a numpy number type and a number expected", "it is ['int64', {'tuple': [1, 2]}]"),
            ),
            ("int64", True, ("the name of a numpy number type and a number expected", "it is ['int64', True]")),
            ("float32", "1", ("the name of a numpy number type and a number expected", "it is ['float32', '1']")),
            ("int8", 300, ("a scalar expected", "it is ['int8', 300]")),
        ]
    },
    "an attribute where there are only slots": (
        lambda document: (
            document["imports"].update({"zoo:Slotted": None}),
            document["objects"].append({"object": "zoo:Slotted", "attributes": {"middle": 1}}),
        ),
        BAD.format("attributes of a Slotted expected", "'middle' is not one of its slots"),
    ),
    "a state where there are only slots": (
        lambda document: (
            document["imports"].update({"zoo:Slotted": None}),
            document["objects"].extend([{"object": "zoo:Slotted", "state": {"ref": 2}}, {"dict": [[1, 1]]}]),
        ),
        BAD.format("names of attributes of a Slotted expected", "one is an int"),
    ),
    "keys with one hash": (
        lambda document: document["objects"].append({"set": [(2**61 - 1) * factor for factor in range(101)]}),
        BAD.format("at most 100 keys with the same hash expected", "there are more"),
    ),
    "keys with one hash in a dict": (
        lambda document: document["objects"].append({"dict": [[(2**61 - 1) * factor, 0] for factor in range(101)]}),
        BAD.format("at most 100 keys with the same hash expected", "there are more"),
    ),
    "keys with one hash in a frozenset": (
        attribute("a", {"frozenset": [(2**61 - 1) * factor for factor in range(101)]}),
        BAD.format("at most 100 keys with the same hash expected", "there are more"),
    ),
    **{
        f"wrapper of torch.nn.parallel: {name}": (
            lambda document, name=name: (
                document["imports"].update({name: None}),
                document["objects"].append({"module": name, "children": {"module": 0}}),
            ),
            f"cannot build $ARCH: classes that can safely be built from data expected, it asks for {name.replace(':', '.')} "
            "(torch.nn.parallel calls objects that the file chooses); nothing was built",
        )
        for name in ("torch.nn.parallel.distributed:DistributedDataParallel", "torch.nn.parallel.data_parallel:DataParallel")
    },
    "no objects": (
        lambda document: document.update(objects=[]),
        BAD.format("objects expected to be a list of objects", "they are []"),
    ),
    "another format": (
        lambda document: document.update(format="pickle"),
        BAD.format("a document of format shardsave-architecture expected", "it is 'pickle'"),
    ),
    "a feature of the future": (
        lambda document: document.update(requires=["telepathy"]),
        "cannot build $ARCH: it requires ['telepathy'], which this version of shardsave does not know; the checkpoint is intact, "
        "build it with a newer version",
    ),
}

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
