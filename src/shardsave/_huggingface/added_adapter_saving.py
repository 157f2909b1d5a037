"""Saves a transformers model together with the adapter that ``add_adapter`` put into it, so that `from_pretrained` opens both.

The weights have their names without PEFT's layers. The adapter is in a shard of its own, which has the name and the names of tensors
that PEFT expects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shardsave._common.words import some
from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shardsave._huggingface.added_adapter import AddedAdapter, added_adapter, not_read
from shardsave._huggingface.peft_names import active_adapters
from shardsave._huggingface.spread_on_disk import computed_source
from shardsave._huggingface.transformers_saving import TransformersLayout
from shardsave._saving.disk_layout import OnDisk
from shardsave._state.module import Entry, State


class AddedAdapterLayout:
    """The layout of a transformers ``model`` with adapters. ``keep_names``: as in `TransformersLayout`."""

    def __init__(self, model: Any, *, keep_names: bool) -> None:
        self._model = model
        self._keep_names = keep_names
        self._whole = TransformersLayout(model, keep_names=keep_names)

    def apply(self, state: State, *, is_kept: bool = False) -> OnDisk:
        if self._keep_names:
            on_disk = self._whole.apply(state)
            note = "from_pretrained does not know the names of layers with adapters, load_model does"
            return on_disk._replace(notes=(*on_disk.notes, note))
        added = added_adapter(self._model, {entry.name: entry.tensor for entry in state.entries})
        on_disk = self._whole.apply(state._replace(entries=_without_adapter(state, added)))
        entries = _adapter_entries(state, added)
        flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
        on_disk = on_disk._replace(
            state=on_disk.state._replace(entries=(*on_disk.state.entries, *entries)),
            module_flags=flags,
            notes=(*on_disk.notes, *self._notes(added)),
        )
        if not entries:
            return on_disk
        return on_disk._replace(
            companions={**on_disk.companions, ADAPTER_CONFIG: self._adapter_config()},
            single_file=ADAPTER_WEIGHTS,
            in_single_file=frozenset(entry.name for entry in entries),
        )

    def fingerprint(self) -> bytes:
        return self._whole.fingerprint()

    def _adapter_config(self) -> bytes:
        """The config that `save_pretrained` writes for the active adapter."""
        values = self._model.peft_config[active_adapters(self._model)[0]].to_dict()
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
        return json.dumps(values, indent=2, sort_keys=True).encode()

    def _notes(self, added: AddedAdapter) -> Iterator[str]:
        """What `from_pretrained` does not read."""
        active = active_adapters(self._model)
        if inactive := [name for name in self._model.peft_config if [name] != active]:
            yield f"from_pretrained reads one adapter, the active one; load_model also reads {', '.join(inactive)}"
        if unread := not_read(self._model, added):
            yield f"from_pretrained does not know PEFT's name of {some(unread)}, and makes new values; load_model reads them"


def _without_adapter(state: State, added: AddedAdapter) -> tuple[Entry, ...]:
    """The entries of the model itself, by their names without PEFT's layers; a tensor is not tied to another name that is the same."""
    plain = added.plain
    entries: dict[str, Entry] = {}
    for entry in state.entries:
        if entry.name in plain and plain[entry.name] not in entries:
            leader = plain.get(entry.tied_to) if entry.tied_to is not None else None
            entries[plain[entry.name]] = entry._replace(name=plain[entry.name], tied_to=leader)
    return tuple(entries.values())


def _adapter_entries(state: State, added: AddedAdapter) -> list[Entry]:
    """The entries of PEFT's file."""
    by_name = {entry.name: entry for entry in state.entries}
    entries = [by_name[name]._replace(name=saved, tied_to=None) for saved, name in added.own.items()]
    entries += [
        Entry(saved, "tensor", None, None, computed_source(saved, tensor, state.entries))
        for saved, tensor in added.copies.items()
    ]
    return entries
