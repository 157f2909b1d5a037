"""Quantised weights of torchao: tensors that consist of other tensors, stored as torchao's own safetensors layout has them.

``0.weight`` becomes ``0._weight_qdata``, ``0._weight_scale``, …; `__metadata__` of each file says how these make up tensors. Nothing in a
file is ever built from that: a module is quantised by its own program, and then filled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shardsave._common.imports import import_at_use
from shardsave._common.memory import PLAIN_TYPES
from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.quantised import PLAIN, TENSOR_NAMES, part_name
from shardsave._state.savable import refuse

#: The full names of the classes whose tensors are stored as their parts.
CLASSES = frozenset(f"torchao.quantization.{name}" for name in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"))

_ENCODER = "torchao.prototype.safetensors.safetensors_utils"


class Quantised(NamedTuple):
    """A quantised tensor. ``parts``: key → the tensors that it consists of. ``form``: torchao's JSON of everything else."""

    parts: Mapping[str, torch.Tensor]
    form: str


class Expanded(NamedTuple):
    """A state with the parts of quantised tensors in their place.

    ``flags``: name of a part → whether its whole is frozen, if that is a parameter. ``metadata``: what torchao needs in the files.
    """

    named: dict[str, torch.Tensor]
    flags: dict[str, bool]
    metadata: dict[str, str]


def quantised(tensor: torch.Tensor) -> Quantised | None:
    """The parts of ``tensor`` if it is of one of `CLASSES`; None for every other tensor, and if this torchao has no JSON for it."""
    kind = type(tensor)
    if kind in PLAIN_TYPES or f"{kind.__module__}.{kind.__qualname__}" not in CLASSES:
        return None
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return None
    try:
        import_at_use(_ENCODER)
        form = json.dumps(tensor, cls=sys.modules[_ENCODER].TensorSubclassAttributeJSONEncoder)
        keys = json.loads(form)["_tensor_data_names"]
        parts = {key: getattr(tensor, key) for key in keys}
        inner, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None
    held = {key for key in inner if getattr(tensor, key) is not None}
    if held != parts.keys() or not all(type(part) in PLAIN_TYPES for part in parts.values()):
        return None
    return Quantised(parts, form)


def expand(named: Mapping[str, torch.Tensor]) -> Expanded:
    """``named`` with the parts of its quantised tensors. Raises UnsupportedTensorError if a part would have the name of another tensor."""
    expanded = Expanded({}, {}, {})
    forms = {}
    for name, tensor in named.items():
        found = quantised(tensor)
        if found is None:
            expanded.named.setdefault(name, tensor)
            continue
        forms[name] = found.form
        for key, part in found.parts.items():
            own_name = part_name(name, key)
            if own_name in named:
                refuse(own_name, f"no other tensor of the name of a part of {name!r} was expected", "there is one")
            expanded.named[own_name] = part
            if isinstance(tensor, nn.Parameter):
                expanded.flags[own_name] = not tensor.requires_grad
    if forms:
        expanded.metadata.update(_metadata(named, forms))
    return expanded


def _metadata(names: Iterable[str], forms: Mapping[str, str]) -> dict[str, str]:
    for name in ("format", CHECKSUM_KEY, TENSOR_NAMES):
        if name in names:
            refuse(name, "another name was expected", "beside quantised tensors, this one has a meaning in the files")
    return {**{name: forms.get(name, PLAIN) for name in names}, TENSOR_NAMES: json.dumps(list(names))}


def differences(tensor: torch.Tensor, stored: Any) -> list[str]:
    """How the quantised ``tensor`` differs from ``stored``, the JSON of another one, in words; empty if it can be filled with its parts.

    What only one of them states is no difference: another version of torchao may have more to say.
    """
    found = quantised(tensor)
    return list(_differences(json.loads(found.form), stored, "")) if found is not None else []


def _differences(own: Any, stored: Any, path: str) -> Iterable[str]:
    if path == "_tensor_data_names" and isinstance(stored, list):
        own, stored = sorted(own), sorted(map(str, stored))
    if isinstance(own, dict) and isinstance(stored, dict):
        for key in own.keys() & stored.keys():
            yield from _differences(own[key], stored[key], key)
    elif own != stored:
        yield f"{path.strip('_')} is {_short(stored)} on disk, {_short(own)} in the module"


def _short(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("_type"), str):
        value = value.get("_data") if isinstance(value.get("_data"), str) else value["_type"]
    return f"{value!r:.60}"
