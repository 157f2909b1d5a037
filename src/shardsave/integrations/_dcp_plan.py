"""From a plan of DCP to the contents of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.coverage import covered_once
from shardsave._common.memory import same_bytes
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._state.module import Entry, State, read_state
from shardsave._state.savable import check_savable, refuse
from shardsave._training.places import Place
from shardsave._training.write_values import ValueWriter
from shardsave.errors import UnsupportedTrainingError
from shardsave.integrations._dcp_document import Document
from shardsave.integrations._dcp_model import ModelRecord
from shardsave.integrations._dcp_names import Path, Rule, path_of, weight_name


class Held(NamedTuple):
    """What this process holds of a tensor of ``shape``: ``chunks`` of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def whole(self) -> torch.Tensor | None:
        """The tensor itself, if one chunk is all of it."""
        tensor = self.chunks[0].tensor
        return tensor if tuple(tensor.shape) == self.shape else None

    def source(self, name: str) -> ByteSource:
        """All of it as a source. Raises UnsupportedTensorError if this process has not every element, each once."""
        if (whole := self.whole) is not None:
            return TensorSource(whole.detach(), self.dtype)
        if not covered_once(self.shape, [(chunk.begin, chunk.tensor.shape) for chunk in self.chunks]):
            here = ", ".join(f"{[*chunk.tensor.shape]} at {[*chunk.begin]}" for chunk in self.chunks[:3])
            refuse(
                name,
                f"all elements of its shape {[*self.shape]} were expected, since one process saves alone",
                f"it has {here}; call torch.distributed.checkpoint.save on all ranks, without no_dist=True",
            )
        return Assembled(self.dtype, self.shape, [chunk for chunk in self.chunks if chunk.tensor.numel()])


class Items(NamedTuple):
    """What a plan has this process save. ``tensors``, ``values``: by DCP's names; values are no tensors. ``paths``: of all names."""

    tensors: dict[str, Held]
    values: dict[str, Any]
    paths: dict[str, Path]


class Saved(NamedTuple):
    """``state``: of the weights. ``entries``: all other tensors. ``document``: what DCP calls all of them."""

    state: State
    entries: tuple[Entry, ...]
    document: Document


def resolve(plan: SavePlan, planner: SavePlanner) -> Items:
    """Asks ``planner`` for everything in ``plan``. Raises UnsupportedTrainingError, UnsupportedTensorError."""
    items = Items({}, {}, {})
    for item in plan.items:
        name = item.index.fqn
        items.paths[name] = path_of(name, plan.planner_data)
        if item.type is WriteItemType.BYTE_IO:
            items.values[name] = _value(item, planner)
        else:
            _add_chunk(items.tensors, item, planner.resolve_data(item))
    return items


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    """The value itself: `resolve_data` would return a pickle of it."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise UnsupportedTrainingError(
            f"cannot save {item.index.fqn!r}: a tensor was expected, or a planner with the method lookup_object, which returns the value "
            f"itself, {type(planner).__name__} has only its pickle, which is never written; nothing was written"
        )
    return look_up(item.index)


def _add_chunk(tensors: dict[str, Held], item: WriteItem, tensor: Any) -> None:
    name, data = item.index.fqn, item.tensor_data
    if data is None or not isinstance(tensor, torch.Tensor):
        refuse(name, "a tensor was expected", f"the planner has a {type(tensor).__name__}")
    check_savable(name, tensor)
    if tensor.shape != data.chunk.sizes:
        refuse(name, f"a part of shape {[*data.chunk.sizes]} was expected, as DCP's plan says", f"it has {[*tensor.shape]}")
    held = tensors.setdefault(name, Held(tensor.dtype, tuple(data.size), []))
    if tensor.dtype != held.dtype:
        refuse(name, f"parts of one dtype were expected, {held.dtype}", f"one is {tensor.dtype}")
    held.chunks.append(Chunk(tuple(data.chunk.offsets), tensor))


def arrange(items: Items, rule: Rule, record: ModelRecord | None) -> Saved:
    """Decides what is a weight and what is stored beside the weights. Raises UnsupportedTensorError, UnsupportedTrainingError."""
    weights: dict[str, Held] = {}
    paths: dict[str, Path] = {}
    values: dict[Path, Any] = {}
    entries: list[Entry] = []
    for name, held in items.tensors.items():
        path, stored = items.paths[name], weight_name(name, rule, record)
        if stored is None:
            entries.append(Entry(f"tensors/{name}", "tensor", None, None, held.source(name)))
            values[path] = {"tensor": f"tensors/{name}"}
            continue
        if stored in weights:
            refuse(name, f"one tensor of the name {stored!r} was expected", "without the names of wrappers there are two")
        weights[stored] = held
        if rule.path(stored) != path:
            paths[stored] = path
    writer = ValueWriter("values/")
    for name, value in items.values.items():
        values[items.paths[name]] = writer.value(value, Place(f"the value {name!r}", name))
    return Saved(_state(weights, record), (*entries, *writer.entries), Document(rule, paths, values))


def _state(weights: Mapping[str, Held], record: ModelRecord | None) -> State:
    whole = {name: held.whole for name, held in weights.items() if held.whole is not None}
    state = read_state(whole)
    by_name = {entry.name: entry for entry in state.entries}
    entries = [by_name.get(name) or Entry(name, "tensor", None, None, held.source(name)) for name, held in weights.items()]
    if record is None:
        return state._replace(entries=tuple(entries))
    ties = _ties(weights, record)
    with_flags = []
    for entry in entries:
        frozen = record.frozen.get(entry.name)
        first = entry.tied_to or entry.name
        leader = ties.get(entry.name) or ties.get(first, first)
        with_flags.append(
            entry._replace(
                kind="buffer" if frozen is None else "parameter",
                frozen=frozen,
                tied_to=leader if leader != entry.name else None,
            )
        )
    return state._replace(entries=tuple(with_flags), flags_known=True)


def _ties(weights: Mapping[str, Held], record: ModelRecord) -> dict[str, str]:
    """Name → leader, itself included, for those that the model ties and that the state dict has with the same values."""
    ties: dict[str, str] = {}
    for name, leader in record.leaders.items():
        if name in weights and leader in weights and _are_same(weights[name], weights[leader]):
            ties[name] = ties[leader] = leader
    return ties


def _are_same(left: Held, right: Held) -> bool:
    """Copies on their way to the file, as `async_save` makes, share no memory any more."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if [chunk.begin for chunk in left.chunks] != [chunk.begin for chunk in right.chunks]:
        return False
    return all(a.tensor is b.tensor or same_bytes(a.tensor, b.tensor) for a, b in zip(left.chunks, right.chunks))


def as_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, check_circular=False, ensure_ascii=False).encode()
