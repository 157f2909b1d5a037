"""Architectures in which one thing was changed, and what a build says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tampering import Json, crc, edit_index, rewrite

import shardsave

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
