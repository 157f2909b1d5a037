"""What is read together on its way into a module: straight into place, or into copies for a conversion or a loading routine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.slots import slots, sub_modules
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class Join(NamedTuple):
    """Tensors of the module that lie on disk in another layout, as several parts or as parts of another.

    ``targets``: their names in the module. ``sources``: what is read for them. ``convert`` makes the former of the latter.
    """

    targets: tuple[str, ...]
    sources: tuple[Located, ...]
    convert: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]


class Joins(Protocol):
    """All joins of a module, and where the sources of each lie in the module's tensors, where they do."""

    joins: list[Join]

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]: ...


class Group(NamedTuple):
    """Tensors that are read together: (stored tensor, destination). `finish` is called once they are filled.

    ``in_place``: the destinations are the module's own; else they are copies that `finish` passes on. It gives what that finds
    missing and unexpected.
    """

    targets: tuple[tuple[Located, torch.Tensor], ...]
    in_place: bool = True
    finish: Callable[[bool], tuple[list[str], list[str]]] = lambda strict: ([], [])


def give(
    owner_name: str,
    owner: nn.Module,
    own: Mapping[str, str],
    stored: Mapping[str, Located],
    given: dict[str, torch.Tensor],
    extra: Mapping[str, Any],
) -> Group:
    """Copies for a sub-module with a loading routine of its own, which gets them together with what was joined for it, and ``extra``."""
    ready = {inner: given.pop(name) for name, inner in own.items() if name in given}
    copies = {inner: (stored[name], copy_of(stored[name])) for name, inner in own.items() if inner not in ready}

    def finish(strict: bool) -> tuple[list[str], list[str]]:
        names = Names.of(owner)
        state: dict[str, Any] = {
            names.wrapped(inner): copies[inner][1] if inner in copies else ready[inner] for inner in own.values()
        }
        state.update({names.wrapped(inner): value for inner, value in extra.items()})
        inference = any(not is_lazy(slot.tensor) and slot.tensor.is_inference() for slot in slots(sub_modules(owner)))
        try:
            with torch.inference_mode(inference):
                answer = owner.load_state_dict(state, strict=strict)
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {owner_name or type(owner).__name__!r}: its own load_state_dict was expected to take "
                f"what was saved, it raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        start = f"{owner_name}." if owner_name else ""
        missing, unexpected = getattr(answer, "missing_keys", ()), getattr(answer, "unexpected_keys", ())
        return [start + names.plain(name) for name in missing], [start + names.plain(name) for name in unexpected]

    return Group(tuple(copies.values()), False, finish)


def copy_of(stored: Located) -> torch.Tensor:
    """New memory for a stored tensor, on the CPU wherever torch makes tensors by default."""
    with torch.inference_mode(
        False
    ):  # a routine may keep it, and a tensor of the caller's inference mode could never be trained
        return torch.empty(torch_shape(stored.dtype, stored.shape), dtype=BY_NAME[stored.dtype].torch, device="cpu")
