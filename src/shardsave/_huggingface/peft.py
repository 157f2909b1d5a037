"""Everything that knows PEFT: which tensors an adapter is, the names that they have on disk, and the config beside them.

PEFT is never imported here unless a model of its is at hand, and then it has been already.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from shardsave._common.sources import TensorSource
from shardsave._huggingface.transformers_saving import OnDisk
from shardsave._loading.fill_groups import Join
from shardsave._state.module import Entry, State
from shardsave._state.wrappers import Names, unwrap
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(source: object) -> Any:
    """The PEFT model that ``source`` is, seen through wrappers; None where it is none."""
    kind = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    if kind is None or not isinstance(source, torch.nn.Module):
        return None
    inner = unwrap(source)
    return inner if isinstance(inner, kind) else None


class Adapter(NamedTuple):
    """The active adapter of a model: name on disk → name in the module, and what else it consists of.

    ``computed``: by name on disk, tensors that PEFT makes for the file and the module does not have.
    """

    names: Mapping[str, str]
    computed: Mapping[str, torch.Tensor]


def adapter_of(model: Any, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Which of ``tensors``, all of a PEFT ``model`` by their names in the module, PEFT writes for its active adapter."""
    name = _active(model)
    utils = importlib.import_module("peft.utils")
    # Whether embeddings were resized is not asked for: that looks for the base model's config on the Hub.
    made = utils.get_peft_model_state_dict(model, state_dict=dict(tensors), adapter_name=name, save_embedding_layers=False)
    in_module = {id(tensor): known for known, tensor in tensors.items()}
    names = {saved: in_module[id(tensor)] for saved, tensor in made.items() if id(tensor) in in_module}
    return Adapter(names, {saved: tensor for saved, tensor in made.items() if saved not in names})


def adapter_on_disk(model: Any, state: State) -> OnDisk:
    """Of ``state``, the entries of a PEFT ``model``, its adapter under the names that PEFT gives it; and the flags of all."""
    entries = {entry.name: entry for entry in state.entries}
    adapter = adapter_of(model, {name: entry.tensor for name, entry in entries.items()})
    if not adapter.names and not adapter.computed:
        raise UnsupportedTensorError(
            f"cannot save the adapter {_active(model)!r}: tensors of it were expected in the model, there is none; nothing was written"
        )
    saved_as = {name: saved for saved, name in adapter.names.items()}
    made = []
    for saved, name in adapter.names.items():
        leader = entries[name].tied_to
        made.append(entries[name]._replace(name=saved, tied_to=saved_as.get(leader) if leader is not None else None))
    made += [Entry(saved, "tensor", None, None, TensorSource.of(tensor)) for saved, tensor in adapter.computed.items()]
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return OnDisk(state._replace(entries=tuple(made)), flags, ())


def adapter_companions(model: Any) -> dict[str, bytes]:
    """What PEFT's own `save_pretrained` puts beside an adapter: file name → content."""
    config = copy.copy(model.peft_config[_active(model)])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if config.task_type is None:
        base = model.get_base_model()
        values["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {ADAPTER_CONFIG: json.dumps(values, indent=2, sort_keys=True).encode()}


class AdapterNames:
    """How an adapter's tensors, by their names on disk, go into a PEFT model, whose base model stays as it is.

    ``stored``: name in the model → stored tensor, and the names on disk of what the model has no use for.
    """

    def __init__(self, names: Mapping[str, str], stored: Mapping[str, Located]) -> None:
        self.joins: list[Join] = []
        self.stored = {names.get(name, name): located for name, located in stored.items()}
        self._own = frozenset(names.values())

    def optional(self, name: str) -> bool:
        """Whether ``name`` is of the base model."""
        return name not in self._own

    def flags(self, given: Mapping[str, bool]) -> dict[str, bool]:
        """They are by names in the model already."""
        return dict(given)

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]:
        """None are joined."""
        return []


def adapter_names(source: object, stored: Mapping[str, Located], where: str) -> AdapterNames | None:
    """How ``stored`` goes into the active adapter of ``source``; None where one of the two is no adapter.

    Raises IncompatibleCheckpointError.
    """
    model = adapted(source)
    if model is None or len(list(model.active_adapters)) != 1:
        return None
    names = Names.of(model)
    tensors = {names.plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    adapter = adapter_of(model, tensors)
    saved = adapter.names.keys() | adapter.computed.keys()
    if not any(name in saved and name not in tensors for name in stored):
        return None
    if adapter.computed:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: an adapter whose tensors are those of the model was expected, PEFT computes "
            f"{', '.join(sorted(adapter.computed))} for the file; use PeftModel.from_pretrained; the module is unchanged"
        )
    return AdapterNames(adapter.names, stored)


def _active(model: Any) -> str:
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"one adapter is saved at a time, {len(names)} are active ({', '.join(names)}): choose by set_adapter")
    return str(names[0])
