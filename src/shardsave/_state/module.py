"""What a module or a mapping has to save: its tensors by name, their freeze flags, and which of them share memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, Union

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shardsave._common.assembled import Memory
from shardsave._common.memory import PLAIN_TYPES, any_overlap, lacks_memory, reach, shared_names
from shardsave._format.dtypes import BY_TORCH, logical_shape
from shardsave.errors import UnsupportedTensorError, an

Source = Union[nn.Module, Mapping[str, Any]]

_COMPILED = "_orig_mod"
#: How the name in a state dict ends under which a module has its extra state.
EXTRA_STATE = "_extra_state"
_PARALLEL = (DataParallel, DistributedDataParallel)

#: What the package ml_dtypes adds to numpy and torch has, too, under the same names.
_ML_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"})


class Entry(NamedTuple):
    """One name of a module. ``frozen`` is None where there is no flag; ``tied_to`` is the entry whose memory this one shares.

    ``cast``: the dtype that it is to have in the file, where that is not the tensor's own.
    """

    name: str
    kind: Literal["parameter", "buffer", "tensor"]
    frozen: bool | None
    tied_to: str | None
    tensor: Memory
    cast: torch.dtype | None = None


def tensor_of(entry: Entry) -> torch.Tensor:
    """The tensor of an entry of a module; only a conversion has entries made of parts."""
    assert isinstance(entry.tensor, torch.Tensor)
    return entry.tensor


class Beside(NamedTuple):
    """What a checkpoint has beside its weights. ``documents``: part → JSON; ``extra``: tensors that a whole model needs as well.

    ``companions``: file name → content. ``module_flags``: name in the module → frozen, where the names on disk are others.
    """

    documents: Mapping[str, bytes] = {}
    extra: tuple[Entry, ...] = ()
    companions: Mapping[str, bytes] = {}
    module_flags: Mapping[str, bool] | None = None


class State(NamedTuple):
    """All entries in state order. ``flags_known`` is False for a mapping without a single Parameter.

    ``overlaps``: pairs of names whose tensors share a part of their memory; they are stored apart.
    ``beside``: what another checkpoint had beside them.
    """

    entries: tuple[Entry, ...]
    flags_known: bool
    overlaps: tuple[tuple[str, str], ...]
    beside: Beside = Beside()


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DistributedDataParallel and DataParallel, in whatever order they are nested."""
    while True:
        if not _holds_only_another(module):
            return module
        module = module.module if isinstance(module, _PARALLEL) else module._orig_mod  # type: ignore[assignment]


def _holds_only_another(module: nn.Module) -> bool:
    """Whether ``module`` is a known wrapper, with nothing of its own that would be lost without it."""
    kind = type(module)
    compiled = kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch.")
    if not compiled and not issubclass(kind, _PARALLEL):
        return False
    return not (module._parameters or module._buffers or len(module._modules) > 1)


class Names:
    """The names of a module's tensors with and without the wrappers around some of its sub-modules."""

    def __init__(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        """``named``: all sub-modules by all their names, in module order."""
        self._wrappers: list[tuple[str, str]] = []  # how names begin at a wrapper, and inside of it; the outer ones first
        for name, part in named:
            if _holds_only_another(part):
                start = f"{name}." if name else ""
                self._wrappers.append((start, f"{start}{'module' if isinstance(part, _PARALLEL) else _COMPILED}."))

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        return cls(module.named_modules(remove_duplicate=False))

    def plain(self, name: str) -> str:
        for start, inside in reversed(self._wrappers):
            if name.startswith(inside):
                name = start + name[len(inside) :]
        return plain_name(name)

    def wrapped(self, name: str) -> str:
        for start, inside in self._wrappers:
            if name.startswith(start):
                name = inside + name[len(start) :]
        return name


def refuse_sharded(module: nn.Module, verb: str, state: str) -> None:
    """Refuses FSDP's older wrapper: each of its state dicts is a collective call, which hangs where one rank alone makes it."""
    for name, part in module.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(part).__mro__):
            raise UnsupportedTensorError(
                f"cannot {verb} module {name!r}: one that is whole in this process was expected, it is a "
                f"FullyShardedDataParallel; take its full state dict; {state}"
            )


def read_state(source: Source | State, *, tensors_only: bool = False) -> State:
    """Reads the entries of ``source``; copies nothing. Raises UnsupportedTensorError, naming the entry.

    ``tensors_only``: extra state that is no tensor is left out, since it is kept elsewhere.
    """
    if isinstance(source, State):
        return source
    if isinstance(source, nn.Module):
        module = unwrap(source)
        refuse_sharded(module, "save", "nothing was written")
        named = _module_tensors(module, tensors_only)
        known = True
        flags = _flags_apart(module, named)
    elif isinstance(source, Mapping):
        named = {name: _as_tensor(name, value) for name, value in source.items()}
        known = any(type(tensor) is nn.Parameter for tensor in named.values())
        flags = {}
    else:
        raise TypeError(f"an nn.Module or a mapping of names to tensors is needed, not {type(source).__name__}")
    unflagged: Literal["buffer", "tensor"] = "buffer" if isinstance(source, nn.Module) else "tensor"
    for name, tensor in named.items():
        check_savable(name, tensor)
    ties = shared_names(named, torch.Tensor.data_ptr)
    entries = []
    for name, tensor in named.items():
        frozen = not tensor.requires_grad if type(tensor) is nn.Parameter else flags.get(name)
        kind = "parameter" if frozen is not None else unflagged
        # Detached: giving the Parameter other data during the save does not take this memory away.
        entries.append(Entry(name, kind, frozen, ties.get(name), tensor.detach()))
    return State(tuple(entries), known, tuple(_overlaps(entries)))


def plain_name(name: str) -> str:
    """The name as it is without ``torch.compile`` on some sub-module; `Names` knows of other wrappers too."""
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name


def _module_tensors(module: nn.Module, tensors_only: bool) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    names = Names.of(module)
    for name, value in module.state_dict(keep_vars=True).items():
        plain = names.plain(name)
        if tensors_only and plain.endswith(EXTRA_STATE) and not isinstance(value, torch.Tensor):
            continue
        if plain in made:
            _refuse(name, f"one tensor of the name {plain!r} was expected", "without those of wrappers two have it")
        made[plain] = _as_tensor(name, value)
    return made


def _flags_apart(module: nn.Module, named: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Name → frozen from the module itself, where its state dict also has tensors that are no Parameters (a hook's, buffers)."""
    if all(type(tensor) is nn.Parameter for tensor in named.values()):
        return {}
    names = Names.of(module)
    return {names.plain(name): not p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}


def _as_tensor(name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str):
        _refuse(name, "a name that is a string was expected", f"it is {an(type(name).__name__)}")
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return _from_numpy(name, value)
    if name.endswith(EXTRA_STATE):
        _refuse(name, "extra state that is a tensor was expected", f"it is {an(type(value).__name__)}, which would need pickle")
    hint = ""
    if isinstance(value, Mapping):
        hint = f": save the mapping of tensors itself, what is in {name!r}"
    elif isinstance(value, (bool, int, float, str)):
        hint = ": plain values go into metadata="
    _refuse(name, "a tensor was expected", f"it is {an(type(value).__name__)}{hint}")


def _from_numpy(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        _refuse(name, "an array without a mask was expected", "it is a masked one; pass its .filled(…)")
    if any(stride < 0 or stride % max(1, array.itemsize) for stride in array.strides):
        wanted = "an array with positive strides of whole elements was expected"
        _refuse(name, wanted, f"its strides are {array.strides} bytes; pass numpy.ascontiguousarray(…)")
    if not array.dtype.isnative:
        _refuse(name, "an array in native byte order was expected", f"its dtype is {array.dtype.str}")
    if not array.flags.writeable:  # torch warns of writing to it; nobody will
        array = np.lib.stride_tricks.as_strided(_writeable_alias(array), array.shape, array.strides)
    try:
        if array.dtype.name in _ML_DTYPES:
            as_integer = torch.from_numpy(array.view(np.uint16 if array.itemsize == 2 else np.uint8))
            return as_integer.view(getattr(torch, array.dtype.name))
        return torch.from_numpy(array)
    except TypeError:
        _refuse(name, "a dtype that torch has was expected", f"it is {array.dtype}")


def _writeable_alias(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    class Interface:
        def __init__(self) -> None:
            self.keep = array
            address, _ = array.__array_interface__["data"]
            self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}

    return np.asarray(Interface()).view(array.dtype)


def check_savable(name: str, tensor: torch.Tensor) -> None:
    if name == "__metadata__":
        _refuse(name, "another name was expected", "safetensors keeps this one for itself")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            _refuse(name, "a name in Unicode was expected", "it has half of a surrogate pair")
    if type(tensor) not in PLAIN_TYPES or hasattr(tensor, "__tensor_flatten__"):
        _refuse(name, "a plain tensor was expected", f"it is {an(type(tensor).__name__)}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        _refuse(name, "a strided tensor was expected", f"its layout is {layout}")
    if tensor.is_meta:
        _refuse(name, "a tensor with data was expected", "it is on the meta device")
    dtype = tensor.dtype
    if dtype not in BY_TORCH:
        unknown = str(dtype).removeprefix("torch.")
        raise UnsupportedTensorError(
            f"cannot save {name!r}: dtype {unknown} has no safetensors equivalent; nothing was written"
        )
    if lacks_memory(tensor):
        _refuse(name, "memory for all its elements was expected", "its storage was freed or made smaller")
    if tensor.nbytes == 0 and math.prod(size or 1 for size in logical_shape(tensor)) >= 1 << 63:
        # Some readers multiply in order and meet the zero in time, some do not, and torch has strides to compute.
        _refuse(
            name, "sizes that multiply to fewer than 2^63, its zeros aside, were expected", f"its shape is {list(tensor.shape)}"
        )
    if dtype == torch.float4_e2m1fn_x2 and tensor.dim() == 0:
        _refuse(name, "a float4 tensor of at least one dimension was expected", "it has none")


def _overlaps(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """Pairs of neighbours in memory that share bytes without being tied; at most one pair for each entry."""
    apart = [entry for entry in entries if entry.tied_to is None]
    begins = [tensor_of(entry).data_ptr() for entry in apart]
    ends = [begin + reach(tensor_of(entry)) for begin, entry in zip(begins, apart)]
    if not any_overlap(begins, ends):
        return
    spans = sorted(
        (str(tensor_of(entry).device), begin, end, entry.name) for begin, end, entry in zip(begins, ends, apart) if begin < end
    )
    furthest: tuple[str, int, str] | None = None
    for device, begin, end, name in spans:
        if furthest is not None and furthest[0] == device and begin < furthest[1]:
            yield furthest[2], name
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, name)


def _refuse(name: object, wanted: str, found: str) -> NoReturn:
    raise UnsupportedTensorError(f"cannot save {name!r}: {wanted}, {found}; nothing was written")
