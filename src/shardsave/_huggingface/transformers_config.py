"""Builds a transformers model from the config beside its weights, if no architecture was saved.

The config is data: it names one of transformers' own classes and the arguments of its constructor. Only that constructor runs, and
only if transformers is trusted. It gets only arguments that its config class names (``transformers_arguments.py``), is offline, and may
make only as much as the checkpoint holds (``transformers_construction.py``).
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import pkgutil
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from shardsave._common.os_calls import CallFailed
from shardsave._common.strict_json import NotJSON, check_memory, glimpse
from shardsave._common.supervised import TooMuchTaken, supervised
from shardsave._format.dtypes import BY_NAME
from shardsave._huggingface.transformers_arguments import ConfigArguments, generation_arguments
from shardsave._huggingface.transformers_construction import CountedTensors, Offline, guarded
from shardsave._storage.checkpoint import Located
from shardsave._storage.companions import CONFIG_NAMES, MAX_COMPANION_BYTES
from shardsave._storage.directory import Directory
from shardsave._storage.find import cannot_read
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError, UntrustedCodeError

CONFIG_NAME, GENERATION_NAME = CONFIG_NAMES

#: Implementations that are part of transformers; all other names may be those of kernels, which are code from the Hub.
_BUILT_IN = (None, "eager", "sdpa")

#: What making a model may take: processor time, and growth of the process. One of 1000 tensors takes less than a second, and some MiB
#: beside its tensors.
_ANY_SECONDS, _SECONDS_PER_TENSOR = 30.0, 0.005
_ANY_BYTES, _BYTES_PER_BYTE = 4 << 30, 4


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


def empty_model(
    folder: str, config: Mapping[str, Any], trust: Collection[str], device: torch.device, stored: Mapping[str, Located]
) -> nn.Module:
    """The model of ``config`` on ``device``: weights have no values yet, and tensors that are never saved have their initial values.

    ``stored`` are the tensors of the checkpoint. The model is made on meta first: if it is far larger than they are, nothing is allocated.

    Raises UntrustedCodeError before anything is imported, and IncompatibleCheckpointError.
    """
    where = f"a model from {os.path.join(folder, CONFIG_NAME)}"
    model_class = _model_class(config, trust, where)
    longest = max((length for located in stored.values() for length in located.shape), default=0)
    arguments = ConfigArguments(where, len(stored), longest).choose(model_class.config_class, config)
    counted = CountedTensors(where, len(stored), sum(math.prod(located.shape) for located in stored.values()))
    device = torch.empty(0, device=device).device  # the current one of this thread, which another thread does not know
    inside: set[int] = set()

    def construct() -> Any:
        inside.add(threading.get_ident())
        with torch.device("meta"), counted:
            _construct(model_class, arguments)
        counted.check()
        with torch.device(device):
            model = _construct(model_class, arguments)
        model.tie_weights()
        _initialise_unsaved(model)
        if model.can_generate():
            _take_generation_config(model, folder)
        return model

    try:
        seconds = _ANY_SECONDS + _SECONDS_PER_TENSOR * len(stored)
        nbytes = _ANY_BYTES + _BYTES_PER_BYTE * sum(located.nbytes for located in stored.values())
        model = supervised(construct, partial(guarded, inside), seconds, nbytes)
    except ShardSaveError:
        raise
    except TooMuchTaken as error:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: a model of {len(stored)} tensors expected, its constructor took {error}; nothing was built"
        ) from None
    except Exception as error:
        counted.check()
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {model_class.__name__} of {_version()} was expected to be built from it, {_failure(error)}; "
            f"the checkpoint is as it was"
        ) from error
    model.name_or_path = folder
    eval_model: nn.Module = model.eval()  # as from_pretrained does, because a config does not record the mode of the model
    return eval_model


def _construct(model_class: Any, arguments: dict[str, Any]) -> Any:
    """A new model with uninitialised weights. Constructors change their arguments, so they get a copy."""
    model_config = model_class.config_class.from_dict(copy.deepcopy(arguments))
    for each in _configs(model_config):
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if vars(each).get(name) not in _BUILT_IN:
                vars(each)[name] = None
    with _without_initialisation():
        return model_class._from_config(model_config)


def _configs(config: Any) -> Iterator[Any]:
    """``config`` and all configs in its attributes."""
    base = importlib.import_module("transformers").PretrainedConfig
    found, seen = [config], {id(config)}
    while found:
        yield (each := found.pop())
        inner = [part for part in vars(each).values() if isinstance(part, base) and id(part) not in seen]
        seen.update(map(id, inner))
        found += inner


def _take_generation_config(model: Any, folder: str) -> None:
    """Gives ``model`` the generation config beside the weights, if there is one."""
    generation = read_config(folder, GENERATION_NAME)
    if generation is not None:
        generation_class = type(model.generation_config)
        model.generation_config = generation_class.from_dict(generation_arguments(generation_class, generation))


def _failure(error: Exception) -> str:
    if isinstance(error, (Offline, ConnectionError)):
        return "it asked for something from the Hub, and nothing is fetched while a model is built; use from_pretrained"
    return f"it raised {type(error).__name__}: {' '.join(str(error).split())}"


def untie_differing(
    model: Any, stored: Mapping[str, Located], same_bytes: Callable[[Located, Located], bool]
) -> list[tuple[str, str]]:
    """Separates parameters that the config ties although they differ in ``stored`` (name in the model → stored tensor), as
    `from_pretrained` does. Returns their names: the one that keeps the tensor, and the one that got its own.
    """
    first: dict[int, str] = {}
    separated = []
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name not in stored or not isinstance(parameter, nn.Parameter):
            continue
        kept = first.setdefault(id(parameter), name)
        if stored[kept] is stored[name] or same_bytes(stored[kept], stored[name]):
            continue
        owner, _, attribute = name.rpartition(".")
        own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), attribute, own)
        for pair in ((name, kept), (kept, name)):
            if ties.get(pair[0]) == pair[1]:
                del ties[pair[0]]
        separated.append((kept, name))
    return separated


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
        importlib.import_module("transformers.modeling_utils")
        model_class = _find_class(name, config.get("model_type"))
    except ImportError as error:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: transformers was expected to be installed, its import failed: {error}; install it, or use load"
        ) from error
    if model_class is None or model_class.config_class is None:
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {name} was expected to be a model of {_version()}, it has none of that name; "
            f"if the class is your own, create the model and use load_model"
        )
    if (config.get("model_type") or "") != model_class.config_class.model_type:  # some inner configs have an empty one
        raise IncompatibleCheckpointError(
            f"cannot build {where}: {name} expects model_type {model_class.config_class.model_type!r}, it has "
            f"{glimpse(config.get('model_type'))}; config and model belong to different releases or models"
        )
    return model_class


def _find_class(name: str, model_type: Any) -> Any:
    """The model of transformers called ``name``, None if there is none. The package exports most models; others, such as a decoder on
    its own, are in the modules of their type of model only."""
    transformers = importlib.import_module("transformers")
    places = [transformers]
    if not hasattr(transformers, name) and isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
        package_name = transformers.CONFIG_MAPPING[model_type].__module__.rpartition(".")[0]
        if package_name.startswith("transformers.models."):
            package = importlib.import_module(package_name)
            modules = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith("modeling_")]
            places = [importlib.import_module(f"{package_name}.{module}") for module in modules]
    for place in places:
        found = getattr(place, name, None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and found.__module__.partition(".")[0] == "transformers":
            return found
    return None


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
