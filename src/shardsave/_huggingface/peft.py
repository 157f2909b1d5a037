"""Everything that knows PEFT: which tensors an adapter is, the names that they have on disk, and the config beside them.

PEFT is never imported here unless a model of its is at hand, and then it has been already.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from shardsave._huggingface.peft_names import active_adapter, adapter_of
from shardsave._huggingface.transformers_saving import OnDisk
from shardsave._state.module import Entry, State, tensor_of
from shardsave.errors import UnsupportedTensorError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_on_disk(model: Any, state: State) -> OnDisk:
    """Of ``state``, the entries of a PEFT ``model``, its adapter under the names that PEFT gives it; and the flags of all."""
    entries = {entry.name: entry for entry in state.entries}
    adapter = adapter_of(model, {name: tensor_of(entry) for name, entry in entries.items()})
    if not adapter.names and not adapter.computed:
        raise UnsupportedTensorError(
            f"cannot save the adapter {active_adapter(model)!r}: tensors of it were expected in the model, "
            f"there is none; nothing was written"
        )
    saved_as = {name: saved for saved, name in adapter.names.items()}
    made = []
    for saved, name in adapter.names.items():
        leader = entries[name].tied_to
        made.append(entries[name]._replace(name=saved, tied_to=saved_as.get(leader) if leader is not None else None))
    made += [Entry(saved, "tensor", None, None, tensor) for saved, tensor in adapter.computed.items()]
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return OnDisk(state._replace(entries=tuple(made)), flags, ())


def adapter_companions(model: Any) -> dict[str, bytes]:
    """What PEFT's own `save_pretrained` puts beside an adapter: file name → content."""
    config = copy.copy(model.peft_config[active_adapter(model)])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if config.task_type is None:
        base = model.get_base_model()
        values["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {ADAPTER_CONFIG: json.dumps(values, indent=2, sort_keys=True).encode()}
