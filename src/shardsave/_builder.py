"""From the document that `_architecture.py` makes to a module again, calling nothing that the document chooses.

Instances are made without ``__init__`` and get their attributes straight, past setters and properties; of a class's own code only
``__setstate__`` runs, where it has one, as it would for pickle.
"""

from __future__ import annotations

import base64
import collections
import functools
import pathlib
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from shardsave._architecture import DICT_TYPES, FORMAT, HOOKS, INTERNAL, shadows_method
from shardsave._imports import dotted, is_dunder
from shardsave._json import NotJSON, glimpse, parse_object
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, an

#: An architecture larger than this is neither written nor read, in bytes.
MAX_DOCUMENT_BYTES = 100_000_000

#: What a reader must know to build; nothing beyond version 1 yet.
SUPPORTED_FEATURES: frozenset[str] = frozenset()

#: ``memory(name, kept, strides)`` gives new memory for the tensor of that name, or None where the checkpoint has none.
Memory = Callable[[str, bool, "list[int] | None"], "torch.Tensor | None"]


class Document:
    """A checked outline of a document: what it imports, and its table of objects. Raises CorruptCheckpointError."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            top = parse_object(data)
        except NotJSON as refusal:
            self.bad(refusal.wanted, refusal.found)
        requires = top.get("requires")
        if top.get("format") != FORMAT or not isinstance(requires, list):
            self.bad(f"a document of format {FORMAT} expected", f"it is {glimpse(top.get('format'))}")
        if unknown := [feature for feature in requires if feature not in SUPPORTED_FEATURES]:
            raise IncompatibleCheckpointError(
                f"cannot build {where}: it requires {glimpse(unknown)}, which this version of shardsave does not know; "
                f"the checkpoint is intact, build it with a newer version"
            )
        self.imports: dict[str, str | None] = top.get("imports")  # type: ignore[assignment]
        self.objects: list[dict[str, Any]] = top.get("objects")  # type: ignore[assignment]
        if not isinstance(self.imports, dict) or not all(v is None or isinstance(v, str) for v in self.imports.values()):
            self.bad("imports expected to map names to versions", f"they are {glimpse(self.imports)}")
        if not isinstance(self.objects, list) or not self.objects or not all(type(node) is dict for node in self.objects):
            self.bad("objects expected to be a list of objects", f"they are {glimpse(self.objects)}")

    def bad(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was built")


class Builder:
    """Makes the objects of a document: first all of them empty, then their contents, the innermost first."""

    def __init__(self, document: Document, found: Mapping[str, Any], memory: Memory) -> None:
        self._document = document
        self._bad = document.bad
        self._found = found
        self._memory = memory
        self._made: list[Any] = []
        self._extra_states: list[tuple[nn.Module, Any]] = []

    def build(self) -> nn.Module:
        """The module, its tensors not yet filled."""
        try:
            self._made = [self._empty(node) for node in self._document.objects]
            for made, node in reversed(list(zip(self._made, self._document.objects))):
                self._fill(made, node)
            for made, node in zip(self._made, self._document.objects):
                if isinstance(made, nn.Module):
                    self._finish(made, node)
        except RecursionError:
            self._bad("values of some depth expected", "they are nested too deeply")
        root = self._made[0]
        if not isinstance(root, nn.Module):
            self._bad("a module expected at the root", f"it is {an(type(root).__name__)}")
        return root

    def set_extra_states(self) -> None:
        """Gives modules with extra state of their own what they had; once the tensors are filled, as ``load_state_dict`` does."""
        for module, state in self._extra_states:
            self._run(type(module), "set_extra_state", lambda: module.set_extra_state(state))

    def _run(self, kind: type, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            name = next((name for name, thing in self._found.items() if thing is kind), kind.__qualname__)
            saved = self._document.imports.get(name) or "an unknown version"
            raise IncompatibleCheckpointError(
                f"cannot build {self._document.where}: {what} of {dotted(name)} was expected to take what was saved with {saved}, "
                f"it raised {type(error).__name__}: {' '.join(str(error).split())}; nothing was built"
            ) from error

    # -- the table

    def _empty(self, node: dict[str, Any]) -> Any:
        if "module" in node:
            return self._instance(node["module"], nn.Module)
        if "object" in node:
            return self._instance(node["object"], object)
        if "tensor" in node:
            return self._tensor(node)
        if "array" in node:
            return self._new_memory(node["array"], True, None).numpy()
        if "list" in node:
            return []
        if "set" in node:
            return set()
        if "deque" in node:
            maxlen = node.get("maxlen")
            if maxlen is not None and (type(maxlen) is not int or maxlen < 0):
                self._bad("maxlen expected to be a number", f"it is {glimpse(maxlen)}")
            return collections.deque(maxlen=maxlen)
        if "dict" in node:
            kind = node.get("type", "dict")
            if kind != "dict" and kind not in DICT_TYPES:
                self._bad(f"a dict or one of {', '.join(DICT_TYPES)} expected", f"it is {glimpse(kind)}")
            return DICT_TYPES.get(kind, dict)()
        self._bad("an object of a known kind expected", f"it is {glimpse(node)}")

    def _instance(self, name: object, of: type) -> Any:
        kind = self._class(name, of)
        if of is object and issubclass(kind, (nn.Module, type, Enum, BaseException)):
            self._bad("an instance of a plain class expected", f"{dotted(str(name))} is none")
        try:
            return object.__new__(kind)
        except TypeError:
            self._bad("an instance of a class in Python expected", f"{dotted(str(name))} is none")

    def _class(self, name: object, of: type) -> type:
        kind = self._import(name)
        if not isinstance(kind, type) or not issubclass(kind, of):
            self._bad(f"a class of {of.__name__} expected", f"{glimpse(name)} is none")
        return kind

    def _import(self, name: object) -> Any:
        if not isinstance(name, str) or name not in self._found:
            self._bad("names expected to stand in imports", f"{glimpse(name)} does not")
        return self._found[name]

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        kind, requires_grad = node.get("kind"), node.get("requires_grad", False)
        if kind not in ("parameter", "buffer", "tensor") or not isinstance(requires_grad, bool):
            self._bad("a parameter, a buffer or a tensor expected", f"it is {glimpse(node)}")
        strides = node.get("strides")
        memory = self._new_memory(node["tensor"], bool(node.get("kept")), strides)
        if requires_grad and not (memory.is_floating_point() or memory.is_complex()):
            self._bad(f"{glimpse(node['tensor'])} expected not to require grad", f"it does, with dtype {memory.dtype}")
        if kind == "parameter":
            return nn.Parameter(memory, requires_grad=requires_grad)
        if kind == "buffer":
            return nn.Buffer(memory)
        return memory.requires_grad_(requires_grad)

    def _new_memory(self, name: object, kept: bool, strides: Any) -> torch.Tensor:
        if not isinstance(name, str):
            self._bad("the name of a tensor expected", f"it is {glimpse(name)}")
        if strides is not None and not (isinstance(strides, list) and all(type(s) is int and s >= 0 for s in strides)):
            self._bad("strides expected to be a list of numbers", f"they are {glimpse(strides)}")
        memory = self._memory(name, kept, strides)
        if memory is None:
            self._bad(f"tensor {glimpse(name)} expected in the checkpoint", "it is not there, or has other strides")
        return memory

    def _fill(self, made: Any, node: dict[str, Any]) -> None:
        if "module" in node:
            self._fill_module(made, node)
        elif "object" in node:
            self._fill_instance(made, node)
        elif "tensor" in node:
            vars(made).update(self._attributes(node, type(made)))
        elif "list" in node:
            made.extend(self._values(node["list"]))
        elif "set" in node:
            made.update(self._keys(self._values(node["set"])))
        elif "deque" in node:
            made.extend(self._values(node["deque"]))
        elif "dict" in node:
            if isinstance(made, collections.defaultdict):
                factory = self._value(node.get("factory"))
                if factory is not None and not callable(factory):
                    self._bad("a factory expected", f"it is {glimpse(node.get('factory'))}")
                made.default_factory = factory
            for key, value in self._pairs(node["dict"]):
                made[key] = value

    def _fill_module(self, module: nn.Module, node: dict[str, Any]) -> None:
        state = dict(vars(nn.Module()))
        state["training"] = bool(node.get("training", True))
        state["_modules"] = {name: self._member(place, nn.Module) for name, place in self._names(node, "children")}
        state["_parameters"] = {name: self._member(place, nn.Parameter) for name, place in self._names(node, "parameters")}
        state["_buffers"] = {name: self._member(place, torch.Tensor) for name, place in self._names(node, "buffers")}
        hidden = node.get("non_persistent", [])
        if not isinstance(hidden, list) or not all(isinstance(name, str) for name in hidden):
            self._bad("non_persistent expected to be a list of names", f"it is {glimpse(hidden)}")
        state["_non_persistent_buffers_set"] = set(hidden)
        attributes = self._attributes(node, type(module))
        taken = attributes.keys() & (INTERNAL | {"training"})
        if taken:
            self._bad("attributes of the module's own expected", f"{min(taken)!r} is torch's")
        state.update(attributes)
        self._set_state(module, state, nn.Module.__setstate__)

    def _fill_instance(self, made: Any, node: dict[str, Any]) -> None:
        if "state" in node:
            self._set_state(made, self._value(node["state"]), None)
        else:
            self._set_state(made, self._attributes(node, type(made)), None)

    def _set_state(self, made: Any, state: Any, default: Any) -> None:
        kind = type(made)
        own = getattr(kind, "__setstate__", None)
        if own is not None and own is not default:
            self._run(kind, "__setstate__", lambda: own(made, state))
            return
        if not isinstance(state, dict):
            self._bad(f"the state of a {kind.__qualname__} expected to be a dict", f"it is {glimpse(state)}")
        for name, value in state.items():
            slot = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
            if isinstance(slot, types.MemberDescriptorType):
                slot.__set__(made, value)
            else:
                vars(made)[name] = value

    def _attributes(self, node: dict[str, Any], kind: type) -> dict[str, Any]:
        made = {}
        for name, value in self._names(node, "attributes"):
            there = getattr(kind, name, None)
            if hasattr(type(there), "__set__") and not isinstance(there, types.MemberDescriptorType):
                self._bad(f"attributes of a {kind.__qualname__} expected", f"{name!r} is a property of its class")
            made[name] = self._value(value)
            if shadows_method(kind, name, made[name]):
                self._bad(f"attributes of a {kind.__qualname__} expected", f"{name!r} would take the place of its method")
        return made

    def _finish(self, module: nn.Module, node: dict[str, Any]) -> None:
        """What torch itself must do to a module: computed tensors, and hooks."""
        computed = node.get("parametrized", [])
        if not isinstance(computed, list) or not all(isinstance(name, str) and name.isidentifier() for name in computed):
            self._bad("parametrized expected to be a list of names", f"it is {glimpse(computed)}")
        if computed:
            lists = module._modules.get("parametrizations")
            if not isinstance(lists, nn.ModuleDict) or set(computed) - lists.keys():
                self._bad("parametrizations of what is parametrized expected", f"{glimpse(computed)} has none")
            parametrize._inject_new_class(module)
            for name in computed:
                parametrize._inject_property(module, name)
        for group, hooks in self._names(node, "hooks"):
            if group not in HOOKS or not isinstance(hooks, list):
                self._bad(f"hooks expected to be of {', '.join(HOOKS)}", f"they are of {glimpse(group)}")
            for entry in hooks:
                if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], bool):
                    self._bad("a hook and a flag expected", f"it is {glimpse(entry)}")
                self._hook(module, group, self._value(entry[0]), entry[1])
        if "extra_state" in node:
            self._extra_states.append((module, self._value(node["extra_state"])))

    def _hook(self, module: nn.Module, group: str, hook: Any, with_module: bool) -> None:
        own_method = isinstance(hook, types.MethodType) and hook.__self__ is module
        if not own_method and not (callable(hook) and type(hook).__module__.startswith("torch.nn.utils.")):
            self._bad("hooks expected to be the module's methods or of torch.nn.utils", f"one is {an(type(hook).__qualname__)}")
        if group == "_forward_pre_hooks":
            module.register_forward_pre_hook(hook)
        elif group == "_state_dict_hooks":
            module._register_state_dict_hook(hook)  # type: ignore[no-untyped-call]
        else:
            module._register_load_state_dict_pre_hook(hook, with_module)  # type: ignore[no-untyped-call]

    # -- values

    def _names(self, node: dict[str, Any], group: str) -> list[tuple[str, Any]]:
        given = node.get(group, {})
        if not isinstance(given, dict):
            self._bad(f"{group} expected to be an object", f"it is {glimpse(given)}")
        for name in given:
            if is_dunder(name):
                self._bad(f"{group} expected to have names of their own", f"{glimpse(name)} is Python's")
        return list(given.items())

    def _member(self, place: object, kind: type) -> Any:
        if place is None:
            return None
        made = self._at(place)
        if not isinstance(made, kind):
            self._bad(f"{an(kind.__name__)} expected", f"object {place} is {an(type(made).__name__)}")
        return made

    def _at(self, place: object) -> Any:
        if type(place) is not int or not 0 <= place < len(self._made):
            self._bad(f"a number below {len(self._made)} expected", f"it is {glimpse(place)}")
        return self._made[place]

    def _values(self, values: object, length: int | None = None) -> list[Any]:
        if not isinstance(values, list) or (length is not None and len(values) != length):
            self._bad(
                "a list of values expected" if length is None else f"{length} values expected", f"it is {glimpse(values)}"
            )
        return [self._value(value) for value in values]

    def _pairs(self, pairs: object) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self._bad("pairs of a key and a value expected", f"it is {glimpse(pairs)}")
        return [(*self._keys([self._value(key)]), self._value(value)) for key, value in pairs]

    def _keys(self, values: list[Any]) -> list[Any]:
        for value in values:
            if not isinstance(value, _KEYS) or (type(value) is tuple and self._keys(list(value)) is None):
                self._bad("keys expected to be simple values", f"one is {an(type(value).__qualname__)}")
        return values

    def _value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is not dict or len(value) != 1:
            self._bad("a value with one tag expected", f"it is {glimpse(value)}")
        [(tag, content)] = value.items()
        if tag == "ref":
            return self._at(content)
        read = getattr(self, f"_read_{tag}", None) if tag in _TAGS else None
        if read is None:
            self._bad("a value with a known tag expected", f"it is {glimpse(value)}")
        try:
            return read(content)
        except RecursionError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, OverflowError):
            self._bad(f"a {tag} expected", f"it is {glimpse(content)}")

    def _read_float(self, content: str) -> float:
        return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[content]

    def _read_complex(self, content: list[str]) -> complex:
        real, imaginary = content
        return complex(float(real), float(imaginary))

    def _read_bytes(self, content: str) -> bytes:
        return base64.b64decode(content, validate=True)

    def _read_tuple(self, content: Any) -> tuple[Any, ...]:
        return tuple(self._values(content))

    def _read_frozenset(self, content: Any) -> frozenset[Any]:
        return frozenset(self._keys(self._values(content)))

    def _read_size(self, content: Any) -> torch.Size:
        return torch.Size(self._values(content))

    def _read_slice(self, content: Any) -> slice:
        return slice(*self._values(content, 3))

    def _read_range(self, content: Any) -> range:
        return range(*self._values(content, 3))

    def _read_ellipsis(self, content: Any) -> Any:
        return ...

    def _read_path(self, content: str) -> pathlib.Path:
        return pathlib.Path(content)

    def _read_device(self, content: str) -> torch.device:
        return (
            torch.device(content) if isinstance(content, str) else self._bad("a device expected", f"it is {glimpse(content)}")
        )

    def _read_dtype(self, content: str) -> torch.dtype:
        return self._of_torch(content, torch.dtype)  # type: ignore[no-any-return]

    def _read_layout(self, content: str) -> torch.layout:
        return self._of_torch(content, torch.layout)  # type: ignore[no-any-return]

    def _read_memory_format(self, content: str) -> torch.memory_format:
        return self._of_torch(content, torch.memory_format)  # type: ignore[no-any-return]

    def _of_torch(self, name: str, kind: type) -> Any:
        made = vars(torch).get(name)
        if not isinstance(made, kind):
            self._bad(f"a {kind.__name__} of torch expected", f"it is {glimpse(name)}")
        return made

    def _read_import(self, content: Any) -> Any:
        return self._import(content)

    def _read_enum(self, content: Any) -> Any:
        name, member = content
        return self._class(name, Enum).__members__[member]  # type: ignore[attr-defined]

    def _read_namedtuple(self, content: Any) -> Any:
        name, values = content
        kind = self._class(name, tuple)
        items = self._values(values, len(kind._fields))  # type: ignore[attr-defined]
        return tuple.__new__(kind, items)

    def _read_scalar(self, content: Any) -> Any:
        name, value = content
        dtype = np.dtype(name)
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            self._bad("a number of numpy expected", f"it is {glimpse(name)}")
        return dtype.type(self._value(value))

    def _read_partial(self, content: Any) -> Any:
        function, arguments, keywords = content
        if not isinstance(function, dict) or not function.keys() <= {"import", "method"}:
            self._bad("a partial of what is imported expected", f"it is of {glimpse(function)}")
        named = dict(self._pairs(keywords))
        return functools.partial(self._value(function), *self._values(arguments), **named)

    def _read_method(self, content: Any) -> Any:
        owner, name = content
        instance = self._value(owner)
        function = next((vars(base)[name] for base in type(instance).__mro__ if name in vars(base)), None)
        if is_dunder(name) or name in vars(nn.Module) or not isinstance(function, types.FunctionType):
            self._bad("a method of an object's own class expected", f"it is {glimpse(name)}")
        if type(instance) not in self._found.values():
            self._bad("a method of what is imported expected", f"it is of a {type(instance).__qualname__}")
        return types.MethodType(function, instance)


_TAGS = frozenset(name.removeprefix("_read_") for name in vars(Builder) if name.startswith("_read_"))
_KEYS = (type(None), bool, int, float, str, bytes, complex, tuple, frozenset, torch.dtype, torch.device, torch.Size, Enum, type,
         types.FunctionType, types.BuiltinFunctionType, np.generic)  # fmt: skip
