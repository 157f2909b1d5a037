"""Builds the module that an architecture document describes. Calls nothing that the document chooses.

Instances are created without ``__init__``, and their attributes are set directly, so that no setter and no property runs. Only a class
that is trusted by its exact name runs code: its ``__setstate__`` and ``set_extra_state``. ``isinstance`` and ``vars`` are not called on
a built object, because they would run its ``__class__`` and ``__getattribute__``.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from shardsave._architecture.class_checks import (
    bases_of,
    class_attribute,
    container_base,
    instance_dict,
    owner_of,
    shadows_method,
    title,
)
from shardsave._architecture.document import DICT_TYPES, TORCH_ATTRIBUTES, Document
from shardsave._architecture.hooks import attach_hooks, attach_parametrizations, computed_tensors
from shardsave._architecture.imports import Imports
from shardsave._architecture.names import dotted, is_dunder
from shardsave._architecture.read_values import ValueReader
from shardsave._architecture.states import REVIEWED_STATES, Unfit
from shardsave._architecture.trust import version_in_words
from shardsave._architecture.uses import Use
from shardsave._common.strict_json import glimpse
from shardsave._common.words import an
from shardsave.errors import IncompatibleCheckpointError, ShardSaveError

#: ``memory(name, kept, strides, on_host)`` returns a new tensor for the stored tensor ``name``, to be filled later. ``kept``: the
#: tensor is one of the extra tensors. Returns None if there is no such tensor, or if the strides do not fit its shape.
Memory = Callable[[str, bool, "list[int] | None", bool], "torch.Tensor | None"]


class Builder:
    """Builds the objects of a document: first creates all of them empty, then fills them, from the last one to the first."""

    def __init__(self, document: Document, imports: Imports, memory: Memory) -> None:
        self._document = document
        self._refuse = document.refuse
        self._imports = imports
        self._memory = memory
        self._values = ValueReader(document, imports)
        self._extra_states: list[tuple[nn.Module, type, Any]] = []

    def build(self) -> nn.Module:
        """Builds the module. Its tensors are not filled yet."""
        nodes = self._document.objects
        try:
            self._values.objects = [self._new(node) for node in nodes]
            values_and_nodes = list(zip(self._values.objects, nodes))
            for value, node in reversed(values_and_nodes):
                self._fill(value, node)
            self._attach([(value, node) for value, node in values_and_nodes if issubclass(type(value), nn.Module)])
        except RecursionError:
            self._refuse("values that are nested less deeply expected", "they are nested too deeply")
        root = self._values.objects[0]
        if not issubclass(type(root), nn.Module):
            self._refuse("a module expected at the root", f"it is {an(title(type(root)))}")
        return root  # type: ignore[no-any-return]

    def set_extra_states(self) -> None:
        """Calls ``set_extra_state`` of modules that have one. Tensors must be filled by then, as in ``load_state_dict``."""
        for module, kind, state in self._extra_states:
            self._run(kind, "set_extra_state", lambda: module.set_extra_state(state))

    def _attach(self, modules: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        for module, node in modules:
            attach = functools.partial(attach_hooks, module, node, self._document, self._values)
            self._run(type(module), "registering hooks", attach)
            if "extra_state" in node:
                self._values.class_of(node["module"], nn.Module, Use.EXTRA_STATE)
                self._extra_states.append((module, type(module), self._values.value(node["extra_state"])))
        for module, node in modules:  # last, because this changes the class of a module
            if names := computed_tensors(module, node, self._document):
                self._values.class_of(node["module"], nn.Module, Use.COMPUTED)
                self._run(type(module), "__init_subclass__", functools.partial(attach_parametrizations, module, names))

    def _run(self, kind: type, name: str, action: Callable[[], Any]) -> None:
        """Runs ``action``, which calls ``name`` of the class ``kind``. Its exceptions become IncompatibleCheckpointError."""
        try:
            action()
        except ShardSaveError:
            raise
        except Exception as error:
            class_name = next(iter(self._imports.names_of(kind)), title(kind))
            version = version_in_words(self._document.imports.get(class_name))
            raise IncompatibleCheckpointError(
                f"cannot build {self._document.where}: {name} of {dotted(class_name)} was expected to accept what was saved with "
                f"{version}, it raised {type(error).__name__}: {' '.join(str(error).split())}; nothing was built"
            ) from error

    # -- New, empty objects.

    def _new(self, node: dict[str, Any]) -> Any:
        if "module" in node:
            return self._new_instance(node["module"], nn.Module, Use.MODULE)
        if "object" in node:
            return self._new_instance(node["object"], object, Use.OBJECT)
        if "tensor" in node:
            return self._new_tensor(node)
        if "array" in node:
            return self._new_array(node["array"])
        if "list" in node:
            return []
        if "set" in node:
            return set()
        if "deque" in node:
            maxlen = node.get("maxlen")
            if maxlen is not None and (type(maxlen) is not int or not 0 <= maxlen <= sys.maxsize):
                self._refuse("maxlen expected to be a number", f"it is {glimpse(maxlen)}")
            return collections.deque(maxlen=maxlen)
        if "dict" in node:
            kind = node.get("type", "dict")
            if not isinstance(kind, str) or (kind != "dict" and kind not in DICT_TYPES):
                self._refuse(f"a dict or one of {', '.join(DICT_TYPES)} expected", f"it is {glimpse(kind)}")
            return DICT_TYPES.get(kind, dict)()
        self._refuse("an object of a known kind expected", f"it is {glimpse(node)}")

    def _new_instance(self, name: object, base: type, use: Use) -> Any:
        kind = self._values.class_of(name, base, use)
        if base is object and issubclass(kind, (nn.Module, type, Enum, BaseException)):
            self._refuse("an instance of a plain class expected", f"{dotted(str(name))} is not one")
        new: Any = container_base(kind).__new__
        try:
            return new(kind)
        except TypeError:
            self._refuse("an instance of a class written in Python expected", f"{dotted(str(name))} is not one")

    def _new_tensor(self, node: dict[str, Any]) -> torch.Tensor:
        kind, requires_grad = node.get("kind"), node.get("requires_grad", False)
        if kind not in ("parameter", "buffer", "tensor") or not isinstance(requires_grad, bool):
            self._refuse("a parameter, a buffer or a tensor expected", f"it is {glimpse(node)}")
        strides = node.get("strides")
        tensor = self._new_memory(node["tensor"], bool(node.get("kept")), strides)
        if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            self._refuse(f"{glimpse(node['tensor'])} expected not to require grad", f"it does, with dtype {tensor.dtype}")
        if kind == "parameter":
            return nn.Parameter(tensor, requires_grad=requires_grad)
        if kind == "buffer":
            return nn.Buffer(tensor)
        return tensor.requires_grad_(requires_grad)

    def _new_array(self, name: object) -> Any:
        tensor = self._new_memory(name, True, None, on_host=True)
        try:
            return tensor.numpy()
        except TypeError:
            self._refuse(f"{glimpse(name)} expected to have a dtype that numpy has", f"it has {tensor.dtype}")

    def _new_memory(self, name: object, kept: bool, strides: Any, on_host: bool = False) -> torch.Tensor:
        if not isinstance(name, str):
            self._refuse("the name of a tensor expected", f"it is {glimpse(name)}")
        if strides is not None and not (isinstance(strides, list) and all(type(s) is int and s >= 0 for s in strides)):
            self._refuse("strides expected to be a list of numbers", f"they are {glimpse(strides)}")
        tensor = self._memory(name, kept, strides, on_host)
        if tensor is None:
            self._refuse(
                f"tensor {glimpse(name)} expected in the checkpoint", "it is missing, or its shape does not allow the strides"
            )
        return tensor

    # -- Their contents.

    def _fill(self, value: Any, node: dict[str, Any]) -> None:
        if "module" in node:
            self._fill_module(value, node)
        elif "object" in node:
            self._fill_instance(value, node)
        elif "tensor" in node:
            vars(value).update(self._attributes(node, value))
        elif "list" in node:
            value.extend(self._values.values(node["list"]))
        elif "set" in node:
            value.update(self._values.keys(self._values.values(node["set"])))
        elif "deque" in node:
            value.extend(self._values.values(node["deque"]))
        elif "dict" in node:
            if isinstance(value, collections.defaultdict):
                factory = self._values.value(node.get("factory"))
                if factory is not None and not callable(factory):
                    self._refuse("a callable factory expected", f"it is {glimpse(node.get('factory'))}")
                value.default_factory = factory
            for key, item in self._values.pairs(node["dict"]):
                value[key] = item

    def _fill_module(self, module: nn.Module, node: dict[str, Any]) -> None:
        state = dict(vars(nn.Module()))
        state["training"] = bool(node.get("training", True))
        for group, attribute, kind in (
            ("children", "_modules", nn.Module),
            ("parameters", "_parameters", nn.Parameter),
            ("buffers", "_buffers", torch.Tensor),
        ):
            members = self._values.named_items(node, group)
            state[attribute] = {name: self._values.member(number, kind) for name, number in members}
        non_persistent = node.get("non_persistent", [])
        if not isinstance(non_persistent, list) or not all(isinstance(name, str) for name in non_persistent):
            self._refuse("non_persistent expected to be a list of names", f"it is {glimpse(non_persistent)}")
        state["_non_persistent_buffers_set"] = set(non_persistent)
        attributes = self._attributes(node, module)
        reserved = attributes.keys() & (TORCH_ATTRIBUTES | {"training"})
        if reserved:
            self._refuse("attributes of the module itself expected", f"{min(reserved)!r} is one of torch's")
        state.update(attributes)
        if issubclass(type(module), nn.RNNBase):
            self._check_layers(state, node)
        self._set_state(module, state)

    def _check_layers(self, state: dict[str, Any], node: dict[str, Any]) -> None:
        """Refuses a ``num_layers`` above the number of tensors, because each layer has at least one.

        A ``__setstate__`` that calls the one of ``nn.RNNBase`` creates names for that many layers, however large the number is.
        """
        members = [*state["_parameters"].values(), *state["_buffers"].values(), *state.values()]
        tensors = sum(issubclass(type(value), torch.Tensor) for value in members) + len(node.get("parametrized", ()))
        layers = state.get("num_layers", 0)
        if not (type(layers) is int or issubclass(type(layers), np.integer)) or layers > tensors:
            shown = glimpse(node["attributes"]["num_layers"])
            self._refuse(f"num_layers expected to be at most {tensors}, the number of tensors", f"it is {shown}")

    def _fill_instance(self, instance: Any, node: dict[str, Any]) -> None:
        kind = type(instance)
        base = container_base(kind)
        if "items" in node and issubclass(base, dict):
            for key, value in self._values.pairs(node["items"]):
                base.__setitem__(instance, key, value)
        elif "elements" in node and base is list:
            list.extend(instance, self._values.values(node["elements"]))
        elif "elements" in node and base is set:
            set.update(instance, self._values.keys(self._values.values(node["elements"])))
        elif "items" in node or "elements" in node:
            self._refuse("a container for items or elements expected", f"it is {an(title(kind))}")
        if "attributes_are_items" in node:
            if not issubclass(base, dict):
                self._refuse("a dict expected", f"it is {an(title(kind))}")
            self._dict_of(instance)
            for name, value in dict.items(instance):
                self._check_attribute(instance, name, value)
            object.__setattr__(instance, "__dict__", instance)
        elif "state" in node:
            state = self._values.value(node["state"])
            if issubclass(type(state), dict) and owner_of(kind, "__setstate__") is None:
                for name, value in dict.items(state):
                    self._check_attribute(instance, name, value)
            self._set_state(instance, state)
        else:
            self._set_state(instance, self._attributes(node, instance))

    def _set_state(self, instance: Any, state: Any) -> None:
        """Sets slots and attributes directly, or calls a ``__setstate__`` of the class, which then is trusted by its exact name."""
        kind = type(instance)
        owner = owner_of(kind, "__setstate__")
        if owner is not None and owner not in REVIEWED_STATES:
            self._run(kind, "__setstate__", lambda: class_attribute(kind, "__setstate__").__get__(instance, kind)(state))
            return
        if not issubclass(type(state), dict):
            self._refuse(f"the state of {an(title(kind))} expected to be a dict", f"it is {an(title(type(state)))}")
        if owner is not None:
            try:
                REVIEWED_STATES[owner](state)
            except Unfit as problem:
                self._refuse(problem.wanted, problem.found)
        for name, value in dict.items(state):
            slot = class_attribute(kind, name)
            if type(slot) is types.MemberDescriptorType and slot.__objclass__ in bases_of(kind):
                slot.__set__(instance, value)
            else:
                self._dict_of(instance, name)[name] = value

    def _dict_of(self, instance: object, name: str = "__dict__") -> dict[str, Any]:
        own = instance_dict(instance)
        if own is None:
            self._refuse(f"attributes of {an(title(type(instance)))} expected", f"{name!r} is not one of its slots")
        return own

    def _attributes(self, node: dict[str, Any], owner: object) -> dict[str, Any]:
        attributes = {}
        for name, value in self._values.named_items(node, "attributes"):
            attributes[name] = self._values.value(value)
            self._check_attribute(owner, name, attributes[name])
        return attributes

    def _check_attribute(self, owner: object, name: object, value: Any) -> None:
        kind = type(owner)
        if type(name) is not str or is_dunder(name):
            shown = glimpse(name) if type(name) is str else an(title(type(name)))
            self._refuse(f"names of attributes of {an(title(kind))} expected", f"one is {shown}")
        in_class = class_attribute(kind, name)
        if owner_of(type(in_class), "__set__") is not None and type(in_class) is not types.MemberDescriptorType:
            self._refuse(f"attributes of {an(title(kind))} expected", f"{glimpse(name)} is a property of its class")
        if shadows_method(owner, name, value):
            self._refuse(f"attributes of {an(title(kind))} expected", f"{glimpse(name)} would replace its method")
