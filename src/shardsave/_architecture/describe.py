"""A module tree as data: what `save` writes beside the weights, so that the module can be built again without its code being run.

The document is one JSON object. ``objects`` is a table of all that has an identity (modules, tensors, lists, dicts, other
instances), so that what is shared is shared again and cycles are no matter; the first is the module itself. A value is a JSON
scalar, ``{"ref": number in the table}``, or an object with one tag (``{"tuple": […]}``, ``{"dtype": "float32"}``).
"""

from __future__ import annotations

import collections
import json
import pathlib
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from shardsave._architecture.kinds import HEAP_TYPE, container_of, own_getstate, shadows_method, slots_of
from shardsave._architecture.table import TableWriter
from shardsave._architecture.trust import is_dunder, version_of
from shardsave._common.memory import PLAIN_TYPES
from shardsave._format.dtypes import BY_TORCH
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.wrappers import plain_name, unwrap
from shardsave.errors import UnsupportedModuleError

FORMAT = "shardsave-architecture"

#: What the document calls dicts that are not plain ones.
DICT_TYPES: Mapping[str, type] = {
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
    "Counter": collections.Counter,
}

#: The attributes of every module that are not its own but torch's.
INTERNAL = frozenset(nn.Module().__dict__) - {"training"}

#: Of these hooks are kept: the module's own methods, and those by which torch.nn's own utilities compute a weight.
HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")

#: Where hooks are defined that only matter to weights which older versions of torch wrote.
_RENAMES_OLD_WEIGHTS = "torch.nn.utils.parametrizations"

_MADE_AT_RUN_TIME = {"ScriptModule": "TorchScript", "GraphModule": "a traced graph"}


def describe(module: nn.Module, extra: ExtraTensors) -> bytes:
    """The tree of ``module`` as data, in JSON; what it needs beside the weights is added to ``extra``.

    Warns of hooks that are not kept. Raises UnsupportedModuleError that lists all that cannot be kept.
    """
    writer = _Writer(extra)
    writer.describe(unwrap(module))
    if writer.refused:
        raise UnsupportedModuleError(f"cannot save the architecture: {'; '.join(writer.refused)}; nothing was written")
    if writer.dropped_hooks:
        warnings.warn(f"hooks are not kept in an architecture: {', '.join(writer.dropped_hooks)}", stacklevel=5)
    document = {
        "format": FORMAT,
        "version": 1,
        "requires": [],
        **({"script": script} if (script := _script_of(writer.imports)) else {}),
        "imports": {name: version_of(name) for name in sorted(writer.imports)},
        "objects": writer.objects,
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()


def _script_of(imports: Iterable[str]) -> str | None:
    """The script (or notebook) that classes of ``__main__`` are from."""
    if not any(name.startswith("__main__:") for name in imports):
        return None
    import sys

    return pathlib.PurePath(getattr(sys.modules["__main__"], "__file__", None) or "an interactive session").name


class _Writer(TableWriter):
    """Makes the table: modules, tensors, arrays, containers and instances."""

    def __init__(self, extra: ExtraTensors) -> None:
        super().__init__()
        self.dropped_hooks: list[str] = []
        self._extra = extra
        self._tables: list[tuple[type, Callable[[Any, str], Any]]] = [
            (nn.Module, self._module),
            (torch.Tensor, self._tensor),
            (np.ndarray, self._array),
        ]

    def describe(self, root: nn.Module) -> None:
        self._number(root, "model")
        while self._queue:
            number, thing, path = self._queue.popleft()
            write = next((write for kind, write in self._tables if isinstance(thing, kind)), self._container)
            self.objects[number] = write(thing, path)

    def _module(self, module: nn.Module, path: str) -> dict[str, Any]:
        kind, computed = type(module), ()
        if parametrize.is_parametrized(module):
            kind, computed = kind.__bases__[0], tuple(module.parametrizations)  # type: ignore[arg-type]
        for base in kind.__mro__:
            if base.__name__ in _MADE_AT_RUN_TIME and base.__module__.startswith("torch."):
                made = _MADE_AT_RUN_TIME[base.__name__]
                self._refuse(path, f"{made}, whose code was made at run time; save the module that it was made from")
                return {}
        given = own_getstate(kind)
        own = dict(vars(module)) if given is None else dict(given(module))
        own.update({slot: getattr(module, slot) for slot in slots_of(kind) if hasattr(module, slot)})
        name = self._import(kind, path)
        node: dict[str, Any] = {"module": name, "training": bool(module.training)}
        node["children"] = {
            child: None if part is None else self._number(unwrap(part), f"{path}.{child}")
            for child, part in own.pop("_modules").items()
        }
        for group in ("_parameters", "_buffers"):
            node[group[1:]] = {
                key: None if tensor is None else self._number(tensor, f"{path}.{key}") for key, tensor in own.pop(group).items()
            }
        node["non_persistent"] = sorted(own.pop("_non_persistent_buffers_set"))
        if computed:
            node["parametrized"] = list(computed)
        hooks = self._hooks(module, path)
        if hooks:
            node["hooks"] = hooks
        if kind.get_extra_state is not nn.Module.get_extra_state:
            node["extra_state"] = self._value(module.get_extra_state(), f"{path}.get_extra_state()")
        attributes = {key: value for key, value in own.items() if key not in INTERNAL and key != "training"}
        for key, value in attributes.items():
            if shadows_method(module, key, value):
                self._refuse(f"{path}.{key}", f"something set on the module in the place of its method {key}()")
        node["attributes"] = self._attributes(attributes, path)
        return {key: value for key, value in node.items() if value not in ({}, []) or key == "module"}

    def _attributes(self, attributes: Mapping[str, Any], path: str) -> dict[str, Any]:
        made = {}
        for key, value in attributes.items():
            if not isinstance(key, str) or is_dunder(key):
                self._refuse(f"{path}.{key}", "an attribute whose name is Python's own")
            else:
                made[key] = self._value(value, f"{path}.{key}")
        return made

    def _hooks(self, module: nn.Module, path: str) -> dict[str, list[Any]]:
        kept: dict[str, list[Any]] = {}
        for group in sorted(key for key in INTERNAL if key.endswith("_hooks")):
            for hook in getattr(module, group).values():
                with_module = getattr(hook, "with_module", False)
                hook = getattr(hook, "hook", hook)  # that of a state dict comes wrapped
                of_torch = type(hook).__module__.startswith("torch.nn.utils.")
                own_method = isinstance(hook, types.MethodType) and hook.__self__ is module
                if group in HOOKS and (of_torch or own_method):
                    kept.setdefault(group, []).append([self._value(hook, f"{path}.{group}"), with_module])
                elif getattr(hook, "__module__", "") != _RENAMES_OLD_WEIGHTS:
                    self.dropped_hooks.append(f"{path}: {group.strip('_').removesuffix('s').replace('_', ' ')} {_who(hook)}")
        return kept

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {"tensor": "", "kind": "tensor"}
        if isinstance(tensor, nn.Parameter):
            node["kind"] = "parameter"
        elif type(tensor) in PLAIN_TYPES and type(tensor) is not torch.Tensor:
            node["kind"] = "buffer"
        if type(tensor) not in PLAIN_TYPES or tensor.dtype not in BY_TORCH:
            what = type(tensor).__name__ if type(tensor) not in PLAIN_TYPES else f"a tensor of {tensor.dtype}"
            self._refuse(path, f"{what}, which the files cannot hold")
            return node
        for group in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(tensor, group, None) or {}).values():
                self.dropped_hooks.append(f"{path}: tensor hook {_who(hook)}")
        node["tensor"], kept = self._extra.place(tensor, plain_name(path.partition(".")[2]))
        if kept:
            node["kept"] = True
        if tensor.requires_grad and tensor.is_leaf:
            node["requires_grad"] = True
        if tensor.layout is torch.strided and not tensor.is_contiguous() and _dense(tensor):
            node["strides"] = list(tensor.stride())
        if vars(tensor) and isinstance(tensor, nn.Parameter):
            node["attributes"] = self._attributes(vars(tensor), path)
        return node

    def _array(self, array: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        try:
            tensor = torch.from_numpy(array.copy())
        except TypeError:
            self._refuse(path, f"an array of {array.dtype}, which the files cannot hold")
            return {}
        self._alive.append(tensor)
        name, _ = self._extra.place(tensor, path.partition(".")[2])
        return {"array": name}

    def _container(self, thing: Any, path: str) -> dict[str, Any]:
        kind = type(thing)
        if kind is list:
            return {"list": self._values(thing, path)}
        if kind is set:
            return {"set": self._keys(thing, path)}
        if kind is collections.deque:
            return {"deque": self._values(thing, path), "maxlen": thing.maxlen}
        if kind is dict:
            return {"dict": self._pairs(thing, path)}
        for name, known in DICT_TYPES.items():
            if kind is known:
                node: dict[str, Any] = {"dict": self._pairs(thing, path), "type": name}
                if isinstance(thing, collections.defaultdict):
                    node["factory"] = self._value(thing.default_factory, f"{path}.default_factory")
                return node
        return self._instance(thing, path)

    def _instance(self, thing: Any, path: str) -> dict[str, Any]:
        """An instance of a class in Python, whose state are its attributes, as pickle sees it."""
        kind = type(thing)
        base = container_of(kind)
        plain = (
            all(getattr(kind, name) is getattr(base, name) for name in ("__reduce_ex__", "__reduce__"))
            and not hasattr(kind, "__getnewargs_ex__")
            and not hasattr(kind, "__getnewargs__")
            and kind.__flags__ & HEAP_TYPE
            and kind.__basicsize__ <= type("Plain", (base,), {}).__basicsize__ + 8 * len(slots_of(kind))
        )
        if not plain:
            self._refuse(path, f"a {kind.__module__}.{kind.__qualname__}, which cannot be kept as data")
            return {}
        node: dict[str, Any] = {"object": self._import(kind, path)}
        if issubclass(base, dict):
            node["items"] = self._pairs(dict(base.items(thing)), path)
        elif base is list:
            node["elements"] = self._values(list.__iter__(thing), path)
        elif base is set:
            node["elements"] = self._keys(set.__iter__(thing), path)
        if (given := own_getstate(kind)) is not None:
            node["state"] = self._value(given(thing), f"{path}.__getstate__()")
            return node
        if (own := getattr(thing, "__dict__", {})) is thing:  # a dict whose items are its attributes too
            node["attributes_are_items"] = True
            return node
        attributes = dict(own)
        attributes.update({slot: getattr(thing, slot) for slot in slots_of(kind) if hasattr(thing, slot)})
        node["attributes"] = self._attributes(attributes, path)
        return node


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without a gap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _who(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
