"""Saves the adapter of a PEFT model as PEFT's ``save_pretrained`` would: tensors, names on disk, and the config beside them."""

from __future__ import annotations

import copy
import json
from typing import Any

from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shardsave._huggingface.peft_names import active_adapter, adapter_of
from shardsave._huggingface.spread_on_disk import computed_source
from shardsave._saving.disk_layout import OnDisk
from shardsave._state.module import Entry, State
from shardsave._state.wrappers import plain_class
from shardsave.errors import UnsupportedTensorError


class AdapterLayout:
    """The layout of the active adapter of a PEFT ``model``: one file with PEFT's names, and the flags of the whole model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def apply(self, state: State, *, is_kept: bool = False) -> OnDisk:
        companions = adapter_companions(self._model)
        entries = {entry.name: entry for entry in state.entries}
        adapter = adapter_of(self._model, {name: entry.tensor for name, entry in entries.items()})
        if not adapter.names and not adapter.computed:
            raise UnsupportedTensorError(
                f"cannot save the adapter {active_adapter(self._model)!r}: at least one tensor was expected, it has none; "
                "nothing was written"
            )
        # PEFT writes a tensor that several layers share once for each of them.
        on_disk = [entries[name]._replace(name=saved_name, tied_to=None) for saved_name, name in adapter.names.items()]
        on_disk += [
            Entry(saved_name, "tensor", None, None, computed_source(saved_name, tensor, state.entries))
            for saved_name, tensor in adapter.computed.items()
        ]
        flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
        # PEFT expects one file, so adapters are never sharded.
        return OnDisk(state._replace(entries=tuple(on_disk)), companions, flags, single_file=ADAPTER_WEIGHTS)

    def fingerprint(self) -> bytes:
        return b""  # it always looks itself


def adapter_companions(model: Any) -> dict[str, bytes]:
    """The config that PEFT's `save_pretrained` writes beside an adapter: file name → content."""
    config = copy.copy(model.peft_config[active_adapter(model)])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if config.task_type is None:
        base = plain_class(type(model.get_base_model()))
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return {ADAPTER_CONFIG: json.dumps(values, indent=2, sort_keys=True).encode()}
