"""Casts on the way to disk: floating-point tensors get another dtype, block by block, and a config beside them says so."""

from __future__ import annotations

import json

import torch

from shardsave._common.sources import ByteSource, CastSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._common.strict_json import NotJSON, check_memory
from shardsave._saving.disk_layout import OnDisk
from shardsave._storage.companions import CONFIG_NAMES

_CASTS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
}


def check_dtype(dtype: object) -> torch.dtype | None:
    """Checks the argument ``dtype``, a torch.dtype or its name."""
    if dtype is None:
        return None
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype must be a torch.dtype or its name, not {type(dtype).__name__}")
    target = _CASTS.get(str(dtype).removeprefix("torch."))
    if target is None:
        raise ValueError(f"dtype must be one of {', '.join(_CASTS)}, not {str(dtype)!r}")
    return target


def cast_of(source: ByteSource, target: torch.dtype | None) -> torch.dtype | None:
    """The dtype to which ``source`` is cast, or None. Floating tensors of 8 and 4 bits are quantised, so they are not cast."""
    own = source.dtype
    return target if target is not None and target != own and own.is_floating_point and own.itemsize > 1 else None


def cast_on_disk(on_disk: OnDisk, target: torch.dtype | None) -> tuple[OnDisk, int]:
    """Returns ``on_disk`` with its floating-point tensors and its configs in ``target``, and how many stored tensors are cast."""
    if target is None:
        return on_disk, 0
    entries, casts = [], 0
    for entry in on_disk.state.entries:
        cast = cast_of(entry.source, target)
        if cast is not None:
            casts += entry.tied_to is None
            entry = entry._replace(source=_cast_source(entry.source, cast))
        entries.append(entry)
    companions = {
        name: config_with_dtype(content, target) if name in CONFIG_NAMES else content
        for name, content in on_disk.companions.items()
    }
    return on_disk._replace(state=on_disk.state._replace(entries=tuple(entries)), companions=companions), casts


def _cast_source(source: ByteSource, target: torch.dtype) -> ByteSource:
    if type(source) is TensorSource and source.tensor.dtype == source.dtype:
        return TensorSource(
            source.tensor, target
        )  # each block is cast straight into staging memory, on the tensor's own device
    if isinstance(source, Spread):
        return source.cast(target)
    return CastSource(source, target)


def config_with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Changes a transformers config to expect weights of ``dtype``; one that states no dtype stays as it is."""
    try:
        check_memory(config)
        values = json.loads(config)
    except (NotJSON, ValueError, RecursionError):
        return config
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(values, dict) and isinstance(values.get(key), str)]
    if not keys:
        return config
    values.update(dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
    return f"{json.dumps(values, indent=2)}\n".encode()
