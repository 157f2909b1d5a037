"""The state to save: the tensors of a module or a mapping by name, their freeze flags, and which of them share memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
    is_distributed_class,
    is_parameter,
    tied_parts,
)
from shardsave._state.numpy_arrays import is_swapped, tensor_of_array
from shardsave._state.offload import Offloaded, offloaded_tensors
from shardsave._state.offloaded_ties import tie_copies, untied_notes
from shardsave._state.quantised import expand
from shardsave._state.savable import check_savable, refuse, refuse_optimizer
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
        flags = _module_flags(module, named)
        named, of_parts, file_metadata = _expanded(named)
        flags.update(of_parts)
        offloaded = offloaded_tensors(module, fill=False)
        values = _with_offloaded(module, offloaded, named)
    elif isinstance(source, Mapping):
        refuse_optimizer(source)
        named = {name: _as_tensor(name, value) for name, value in source.items()}
        swapped.update(name for name, value in source.items() if is_swapped(value))
        named, flags, file_metadata = _expanded(named)
        flags_known = bool(flags) or any(map(is_parameter, named.values()))
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

    ``values``: the memory of each, but of those that are distributed. All of one tensor is read at once: of very many tensors, each look
    at another one has to wait for memory.
    """
    flags, without_flag, swapped, reader = origins
    entries, memory, begins, ends = [], [], [], []
    parts: dict[str, LocalPart] = {}
    spread = {kind for kind in {*map(type, named.values())} if is_distributed_class(kind)} if reader is not None else ()
    for (name, tensor), value in zip(named.items(), values.values()):
        part = _part(name, tensor, reader) if reader is not None and type(tensor) in spread else None
        if part is not None:
            parts[name], value = part, part.local
        reach = check_savable(name, value)
        memory.append(value)
        begins.append(begin := value.data_ptr())
        ends.append(begin + reach)
        frozen = not tensor.requires_grad if is_parameter(tensor) else flags.get(name)
        kind = "parameter" if frozen is not None else without_flag
        # `Tensor.data`: if the Parameter gets other data during the save, this memory stays alive. It is cheaper than `detach`.
        in_memory = SwappedSource if name in swapped else TensorSource
        source = part.spread if part is not None else in_memory(value.data, tensor.dtype)
        entries.append(Entry(name, kind, frozen, None, source))
    # Swapped bytes have other values than the tensor that seems to share them, so they are never tied.
    to_compare = [0 if name in swapped else begin for name, begin in zip(values, begins)] if swapped else begins
    ties = shared_names(dict(zip(named, memory)), to_compare)
    if parts:
        ties = tied_parts(named, parts, ties)
    if ties:
        entries = [entry._replace(tied_to=ties.get(entry.name)) for entry in entries]
    return tuple(entries), tuple(_overlaps(entries, memory, begins, ends))


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
    tensors: dict[str, torch.Tensor] = {}
    state = module.state_dict(keep_vars=True)
    for (name, value), plain in zip(state.items(), names.all_plain(state)):
        if tensors_only and plain.endswith(EXTRA_STATE) and not isinstance(value, torch.Tensor):
            continue
        if plain in tensors:
            refuse(name, f"one tensor of the name {plain!r} was expected", "without the names of wrappers there are two")
        tensors[plain] = tensor = _as_tensor(name, value)
        if tensor is not value and is_swapped(value):
            swapped.add(plain)
    return tensors


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


def _module_flags(module: nn.Module, named: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Name → frozen, from the module itself; empty if all tensors in its state dict are Parameters, which have their own flags.

    Other tensors in a state dict are buffers, or tensors that a hook put in the place of a Parameter.
    """
    if all(map(is_parameter, named.values())):
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
