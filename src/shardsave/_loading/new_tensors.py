"""New memory for stored tensors: for a whole selection at once, for a model that is being built, and for one temporary copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory_errors import check_free_memory, memory_for, refuse_lack_of_memory
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.read import Target
from shardsave._storage.checkpoint import Checkpoint, Located


@gc_paused()
def new_tensors(stored: Mapping[str, Located], device: torch.device) -> dict[str, torch.Tensor]:
    """An uninitialised tensor on ``device`` for each stored tensor.

    `torch.empty_like` takes half the time of `torch.empty`, so only the first tensor of each dtype and shape is created by `torch.empty`.
    """
    tensors = {}
    first_of_kind: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for name, located in stored.items():
        first = first_of_kind.get((located.dtype, located.shape))
        if first is None:
            tensors[name] = first_of_kind[located.dtype, located.shape] = _new_tensor(located, device)
            continue
        try:
            tensors[name] = torch.empty_like(first)
        except (MemoryError, RuntimeError) as error:
            refuse_lack_of_memory(error, name, located.nbytes, device)
            raise
    return tensors


def new_copy(located: Located) -> torch.Tensor:
    """An uninitialised tensor for a copy of a stored tensor; on the CPU even if torch's default device is another."""
    # A loading routine may keep the tensor, and a tensor created in the caller's inference mode could never be trained.
    with torch.inference_mode(False):
        return _new_tensor(located, torch.device("cpu"))


def _new_tensor(located: Located, device: torch.device) -> torch.Tensor:
    with memory_for(located.name, located.nbytes, device):
        return torch.empty(torch_shape(located.dtype, located.shape), dtype=BY_NAME[located.dtype].torch, device=device)


class NewTensors:
    """Makes the tensors of a model that is being built, each once, and lists in ``targets`` what has to be read into them."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.targets: list[Target] = []
        self._checkpoint = checkpoint
        self._device = device
        self._tensors: dict[tuple[bool, str, torch.device], torch.Tensor] = {}

    def __call__(self, name: str, kept: bool, strides: list[int] | None, on_host: bool = False) -> torch.Tensor | None:
        """The tensor for ``name``; None if the checkpoint has no such tensor, or if ``strides`` leave gaps or overlap.

        ``kept``: it is one of the extra tensors, which are stored beside the weights. ``on_host``: it goes to the CPU.
        """
        device = torch.device("cpu") if on_host else self._device
        stored_name = name if kept else self._checkpoint.ties.get(name, name)
        located = (self._checkpoint.kept if kept else self._checkpoint.tensors).get(stored_name)
        if located is None:
            return None
        key = (kept, stored_name, device)
        if key not in self._tensors:
            if strides is not None and not _are_dense(strides, torch_shape(located.dtype, located.shape)):
                return None
            tensor = _new_tensor(located, device) if strides is None else _new_strided(located, strides, device)
            self._tensors[key] = tensor
            self.targets.append((located, tensor))
        return self._tensors[key].detach()

    def check_free(self) -> tuple[str, ...]:
        """Checks that the tensors so far fit on the CPU, as `check_free_memory` does: memory is taken only when it is first written."""
        tensors = (tensor for _, tensor in self.targets if isinstance(tensor, torch.Tensor))
        nbytes = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
        return check_free_memory(self._checkpoint.path, nbytes, "nothing was built")


def _new_strided(located: Located, strides: Sequence[int], device: torch.device) -> torch.Tensor:
    shape, dtype = torch_shape(located.dtype, located.shape), BY_NAME[located.dtype].torch
    with memory_for(located.name, located.nbytes, device):
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _are_dense(strides: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` with ``strides`` fills its memory without gaps, and no two elements share memory."""
    if len(strides) != len(shape) or 0 in shape:
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
