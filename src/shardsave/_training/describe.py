"""Describes a training state as data: JSON for the training document, and the tensors to store. Copies and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from shardsave._common.gc_pause import gc_paused
from shardsave._state.distributed_tensors import PartReader
from shardsave._state.module import Entry
from shardsave._state.wrappers import unwrap
from shardsave._training.kinds import class_name, items_of, kind_of, reshard_all
from shardsave._training.modules import describe_module
from shardsave._training.optimizers import describe_optimizer, note_on_names, packed_state
from shardsave._training.parameter_names import Model, ParameterNames
from shardsave._training.per_rank import PerRank
from shardsave._training.places import RNG, ROOT, Place, refuse
from shardsave._training.rng import generator_class, generator_state, process_state
from shardsave._training.write_values import MAX_DEPTH, ValueWriter
from shardsave.errors import ShardSaveError, UnsupportedTrainingError


class TrainingState(NamedTuple):
    """A training state as data.

    ``shared``: the JSON of what is the same on all ranks. ``leaves``: key → the JSON of what belongs to this rank. ``shared_entries``,
    ``own_entries``: the tensors to store; names of this rank's begin with ``rank <n>/``. ``epoch``: the number at
    ``training["epoch"]``; None if there is none. ``notes``: for the report. ``warnings``: those of them that the caller must be warned
    of. ``has_distributed``: whether there is a tensor of which other ranks have parts.
    """

    shared: Any
    leaves: Mapping[str, Any]
    shared_entries: tuple[Entry, ...]
    own_entries: tuple[Entry, ...]
    epoch: int | float | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    has_distributed: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors."""
        return (*self.shared_entries, *self.own_entries)


@gc_paused()
def describe(
    training: Any, model: Model, *, rng: bool = False, rank: int = 0, parts: PartReader | None = None
) -> TrainingState:
    """Describes ``training``, a nested structure of stateful objects and data, and with ``rng`` the generators of this process.

    ``model``: gives the parameters of optimizers their names. ``rank``: of this process. ``parts``: reads distributed tensors; None if
    this process alone saves. Raises UnsupportedTrainingError or UnsupportedTensorError for what cannot be kept, by its place.
    """
    state = process_state() if rng else None  # before anybody's `state_dict` could draw a number
    if parts is not None:
        reshard_all(model, training)
    describer = _Describer(training, model, rank, parts)
    shared = describer.value(training, ROOT, describer.shared)
    if state is not None:
        describer.leaves[RNG.path] = describer.own.value(state, RNG)
    epoch = training.get("epoch") if isinstance(training, Mapping) else None
    return TrainingState(
        shared=shared,
        leaves=describer.leaves,
        shared_entries=tuple(describer.shared.entries),
        own_entries=tuple(describer.own.entries),
        epoch=epoch if type(epoch) in (int, float) else None,
        notes=tuple(describer.notes),
        warnings=tuple(describer.warnings),
        has_distributed=describer.shared.has_distributed or describer.own.has_distributed,
    )


class _Describer:
    """Walks over a training state. ``shared`` and ``own`` write what all ranks share and what belongs to this one."""

    def __init__(self, training: Any, model: Model, rank: int, parts: PartReader | None) -> None:
        self.shared = ValueWriter(parts=parts)
        self.own = ValueWriter(f"rank {rank}/", parts)
        self.leaves: dict[str, Any] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._names = ParameterNames(model, training)
        self._model = unwrap(model) if isinstance(model, nn.Module) else None
        self._above: list[int] = []
        self._written: dict[tuple[int, bool], tuple[Any, Any]] = {}  # the same object has one state at all places

    def value(self, value: Any, place: Place, writer: ValueWriter) -> Any:
        if isinstance(value, PerRank):
            if writer is self.own:
                refuse(place, "PerRank around a value that all ranks would share was", "it is within another PerRank")
            self.leaves[place.path] = self.value(value.value, place, self.own)
            return {"per_rank": place.path}
        kind = kind_of(value)
        if kind in ("tensor", "array"):
            return writer.value(value, place)
        if kind is not None:
            key = id(value), writer is self.own
            if key not in self._written:
                self._written[key] = value, self._leaf(kind, value, place, writer)
            return self._written[key][1]
        if (items := items_of(value)) is None:
            return writer.value(value, place)
        if id(value) in self._above:
            refuse(place, "values that do not contain themselves were", f"this {type(value).__name__} does")
        if len(self._above) == MAX_DEPTH:
            refuse(place, f"values nested at most {MAX_DEPTH} levels deep were", "it is deeper")
        self._above.append(id(value))
        parts = [self.value(item, place.at(key), writer) for key, item in items]
        self._above.pop()
        if not isinstance(value, Mapping):
            return {type(value).__name__: parts}
        # The writer checks and encodes the keys.
        encoded = writer.value(dict.fromkeys(value), place)
        if "dict" in encoded:
            return {"dict": dict(zip(encoded["dict"], parts))}
        return {"pairs": [[key, item] for (key, _), item in zip(encoded["pairs"], parts)]}

    def _leaf(self, kind: str, value: Any, place: Place, writer: ValueWriter) -> Any:
        if kind == "module":
            if self._model is not None and unwrap(value) is self._model:
                refuse(place, "a module beside the model was", "it is the model itself, which is saved anyway")
            return describe_module(value, writer, place)
        if kind == "generator":
            state = writer.value(generator_state(value, place), place.in_state())
            return {"generator": {"class": generator_class(value), "state": state}}
        try:
            state = value.state_dict()
        except ShardSaveError:
            raise
        except Exception as error:
            raise UnsupportedTrainingError(
                f"cannot save {place.path}: its state was expected, state_dict() raised {type(error).__name__}: "
                f"{' '.join(str(error).split())}; nothing was written"
            ) from error
        if kind == "optimizer" and packed_state(value, state):
            note, is_warning = note_on_names(value, place, self._names)
            self.notes += [note] if note else []
            self.warnings += [note] if is_warning else []
            return describe_optimizer(value, state, writer, place, self._names)
        return {"object": {"class": class_name(value), "state": writer.value(state, place.in_state())}}
