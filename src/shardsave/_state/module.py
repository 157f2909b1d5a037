"""The state to save: the tensors of a module or a mapping by name, their freeze flags, and which of them share memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import repeat
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Union

import numpy as np
import torch
from torch import nn

from shardsave._common.memory import PLAIN_TYPES, any_overlap, same_bytes, shared_names
from shardsave._common.sources import ByteSource, SwappedSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._common.words import an
from shardsave._state.distributed_tensors import (
    LocalPart,
    NotReadable,
    PartReader,
    are_parameters,
    is_distributed_class,
    read_directly,
    tied_parts,
)
from shardsave._state.numpy_arrays import is_swapped, tensor_of_array
from shardsave._state.offload import Offloaded, offloaded_tensors
from shardsave._state.offloaded_ties import tie_copies, untied_notes
from shardsave._state.quantised import expand
from shardsave._state.savable import check_all_savable, check_savable, refuse, refuse_optimizer
from shardsave._state.sharded import refuse_partitioned, refuse_sharded
from shardsave._state.wrappers import Names, unwrap

Source = Union[nn.Module, Mapping[str, Any]]

#: The last part of the name under which a state dict has a module's extra state.
EXTRA_STATE = "_extra_state"


class Entry(NamedTuple):
    """One name of a module or a mapping.

    ``frozen``: None without a freeze flag. ``tied_to``: the first name with the same memory; None for the first name itself.
    ``source``: where the bytes for the file come from; for entries of a module or a mapping a `TensorSource`, or a `Spread` if several
    ranks have parts of it.
    """

    name: str
    kind: Literal["parameter", "buffer", "tensor"]
    frozen: bool | None
    tied_to: str | None
    source: ByteSource

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor of an entry of a module or a mapping; one on the meta device in the place of a `Spread`.

        Entries of a conversion may have other sources, which have no tensor.
        """
        if isinstance(self.source, Spread):
            return self.source.stand_in
        assert isinstance(self.source, TensorSource)
        return self.source.tensor


class State(NamedTuple):
    """All entries in state order. ``flags_known`` is False for a mapping without a single Parameter.

    ``overlaps``: pairs of names whose tensors share a part of their memory; they are stored separately. ``files``: path → the name
    of a tensor, for the files that the module opens again whenever it computes. ``notes``: for the report. ``file_metadata``: what
    belongs into ``__metadata__`` of each file.
    """

    entries: tuple[Entry, ...]
    flags_known: bool
    overlaps: tuple[tuple[str, str], ...]
    files: Mapping[str, str] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    file_metadata: Mapping[str, str] = MappingProxyType({})


def read_state(source: Source, *, tensors_only: bool = False, reader: PartReader | None = None) -> State:
    """Reads the entries of ``source``; copies nothing. Raises UnsupportedTensorError, naming the entry.

    ``tensors_only``: extra state that is not a tensor is left out, since the architecture holds it. ``reader``: reads DTensors; None if
    this process alone saves, so that each tensor has to be whole in it.
    """
    swapped: set[str] = set()  # the names of arrays in the byte order of another kind of processor
    values: Mapping[str, torch.Tensor]
    offloaded: Mapping[str, Offloaded] = {}
    file_metadata: Mapping[str, str] = {}
    if isinstance(source, nn.Module):
        module = unwrap(source)
        sub_modules = list(module.named_modules(remove_duplicate=False))
        refuse_sharded(sub_modules, "save", "nothing was written", emptied=True)
        named = _module_tensors(module, Names(sub_modules), tensors_only, swapped)
        flags_known = True
        flags = _module_flags(module, named.values())
        named, of_parts, file_metadata = _expanded(named)
        flags.update(of_parts)
        offloaded = offloaded_tensors(module, fill=False)
        values = _with_offloaded(module, offloaded, named)
    elif isinstance(source, Mapping):
        refuse_optimizer(source)
        named = {name: _as_tensor(name, value) for name, value in source.items()}
        swapped.update(name for name, value in source.items() if is_swapped(value))
        named, flags, file_metadata = _expanded(named)
        flags_known = bool(flags) or any(are_parameters(named.values()))
        values = named
    else:
        raise TypeError(f"an nn.Module or a mapping of names to tensors is needed, not {type(source).__name__}")
    if reader is not None and swapped:
        refuse(
            min(swapped), "an array in the byte order of this processor was expected by several ranks", "it has the other one"
        )
    without_flag: Literal["buffer", "tensor"] = "buffer" if isinstance(source, nn.Module) else "tensor"
    entries, overlaps = _entries(named, values, _Origins(flags, without_flag, swapped, reader))
    files = {found.file: name for name, found in offloaded.items() if found.file}
    notes = untied_notes(offloaded, values) if offloaded else ()
    return State(entries, flags_known, overlaps, files, notes, file_metadata)


class _Origins(NamedTuple):
    """What is known of tensors by name. ``flags``: of those that are no Parameters. ``without_flag``: the kind of tensors without one.

    ``swapped``: the names of arrays in another byte order. ``reader``: reads distributed tensors.
    """

    flags: Mapping[str, bool]
    without_flag: Literal["buffer", "tensor"]
    swapped: Collection[str]
    reader: PartReader | None


def _entries(
    named: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], origins: _Origins
) -> tuple[tuple[Entry, ...], tuple[tuple[str, str], ...]]:
    """The entries of ``named``, and the pairs of them that share a part of their memory.

    ``values``: the memory of each, but of those that are distributed. Each question is put to all tensors in turn: of very many tensors,
    a look at another one has to wait for memory, but ``data``, which is made here, lies side by side.
    """
    flags, without_flag, swapped, reader = origins
    names, tensors = [*named], [*named.values()]
    memory = [*values.values()]
    spread: list[Spread | None] = [None] * len(names)
    if reader is not None:
        memory, spread = _with_parts(named, memory, reader)
    if not PLAIN_TYPES.issuperset(map(type, memory)):
        check_all_savable(names, memory, memory)
    # `Tensor.data`: if the Parameter gets other data during the save, this memory stays alive. It is cheaper than `detach`.
    data = [value.data if part is None else value for value, part in zip(memory, spread)]
    reaches = check_all_savable(names, memory, data)
    begins = [value.data_ptr() for value in data]
    with read_directly(tensors):
        needs_grad = [*map(attrgetter("requires_grad"), tensors)]
    own_flag = are_parameters(tensors)
    frozen = [not grad if own else flags.get(name) for name, grad, own in zip(names, needs_grad, own_flag)]
    kinds = ["parameter" if is_frozen is not None else without_flag for is_frozen in frozen]
    sources = [
        (SwappedSource if name in swapped else TensorSource)(value, tensor.dtype) if part is None else part
        for name, tensor, value, part in zip(names, tensors, data, spread)
    ]
    entries = [*map(Entry._make, zip(names, kinds, frozen, repeat(None), sources))]
    ties: Mapping[str, str] = {}
    if len({*begins}) < len(begins):
        # Swapped bytes have other values than the tensor that seems to share them, so they are never tied.
        to_compare = [0 if name in swapped else begin for name, begin in zip(names, begins)] if swapped else begins
        parts = {name: part for name, part in zip(names, spread) if part is not None}
        ties = tied_parts(named, parts, shared_names(dict(zip(names, memory)), to_compare))
    if ties:
        entries = [entry._replace(tied_to=ties.get(entry.name)) for entry in entries]
    ends = [begin + reach for begin, reach in zip(begins, reaches)]
    return tuple(entries), tuple(_overlaps(entries, memory, begins, ends))


def _with_parts(
    named: Mapping[str, torch.Tensor], values: list[torch.Tensor], reader: PartReader
) -> tuple[list[torch.Tensor], list[Spread | None]]:
    """The memory of each of ``named`` in this process, and its part here if it is distributed. ``values``: the memory of the others."""
    kinds = {kind for kind in {*map(type, named.values())} if is_distributed_class(kind)}
    spread = {name: tensor for name, tensor in named.items() if type(tensor) in kinds}
    columns = reader.read_all([*spread.values()])
    if columns is None:
        parts = [_part(name, tensor, reader) for name, tensor in spread.items()]
        columns = [part.local for part in parts], [part.spread for part in parts]
    found = zip(*columns)
    pairs = [next(found) if type(tensor) in kinds else (value, None) for tensor, value in zip(named.values(), values)]
    return [value for value, _ in pairs], [part for _, part in pairs]


def _part(name: str, tensor: torch.Tensor, reader: PartReader) -> LocalPart:
    """The part in this process of a distributed tensor."""
    try:
        return reader.read(tensor)
    except NotReadable as error:
        refuse(name, error.expected, error.found)


def _expanded(named: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, bool], Mapping[str, str]]:
    """``named`` with the parts of quantised tensors in their place, the flags of these, and what the files must say about them."""
    usual = all(kind in PLAIN_TYPES or is_distributed_class(kind) for kind in {*map(type, named.values())})
    return (named, {}, {}) if usual else expand(named)


def _module_tensors(module: nn.Module, names: Names, tensors_only: bool, swapped: set[str]) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    plain_names = names.all_plain(state)
    if plain_names is state and _are_usual(state):
        return dict(state)
    tensors: dict[str, torch.Tensor] = {}
    for (name, value), plain in zip(state.items(), plain_names):
        if tensors_only and plain.endswith(EXTRA_STATE) and not isinstance(value, torch.Tensor):
            continue
        if plain in tensors:
            refuse(name, f"one tensor of the name {plain!r} was expected", "without the names of wrappers there are two")
        tensors[plain] = tensor = _as_tensor(name, value)
        if tensor is not value and is_swapped(value):
            swapped.add(plain)
    return tensors


def _are_usual(state: Mapping[Any, Any]) -> bool:
    """Whether ``state`` maps strings to plain or distributed tensors that are whole, as far as `_as_tensor` can see."""
    usual = all(kind in PLAIN_TYPES or is_distributed_class(kind) for kind in {*map(type, state.values())})
    return usual and {str}.issuperset(map(type, state)) and not any(map(hasattr, state.values(), repeat("ds_status")))


def _with_offloaded(
    module: nn.Module, offloaded: Mapping[str, Offloaded], named: dict[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """``named`` with the values of tensors that accelerate offloads. They are cast to the dtype of their placeholders, as accelerate does.

    Two names of one placeholder with equal values get the same memory: copies on disk are not tied.
    """
    if not offloaded:
        return named
    values = dict(named)
    first: dict[int, str] = {}
    for name, tensor in named.items():
        if name in offloaded:
            value, problem = offloaded[name].tensor, offloaded[name].problem
            if value is None:
                refuse(name, "a tensor with data was expected", f"accelerate offloads it, and {problem}")
            check_savable(name, torch.empty(0, dtype=tensor.dtype))
            values[name] = value
        elif tensor.is_meta:
            refuse(
                name,
                "a tensor with data was expected",
                "it is on the meta device, and accelerate, which offloads other tensors of this model, has no values for it; for an "
                "adapter, keep the layers that it changes off the disk (device_map)",
            )
        leader = first.setdefault(id(tensor), name)
        if leader != name and same_bytes(values[leader], values[name]):
            values[name] = values[leader]
    tie_copies(module, offloaded, named, values)
    return values


def _module_flags(module: nn.Module, tensors: Collection[torch.Tensor]) -> dict[str, bool]:
    """Name → frozen, from the module itself; empty if all tensors in its state dict are Parameters, which have their own flags.

    Other tensors in a state dict are buffers, or tensors that a hook put in the place of a Parameter.
    """
    if all(are_parameters(tensors)):
        return {}
    names = Names.of(module)
    return {names.plain(name): not p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}


def _as_tensor(name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str):
        refuse(name, "a name that is a string was expected", f"it is {an(type(name).__name__)}")
    if isinstance(value, torch.Tensor):
        if hasattr(value, "ds_status"):
            refuse_partitioned(name, value, "save", "nothing was written")
        return value
    if isinstance(value, np.ndarray):
        return tensor_of_array(name, value)
    if name.endswith(EXTRA_STATE):
        refuse(name, "extra state that is a tensor was expected", f"it is {an(type(value).__name__)}, which would need pickle")
    hint = ""
    if isinstance(value, Mapping):
        hint = f": save the mapping of tensors itself, the one in {name!r}"
    elif isinstance(value, (list, tuple)) and value and all(isinstance(part, torch.Tensor) for part in value):
        hint = f": give each tensor a name of its own, such as {name + '.0'!r}"
    elif isinstance(value, (bool, int, float, str, list, tuple, type(None))):
        hint = ": pass plain values as metadata="
    refuse(name, "a tensor was expected", f"it is {an(type(value).__name__)}{hint}")


def _overlaps(
    entries: list[Entry], values: list[torch.Tensor], begins: list[int], ends: list[int]
) -> Iterator[tuple[str, str]]:
    """Pairs of neighbours in memory that share bytes without being tied; at most one pair for each entry.

    ``values``, ``begins``, ``ends``: the tensor of each entry, and its addresses.
    """
    if not any_overlap(begins, ends):  # tied entries seem to overlap, too
        return
    spans = sorted(
        (str(value.device), begin, end, entry.name)
        for begin, end, entry, value in zip(begins, ends, entries, values)
        if begin < end and entry.tied_to is None
    )
    furthest: tuple[str, int, str] | None = None
    for device, begin, end, name in spans:
        if furthest is not None and furthest[0] == device and begin < furthest[1]:
            yield furthest[2], name
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, name)
