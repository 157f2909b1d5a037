"""The tensors of a transformers model as `save_pretrained` lays them out on disk: renamed, and fused tensors taken apart.

Saving writes this layout, loading reads it straight into the same views. transformers itself converts. A tensor on disk that is
a part of one in memory is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from shardsave._common.imports import import_at_use
from shardsave._common.memory import tensors_in
from shardsave._state.wrappers import plain_classes
from shardsave.errors import UnsupportedTensorError

_SOURCES = "_shardsave_sources"


class Join(NamedTuple):
    """``joined`` was made of ``tensors`` along the dimension ``dim``: one after the other or, if ``is_stack``, with a new dimension."""

    joined: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    dim: int
    is_stack: bool


class DiskTensor(NamedTuple):
    """One tensor on disk: a view of the single tensor in ``sources`` (names in the module), or a copy made of one or more of them.

    ``joins``: how copies were made, by their storage, as far as tensors were only joined.
    """

    tensor: torch.Tensor
    sources: tuple[str, ...]
    is_copy: bool
    joins: Mapping[object, Join] = {}


def reverted(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, DiskTensor]:
    """Name on disk → the tensor stored there, as transformers reverts ``tensors`` of ``model`` (by their names in the module).

    Raises UnsupportedTensorError.
    """
    revert = _revert_function()
    if revert is None:
        return {name: DiskTensor(tensor, (name,), False) for name, tensor in tensors.items()}
    storages = {}
    marked = {}
    for name, tensor in tensors.items():
        marked[name] = tensor.detach()
        setattr(marked[name], _SOURCES, (name,))
        storages[name] = storage_of(tensor)
    views = _ViewsOnly()
    try:
        with plain_classes(model), views, torch.no_grad():
            on_disk = dict(revert(model, marked))
    except Exception as error:
        raise UnsupportedTensorError(
            f"cannot save {type(model).__name__}: transformers was expected to convert it to its layout on disk, it "
            f"raised {type(error).__name__}: {' '.join(str(error).split())}; nothing was written"
        ) from error
    parts = {}
    for name, tensor in on_disk.items():
        sources = getattr(tensor, _SOURCES)
        is_copy = storage_of(tensor) not in [storages[source] for source in sources]
        parts[name] = DiskTensor(tensor, sources, is_copy, views.joins)
    return parts


class _ViewsOnly(TorchFunctionMode):
    """A slice of a tensor stays a view, even if not contiguous; and every result remembers the tensors that it was made from.

    ``joins``: the results of joins, by their storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joins: dict[object, Join] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.contiguous:
            return args[0]
        result = function(*args, **(kwargs or {}))
        sources = [source for tensor in tensors_in((args, kwargs or {})) for source in getattr(tensor, _SOURCES, ())]
        for tensor in tensors_in(result):
            setattr(tensor, _SOURCES, tuple(dict.fromkeys(sources)))
        if function in (torch.cat, torch.concat, torch.stack) and not (kwargs or {}).keys() - {"dim"}:
            dim = (*args[1:], (kwargs or {}).get("dim", 0))[0] % result.dim()
            self.joins[storage_of(result)] = Join(result, tuple(args[0]), dim, function is torch.stack)
        return result


def storage_of(tensor: torch.Tensor) -> object:
    """Identifies the storage of ``tensor``, also on the meta device."""
    return tensor.untyped_storage()._cdata


def _revert_function() -> Any:
    """The function of transformers that converts to the layout on disk; None if this version has none and stores names as they are."""
    try:
        return getattr(import_at_use("transformers.core_model_loading"), "revert_weight_conversion", None)
    except ImportError:
        return None
