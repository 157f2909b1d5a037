"""Sub-modules that load themselves: they receive everything stored below their name as a state dict of copies on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._common.memory_errors import memory_for
from shardsave._common.words import some
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
    may_be_missing: Callable[[str], bool],
) -> RoutineAnswer:
    """Reads what ``module`` receives and calls its `load_state_dict`.

    ``joined``: name in the module → tensor that a join has produced; this function removes those that the routine receives.
    ``may_be_missing``: whether the checkpoint need not have a name; if it lacks one, the routine is called without ``strict``.
    """
    values = {inside: joined.pop(name) for name, inside in routine.tensors.items() if name in joined}
    located = {inside: stored[name] for name, inside in routine.tensors.items() if inside not in values}
    copies = {inside: new_copy(tensor) for inside, tensor in located.items()}
    reader.read([(located[inside], copy) for inside, copy in copies.items()])
    values.update(copies)
    names = Names.of(module)
    state: dict[str, Any] = {names.wrapped(inside): values[inside] for inside in routine.tensors.values()}
    state.update({names.wrapped(inside): value for inside, value in routine.extra_state.items()})
    start = f"{routine.name}." if routine.name else ""
    optional = any(name not in state and may_be_missing(start + names.plain(name)) for name in module.state_dict())
    origins = Origins(values)
    try:
        with torch.inference_mode(_has_inference_tensors(module)), origins:
            answer = module.load_state_dict(state, strict=strict and not optional)
    except Exception as error:
        raise _refused(module, routine, f"raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    missing = [start + names.plain(name) for name in getattr(answer, "missing_keys", ())]
    missing = [name for name in missing if not may_be_missing(name)]
    unexpected = [start + names.plain(name) for name in getattr(answer, "unexpected_keys", ())]
    if strict and (missing or unexpected):
        raise _refused(module, routine, f"found missing: {some(missing) or 'none'}, unexpected: {some(unexpected) or 'none'}")
    filled = origins.of_parameters(module)
    return RoutineAnswer(missing, unexpected, {start + name: tuple(start + o for o in of) for name, of in filled.items()})


def _refused(module: nn.Module, routine: Routine, reason: str) -> IncompatibleCheckpointError:
    return IncompatibleCheckpointError(
        f"cannot load {routine.name or type(module).__name__!r}: its own load_state_dict was expected to accept "
        f"what was saved, it {reason}"
    )


def read_joined(join: Join, reader: TensorReader) -> Mapping[str, torch.Tensor]:
    """Reads the sources of ``join`` into copies and converts them: name in the module → its value."""
    copies = [new_copy(source) for source in join.sources]
    reader.read([*zip(join.sources, copies)])
    with memory_for(join.targets[0], sum(copy.nbytes for copy in copies), None):
        return join.convert(copies)


def _has_inference_tensors(module: nn.Module) -> bool:
    return any(not is_lazy(tensor) and tensor.is_inference() for tensor in chain(module.parameters(), module.buffers()))
