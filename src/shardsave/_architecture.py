"""A module tree as data: what `save` writes beside the weights, so that the module can be built again without its code being run.

The document is one JSON object. ``objects`` is a table of all that has an identity (modules, tensors, lists, dicts, other
instances), so that what is shared is shared again and cycles are no matter; the first is the module itself. A value is a JSON
scalar, ``{"ref": number in the table}``, or an object with one tag (``{"tuple": […]}``, ``{"dtype": "float32"}``).
"""

from __future__ import annotations

import base64
import collections
import enum
import functools
import json
import math
import pathlib
import reprlib
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from shardsave._dtypes import BY_TORCH
from shardsave._extra_tensors import ExtraTensors
from shardsave._imports import is_dunder, name_of, version_of
from shardsave._json import MAX_DIGITS
from shardsave._state import PLAIN_TYPES, plain_name, unwrap
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

#: Tuples and other values that have no place in the table, inside of each other.
_MAX_DEPTH = 100

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
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


class _Writer:
    """Makes the table. Work waits in a queue, so that no depth of a model reaches the depth of Python's stack."""

    def __init__(self, extra: ExtraTensors) -> None:
        self.objects: list[Any] = []
        self.imports: set[str] = set()
        self.refused: list[str] = []
        self.dropped_hooks: list[str] = []
        self._depth = 0
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # an id is that of one object only while the object lives
        self._queue: collections.deque[tuple[int, Any, str]] = collections.deque()
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

    def _number(self, thing: Any, path: str) -> int:
        number = self._numbers.get(id(thing))
        if number is None:
            number = self._numbers[id(thing)] = len(self.objects)
            self._alive.append(thing)
            self.objects.append(None)
            self._queue.append((number, thing, path))
        return number

    def _refuse(self, path: str, found: str) -> None:
        self.refused.append(f"{path}: {found}")

    def _import(self, thing: Any, path: str) -> str:
        name = name_of(thing)
        if name is None:
            self._refuse(path, _nameless(thing))
            return ""
        self.imports.add(name)
        return name

    # -- what has an identity

    def _module(self, module: nn.Module, path: str) -> dict[str, Any]:
        kind, computed = type(module), ()
        if parametrize.is_parametrized(module):
            kind, computed = kind.__bases__[0], tuple(module.parametrizations)  # type: ignore[arg-type]
        for base in kind.__mro__:
            if base.__name__ in _MADE_AT_RUN_TIME and base.__module__.startswith("torch."):
                made = _MADE_AT_RUN_TIME[base.__name__]
                self._refuse(path, f"{made}, whose code was made at run time; save the module that it was made from")
                return {}
        given = _own_getstate(kind)
        own = dict(vars(module)) if given is None else dict(given(module))
        own.update({slot: getattr(module, slot) for slot in _slots(kind) if hasattr(module, slot)})
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
            and kind.__flags__ & _HEAP_TYPE
            and kind.__basicsize__ <= type("Plain", (base,), {}).__basicsize__ + 8 * len(_slots(kind))
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
        if (given := _own_getstate(kind)) is not None:
            node["state"] = self._value(given(thing), f"{path}.__getstate__()")
            return node
        if (own := getattr(thing, "__dict__", {})) is thing:  # a dict whose items are its attributes too
            node["attributes_are_items"] = True
            return node
        attributes = dict(own)
        attributes.update({slot: getattr(thing, slot) for slot in _slots(kind) if hasattr(thing, slot)})
        node["attributes"] = self._attributes(attributes, path)
        return node

    # -- values

    def _values(self, things: Iterable[Any], path: str) -> list[Any]:
        return [self._value(thing, f"{path}[{place}]") for place, thing in enumerate(things)]

    def _pairs(self, things: Mapping[Any, Any], path: str) -> list[list[Any]]:
        keys = self._keys(things, path)
        return [[key, self._value(value, f"{path}[{_short(name)}]")] for key, (name, value) in zip(keys, things.items())]

    def _keys(self, things: Iterable[Any], path: str) -> list[Any]:
        """What can be looked up by its value alone: an object is another one when it is built again."""
        made = []
        for thing in things:
            if not is_key(thing):
                self._refuse(path, f"a key or element {_short(thing)}, which is looked up by what it is and not by its value")
                continue
            made.append(self._value(thing, f"{path}, a key"))
        return made

    def _value(self, thing: Any, path: str) -> Any:
        if self._depth == _MAX_DEPTH:
            self._refuse(path, f"values nested more than {_MAX_DEPTH} deep, each one inside of another")
            return None
        self._depth += 1
        try:
            return self._written(thing, path)
        finally:
            self._depth -= 1

    def _written(self, thing: Any, path: str) -> Any:
        kind = type(thing)
        if thing is None or kind is bool:
            return thing
        if kind is str:
            return self._text(thing, path)
        if kind is int:
            if abs(thing) >= 10**MAX_DIGITS:
                self._refuse(path, f"a number of more than {MAX_DIGITS} digits")
            return thing
        if kind is float:
            return thing if math.isfinite(thing) else {"float": repr(thing)}
        simple = _SIMPLE.get(kind)
        if simple is not None:
            tag, value = simple
            return {tag: value(thing)}
        if kind is frozenset:
            return {"frozenset": self._keys(thing, path)}
        if kind in (tuple, torch.Size):
            return {"size" if kind is torch.Size else "tuple": self._values(thing, path)}
        if kind is slice:
            return {"slice": self._values((thing.start, thing.stop, thing.step), path)}
        if kind is functools.partial:
            call = [self._value(thing.func, f"{path}.func"), self._values(thing.args, path), self._pairs(thing.keywords, path)]
            return {"partial": call}
        return self._named(thing, path)

    def _named(self, thing: Any, path: str) -> Any:
        """What is named rather than described: classes, functions, members of an enum, methods; all else goes to the table."""
        if isinstance(thing, enum.Flag):
            return {"flag": [self._import(type(thing), path), thing.value]}
        if isinstance(thing, enum.Enum):
            if thing.name not in type(thing).__members__:
                self._refuse(path, f"{thing!r}, which has no name in its enum")
            return {"enum": [self._import(type(thing), path), thing.name]}
        if isinstance(thing, (type, *_FUNCTIONS)):
            return {"import": self._import(thing, path)}
        if isinstance(thing, types.MethodType):
            own = next(
                (vars(base)[thing.__name__] for base in type(thing.__self__).__mro__ if thing.__name__ in vars(base)), None
            )
            if own is not thing.__func__:
                self._refuse(path, f"the method {thing.__name__}, which its class does not have; define it in the class")
                return None
            if vars(nn.Module).get(thing.__name__) is None and not is_dunder(thing.__name__):
                return {"method": [self._value(thing.__self__, path), thing.__name__]}
            self._refuse(path, f"the method {thing.__name__} of every module")
            return None
        if isinstance(thing, tuple) and hasattr(thing, "_fields"):
            return {"namedtuple": [self._import(type(thing), path), self._values(thing, path)]}
        if isinstance(thing, np.generic) and thing.dtype.kind in "biuf" and thing.dtype.itemsize <= 8:
            return {"scalar": [thing.dtype.name, self._value(thing.item(), path)]}
        if isinstance(thing, nn.Module):
            thing = unwrap(thing)
        return {"ref": self._number(thing, path)}

    def _text(self, text: str, path: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse(path, "text with half of a surrogate pair")
        return text


_SIMPLE: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
    complex: ("complex", lambda value: [repr(value.real), repr(value.imag)]),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
    range: ("range", lambda value: [value.start, value.stop, value.step]),
    type(...): ("ellipsis", lambda value: True),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    torch.layout: ("layout", lambda value: str(value).removeprefix("torch.")),
    torch.memory_format: ("memory_format", lambda value: str(value).removeprefix("torch.")),
    pathlib.PosixPath: ("path", str),
}

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_CONTAINERS = (collections.OrderedDict, dict, list, set)
_KEYS = (type(None), bool, int, float, str, bytes, complex, range, pathlib.PurePath, torch.dtype, torch.device, enum.Enum, type,
         *_FUNCTIONS, np.generic)  # fmt: skip


def container_of(kind: type) -> type:
    """The type of Python's own that ``kind`` gets its elements from; ``object`` where it has none."""
    return next((base for base in _CONTAINERS if issubclass(kind, base)), object)


def is_key(thing: object) -> bool:
    """Whether ``thing`` is looked up by its value, in a set or as the key of a dict."""
    if isinstance(thing, (tuple, frozenset)):
        return all(map(is_key, thing))
    return isinstance(thing, _KEYS)


def shadows_method(owner: object, name: str, value: Any) -> bool:
    """Whether ``value``, set on ``owner``, would be called in the place of a method.

    A method of the object itself may be: some choose their ``forward`` so.
    """
    of_torch = isinstance(owner, nn.Module) and name in vars(nn.Module)
    if isinstance(value, types.MethodType) and value.__self__ is owner:
        return of_torch and name != "forward"
    there = getattr(type(owner), name, None)
    return callable(value) and (of_torch or (callable(there) and not isinstance(there, type)))


def _slots(kind: type) -> list[str]:
    return [
        name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, types.MemberDescriptorType)
    ]


def _own_getstate(kind: type) -> Callable[[Any], Any] | None:
    given = getattr(kind, "__getstate__", None)
    return given if given is not getattr(object, "__getstate__", None) else None


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without a gap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _nameless(thing: Any) -> str:
    if isinstance(thing, types.FunctionType):
        code = thing.__code__
        where = f"{pathlib.PurePath(code.co_filename).name}:{code.co_firstlineno}"
        if thing.__name__ == "<lambda>":
            return f"lambda at {where}; use a named function"
        return f"function {thing.__qualname__} at {where}, which cannot be imported; define it at the top of a module"
    if isinstance(thing, type):
        return f"class {thing.__module__}.{thing.__qualname__}, which cannot be imported; define it at the top of a module"
    return f"{thing!r}, which cannot be imported"


def _short(thing: object) -> str:
    return reprlib.repr(thing)


def _who(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
