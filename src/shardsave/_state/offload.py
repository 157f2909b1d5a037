"""Models that accelerate offloads: their tensors are placeholders, and a hook of each sub-module reads the values from a map.

The hooks are recognised by their attributes; accelerate is never imported. Sources: accelerate's ``hooks.py`` (AlignDevicesHook) and
``utils/offload.py`` (OffloadedWeightsLoader, PrefixedDataset).
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from shardsave._common.imports import import_at_use
from shardsave._common.memory import PLAIN_TYPES
from shardsave._state.wrappers import Names

#: The attribute in which accelerate keeps the hook of a module.
_HOOK = "_hf_hook"


class Offloaded(NamedTuple):
    """Where the values of one tensor of a module are while its sub-module does not run.

    ``tensor``: the memory or the mapped file from which accelerate reads them; None if they cannot be read. ``problem``: why they
    cannot be read there or, if there is a ``tensor``, why a load must not change it; "" if there is no problem. ``spare``: the module
    computes with a buffer of its own, and accelerate puts these values in its place when the hook is removed. ``file``: the
    safetensors file that accelerate opens again for each forward pass; "" if there is none. ``on_disk``: the values are in a file,
    where tied tensors have separate copies. ``tied``: the hook knows that the tensor was tied, but not to which.
    """

    tensor: torch.Tensor | None
    problem: str
    spare: bool = False
    file: str = ""
    on_disk: bool = False
    tied: bool = False


def offloaded_tensors(module: nn.Module, *, fill: bool) -> dict[str, Offloaded]:
    """Name without wrappers → its values, for each tensor of ``module`` that accelerate reads from a map before it computes.

    That is also true of a tensor that has memory at this moment: the next forward pass replaces it. ``fill``: map files for writing,
    and include spare copies.
    """
    if "accelerate.hooks" not in sys.modules:  # a library that was never imported has no hooks
        return {}
    named = list(module.named_modules(remove_duplicate=False))
    hooked = [(f"{name}." if name else "", part) for name, part in named if vars(part).get(_HOOK) is not None]
    if not hooked:
        return {}
    plain, files = Names(named).plain, _Files(fill)
    offloaded = {}
    # Children come after their parents, and inner hooks after outer ones: as in a forward pass, the last one decides.
    for start, part in hooked:
        for hook in _hooks(vars(part)[_HOOK]):
            for inside, placeholder in _placeholders(part, hook):
                if type(placeholder) in PLAIN_TYPES:  # others hold quantized values in a form of their own
                    found = _checked(_find(hook, inside, placeholder, files), placeholder)
                    tied = inside in getattr(hook, "tied_params_names", ())
                    offloaded[plain(start + inside)] = found._replace(tied=tied)
            for inside, buffer in _own_buffers(part, hook) if fill else ():
                found = _checked(_find(hook, inside, buffer, files), buffer)
                if not found.problem:
                    offloaded.setdefault(plain(start + inside), found._replace(spare=True))
    return _by_every_name(named, plain, offloaded)


def _by_every_name(
    named: Sequence[tuple[str, nn.Module]], plain: Callable[[str], str], offloaded: dict[str, Offloaded]
) -> dict[str, Offloaded]:
    """``offloaded`` with the other names of sub-modules that have several: a hook that places a whole module knows one name of each."""
    names = [
        (plain(f"{name}.{attribute}" if name else attribute), (id(part), attribute))
        for name, part in named
        for attribute in (*part._parameters, *part._buffers)
    ]
    by_place = {place: offloaded[name] for name, place in names if name in offloaded}
    return {**{name: by_place[place] for name, place in names if place in by_place}, **offloaded}


def _hooks(hook: Any) -> Iterator[Any]:
    """``hook``, or the hooks in it, in the order in which they run."""
    if isinstance(inner := getattr(hook, "hooks", None), (tuple, list)):
        for each in inner:
            yield from _hooks(each)
    else:
        yield hook


def _placeholders(module: nn.Module, hook: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that ``hook`` replaces before a forward pass of ``module``, by their names in it."""
    if not hasattr(hook, "offload"):
        if not type(hook).__module__.startswith("accelerate."):  # a hook of another library may do anything to its placeholders
            yield from ((name, tensor) for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta)
        return
    if not hook.offload:
        return
    yield from module.named_parameters(recurse=_recurses(hook))
    if getattr(hook, "offload_buffers", False):
        yield from _saved_buffers(module, hook)


def _own_buffers(module: nn.Module, hook: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that ``hook`` leaves to ``module``, by their names in it."""
    if getattr(hook, "offload", False) and not getattr(hook, "offload_buffers", False):
        yield from _saved_buffers(module, hook)


def _saved_buffers(module: nn.Module, hook: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, part in module.named_modules() if _recurses(hook) else [("", module)]:
        for attribute, buffer in part.named_buffers(recurse=False):
            if attribute not in part._non_persistent_buffers_set:
                yield f"{name}.{attribute}" if name else attribute, buffer


def _recurses(hook: Any) -> bool:
    return bool(getattr(hook, "place_submodules", False))


def _find(hook: Any, name: str, placeholder: torch.Tensor, files: _Files) -> Offloaded:
    """The values that ``hook`` reads for ``name``."""
    weights: Any = getattr(hook, "weights_map", None)
    if not isinstance(weights, Mapping):
        return Offloaded(None, f"the hook that holds its values is {type(hook).__module__}.{type(hook).__qualname__}")
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    if not all(hasattr(weights, attribute) for attribute in ("state_dict", "index", "save_folder")):
        return _in_memory(weights, name)
    if name in weights.state_dict:
        return _in_memory(weights.state_dict, name)
    if name not in weights.index:
        return Offloaded(None, f"the map from which accelerate reads has no entry {name!r}")
    entry = weights.index[name]
    try:
        if entry.get("safetensors_file") is not None:
            return files.safetensors(entry, name, placeholder.dtype)
        return files.memory_map(os.path.join(weights.save_folder, f"{name}.dat"), entry)
    except Exception as error:  # whatever the file or safetensors says, it is the reason
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Offloaded(None, f"accelerate's copy on disk cannot be read, {reason}")


def _in_memory(weights: Mapping[str, Any], name: str) -> Offloaded:
    try:
        value, again = weights[name], weights[name]
    except KeyError:
        return Offloaded(None, f"the map from which accelerate reads has no entry {name!r}")
    if not isinstance(value, torch.Tensor):
        return Offloaded(None, f"the map from which accelerate reads has a {type(value).__name__} for it")
    if value is not again and value.untyped_storage().data_ptr() != again.untyped_storage().data_ptr():
        return Offloaded(None, f"the map from which accelerate reads, a {type(weights).__name__}, makes it anew each time")
    return Offloaded(value.detach(), "")


def _checked(found: Offloaded, placeholder: torch.Tensor) -> Offloaded:
    tensor = found.tensor
    if tensor is None or tensor.shape == placeholder.shape:
        return found
    return Offloaded(None, f"accelerate holds values of shape {list(tensor.shape)} for its shape {list(placeholder.shape)}")


class _Files:
    """Maps accelerate's copies on disk, each once, so that two names of one copy have the same memory."""

    def __init__(self, fill: bool) -> None:
        self._fill = fill
        self._readers: dict[str, Any] = {}
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}

    def memory_map(self, path: str, entry: Mapping[str, Any]) -> Offloaded:
        """A file of bare values, which accelerate itself wrote."""
        dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        state = os.lstat(path)
        own = stat.S_ISREG(state.st_mode) and state.st_nlink == 1 and os.access(path, os.W_OK)
        problem = "" if own else f"accelerate reads it from {path}, which is no writable file of its own"
        if os.stat(path).st_size < nbytes:  # numpy would make the file longer
            return Offloaded(None, f"accelerate's copy {path} has {os.stat(path).st_size} bytes instead of {nbytes}")
        if (path, "") not in self._tensors:
            mapped = np.memmap(path, np.uint8, "r+" if self._fill and not problem else "c", shape=(nbytes,))
            self._tensors[path, ""] = torch.from_numpy(mapped).view(dtype).view(shape)
        return Offloaded(self._tensors[path, ""], problem, on_disk=True)

    def safetensors(self, entry: Mapping[str, Any], name: str, dtype: torch.dtype) -> Offloaded:
        """A tensor of a safetensors file, which may be the checkpoint that the model came from. ``dtype``: of the placeholder."""
        path, name_in_file = str(entry["safetensors_file"]), str(entry.get("weight_name", name))
        if path not in self._readers:
            self._readers[path] = import_at_use("safetensors").safe_open(path, framework="pt", device="cpu")
        if (path, name_in_file) not in self._tensors:
            tensor = self._readers[path].get_tensor(name_in_file)  # mapped, not read
            on_the_way = getattr(torch, entry.get("dtype", ""), dtype)
            self._tensors[path, name_in_file] = tensor if on_the_way == dtype else tensor.to(on_the_way)
        problem = (
            f"accelerate reads it from the checkpoint file {path}, which a load must not change; "
            "use from_pretrained with this checkpoint instead"
        )
        return Offloaded(self._tensors[path, name_in_file], problem, file=path, on_disk=True)
