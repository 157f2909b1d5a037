"""Writes the architecture document of a module. `save` stores it beside the weights; `build_model` rebuilds the module from it.

Only data is written: which class each module has, and its attributes, but none of its code. `document.py` describes the document.
"""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from shardsave._architecture.class_checks import HEAP_TYPE, container_base, own_getstate, shadows_method, slots_of
from shardsave._architecture.document import DICT_TYPES, FORMAT, HOOK_GROUPS, TORCH_ATTRIBUTES
from shardsave._architecture.names import is_dunder, version_of
from shardsave._architecture.trust import Lacking, Trust, all_lacking
from shardsave._architecture.uses import Uses
from shardsave._architecture.write_values import ValueWriter, in_order
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.warn_caller import warn_caller
from shardsave._format.dtypes import BY_TORCH
from shardsave._state.distributed_tensors import attributes_of, is_distributed
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.fsdp import attributes_without_fsdp, is_fsdp_hook
from shardsave._state.wrappers import plain_class, plain_name, unwrap
from shardsave.errors import UnsupportedModuleError

#: Hooks from this module of torch only rename weights that older versions of torch saved, so they need not be saved.
_RENAMES_OLD_WEIGHTS = "torch.nn.utils.parametrizations"

#: The attribute in which transformers keeps Python's hash of a GenerationConfig, to see whether that has changed. Another process has
#: another hash of the same texts, and takes a missing one as it would take that.
_OF_ONE_PROCESS = frozenset(["_original_object_hash"])

_GENERATED_CLASSES = {"ScriptModule": "TorchScript", "GraphModule": "a traced graph"}


class Description(NamedTuple):
    """``document``: the architecture document, as JSON. ``lacking``: what a build needs to be trusted."""

    document: bytes
    lacking: list[Lacking]


def describe(module: nn.Module, extra: ExtraTensors) -> Description:
    """Describes ``module``. Tensors that the document needs beside the weights are added to ``extra``.

    Warns of hooks that are not saved. Raises UnsupportedModuleError, which lists everything that cannot be saved.
    """
    writer = _ModuleWriter(extra)
    writer.describe(module)
    if writer.refused:
        raise UnsupportedModuleError(f"cannot save the architecture: {'; '.join(writer.refused)}; nothing was written")
    if writer.dropped_hooks:
        warn_caller(f"hooks are not saved with an architecture: {', '.join(writer.dropped_hooks)}")
    document = {
        "format": FORMAT,
        "version": 1,
        "requires": [],
        **({"script": script} if (script := _script_of(writer.imports)) else {}),
        "imports": {name: version_of(name) for name in sorted(writer.imports)},
        "objects": writer.objects,
    }
    lacking = all_lacking(Uses(writer.imports, writer.objects), Trust(), writer.imports)
    return Description(json.dumps(document, ensure_ascii=False, allow_nan=False).encode(), lacking)


def _script_of(imports: Iterable[str]) -> str | None:
    """The file name of the script that defines the classes of ``__main__``; None if ``imports`` has no such class."""
    if not any(name.startswith("__main__:") for name in imports):
        return None
    return pathlib.PurePath(getattr(sys.modules["__main__"], "__file__", None) or "an interactive session").name


class _ModuleWriter(ValueWriter):
    """Writes the table: modules, tensors, arrays, containers and instances."""

    def __init__(self, extra: ExtraTensors) -> None:
        super().__init__()
        self.dropped_hooks: list[str] = []
        self._extra = extra
        self._writers: list[tuple[type, Callable[[Any, str], Any]]] = [
            (nn.Module, self._module),
            (torch.Tensor, self._tensor),
            (np.ndarray, self._array),
        ]

    def describe(self, root: nn.Module) -> None:
        self._number(root, "model")
        while self._queue:
            number, value, path = self._queue.popleft()
            write = next((write for kind, write in self._writers if isinstance(value, kind)), self._container)
            self.objects[number] = write(value, path)

    def _module(self, module: nn.Module, path: str) -> dict[str, Any]:
        kind, computed = plain_class(type(module)), ()
        if parametrize.is_parametrized(module):
            kind, computed = plain_class(kind.__bases__[0]), tuple(module.parametrizations)  # type: ignore[arg-type]
        for base in kind.__mro__:
            if base.__name__ in _GENERATED_CLASSES and base.__module__.startswith("torch."):
                generated = _GENERATED_CLASSES[base.__name__]
                self._refuse(path, f"{generated}, whose code was generated at run time; save the original module")
                return {}
        getstate = own_getstate(kind)
        own = vars(module) if getstate is None else dict(getstate(module))
        state = attributes_without_fsdp(own) | _slot_values(module, kind)
        node: dict[str, Any] = {"module": self._import(kind, path), "training": bool(module.training)}
        node["children"] = {
            name: None if child is None else self._number(unwrap(child), f"{path}.{name}")
            for name, child in state.pop("_modules").items()
        }
        for group in ("parameters", "buffers"):
            node[group] = {
                name: None if tensor is None else self._number(tensor, f"{path}.{name}")
                for name, tensor in state.pop(f"_{group}").items()
            }
        node["non_persistent"] = sorted(state.pop("_non_persistent_buffers_set"))
        if computed:
            node["parametrized"] = list(computed)
        hooks = self._hooks(module, path)
        if hooks:
            node["hooks"] = hooks
        if kind.get_extra_state is not nn.Module.get_extra_state:
            node["extra_state"] = self._value(module.get_extra_state(), f"{path}.get_extra_state()")
        attributes = {name: value for name, value in state.items() if name not in TORCH_ATTRIBUTES and name != "training"}
        for name, value in attributes.items():
            if shadows_method(module, name, value):
                self._refuse(f"{path}.{name}", f"a value that was set on the module in place of its method {name}()")
        node["attributes"] = self._attributes(attributes, path)
        return {key: value for key, value in node.items() if value not in ({}, []) or key == "module"}

    def _attributes(self, attributes: Mapping[str, Any], path: str) -> dict[str, Any]:
        written = {}
        for name, value in attributes.items():
            if not isinstance(name, str) or is_dunder(name):
                self._refuse(f"{path}.{name}", "an attribute whose name Python reserves")
            else:
                written[name] = self._value(value, f"{path}.{name}")
        return written

    def _hooks(self, module: nn.Module, path: str) -> dict[str, list[Any]]:
        saved: dict[str, list[Any]] = {}
        for group in sorted(name for name in TORCH_ATTRIBUTES if name.endswith("_hooks")):
            for hook in itertools.filterfalse(is_fsdp_hook, getattr(module, group).values()):
                with_module = getattr(hook, "with_module", False)
                hook = getattr(hook, "hook", hook)  # torch wraps the hooks of a state dict
                of_torch = type(hook).__module__.startswith("torch.nn.utils.")
                own_method = isinstance(hook, types.MethodType) and hook.__self__ is module
                if group in HOOK_GROUPS and (of_torch or own_method):
                    saved.setdefault(group, []).append([self._value(hook, f"{path}.{group}"), with_module])
                elif getattr(hook, "__module__", "") != _RENAMES_OLD_WEIGHTS:
                    kind = group.strip("_").removesuffix("s").replace("_", " ")
                    self.dropped_hooks.append(f"{path}: {kind} {_name_of_hook(hook)}")
        return saved

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {"tensor": "", "kind": "tensor"}
        if isinstance(tensor, nn.Parameter):
            node["kind"] = "parameter"
        elif type(tensor) in PLAIN_TYPES and type(tensor) is not torch.Tensor:
            node["kind"] = "buffer"
        if not (type(tensor) in PLAIN_TYPES or is_distributed(tensor)) or tensor.dtype not in BY_TORCH:
            description = type(tensor).__name__ if type(tensor) not in PLAIN_TYPES else f"a tensor of {tensor.dtype}"
            self._refuse(path, f"{description}, which safetensors files cannot store")
            return node
        for group in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(tensor, group, None) or {}).values():
                self.dropped_hooks.append(f"{path}: tensor hook {_name_of_hook(hook)}")
        node["tensor"], kept = self._extra.place(tensor, plain_name(path.partition(".")[2]))
        if kept:
            node["kept"] = True
        if tensor.requires_grad and tensor.is_leaf:
            node["requires_grad"] = True
        if tensor.layout is torch.strided and not tensor.is_contiguous() and _is_dense(tensor):
            node["strides"] = list(tensor.stride())
        if isinstance(tensor, nn.Parameter) and (attributes := attributes_of(tensor)):
            node["attributes"] = self._attributes(attributes, path)
        return node

    def _array(self, array: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        try:
            tensor = torch.from_numpy(array.copy())
        except TypeError:
            self._refuse(path, f"an array of {array.dtype}, which safetensors files cannot store")
            return {}
        self._alive.append(tensor)
        name, _ = self._extra.place(tensor, path.partition(".")[2])
        return {"array": name}

    def _container(self, value: Any, path: str) -> dict[str, Any]:
        kind = type(value)
        if kind is list:
            return {"list": self._values(value, path)}
        if kind is set:
            return {"set": self._keys(in_order(value), path)}
        if kind is collections.deque:
            return {"deque": self._values(value, path), "maxlen": value.maxlen}
        if kind is dict:
            return {"dict": self._pairs(value, path)}
        for name, dict_type in DICT_TYPES.items():
            if kind is dict_type:
                node: dict[str, Any] = {"dict": self._pairs(value, path), "type": name}
                if isinstance(value, collections.defaultdict):
                    node["factory"] = self._value(value.default_factory, f"{path}.default_factory")
                return node
        return self._instance(value, path)

    def _instance(self, instance: Any, path: str) -> dict[str, Any]:
        """An instance of a class written in Python: its attributes, or the state that its ``__getstate__`` returns."""
        kind = type(instance)
        base = container_base(kind)
        plain = (
            all(getattr(kind, name) is getattr(base, name) for name in ("__reduce_ex__", "__reduce__"))
            and not hasattr(kind, "__getnewargs_ex__")
            and not hasattr(kind, "__getnewargs__")
            and kind.__flags__ & HEAP_TYPE
            and kind.__basicsize__ <= type("Plain", (base,), {}).__basicsize__ + 8 * len(slots_of(kind))
        )
        if not plain:
            self._refuse(path, f"a {kind.__module__}.{kind.__qualname__}, which cannot be saved as data")
            return {}
        node: dict[str, Any] = {"object": self._import(kind, path)}
        if issubclass(base, dict):
            node["items"] = self._pairs(dict(base.items(instance)), path)
        elif base is list:
            node["elements"] = self._values(list.__iter__(instance), path)
        elif base is set:
            node["elements"] = self._keys(in_order(set.__iter__(instance)), path)
        if (getstate := own_getstate(kind)) is not None:
            node["state"] = self._value(getstate(instance), f"{path}.__getstate__()")
        elif (attributes := getattr(instance, "__dict__", {})) is instance:
            node["attributes_are_items"] = True  # a dict that is its own __dict__
        else:
            own = dict(attributes) | _slot_values(instance, kind)
            node["attributes"] = self._attributes({name: own[name] for name in own if name not in _OF_ONE_PROCESS}, path)
        return node


def _slot_values(instance: Any, kind: type) -> dict[str, Any]:
    """The values of ``__slots__``, which ``vars`` does not contain."""
    return {slot: getattr(instance, slot) for slot in slots_of(kind) if hasattr(instance, slot)}


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _name_of_hook(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
