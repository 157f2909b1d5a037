"""Method: each class of the installed model packages is built from a document, with only its package trusted, while a profiler watches.

No function of the package may run: not its ``__setstate__``, ``__getattr__``, ``__init_subclass__`` or metaclass, whatever it has.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import importlib
import io
import json
import logging
import pkgutil
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardsave import ShardSaveError, UntrustedCodeError
from shardsave._architecture.builder import Builder
from shardsave._architecture.class_checks import bases_of, module_of, namespace
from shardsave._architecture.document import FORMAT, Document
from shardsave._architecture.imports import resolve
from shardsave._architecture.names import follow
from shardsave._architecture.states import REVIEWED_STATES
from shardsave._architecture.trust import Trust

ROUTINES = [
    "__setstate__", "set_extra_state", "__getattr__", "__getattribute__", "__setattr__", "__init_subclass__", "__set_name__",
    "__del__", "metaclass", "_missing_", "__instancecheck__", "__class__(", "__new__", "__setitem__", "__hash__", "__eq__", "__call__",
]  # fmt: skip

#: A part of each package that is imported quickly.
QUICK = {
    "transformers": ["transformers.models.bert", "transformers.models.roformer", "transformers.models.bert_japanese"],
    "peft": ["peft.tuners.lora", "peft.peft_model"],
    "torchvision": ["torchvision.models", "torchvision.ops"],
    "timm": ["timm.layers"],
}


def modules_of(names: list[str], below: bool = True) -> Iterator[types.ModuleType]:
    """The modules ``names``, and all below them, that can be imported here."""
    for name in names:
        with contextlib.suppress(BaseException):  # optional packages are missing, and some modules exit
            module = importlib.import_module(name)
            yield module
            inner = pkgutil.iter_modules(getattr(module, "__path__", []) if below else [], f"{name}.")
            yield from modules_of([info.name for info in inner if not info.name.endswith("__main__")])


def classes_of(module: types.ModuleType) -> Iterator[type]:
    for value in list(vars(module).values()):
        if issubclass(type(value), type) and module_of(value) == module.__name__ and follow(module, value.__name__) is value:
            yield value


TORCH = [
    "torch.nn.modules.linear:Identity",
    "torch.nn.modules.container:ModuleDict",
    "torch.nn.utils.parametrize:ParametrizationList",
]


def documents(kind: type) -> Iterator[dict[str, Any]]:
    """Documents that use ``kind`` in each way that a package's name may be enough for."""
    name = f"{module_of(kind)}:{kind.__name__}"
    for objects in tables(kind, name):
        yield {"imports": dict.fromkeys([name, *TORCH]), "objects": objects}


def tables(kind: type, name: str) -> Iterator[list[dict[str, Any]]]:
    root: dict[str, Any] = {"module": TORCH[0], "attributes": {"held": {"ref": 1}}}
    if issubclass(kind, nn.Module):
        computed = {"module": name, "children": {"parametrizations": 2}, "parametrized": ["computed"]}
        yield [root, computed, {"module": TORCH[1], "children": {"computed": 3}}, {"module": TORCH[2]}]
        yield [root, {"module": name, "attributes": {"text": "a", "shared": {"ref": 0}}, "extra_state": 1}]
        yield [root, {"module": name, "attributes": {"text": "a", "shared": {"ref": 0}}, "children": {"c": 0}}]
    elif issubclass(kind, enum.Enum):
        for tag, content in (("enum", next(iter(kind._member_map_), "")), ("flag", 3)):
            yield [root, {"list": [{tag: [name, content]}]}, {"set": [{tag: [name, content]}]}]
    elif issubclass(kind, tuple):
        values = [1] * len(namespace(kind).get("_fields", ()))
        yield [root, {"list": [{"namedtuple": [name, values]}]}, {"set": [{"namedtuple": [name, values]}]}]
    else:
        contents = (
            {"items": [["a", 1]]} if issubclass(kind, dict) else {"elements": [1]} if issubclass(kind, (list, set)) else {}
        )
        yield [root, {"object": name, **contents, "attributes": {"text": "a", "shared": {"ref": 0}}}]
        yield [root, {"object": name, "state": {"ref": 2}}, {"dict": [["text", {"ref": 1}]]}]


def calls_during_build(document: dict[str, Any], package: str, *trust: str) -> tuple[list[str], Exception | None]:
    """The functions of ``package`` that ran during a build with this trust, and the refusal."""
    folder = str(sys.modules[package].__path__[0])
    data = json.dumps({"format": FORMAT, "requires": [], **document}).encode()
    ran: list[str] = []

    def watch(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            ran.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    refusal: Exception | None = None
    sys.setprofile(watch)
    try:
        opened = Document(data, "it")
        builder = Builder(opened, resolve(opened, Trust(trust)), lambda *_: torch.zeros(1))
        builder.build()
        builder.set_extra_states()
        del builder
    except ShardSaveError as error:
        refusal = error.with_traceback(None)
    finally:
        sys.setprofile(None)
    return ran, refusal


def scan(package: str, names: list[str], below: bool = True) -> tuple[int, set[str]]:
    """Builds every class of the modules ``names``. Returns the number of classes, and those that need an exact name."""
    count, refused, wrong = 0, set(), []
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules_of(names, below):
            for kind in classes_of(module):
                count += 1
                for document in documents(kind):
                    ran, refusal = calls_during_build(document, package, package)
                    if ran:
                        wrong.append(f"{module.__name__}.{kind.__name__}: {ran}")
                if isinstance(refusal, UntrustedCodeError):  # of the last document, which has the least that a class can do
                    refused.add(f"{module.__name__}.{kind.__name__}")
        gc.collect()
    logging.disable(logging.NOTSET)
    assert wrong == []
    return count, refused


@pytest.mark.parametrize("package", QUICK)
def test_classes_of_a_part(package: str) -> None:
    """Catches a routine of a trusted package that runs with values from a file, in the parts that are imported quickly."""
    pytest.importorskip(package)
    count, refused = scan(package, QUICK[package])
    assert count > 20
    if package == "transformers":
        assert "transformers.models.roformer.tokenization_roformer.RoFormerTokenizer" in refused
        assert "transformers.models.bert.modeling_bert.BertSelfAttention" not in refused


def test_the_profiler_sees_what_runs() -> None:
    """Catches a scan that would not notice anything."""
    tokenization = pytest.importorskip("transformers.models.roformer.tokenization_roformer")
    for document in documents(tokenization.RoFormerTokenizer):
        exact = "transformers.models.roformer.tokenization_roformer.RoFormerTokenizer"
        ran, refusal = calls_during_build(document, "transformers", "transformers", exact)
        assert any("__setstate__" in name for name in ran) and not isinstance(refusal, UntrustedCodeError)


def with_routines(package: str) -> Iterator[str]:
    """The modules of ``package`` whose source has one of the words `ROUTINES`."""
    [folder] = importlib.import_module(package).__path__
    for path in sorted(Path(folder).rglob("*.py")):
        if any(routine in path.read_text(errors="replace") for routine in ROUTINES):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.slow
@pytest.mark.parametrize("package", QUICK)
def test_modules_with_routines(package: str) -> None:
    """Catches a routine of a trusted package that runs with values from a file, wherever the package defines one."""
    pytest.importorskip(package)
    count, refused = scan(package, list(with_routines(package)), below=False)
    assert count > 10 and len(refused) < count


@pytest.mark.large
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("package", QUICK)
def test_all_installed_classes(package: str) -> None:
    """Catches a routine of a trusted package that runs with values from a file, in any module: transformers takes five minutes."""
    pytest.importorskip(package)
    count, refused = scan(package, [package])
    assert count > 100 and len(refused) < count


def test_every_setstate_of_torch_nn_is_reviewed() -> None:
    """Catches a class of a newer torch whose ``__setstate__`` nobody has read: it would need its exact name, with no reason to."""
    unreviewed = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules_of(["torch.nn"]):
            for kind in classes_of(module):
                if issubclass(kind, nn.Module) and not module.__name__.startswith("torch.nn.parallel"):
                    owner = next((base for base in bases_of(kind) if "__setstate__" in namespace(base)), None)
                    unreviewed |= {owner} - REVIEWED_STATES.keys()
    assert unreviewed == set()
