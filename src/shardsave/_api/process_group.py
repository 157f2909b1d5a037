"""The argument ``process_group``, and whether a verb is collective."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.distributed
from torch import nn

from shardsave._state.distributed_tensors import is_dtensor
from shardsave._state.fsdp import is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How deep a training state is nested at most.
_MAX_DEPTH = 64


def check_group(group: Any) -> None:
    """Raises TypeError for anything but a group of torch.distributed, ValueError for one that this process is not in."""
    available = torch.distributed.is_available()
    if available and group is torch.distributed.GroupMember.NON_GROUP_MEMBER:  # what `new_group` returns to other processes
        raise ValueError("process_group must have this process in it, this process is not in the group that was passed")
    if not available or not isinstance(group, torch.distributed.ProcessGroup):
        of_mesh = "; pass mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(f"process_group must be a group of torch.distributed or None, not {type(group).__name__}{of_mesh}")


def collective_group(
    source: Union[nn.Module, Mapping[str, Any], Iterable[Any], None], process_group: ProcessGroup | None, training: Any = None
) -> ProcessGroup | None:
    """The group over which a verb is collective; None if it concerns this process alone.

    That is ``process_group`` or, if ``source`` (a module, a mapping or tensors) or ``training`` (a training state) has a DTensor, the
    default group. A given group of one process is none, unless there is a DTensor. Raises TypeError, and ValueError if this process is
    not in ``process_group``.
    """
    if process_group is None:
        # Asked first: to look at every tensor takes time. Whoever has a DTensor has imported its module.
        if "torch.distributed.tensor" not in sys.modules or not torch.distributed.is_initialized():
            return None
        spread = _has_dtensor(source) or _training_has_dtensor(training)
        return torch.distributed.group.WORLD if spread else None
    check_group(process_group)
    spread = _has_dtensor(source) or _training_has_dtensor(training)
    return process_group if spread or process_group.size() > 1 else None


def members(group: ProcessGroup) -> list[int]:
    """The global rank of each process of ``group``, in the order of the group."""
    return torch.distributed.get_process_group_ranks(group)


def _has_dtensor(source: Union[nn.Module, Mapping[str, Any], Iterable[Any], None]) -> bool:
    if "torch.distributed.tensor" not in sys.modules or source is None:  # whoever has a DTensor has imported its module
        return False
    if isinstance(source, nn.Module):
        tensors = (tensor for part in source.modules() for tensor in (*part._parameters.values(), *part._buffers.values()))
        return any(map(is_dtensor, tensors)) or any(map(is_fsdp_module, source.modules()))
    if isinstance(source, torch.Tensor) or not isinstance(source, Iterable):
        return False  # the verb itself says what is wrong
    return any(map(is_dtensor, source.values() if isinstance(source, Mapping) else source))


def _training_has_dtensor(value: Any, depth: int = 0) -> bool:
    """The same for ``value`` in a training state: an optimizer, a module, a tensor, or a container of these."""
    if "torch.distributed.tensor" not in sys.modules or value is None or depth > _MAX_DEPTH:
        return False
    from shardsave._training.per_rank import PerRank

    value = value.value if isinstance(value, PerRank) else value
    if isinstance(value, torch.Tensor):
        return is_dtensor(value)
    if isinstance(value, nn.Module):
        return _has_dtensor(value)
    if isinstance(value, torch.optim.Optimizer):
        return _has_dtensor(parameter for group in value.param_groups for parameter in group["params"])
    if isinstance(value, (Mapping, list, tuple)):
        return any(_training_has_dtensor(item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value))
    return False
