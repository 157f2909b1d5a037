"""What the pickle in a file of ``torch.save`` says of its tensors, as descriptions: which storage, which part of it, which dtype."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from shardsave._foreign.pickled_arrays import ARRAY_NAMES
from shardsave._foreign.records import PLAIN_TYPES, Forbidden, GlobalName, Inert, Record, Sequence, is_harmless, record_class

#: Names of storage types → the dtype of their elements.
_STORAGE_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
        "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
        "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
        "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2",
        "QUInt2x4Storage": "quint2x4",
    }.items()
}  # fmt: skip

#: A persistent id in protocol 0, which writes it as text.
_TEXT_ID = re.compile(r"\('storage', <class 'torch\.(?:storage\.)?(\w+)'>, '([^']+)', '[^']*', (\d+)(, None)?\)")


#: How many different names a pickle may have. Each becomes a class, which takes a kilobyte.
_MAX_NAMES = 10_000


class StorageType(NamedTuple):
    """A storage class of torch, as an argument in a pickle."""

    dtype: torch.dtype


class Storage(NamedTuple):
    """The storage ``key`` of a file, of ``nbytes``, from its byte ``begin`` on. ``location`` is the device that it was on."""

    key: str
    dtype: torch.dtype
    nbytes: int
    location: str
    begin: int = 0


class Described(NamedTuple):
    """A strided tensor. ``offset`` and ``strides`` count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False


class Allowed:
    """Names that the pickles of a source may have by request; remembers which of them they have."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = tuple(names)
        self._used: set[str] = set()

    def allows(self, name: str) -> bool:
        if name not in self._names:
            return False
        self._used.add(name)
        return True

    def notes(self) -> tuple[str, ...]:
        """A note for each name that no pickle has, which is most likely a typing mistake."""
        return tuple(f"allow={name!r} matched no name" for name in self._names if name not in self._used)


class Names:
    """The global names of one file. ``unknown``: those that are no tensors, usual values, or ``allowed``; they became records too.

    With ``every``, every name is allowed.
    """

    def __init__(self, allowed: Allowed | None = None, *, every: bool = False) -> None:
        self.unknown: dict[str, None] = {}
        self._allowed = allowed or Allowed()
        self._every = every
        self._known: dict[GlobalName, Any] = {}

    def find(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            if len(self._known) >= _MAX_NAMES:
                raise Forbidden(f"has more than {_MAX_NAMES} different names")
            self._known[module, name] = self._make(module, name)
        return self._known[module, name]

    def has_plain_storages(self) -> bool:
        """Whether the pickle has storages as `pickle.dump` writes them, and `torch.save` does not."""
        return ("torch.storage", "_load_from_bytes") in self._known

    def _make(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return StorageType(_STORAGE_DTYPES[name])
        is_allowed = self._allowed.allows(f"{module}.{name}") or self._every
        if not is_allowed and not is_harmless(module, name):
            self.unknown[f"{module}.{name}"] = None
        return record_class(module, name)


def storage_of(saved_id: Any) -> Storage:
    """The storage that a persistent id of ``torch.save`` describes."""
    if isinstance(saved_id, str) and (text := _TEXT_ID.fullmatch(saved_id)) is not None:
        saved_id = ("storage", StorageType(_STORAGE_DTYPES[text[1]]), text[2], "", int(text[3]), None)
    kind, storage_type, key, location, elements, *rest = saved_id
    view = rest[0] if rest else None  # only in torch's old format: key, offset and size of a part of the storage
    if kind != "storage" or not isinstance(storage_type, StorageType) or not _are_sizes((elements,)):
        raise Forbidden("refers to something else than a storage")
    size = storage_type.dtype.itemsize
    if view is None:
        return Storage(str(key), storage_type.dtype, elements * size, str(location))
    _, offset, length = view
    if not _are_sizes((offset, length)) or offset + length > elements:
        raise Forbidden("refers to a part outside of its storage")
    return Storage(str(key), storage_type.dtype, elements * size, str(location), offset * size)


def _call(function: Callable[..., Any]) -> type[Inert]:
    """A class that returns ``function(*arguments)`` when it is called: a pickle cannot change a class below `Inert`."""
    return type(function.__name__, (Inert,), {"__new__": lambda cls, *arguments: function(*arguments)})


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Described:
    """``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``; the rest is requires_grad, hooks, and the bits conj and neg."""
    metadata = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    return _described(storage, storage.dtype, offset, shape, strides, metadata)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Described:
    return _described(storage, dtype, offset, shape, strides, rest[0] if rest and isinstance(rest[0], dict) else {})


def _described(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, bits: dict[Any, Any]) -> Described:
    valid = (
        isinstance(storage, Storage)
        and isinstance(dtype, torch.dtype)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
    )
    if not valid or len(shape) != len(strides) or not _are_sizes((offset, *shape, *strides)):
        raise Forbidden("describes a tensor that cannot be")
    return Described(storage, dtype, offset, shape, strides, bits.get("conj") is True, bits.get("neg") is True)


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


class WithAttributes(Inert):
    """A tensor with attributes, or of a subclass that is called ``subclass``. ``tensor`` may be a description; so may attributes."""

    def __init__(self, tensor: Any, state: Any, subclass: str | None = None) -> None:
        self.tensor, self.subclass = tensor, subclass
        states = state if isinstance(state, tuple) else (state,)  # the second one has the slots of a class
        self.states = tuple(state for state in states if state)


def _same(tensor: Any, *rest: Any) -> Any:
    """``_rebuild_parameter`` and the like: the tensor with a freeze flag or hooks, which no file of weights has."""
    return tensor


def _parameter(tensor: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    """``torch._utils._rebuild_parameter_with_state``."""
    return WithAttributes(tensor, state) if state else tensor


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor of a subclass, or with attributes. ``kind`` of a subclass is a record."""
    tensor = function(*arguments) if isinstance(function, type) and issubclass(function, Inert) else None
    if not isinstance(tensor, (Described, torch.Tensor, WithAttributes)):
        raise Forbidden("describes a tensor that cannot be")
    if kind in _TENSOR_TYPES:
        return WithAttributes(tensor, state) if state else tensor
    if not isinstance(kind, type) or not issubclass(kind, Record):
        raise Forbidden("describes a tensor that cannot be")
    return WithAttributes(tensor, state, kind.name)


def _quantized(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> torch.Tensor:
    """A quantised tensor without its values, since it cannot be converted; its dtype and shape are for messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about quantised tensors, whoever asks for one
        one = torch._empty_affine_quantized([1] * len(shape), scale=1.0, zero_point=0, dtype=storage.dtype, device="cpu")
    return one.expand(shape)


def _sparse(layout: Any, data: Any) -> torch.Tensor:
    """A sparse tensor without its values, since it cannot be converted."""
    sizes = [part for part in data if isinstance(part, tuple) and not isinstance(part, Described)]
    dtypes = [part.dtype for part in data if isinstance(part, Described)]
    return torch.empty(sizes[0], dtype=dtypes[-1], layout=layout, device="meta")


def _without_data(dtype: Any, shape: Any, *rest: Any) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layout(name: Any) -> torch.layout:
    value = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(value, torch.layout):
        raise Forbidden("has an unknown layout")
    return value


_TENSOR_TYPES = (
    record_class("torch", "Tensor"),
    record_class("torch.nn.parameter", "Parameter"),
    record_class("torch.nn.parameter", "Buffer"),
)

_NAMES: dict[GlobalName, Any] = {
    **PLAIN_TYPES,
    **ARRAY_NAMES,
    ("torch", "Size"): Sequence,
    ("torch", "device"): record_class("torch", "device"),
    ("torch", "Tensor"): _TENSOR_TYPES[0],
    ("torch.nn.parameter", "Parameter"): _TENSOR_TYPES[1],
    ("torch.nn.parameter", "Buffer"): _TENSOR_TYPES[2],
    ("torch.nn", "Parameter"): _TENSOR_TYPES[1],
    ("torch._utils", "_rebuild_tensor"): _call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _call(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _call(_same),
    ("torch._utils", "_rebuild_parameter_with_state"): _call(_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _call(_same),
    ("torch._tensor", "_rebuild_from_type_v2"): _call(_of_type),
    ("torch._utils", "_rebuild_qtensor"): _call(_quantized),
    ("torch._utils", "_rebuild_sparse_tensor"): _call(_sparse),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _call(_without_data),
    ("torch.serialization", "_get_layout"): _call(_layout),
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, (torch.dtype, torch.qscheme, torch.layout, torch.memory_format))
    },
}

__all__ = ["Allowed", "Described", "Names", "Record", "Storage", "WithAttributes", "storage_of"]
