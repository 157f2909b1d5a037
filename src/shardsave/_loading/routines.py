"""Sub-modules that load themselves: they receive everything stored below their name as a state dict of copies on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._loading.disk_layout import Join
from shardsave._loading.module_plan import Routine
from shardsave._loading.new_tensors import new_copy
from shardsave._loading.origins import Origins
from shardsave._loading.read import TensorReader
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class RoutineAnswer(NamedTuple):
    """``missing``, ``unexpected``: the names that the routine reports. ``origins``: the name of each parameter that it filled → the
    names of the stored tensors that it filled it from."""

    missing: list[str]
    unexpected: list[str]
    origins: dict[str, tuple[str, ...]]


def run_routine(
    module: nn.Module,
    routine: Routine,
    stored: Mapping[str, Located],
    joined: dict[str, torch.Tensor],
    reader: TensorReader,
    strict: bool,
) -> RoutineAnswer:
    """Reads what ``module`` receives and calls its `load_state_dict`.

    ``joined``: name in the module → tensor that a join has produced; this function removes those that the routine receives.
    """
    values = {inside: joined.pop(name) for name, inside in routine.tensors.items() if name in joined}
    located = {inside: stored[name] for name, inside in routine.tensors.items() if inside not in values}
    copies = {inside: new_copy(tensor) for inside, tensor in located.items()}
    reader.read([(located[inside], copy) for inside, copy in copies.items()])
    values.update(copies)
    names = Names.of(module)
    state: dict[str, Any] = {names.wrapped(inside): values[inside] for inside in routine.tensors.values()}
    state.update({names.wrapped(inside): value for inside, value in routine.extra_state.items()})
    origins = Origins(values)
    try:
        with torch.inference_mode(_has_inference_tensors(module)), origins:
            answer = module.load_state_dict(state, strict=strict)
    except Exception as error:
        raise IncompatibleCheckpointError(
            f"cannot load {routine.name or type(module).__name__!r}: its own load_state_dict was expected to accept "
            f"what was saved, it raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    start = f"{routine.name}." if routine.name else ""
    return RoutineAnswer(
        missing=[start + names.plain(name) for name in getattr(answer, "missing_keys", ())],
        unexpected=[start + names.plain(name) for name in getattr(answer, "unexpected_keys", ())],
        origins={
            start + name: tuple(start + origin for origin in of_parameter)
            for name, of_parameter in origins.of_parameters(module).items()
        },
    )


def read_joined(join: Join, reader: TensorReader) -> Mapping[str, torch.Tensor]:
    """Reads the sources of ``join`` into copies and converts them: name in the module → its value."""
    copies = [new_copy(source) for source in join.sources]
    reader.read([*zip(join.sources, copies)])
    return join.convert(copies)


def _has_inference_tensors(module: nn.Module) -> bool:
    return any(not is_lazy(tensor) and tensor.is_inference() for tensor in chain(module.parameters(), module.buffers()))
