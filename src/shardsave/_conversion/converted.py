"""What a conversion will write: the source's tensors with new names and dtypes, and what it keeps beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch

from shardsave._common.assembled import Assembled, Chunk
from shardsave._conversion.changes import Names
from shardsave._conversion.mapped_pages import ReleaseWhileReading
from shardsave._conversion.origin import Origin
from shardsave._conversion.training import TrainingState
from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shardsave._format.index import TRAINING
from shardsave._format.quantised import forms_of_parts
from shardsave._saving.casts import cast_of, config_with_dtype
from shardsave._state.module import Entry, State, read_state
from shardsave._state.parts import Parts
from shardsave._state.savable import check_savable
from shardsave._storage.companions import CONFIG_NAMES
from shardsave.errors import IncompatibleCheckpointError


def converted_state(origin: Origin, names: Names, target: torch.dtype | None, path: str) -> tuple[State, int]:
    """Returns the state of ``origin`` with the names and dtypes of the new file, and how many stored tensors are cast.

    Raises IncompatibleCheckpointError if no tensor is left, or if two would have the same name; ``path`` is for the message.
    """
    named: dict[str, Any] = {}
    old_of: dict[str, str] = {}
    for old, value in origin.values.items():
        new = names.new(old)
        if new in old_of:
            raise IncompatibleCheckpointError(
                f"cannot convert {path}: different new names were expected, {old_of[new]!r} and {old!r} would both be {new!r}; "
                f"nothing was written"
            )
        named[new], old_of[new] = value, old
    if not named:
        raise IncompatibleCheckpointError(
            f"cannot convert {path}: at least one tensor was expected, none is left; nothing was written"
        )
    state = read_state({name: value for name, value in named.items() if not isinstance(value, Assembled)})
    entries = {entry.name: entry for entry in state.entries}
    for name, value in named.items():
        if isinstance(value, Assembled):
            check_savable(name, torch.empty(0, dtype=value.dtype, device="cpu"))
            entries[name] = Entry(name, "tensor", None, None, value)
    flags = origin.flags or {}
    release = ReleaseWhileReading(origin.mappings)
    entries_in_order, casts = [], 0
    for name in named:
        entry, frozen = entries[name], flags.get(old_of[name])
        kind: Literal["parameter", "tensor"] = "tensor" if frozen is None else "parameter"
        source, cast = entry.source, cast_of(entry.source, target)
        if cast is not None:
            casts += entry.tied_to is None
            chunks = source.chunks if isinstance(source, Assembled) else [Chunk((0,) * entry.tensor.dim(), entry.tensor)]
            # A cast may read faster than progress is reported, so pages are released while they are read.
            source = Assembled(cast, source.shape, chunks, release)
        entries_in_order.append(entry._replace(frozen=frozen, kind=kind, source=source))
    file_metadata = _about_quantised(origin, names, target, path)
    return State(tuple(entries_in_order), origin.flags is not None, state.overlaps, file_metadata=file_metadata), casts


def _quantised_parts(origin: Origin) -> list[str]:
    """The names of those tensors of ``origin`` that are parts of torchao's quantised tensors."""
    forms = forms_of_parts(origin.checkpoint.quantised) if origin.checkpoint is not None else {}
    return [name for name in origin.values if name in forms]


def _about_quantised(origin: Origin, names: Names, target: torch.dtype | None, path: str) -> Mapping[str, str]:
    """What the new files say about quantised tensors: the same as the old ones, if the names of all their parts are the same."""
    parts = _quantised_parts(origin)
    if parts and target is not None:
        raise IncompatibleCheckpointError(
            f"cannot convert {path} to another dtype: tensors that are not quantised were expected, {parts[0]!r} is a part of one; "
            f"nothing was written"
        )
    if not parts or any(names.new(part) != part for part in parts):
        return {}
    assert origin.checkpoint is not None
    return origin.checkpoint.quantised


class CarriedOver(NamedTuple):
    """What the new checkpoint keeps of the source besides the weights, and notes about what it leaves out.

    ``adapter``: the names of the weights that are in the file of an adapter; its config is one of the ``companions``.
    """

    parts: Parts
    companions: Mapping[str, bytes]
    module_flags: Mapping[str, bool] | None
    notes: tuple[str, ...]
    adapter: frozenset[str] = frozenset()
    training: TrainingState | None = None

    @property
    def entries(self) -> list[Entry]:
        """The tensors of all parts."""
        training = self.training.entries.values() if self.training is not None else ()
        return [*self.parts.extra, *chain.from_iterable(training)]


def carried_over(origin: Origin, names: Names, target: torch.dtype | None, *, to_directory: bool) -> CarriedOver:
    """Keeps an architecture, a program and the training state only if no name or dtype changes, since they refer to the saved ones.

    Keeps the files of an adapter only if no name changes, since PEFT finds its tensors by name.
    """
    companions = origin.companions
    if target is not None:
        companions = {n: config_with_dtype(config, target) if n in CONFIG_NAMES else config for n, config in companions.items()}
    names_differ = bool(origin.dropped or names.renamed)
    notes = []
    keeps_adapter = to_directory and not names_differ and ADAPTER_CONFIG in companions
    if origin.adapter and not keeps_adapter:
        companions = {name: config for name, config in companions.items() if name != ADAPTER_CONFIG}
        reason = (
            "a single file cannot hold them"
            if not to_directory
            else "PEFT's names have changed"
            if names_differ
            else f"no {ADAPTER_CONFIG} was read beside them"
        )
        notes.append(f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} were left out, so from_pretrained finds no adapter: {reason}")
    if names.renamed and any(names.new(part) != part for part in _quantised_parts(origin)):
        notes.append("what torchao says about quantised tensors was left out: it refers to the saved names")
    adapter = origin.adapter if keeps_adapter else frozenset()
    if to_directory and not names_differ and target is None:
        return CarriedOver(origin.parts, companions, origin.module_flags, tuple(notes), adapter, origin.training)
    reason = "it refers to the saved names and dtypes" if to_directory else "a single file cannot hold it"
    training = [TRAINING] if origin.training is not None else []
    notes += [f"the {role} was left out: {reason}" for role in sorted([*origin.parts.documents, *training])]
    return CarriedOver(Parts(), companions, None if names_differ else origin.module_flags, tuple(notes), adapter)
