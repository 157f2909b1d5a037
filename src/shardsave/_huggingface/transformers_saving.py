"""Everything that knows transformers: the names and the layout of a model on disk, and which files lie beside its weights.

transformers is never imported here unless a model of its is at hand, and then it has been already.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shardsave._common.words import human_bytes
from shardsave._huggingface.transformers_on_disk import Part, reverted
from shardsave._saving.disk_layout import OnDisk
from shardsave._state.module import Entry, State, tensor_of


def companions(model: Any) -> dict[str, bytes]:
    """What `save_pretrained` puts beside the weights of ``model``: file name → content."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if "transformers_weights" in config.__dict__:
        del config.transformers_weights
    files = {"config.json": config.to_json_string(use_diff=True)}
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    return {name: text.encode() for name, text in files.items()}


class TransformersLayout:
    """A transformers ``model`` as `save_pretrained` lays it out, configs included.

    ``keep_names``: names and tensors stay as they are in memory; only the configs are added.
    """

    def __init__(self, model: Any, *, keep_names: bool) -> None:
        self._model = model
        self._keep_names = keep_names

    def apply(self, state: State) -> OnDisk:
        """Fused tensors become views of their parts: nothing is copied, except where parts are joined on disk, which is noted."""
        configs = companions(self._model)
        if self._keep_names:
            return OnDisk(state, configs)
        model = self._model
        ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
        entries = _stored_as_they_do(model, [entry for entry in state.entries if entry.name not in ignored])
        by_name = {entry.name: entry for entry in entries}
        stored = {entry.name: tensor_of(entry) for entry in entries if entry.tied_to is None}
        renamed = reverted(model, stored)
        place = {name: n for n, name in enumerate(stored)}
        on_disk = [_entry(name, part, [by_name[source] for source in part.sources]) for name, part in renamed.items()]
        order = {name: min(place[source] for source in part.sources) for name, part in renamed.items()}
        on_disk.sort(key=lambda entry: order[entry.name])  # stable: the parts of one tensor keep their order
        on_disk += _ties(model, entries, renamed)
        flags = None
        if {entry.name for entry in on_disk} != {entry.name for entry in state.entries}:
            flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
        copied = sum(part.tensor.nbytes for part in renamed.values() if part.is_copy)
        notes = (f"{human_bytes(copied)} were copied in memory, since they are joined on disk",) if copied else ()
        return OnDisk(state._replace(entries=tuple(on_disk)), configs, flags, notes=notes)


def _entry(name: str, part: Part, sources: Iterable[Entry]) -> Entry:
    """Frozen when all that it is made of is."""
    flags = [entry.frozen for entry in sources if entry.frozen is not None]
    return Entry(name, "parameter" if flags else "buffer", all(flags) if flags else None, None, part.tensor)


def _stored_as_they_do(model: Any, entries: list[Entry]) -> list[Entry]:
    """Of names that share memory `save_pretrained` keeps the one that the model ties the others to: so do we."""
    if all(entry.tied_to is None for entry in entries):
        return entries
    patterns = [
        re.compile(f"{name}.{key}" if name else key)
        for name, module in model.named_modules()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    ]
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.tied_to or entry.name, []).append(entry.name)
    keeper = {}
    for names in groups.values():
        free = [name for name in names if not any(pattern.search(name) for pattern in patterns)]
        keeper.update(dict.fromkeys(names, free[0] if free else max(names)))
    return [entry._replace(tied_to=keeper[entry.name] if keeper[entry.name] != entry.name else None) for entry in entries]


def _ties(model: Any, entries: Iterable[Entry], stored: Mapping[str, Part]) -> list[Entry]:
    """The tied entries under the names that they would have on disk, as far as these are names of their own."""
    tied = {entry.name: entry for entry in entries if entry.tied_to is not None}
    whole = {part.sources[0]: name for name, part in stored.items() if len(part.sources) == 1 and not part.is_copy}
    once = {source for source in whole if sum(part.sources == (source,) for part in stored.values()) == 1} if tied else set()
    made = []
    for name, part in reverted(model, {name: tensor_of(entry) for name, entry in tied.items()}).items() if tied else ():
        entry = tied[part.sources[0]]
        if len(part.sources) == 1 and entry.tied_to in once and name not in stored:
            made.append(entry._replace(name=name, tied_to=whole[entry.tied_to]))
    return made
