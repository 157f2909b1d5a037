"""From the document that `_architecture/describe.py` makes to a module again, calling nothing that the document chooses.

Instances are made without ``__init__`` and get their attributes straight, past setters and properties. Of a class's own code runs only
what SECURITY.md names. So a made object is never asked: ``isinstance`` and ``vars`` would run its ``__class__`` and ``__getattribute__``.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from shardsave._architecture.class_checks import container_of, in_class, shadows_method
from shardsave._architecture.describe import DICT_TYPES, INTERNAL
from shardsave._architecture.hooks import attach_hooks, compute, computed_tensors
from shardsave._architecture.read_values import Document, Values
from shardsave._architecture.trust import dotted, is_dunder
from shardsave._common.strict_json import glimpse
from shardsave.errors import IncompatibleCheckpointError, ShardSaveError, an

#: ``memory(name, kept, strides, on_host)`` gives new memory for the tensor of that name, or None where the checkpoint has none.
Memory = Callable[[str, bool, "list[int] | None", bool], "torch.Tensor | None"]


class Builder:
    """Makes the objects of a document: first all of them empty, then their contents, the innermost first."""

    def __init__(self, document: Document, found: Mapping[str, Any], memory: Memory) -> None:
        self._document = document
        self._bad = document.bad
        self._found = found
        self._memory = memory
        self._values = Values(document, found)
        self._extra_states: list[tuple[nn.Module, Any]] = []

    def build(self) -> nn.Module:
        """The module, its tensors not yet filled."""
        try:
            self._values.made = [self._empty(node) for node in self._document.objects]
            for made, node in reversed(list(zip(self._values.made, self._document.objects))):
                self._fill(made, node)
            modules = [
                (made, node)
                for made, node in zip(self._values.made, self._document.objects)
                if issubclass(type(made), nn.Module)
            ]
            for module, node in modules:
                attach = functools.partial(attach_hooks, module, node, self._document, self._values)
                self._run(type(module), "registering hooks", attach)
                if "extra_state" in node:
                    self._extra_states.append((module, self._values.value(node["extra_state"])))
            for module, node in modules:  # only then, since a module whose tensors are computed is of another class
                if names := computed_tensors(module, node, self._document):
                    self._run(type(module), "__getattr__", functools.partial(compute, module, names))
        except RecursionError:
            self._bad("values of some depth expected", "they are nested too deeply")
        root = self._values.made[0]
        if not issubclass(type(root), nn.Module):
            self._bad("a module expected at the root", f"it is {an(type(root).__name__)}")
        return root  # type: ignore[no-any-return]

    def set_extra_states(self) -> None:
        """Gives modules with extra state of their own what they had; once the tensors are filled, as ``load_state_dict`` does."""
        for module, state in self._extra_states:
            self._run(type(module), "set_extra_state", lambda: module.set_extra_state(state))

    def _run(self, kind: type, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except ShardSaveError:
            raise
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
            return self._array(node["array"])
        if "list" in node:
            return []
        if "set" in node:
            return set()
        if "deque" in node:
            maxlen = node.get("maxlen")
            if maxlen is not None and (type(maxlen) is not int or not 0 <= maxlen <= sys.maxsize):
                self._bad("maxlen expected to be a number", f"it is {glimpse(maxlen)}")
            return collections.deque(maxlen=maxlen)
        if "dict" in node:
            kind = node.get("type", "dict")
            if not isinstance(kind, str) or (kind != "dict" and kind not in DICT_TYPES):
                self._bad(f"a dict or one of {', '.join(DICT_TYPES)} expected", f"it is {glimpse(kind)}")
            return DICT_TYPES.get(kind, dict)()
        self._bad("an object of a known kind expected", f"it is {glimpse(node)}")

    def _instance(self, name: object, of: type) -> Any:
        kind = self._values.class_of(name, of)
        if of is object and issubclass(kind, (nn.Module, type, Enum, BaseException)):
            self._bad("an instance of a plain class expected", f"{dotted(str(name))} is none")
        new: Any = container_of(kind).__new__
        try:
            return new(kind)
        except TypeError:
            self._bad("an instance of a class in Python expected", f"{dotted(str(name))} is none")

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

    def _array(self, name: object) -> Any:
        memory = self._new_memory(name, True, None, on_host=True)
        try:
            return memory.numpy()
        except TypeError:
            self._bad(f"{glimpse(name)} expected to be of a dtype of numpy", f"it is of {memory.dtype}")

    def _new_memory(self, name: object, kept: bool, strides: Any, on_host: bool = False) -> torch.Tensor:
        if not isinstance(name, str):
            self._bad("the name of a tensor expected", f"it is {glimpse(name)}")
        if strides is not None and not (isinstance(strides, list) and all(type(s) is int and s >= 0 for s in strides)):
            self._bad("strides expected to be a list of numbers", f"they are {glimpse(strides)}")
        memory = self._memory(name, kept, strides, on_host)
        if memory is None:
            self._bad(f"tensor {glimpse(name)} expected in the checkpoint", "it is not there, or has other strides")
        return memory

    def _fill(self, made: Any, node: dict[str, Any]) -> None:
        if "module" in node:
            self._fill_module(made, node)
        elif "object" in node:
            self._fill_instance(made, node)
        elif "tensor" in node:
            vars(made).update(self._attributes(node, made))
        elif "list" in node:
            made.extend(self._values.values(node["list"]))
        elif "set" in node:
            made.update(self._values.keys(self._values.values(node["set"])))
        elif "deque" in node:
            made.extend(self._values.values(node["deque"]))
        elif "dict" in node:
            if isinstance(made, collections.defaultdict):
                factory = self._values.value(node.get("factory"))
                if factory is not None and not callable(factory):
                    self._bad("a factory expected", f"it is {glimpse(node.get('factory'))}")
                made.default_factory = factory
            for key, value in self._values.pairs(node["dict"]):
                made[key] = value

    def _fill_module(self, module: nn.Module, node: dict[str, Any]) -> None:
        state = dict(vars(nn.Module()))
        state["training"] = bool(node.get("training", True))
        state["_modules"] = {
            name: self._values.member(place, nn.Module) for name, place in self._values.names(node, "children")
        }
        state["_parameters"] = {
            name: self._values.member(place, nn.Parameter) for name, place in self._values.names(node, "parameters")
        }
        state["_buffers"] = {
            name: self._values.member(place, torch.Tensor) for name, place in self._values.names(node, "buffers")
        }
        hidden = node.get("non_persistent", [])
        if not isinstance(hidden, list) or not all(isinstance(name, str) for name in hidden):
            self._bad("non_persistent expected to be a list of names", f"it is {glimpse(hidden)}")
        state["_non_persistent_buffers_set"] = set(hidden)
        attributes = self._attributes(node, module)
        taken = attributes.keys() & (INTERNAL | {"training"})
        if taken:
            self._bad("attributes of the module's own expected", f"{min(taken)!r} is torch's")
        state.update(attributes)
        if issubclass(type(module), nn.RNNBase):
            self._check_layers(state, node)
        self._set_state(module, state, nn.Module.__setstate__)

    def _check_layers(self, state: dict[str, Any], node: dict[str, Any]) -> None:
        """``RNNBase.__setstate__`` makes names for as many layers as it is told of, and each layer has a tensor at least."""
        held = [*state["_parameters"].values(), *state["_buffers"].values(), *state.values()]
        tensors = sum(issubclass(type(value), torch.Tensor) for value in held) + len(node.get("parametrized", ()))
        layers = state.get("num_layers", 0)
        if not issubclass(type(layers), (int, np.integer)) or layers > tensors:
            found = glimpse(node["attributes"]["num_layers"])
            self._bad(f"at most {tensors} layers expected, which has {tensors} tensors", f"num_layers is {found}")

    def _fill_instance(self, made: Any, node: dict[str, Any]) -> None:
        base = container_of(type(made))
        if "items" in node and issubclass(base, dict):
            for key, value in self._values.pairs(node["items"]):
                base.__setitem__(made, key, value)
        elif "elements" in node and base is list:
            list.extend(made, self._values.values(node["elements"]))
        elif "elements" in node and base is set:
            set.update(made, self._values.keys(self._values.values(node["elements"])))
        elif "items" in node or "elements" in node:
            self._bad("a container expected", f"a {type(made).__qualname__} with elements is none")
        if "attributes_are_items" in node:
            if not issubclass(base, dict):
                self._bad("a dict expected", f"it is {an(type(made).__qualname__)}")
            self._own_dict(made)
            for name, value in dict.items(made):
                self._check_attribute(made, name, value)
            object.__setattr__(made, "__dict__", made)
        elif "state" in node:
            state = self._values.value(node["state"])
            if issubclass(type(state), dict) and getattr(type(made), "__setstate__", None) is None:
                for name, value in dict.items(state):
                    self._check_attribute(made, name, value)
            self._set_state(made, state, None)
        else:
            self._set_state(made, self._attributes(node, made), None)

    def _set_state(self, made: Any, state: Any, default: Any) -> None:
        kind = type(made)
        own = getattr(kind, "__setstate__", None)
        if own is not None and own is not default:
            self._run(kind, "__setstate__", lambda: own(made, state))
            return
        if not issubclass(type(state), dict):
            self._bad(f"the state of a {kind.__qualname__} expected to be a dict", f"it is {an(type(state).__qualname__)}")
        for name, value in dict.items(state):
            slot = in_class(kind, name)
            if isinstance(slot, types.MemberDescriptorType):
                slot.__set__(made, value)
            else:
                self._own_dict(made, name)[name] = value

    def _own_dict(self, made: object, name: str = "__dict__") -> dict[str, Any]:
        kind = type(made)
        if not isinstance(in_class(kind, "__dict__"), types.GetSetDescriptorType):  # none, or a property of the class
            self._bad(f"attributes of a {kind.__qualname__} expected", f"{name!r} is none of its slots")
        return object.__getattribute__(made, "__dict__")  # type: ignore[no-any-return]

    def _attributes(self, node: dict[str, Any], owner: object) -> dict[str, Any]:
        made = {}
        for name, value in self._values.names(node, "attributes"):
            made[name] = self._values.value(value)
            self._check_attribute(owner, name, made[name])
        return made

    def _check_attribute(self, owner: object, name: object, value: Any) -> None:
        kind = type(owner)
        if type(name) is not str or is_dunder(name):
            found = glimpse(name) if type(name) is str else an(type(name).__qualname__)
            self._bad(f"attributes of a {kind.__qualname__} expected", f"{found} is no name of one")
        there = in_class(kind, name)
        if hasattr(type(there), "__set__") and not isinstance(there, types.MemberDescriptorType):
            self._bad(f"attributes of a {kind.__qualname__} expected", f"{name!r} is a property of its class")
        if shadows_method(owner, name, value):
            self._bad(f"attributes of a {kind.__qualname__} expected", f"{name!r} would take the place of its method")
