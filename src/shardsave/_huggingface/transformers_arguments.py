"""Chooses what of a transformers config reaches the constructor: arguments that its class names, with plain values.

A config class of transformers turns every key into an attribute, and some attributes decide what is fetched or run: an attention
implementation is a kernel from the Hub, a backbone may be a repository, and ``attribute_map`` renames one attribute to another. So keys
are not removed by their names: only those that the class itself names are kept, and their values are numbers, words, and lists and
tables of these. Numbers are bounded by what the checkpoint holds, since a constructor may loop over them before it makes a tensor.
"""

from __future__ import annotations

import importlib
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

import torch

from shardsave._common.strict_json import glimpse
from shardsave._huggingface.transformers_config_classes import argument_names, signature, sub_configs
from shardsave.errors import IncompatibleCheckpointError

#: Settings of generation that name code.
_NO_SETTINGS = frozenset({
    "compile_config", "continuous_batching_config", "noise_scheduler", "custom_generate",
})  # fmt: skip

#: Older names of sub-configs.
_OLD_CONFIGS = {"language_config": "text_config", "vit_config": "vision_config"}

#: Older arguments that are tables, of which a class takes single entries.
_OLD_TABLES = frozenset({
    "rope_scaling", "rope_parameters", "whisper_config", "mtp_config", "linear_attn_config", "sparse_attention_config",
    "attention_other_setting",
})  # fmt: skip

_LABELS = frozenset({"id2label", "label2id"})

#: Arguments whose text is shown or compared, never looked up.
_TEXT = frozenset({
    "id2label", "label2id", "label_names", "vocab_list", "vocabulary_map", "speaker_id", "langs", "languages", "title_sep",
    "doc_sep", "prefix",
})  # fmt: skip

#: Arguments that go to timm's ``create_model``, where text may be the path of a file.
_NUMBERS = frozenset({"model_args"})

#: Text without a separator of paths, repositories or addresses.
_WORD = re.compile(r"(?!\.)[\w*+,=.-]{0,1024}", re.ASCII)

#: Arguments over which constructors loop, those of them that are lists of such numbers, those whose square is a number of loops, and
#: those whose numbers may have any size: whole numbers, and fractions.
_COUNTED = re.compile(
    r"(?!max_)(?!.*(size|dim|channel))(.*(layer|depth|stage|blocks|repeats)|n_layers?$)|first_k_dense|attention_types$|n_codes"
)
_SQUARED = re.compile(r"(image|img)_?(size|height|width)$|resolution$")
_SUMMED = re.compile(r"depths?$|num_\w*(layers|blocks|repeats)$")
_UNBOUNDED = re.compile(r"theta|rotary_emb_base|seed|sliding_window")
_UNBOUNDED_FLOAT = re.compile(rf"{_UNBOUNDED.pattern}|(?<!inter)val|clip|limit|frequency")

_MOST_LAYERS, _MOST_LABELS, _LARGEST, _LARGEST_SQUARED = 1 << 10, 1 << 16, 1 << 25, 1 << 12
#: Whole numbers below zero have a meaning of their own, such as -1 and -100; subtracted from another, they are a size.
_LEAST = -(1 << 10)
_DEEPEST = 8


class ConfigArguments:
    """Chooses the arguments for config classes. ``tensors`` and ``longest`` are the number of the checkpoint's tensors and the length of
    their longest dimension. Raises IncompatibleCheckpointError; nothing of a class is run.
    """

    def __init__(self, where: str, tensors: int, longest: int) -> None:
        self._where = where
        self._layers = _MOST_LAYERS + tensors
        self._labels = max(_MOST_LABELS, longest)
        self._largest = max(_LARGEST, longest)
        self._squared = max(_LARGEST_SQUARED, longest)

    def choose(self, config_class: Any, values: Mapping[str, Any], place: str = "", depth: int = 0) -> dict[str, Any]:
        """The arguments for ``config_class`` among ``values``, the content of its file. Other keys are left out."""
        self._check_depth(place, depth)
        names, configs = argument_names(config_class), sub_configs(config_class)
        chosen: dict[str, Any] = {}
        for name, value in values.items():
            if name not in names:
                continue
            own_name = _OLD_CONFIGS.get(name, name.removesuffix("_dict"))
            inner = "timm_backbone" if name == "backbone_kwargs" else configs.get(own_name)
            if name == "use_pretrained_backbone":
                chosen[name] = False  # its weights are in the checkpoint, not on the Hub
            elif not isinstance(value, dict):
                self._check(name, value, place + name)
                chosen[name] = value
            elif name == "per_layer_config":
                chosen[name] = self._per_layer(config_class, value, place + name, depth + 1)
            elif inner is not None:
                inner_class = self._inner_class(inner, value, place + name)
                chosen[name] = self.choose(inner_class, value, f"{place}{name}.", depth + 1)
            elif name in signature(config_class) or name in _OLD_TABLES:
                self._check(name, value, place + name)
                chosen[name] = value
        return chosen

    def _per_layer(self, config_class: Any, layers: Mapping[str, Any], place: str, depth: int) -> dict[str, Any]:
        """Number of a layer → what differs in it."""
        chosen = {}
        if len(layers) > self._layers:
            self._refuse(place, f"at most {self._layers} layers", layers)
        for number, values in layers.items():
            where = f"{place}.{number}"
            if not number.isdecimal() or not isinstance(values, dict):
                self._refuse(where, "arguments of the layer with that number", values)
            self._check("skip", skipped := values.get("skip", []), f"{where}.skip")
            chosen[number] = self.choose(config_class, values, f"{where}.", depth) | ({"skip": skipped} if skipped else {})
        return chosen

    def _inner_class(self, inner: Any, values: Mapping[str, Any], place: str) -> Any:
        """The class of a sub-config; ``inner`` is the class, or the type of model if ``values`` has none."""
        if isinstance(inner, type):
            return inner
        known = importlib.import_module("transformers").CONFIG_MAPPING
        model_type = values.get("model_type", inner)
        if not isinstance(model_type, str) or model_type not in known:
            self._refuse(f"{place}.model_type", "a type of model that this release of transformers has", model_type)
        inner_class = known[model_type]
        if inner_class.__module__.partition(".")[0] != "transformers":
            self._refuse(f"{place}.model_type", "a model of transformers' own", model_type)
        return inner_class

    def _check(self, name: str, value: Any, place: str, depth: int = 0) -> None:
        """Refuses a value that is not plain."""
        self._check_depth(place, depth)
        if name.endswith("dtype"):
            self._check_dtype(value, place)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self._check_number(name, value, place)
        elif isinstance(value, str):
            if name in _NUMBERS or (name not in _TEXT and not _WORD.fullmatch(value)):
                self._refuse(place, "a number" if name in _NUMBERS else "a word", value)
        elif isinstance(value, list):
            self._check_list(name, value, place, depth)
        elif isinstance(value, dict):
            self._check_table(name, value, place, depth)

    def _check_table(self, name: str, value: dict[str, Any], place: str, depth: int) -> None:
        if name in _LABELS and len(value) > self._labels:
            self._refuse(place, f"at most {self._labels} labels", value)
        for key, part in value.items():
            if name not in _TEXT and not _WORD.fullmatch(key):
                self._refuse(place, "words as keys", key)
            self._check(name, part, f"{place}.{key}", depth + 1)

    def _check_list(self, name: str, value: list[Any], place: str, depth: int) -> None:
        if _COUNTED.match(name):
            total = sum(part for part in value if isinstance(part, int)) if _SUMMED.match(name) else 0
            if max(len(value), total) > self._layers:
                self._refuse(place, f"at most {self._layers} layers", value)
        for number, part in enumerate(value):
            self._check(name, part, f"{place}[{number}]", depth + 1)

    def _check_number(self, name: str, value: float, place: str) -> None:
        if name == "num_labels":
            limit = self._labels
        elif _COUNTED.match(name):
            limit = self._layers
        elif _SQUARED.search(name):
            limit = self._squared
        else:
            limit = self._largest
        argument = place.rpartition(".")[2]
        if isinstance(value, float):
            fits = abs(value) <= limit or not math.isfinite(value) or _UNBOUNDED_FLOAT.search(argument)
        else:
            fits = _LEAST <= value <= limit or (_UNBOUNDED.search(argument) and abs(value) < 1 << 63)
        if not fits:
            wanted = "a number" if value > 0 else f"a number from {_LEAST}"
            self._refuse(place, f"{wanted} up to {limit}, as for the tensors of this checkpoint", value)

    def _check_dtype(self, value: Any, place: str) -> None:
        if value is not None and not (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
            self._refuse(place, "a dtype of torch", value)

    def _check_depth(self, place: str, depth: int) -> None:
        if depth > _DEEPEST:
            self._refuse(f"{place[:60]}...", f"at most {_DEEPEST} levels", "more")

    def _refuse(self, place: str, wanted: str, found: Any) -> typing.NoReturn:
        raise IncompatibleCheckpointError(
            f"cannot build {self._where}: {place}: {wanted} expected, it is {glimpse(found)}; nothing was built"
        )


def generation_arguments(generation_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``values``, the content of a generation config. Models add settings of their own, so all that are data are
    kept: none hides code of ``generation_class``, or is an option of a compiler or scheduler, which are looked up by name."""
    return {
        name: value
        for name, value in values.items()
        if name.isidentifier() and not name.startswith("_") and not hasattr(generation_class, name) and name not in _NO_SETTINGS
    }
