"""From a plan of DCP to the contents of a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.coverage import covered_once
from shardsave._common.memory import same_bytes
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._state.module import Entry, State, read_state
from shardsave._state.savable import check_name, check_savable, refuse
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


class Items(NamedTuple):
    """What a plan has this process save. ``tensors``, ``values``: by DCP's names; values are no tensors. ``paths``: of all names."""

    tensors: dict[str, Held]
    values: dict[str, Any]
    paths: dict[str, Path]


class Weight(NamedTuple):
    """A tensor of the model. ``tied_to``: the name under which it is stored; None if that is its own."""

    held: Held
    kind: Literal["parameter", "buffer", "tensor"]
    frozen: bool | None
    tied_to: str | None


class Arranged(NamedTuple):
    """What this process saves, by the names under which it is stored.

    ``weights``: of the model. ``others``: all other tensors. ``document``: what DCP calls all of them. ``flags_known``, ``overlaps``: as in
    `State`.
    """

    weights: dict[str, Weight]
    others: dict[str, Held]
    document: Document
    flags_known: bool
    overlaps: tuple[tuple[str, str], ...]


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


def arrange(items: Items, rule: Rule | None, record: ModelRecord | None) -> Arranged:
    """Decides what is a weight and what is stored beside the weights. ``rule``: None if this process has no weights.

    Raises UnsupportedTensorError, UnsupportedTrainingError.
    """
    weights: dict[str, Held] = {}
    others: dict[str, Held] = {}
    paths: dict[str, Path] = {}
    values: dict[Path, Any] = {}
    for name, held in items.tensors.items():
        path, stored = items.paths[name], weight_name(name, rule, record)
        if stored is None:
            others[f"tensors/{name}"] = held
            values[path] = {"tensor": f"tensors/{name}"}
            continue
        if stored in weights:
            refuse(name, f"one tensor of the name {stored!r} was expected", "without the names of wrappers there are two")
        weights[stored] = held
        if rule is not None and rule.path(stored) != path:
            paths[stored] = path
    writer = ValueWriter("values/")
    streams: list[Path] = []
    for name, value in items.values.items():
        path = items.paths[name]
        check_name(name)
        if type(value) is io.BytesIO:
            streams.append(path)
            value = torch.from_numpy(np.frombuffer(value.getbuffer(), np.uint8).copy())
        values[path] = writer.value(value, Place(f"the value {name!r}", name))
    for entry in writer.entries:
        tensor = entry.tensor
        others[entry.name] = Held(tensor.dtype, tuple(tensor.shape), [Chunk((0,) * tensor.dim(), tensor)])
    listed, flags_known, overlaps = _weights(weights, record)
    return Arranged(listed, others, Document(rule or Rule(), paths, values, tuple(streams)), flags_known, overlaps)


def _weights(
    weights: Mapping[str, Held], record: ModelRecord | None
) -> tuple[dict[str, Weight], bool, tuple[tuple[str, str], ...]]:
    state = read_state({name: held.whole for name, held in weights.items() if held.whole is not None})
    read = {entry.name: entry for entry in state.entries}
    first = {name: read[name].tied_to or name if name in read else name for name in weights}
    if record is None:
        kept = {
            name: Weight(held, read[name].kind, read[name].frozen, read[name].tied_to)
            if name in read
            else Weight(held, "tensor", None, None)
            for name, held in weights.items()
        }
        return kept, state.flags_known, state.overlaps
    ties = _ties(weights, record)
    listed = {}
    for name, held in weights.items():
        frozen = record.frozen.get(name)
        leader = ties.get(name) or ties.get(first[name], first[name])
        listed[name] = Weight(held, "buffer" if frozen is None else "parameter", frozen, leader if leader != name else None)
    return listed, True, state.overlaps


def _ties(weights: Mapping[str, Held], record: ModelRecord) -> dict[str, str]:
    """Name → leader, itself included, for those that the model ties. Values are compared where this process has both tensors."""
    ties: dict[str, str] = {}
    for name, leader in record.leaders.items():
        if name in weights and (leader not in weights or _are_same(weights[name], weights[leader])):
            ties[name] = ties[leader] = leader
    return ties


def _are_same(left: Held, right: Held) -> bool:
    """Copies on their way to the file, as `async_save` makes, share no memory any more."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if [chunk.begin for chunk in left.chunks] != [chunk.begin for chunk in right.chunks]:
        return False
    return all(a.tensor is b.tensor or same_bytes(a.tensor, b.tensor) for a, b in zip(left.chunks, right.chunks))


def alone(part: Arranged) -> tuple[State, tuple[Entry, ...]]:
    """The state of the weights, and the entries of all other tensors, if this process saves alone.

    Raises UnsupportedTensorError for a tensor of which it has not every element, each once.
    """
    entries = []
    for name, (held, kind, frozen, tied_to) in part.weights.items():
        entries.append(Entry(name, kind, frozen, tied_to if tied_to in part.weights else None, _source(name, held)))
    others = tuple(Entry(name, "tensor", None, None, _source(name, held)) for name, held in part.others.items())
    return State(tuple(entries), part.flags_known, part.overlaps), others


def _source(name: str, held: Held) -> ByteSource:
    if (whole := held.whole) is not None:
        return TensorSource(whole.detach(), held.dtype)
    if not covered_once(held.shape, [(chunk.begin, chunk.tensor.shape) for chunk in held.chunks]):
        here = ", ".join(f"{[*chunk.tensor.shape]} at {[*chunk.begin]}" for chunk in held.chunks[:3])
        refuse(
            name,
            f"all elements of its shape {[*held.shape]} were expected, since one process saves alone",
            f"it has {here}; call torch.distributed.checkpoint.save on all ranks, without no_dist=True",
        )
    return Assembled(held.dtype, held.shape, [chunk for chunk in held.chunks if chunk.tensor.numel()])
