"""Modules within a training state, such as averaged models: their tensors by name, read back in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardsave._common.words import some
from shardsave._format.dtypes import torch_shape
from shardsave._state.distributed_tensors import is_dtensor
from shardsave._state.fsdp import is_fsdp_module
from shardsave._state.self_loading import loads_itself
from shardsave._state.sharded import refuse_sharded
from shardsave._state.wrappers import Names, unwrap
from shardsave._training.distributed import TAG as BOXES
from shardsave._training.distributed import fill_boxes, placements_in_words
from shardsave._training.places import Place, refuse
from shardsave._training.read_values import Onto, ValueReader
from shardsave._training.subclasses import TAG as SUBCLASS
from shardsave._training.subclasses import fill_subclass
from shardsave._training.write_values import ValueWriter


def describe_module(module: nn.Module, writer: ValueWriter, place: Place) -> Any:
    """The JSON of a module: its tensors by their names without wrappers, and extra state that is no tensor."""
    refuse_sharded([*module.named_modules(remove_duplicate=False)], "save", "nothing was written", emptied=True)
    module = unwrap(module)
    state = _plain_state(module)
    if len(state) != len(module.state_dict()):
        refuse(place, "one tensor for each name was", "without the names of wrappers two have the same")
    tensors: dict[str, str] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if type(value) is torch.Tensor or type(value) is nn.Parameter:
            tensors[name] = writer.tensor(value, f"{place.name}/{name}", f"{place.path}.state_dict()[{name!r}]")
        else:
            encoded = writer.value(value, Place(f"{place.path}.state_dict()[{name!r}]", f"{place.name}/{name}"))
            if isinstance(value, torch.Tensor) and "tensor" in encoded:
                tensors[name] = encoded["tensor"]
            else:
                others[name] = encoded
    return {"module": {"class": _class_of(module).__name__, "tensors": tensors, "others": others}}


def plan_module(
    module: nn.Module, encoded: Any, reader: ValueReader, place: Place
) -> tuple[Callable[[], None] | None, list[str], list[str]]:
    """How ``module`` is filled from its JSON. Returns what has to be called after its tensors were read (None: nothing), how the names
    and shapes differ, and notes. What differs is left out.
    """
    refuse_sharded([*module.named_modules(remove_duplicate=False)], "fill", "nothing was changed")
    module = unwrap(module)
    path = place.path
    _, tensors, others = reader.members(encoded, path, {"class": str, "tensors": dict, "others": dict})
    own = _plain_state(module)
    missing = sorted(own.keys() - tensors.keys() - others.keys())
    unexpected = sorted((tensors.keys() | others.keys()) - own.keys())
    differences = [f"{path}: the checkpoint has no {some(map(repr, missing))}"] if missing else []
    differences += [f"{path}: the module has no {some(map(repr, unexpected))}"] if unexpected else []
    fitting = {}
    for name, stored_name in tensors.items():
        stored = reader.stored(stored_name, f"{path}, {name}")
        if name not in own:
            continue
        value, shape = own[name], torch_shape(stored.dtype, stored.shape)
        if not isinstance(value, torch.Tensor):
            differences.append(f"{path}: {name!r} is a tensor on disk, not in the module")
        elif value.shape != shape:
            differences.append(f"{path}: {name!r} is {list(shape)} on disk, {list(value.shape)} in the module")
        else:
            fitting[name] = stored_name
    names = Names.of(module)
    if not loads_itself(module):
        for name in others.keys() & own.keys():
            value = others[name]
            tag = next(iter(value), "") if isinstance(value, dict) and len(value) == 1 else ""
            if tag not in _FILL:
                differences.append(f"{path}: {name!r} is a tensor in the module, not on disk")
            elif difference := _FILL[tag](own[name], value[tag], f"{path}[{name!r}]", reader):
                differences.append(difference)
        return None, differences, _fill_in_place(own, fitting, reader, path)
    extra = {name: reader.value(value, f"{path}[{name!r}]") for name, value in others.items() if name in own}
    copies = {name: _new(stored, own[name], f"{path}[{name!r}]", reader) for name, stored in fitting.items()}
    state = {names.wrapped(name): value for name, value in {**copies, **extra}.items()}
    strict = not differences

    def load() -> None:
        module.load_state_dict(state, strict=strict)

    return load, differences, []


#: The tag of a tensor that consists of others → has these read into those of a live one.
_FILL = {SUBCLASS: fill_subclass, BOXES: fill_boxes}


def _new(stored: str, own: Any, path: str, reader: ValueReader) -> torch.Tensor:
    """A new tensor for what ``stored`` names, distributed as ``own`` if that is."""
    like = own if reader.parts is not None and is_dtensor(own) else None
    return reader.new(stored, path, Onto(own.device, like), placements_in_words(own))


def _fill_in_place(own: dict[str, Any], fitting: dict[str, str], reader: ValueReader, path: str) -> list[str]:
    cast = [name for name, stored in fitting.items() if reader.fill(stored, own[name], f"{path}[{name!r}]")]
    return [f"{path}: {some(map(repr, cast))} were cast to the dtype in the module"] if cast else []


def _class_of(module: nn.Module) -> type:
    """The class of ``module``; ``fully_shard`` has put one of its own before it."""
    kind = type(module)
    return kind.__mro__[2] if is_fsdp_module(module) else kind


def _plain_state(module: nn.Module) -> dict[str, Any]:
    names = Names.of(module)
    return {names.plain(name): value for name, value in module.state_dict(keep_vars=True).items()}
