"""Builds a transformers model from the config beside its weights, if no architecture was saved.

The config is data: it names one of transformers' own classes and the arguments of its constructor. Only that constructor runs, and
only if transformers is trusted; arguments that would make it fetch code or weights from elsewhere are removed first.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardsave._common.os_calls import CallFailed
from shardsave._common.strict_json import NotJSON, check_memory, glimpse
from shardsave._format.dtypes import BY_NAME
from shardsave._storage.checkpoint import Located
from shardsave._storage.companions import CONFIG_NAMES, MAX_COMPANION_BYTES
from shardsave._storage.directory import Directory
from shardsave._storage.find import cannot_read
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError

CONFIG_NAME, GENERATION_NAME = CONFIG_NAMES

#: Arguments that fetch from the Hub: kernels are code, and a pretrained backbone has weights.
_FETCHED = ("attn_implementation", "experts_implementation", "use_pretrained_backbone")


def read_config(folder: str, name: str = CONFIG_NAME) -> dict[str, Any] | None:
    """The JSON object in the file ``name`` of ``folder``, None if there is no such file. Raises CorruptCheckpointError."""
    path = os.path.join(folder, name)
    try:
        with Directory() as opened:
            opened.open(folder)
            data = opened.read_all(name, MAX_COMPANION_BYTES)
    except CallFailed as error:
        raise cannot_read(path, error) from error
    if data is None:
        return None
    try:
        check_memory(data)
        config = json.loads(data, object_hook=_special_float)
    except NotJSON as refusal:
        raise CorruptCheckpointError(f"corrupt {name}: {path}: {refusal.wanted}, {refusal.found}; nothing was built") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CorruptCheckpointError(f"corrupt {name}: {path}: JSON expected, found: {reason}; nothing was built") from error
    if not isinstance(config, dict):
        raise CorruptCheckpointError(
            f"corrupt {name}: {path}: a JSON object expected, it is {glimpse(config)}; nothing was built"
        )
    return config


def _special_float(value: dict[str, Any]) -> Any:
    """An infinity or NaN, which JSON does not have, as transformers writes it: ``{"__float__": "Infinity"}``."""
    special = value.get("__float__")
    return float(special) if special in ("Infinity", "-Infinity", "NaN") and len(value) == 1 else value


def empty_model(folder: str, config: Mapping[str, Any], trust: Collection[str], device: torch.device) -> nn.Module:
    """The model of ``config`` on ``device``: weights have no values yet, and tensors that are never saved have their initial values.

    Raises UntrustedCodeError before anything is imported, and IncompatibleCheckpointError.
    """
    where = f"a model from {os.path.join(folder, CONFIG_NAME)}"
    model_class = _model_class(config, trust, where)
    arguments = _without_fetched(config)
    arguments.pop("architectures", None)
    try:
        model_config = model_class.config_class.from_dict(arguments)
        with torch.device(device), _without_initialisation():
            model: Any = model_class._from_config(model_config)
        model.tie_weights()
        _initialise_unsaved(model)
        generation = read_config(folder, GENERATION_NAME) if model.can_generate() else None
        if generation is not None:
            model.generation_config = type(model.generation_config).from_dict(generation)
    except CorruptCheckpointError:
        raise
    except Exception as error:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {model_class.__name__} of {_version()} was expected to be built from it, it raised "
            f"{type(error).__name__}: {' '.join(str(error).split())}; the checkpoint is as it was"
        ) from error
    model.name_or_path = folder
    eval_model: nn.Module = model.eval()  # as from_pretrained does, because a config does not record the mode of the model
    return eval_model


def take_stored_dtypes(model: nn.Module, stored: Mapping[str, Located]) -> None:
    """Gives each tensor of ``model`` the dtype that it has in ``stored`` (name in the model → stored tensor); a config has one for all."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored and BY_NAME[stored[name].dtype].torch != tensor.dtype:
            tensor.data = torch.empty_like(tensor, dtype=BY_NAME[stored[name].dtype].torch)


def _model_class(config: Mapping[str, Any], trust: Collection[str], where: str) -> Any:
    """The transformers class that the config names."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or not name.isidentifier():
        raise IncompatibleCheckpointError(
            f"cannot build {where}: the name of one class of transformers was expected, its architectures are {glimpse(architectures)}; "
            f"define the model and use load_model"
        )
    if "transformers" not in trust and f"transformers.{name}" not in trust:
        raise UntrustedCodeError(
            f"cannot build {where}: only what is trusted is imported, the config names transformers.{name}; "
            f"if you trust it, pass trust=['transformers']; nothing was imported"
        )
    if "quantization_config" in config:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: a model that is not quantized was expected, it has a quantization_config; use from_pretrained"
        )
    try:
        modeling = importlib.import_module("transformers.modeling_utils")
        model_class: Any = getattr(importlib.import_module("transformers"), name, None)
    except ImportError as error:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: transformers was expected to be installed, its import failed: {error}; install it, or use load"
        ) from error
    is_model = isinstance(model_class, type) and issubclass(model_class, modeling.PreTrainedModel)
    if not is_model or model_class.config_class is None:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {name} was expected to be a model of {_version()}, it has none of that name; "
            f"if the class is your own, create the model and use load_model"
        )
    if config.get("model_type") != model_class.config_class.model_type:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {name} expects model_type {model_class.config_class.model_type!r}, it has "
            f"{glimpse(config.get('model_type'))}; config and model belong to different releases or models"
        )
    return model_class


def _without_fetched(value: Any) -> Any:
    """``value`` without the arguments that fetch code or weights from elsewhere, at any depth."""
    if isinstance(value, dict):
        kept = {key: _without_fetched(part) for key, part in value.items() if key.lstrip("_") not in _FETCHED}
        return kept | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in value else {})
    return [_without_fetched(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Inside, transformers allocates weights without random values: they will be read from the checkpoint."""
    for name in ("transformers.initialization", "transformers.modeling_utils"):
        try:
            without = getattr(importlib.import_module(name), "no_init_weights", None)
        except ImportError:
            continue
        if without is not None:
            with without():
                yield
            return
    yield


def _initialise_unsaved(model: Any) -> None:
    """Has transformers compute the values that it does not save, such as sinusoidal embeddings."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *(model._keys_to_ignore_on_load_missing or ())]
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor._is_hf_initialized = not any(re.search(pattern, name) for pattern in patterns)
    if hasattr(model, "initialize_weights"):
        model.initialize_weights()


def _version() -> str:
    return f"transformers {getattr(importlib.import_module('transformers'), '__version__', '')}"
