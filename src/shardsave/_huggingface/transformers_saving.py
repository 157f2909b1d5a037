"""Saves transformers models as ``save_pretrained`` would: tensors, names on disk, and the configs beside the weights.

Only used for a transformers model, so transformers has already been imported.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._common.words import human_bytes, some
from shardsave._huggingface.spread_on_disk import spread_on_disk
from shardsave._huggingface.transformers_names import what_converts
from shardsave._huggingface.transformers_on_disk import DiskTensor, reverted
from shardsave._huggingface.transformers_round_trip import not_given_back
from shardsave._saving.disk_layout import OnDisk
from shardsave._state.module import Entry, State
from shardsave._state.wrappers import plain_class


def companions(model: Any) -> dict[str, bytes]:
    """The configs that `save_pretrained` writes beside the weights of ``model``: file name → content."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [plain_class(type(model)).__name__]
    if "transformers_weights" in config.__dict__:
        del config.transformers_weights
    files = {"config.json": config.to_json_string(use_diff=True)}
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    return {name: text.encode() for name, text in files.items()}


class TransformersLayout:
    """The layout of `save_pretrained` for a transformers ``model``, with its configs.

    ``keep_names``: names and tensors stay as they are in memory; only the configs are added.
    """

    def __init__(self, model: Any, *, keep_names: bool) -> None:
        self._model = model
        self._keep_names = keep_names

    def apply(self, state: State, *, is_kept: bool = False) -> OnDisk:
        """Stores fused tensors as views of their parts. Only tensors that are joined on disk are copied, with a note."""
        model, configs = self._model, companions(self._model)
        if is_kept:  # transformers compiles a thousand patterns before it knows
            return OnDisk(state, configs)
        if self._keep_names:
            return self._in_memory(state, configs)
        ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
        entries = _tied_as_transformers_ties(model, [entry for entry in state.entries if entry.name not in ignored])
        by_name = {entry.name: entry for entry in entries}
        stored = {entry.name: entry.tensor for entry in entries if entry.tied_to is None}
        renamed = reverted(model, stored)
        if lost := not_given_back(model, stored, {**_leaders(state.entries), **_leaders(entries)}, renamed):
            note = (
                f"names and tensors are stored as they are in memory, since transformers would not give back {some(lost)} "
                f"from its own layout of {type(model).__name__}"
            )
            return self._in_memory(state, configs, [note])
        position = {name: n for n, name in enumerate(stored)}
        on_disk = [_entry(name, part, [by_name[source] for source in part.sources]) for name, part in renamed.items()]
        order = {name: min(position[source] for source in part.sources) for name, part in renamed.items()}
        on_disk.sort(key=lambda entry: order[entry.name])  # stable: the parts of one tensor keep their order
        on_disk += _ties(model, entries, renamed)
        flags = None
        if {entry.name for entry in on_disk} != {entry.name for entry in state.entries}:
            flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
        copied_bytes = sum(part.tensor.nbytes for part in renamed.values() if part.is_copy and not part.tensor.is_meta)
        notes = []
        if copied_bytes:
            notes.append(f"{human_bytes(copied_bytes)} were copied in memory, since these tensors are joined on disk")
        return OnDisk(state._replace(entries=tuple(on_disk)), configs, flags, notes=tuple(notes), copied_bytes=copied_bytes)

    def fingerprint(self) -> bytes:
        facts = json.dumps([type(self).__name__, self._keep_names, *what_converts(self._model)])
        return hashlib.sha256(facts.encode()).digest()[:16]

    def _in_memory(self, state: State, configs: Mapping[str, bytes], notes: Iterable[str] = ()) -> OnDisk:
        """``state`` as it is, with a note if `from_pretrained` would rename its names to others."""
        stored = {entry.name: entry.tensor for entry in state.entries if entry.tied_to is None}
        as_they_are = {name: DiskTensor(tensor, (name,), False) for name, tensor in stored.items()}
        if misread := not_given_back(self._model, stored, _leaders(state.entries), as_they_are):
            notes = [*notes, f"from_pretrained renames {some(misread)} to other names, load_model does not"]
        return OnDisk(state, configs, notes=tuple(notes))


def _leaders(entries: Iterable[Entry]) -> dict[str, str]:
    """Every name → the name under which its tensor is stored."""
    return {entry.name: entry.tied_to or entry.name for entry in entries}


def _entry(name: str, part: DiskTensor, sources: Sequence[Entry]) -> Entry:
    """An entry that is frozen if all of ``sources`` with a flag are; it is cast if all of them are cast to one dtype."""
    flags = [entry.frozen for entry in sources if entry.frozen is not None]
    dtypes = {entry.source.dtype for entry in sources}
    spreads = [entry.source for entry in sources if isinstance(entry.source, Spread)]
    if spreads:
        source: ByteSource = spread_on_disk(name, part, spreads)
    else:
        source = TensorSource(part.tensor, dtypes.pop() if len(dtypes) == 1 else part.tensor.dtype)
    return Entry(name, "parameter" if flags else "buffer", all(flags) if flags else None, None, source)


def _tied_as_transformers_ties(model: Any, entries: list[Entry]) -> list[Entry]:
    """Stores tied tensors under the same name as `save_pretrained`: the one to which the model ties the others."""
    if all(entry.tied_to is None for entry in entries):
        return entries
    leader = leaders_of_ties(model, {entry.name: entry.tied_to or entry.name for entry in entries})
    return [entry._replace(tied_to=leader[entry.name] if leader[entry.name] != entry.name else None) for entry in entries]


def leaders_of_ties(model: Any, first: Mapping[str, str]) -> dict[str, str]:
    """Name → the name under which `save_pretrained` stores its tensor. ``first``: name → the first name with the same tensor."""
    patterns = [
        re.compile(f"{name}.{key}" if name else key)
        for name, module in model.named_modules()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    ]
    groups: dict[str, list[str]] = {}
    for name, leader in first.items():
        groups.setdefault(leader, []).append(name)
    leaders = {}
    for names in groups.values():
        candidates = [name for name in names if not any(pattern.search(name) for pattern in patterns)]
        leaders.update(dict.fromkeys(names, candidates[0] if candidates else max(names)))
    return leaders


def _ties(model: Any, entries: Iterable[Entry], stored: Mapping[str, DiskTensor]) -> list[Entry]:
    """The tied entries with their names on disk, except those whose name on disk is already in ``stored``."""
    tied = {entry.name: entry for entry in entries if entry.tied_to is not None}
    if not tied:
        return []
    name_on_disk = {part.sources[0]: name for name, part in stored.items() if len(part.sources) == 1 and not part.is_copy}
    # If a leader is several tensors on disk, the tied name shares memory with no single one of them.
    unsplit = {name for name in name_on_disk if sum(part.sources == (name,) for part in stored.values()) == 1}
    ties = []
    for name, part in reverted(model, {name: entry.tensor for name, entry in tied.items()}).items():
        entry = tied[part.sources[0]]
        if len(part.sources) == 1 and entry.tied_to in unsplit and name not in stored:
            ties.append(entry._replace(name=name, tied_to=name_on_disk[entry.tied_to]))
    return ties
