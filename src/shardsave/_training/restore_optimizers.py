"""Optimizers from data: their state finds the parameters by name, in whatever groups they are now. No step is ever run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.words import count, some
from shardsave._state.distributed_tensors import is_dtensor
from shardsave._training.kinds import class_name, inner
from shardsave._training.optimizer_options import is_of_torch, known_options, options_not_saved, wrong_option
from shardsave._training.optimizer_states import wrong_state
from shardsave._training.optimizers import NO_OPTIONS
from shardsave._training.parameter_names import ParameterNames
from shardsave._training.places import Place
from shardsave._training.read_values import UNCHANGED, Onto, ValueReader
from shardsave.errors import UnsupportedTensorError

_ON_HOST = Onto(torch.device("cpu"))

#: The keys of the value that is a tensor and was on the CPU.
_TENSOR = {"tensor"}


class OptimizerPlan(NamedTuple):
    """How an optimizer is filled.

    ``load``: call it after the tensors were read. ``order``: for each group, the saved group that it continues; None: there is none.
    ``saved_groups``: their number. ``late_notes``: makes those that depend on the flags of parameters, told whether these are now as
    they were saved. ``difference``: why the state does
    not fit; ``load`` must not be called then.
    """

    load: Callable[[], None]
    order: Sequence[int | None]
    saved_groups: int
    notes: Sequence[str]
    late_notes: Callable[[bool], list[str]] = lambda _: []
    difference: str | None = None


class _SavedGroup(NamedTuple):
    names: list[str]
    options: Any
    shapes: list[Any]


def plan_optimizer(
    optimizer: Any, encoded: Any, reader: ValueReader, place: Place, names: ParameterNames, device: torch.device | None
) -> OptimizerPlan:
    """Plans how ``optimizer`` continues from its JSON. ``device``: where the model's parameters will be, if they are about to move."""
    path = place.path
    saved_class, groups, state, rest = reader.members(
        encoded, path, {"class": str, "groups": list, "state": dict, "rest": object}
    )
    saved = [_saved_group(group, reader, f"{path}, group {at}") for at, group in enumerate(groups)]
    own = names.of_groups(optimizer.param_groups)
    parameters = {
        name: parameter
        for listed, group in zip(own, optimizer.param_groups)
        for name, parameter in zip(listed, group["params"])
    }
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise UnsupportedTensorError(
                f"cannot resume {path}: parameters with memory were expected, {name!r} is on the meta device; make the optimizer after "
                f"the model has memory; {UNCHANGED}"
            )
    group_of = {name: at for at, group in enumerate(saved) for name in group.names}
    if len(group_of) != sum(len(group.names) for group in saved):
        reader.corrupt(path, "groups in which each parameter is once were", [group.names for group in saved])
    if difference := _difference(optimizer, saved_class, saved, parameters, path):
        if not names.in_model and saved_class == class_name(optimizer):
            difference += "; pass the model too, which names the parameters"
        return _not_filled(difference)
    order = [_saved_groups_of(at, listed, saved, group_of) for at, listed in enumerate(own)]
    packed = optimizer.state_dict()
    loaded, notes, difference = _loaded_groups(packed["param_groups"], optimizer, saved, order, reader, path)
    if difference is not None:
        return _not_filled(difference)
    state_by_name = {}
    for name, values in state.items():
        if name not in group_of or type(values) is not dict:
            reader.corrupt(path, "the state of a parameter of a group was", name)
        if (parameter := parameters.get(name)) is not None:
            target = parameter.device if device is None or id(parameter) not in names.in_model else device
            onto = Onto(target, parameter if type(parameter) in PLAIN_TYPES or is_dtensor(parameter) else None)
            state_by_name[name] = _state_of(values, reader, f"{path}.state[{name!r}]", onto)
    if wrong := wrong_state(optimizer, zip(loaded, own), state_by_name):
        return _not_filled(f"{path}: {wrong}")
    rest = reader.value(rest, path)
    if type(rest) is not dict or type(rest.get("state", {})) is not dict or "param_groups" in rest:
        reader.corrupt(path, "other members of a state dict were", rest)
    numbers = [number for group in packed["param_groups"] for number in group["params"]]
    by_number = {number: state_by_name[name] for number, name in zip(numbers, parameters) if name in state_by_name}
    state_dict = {**rest, "state": {**rest.get("state", {}), **by_number}, "param_groups": loaded}

    @gc_paused()
    def load() -> None:
        optimizer.load_state_dict(state_dict)
        for name, values in state_by_name.items():
            if isinstance(own_state := optimizer.state.get(parameters[name]), dict):
                _put_back(own_state, values)

    starts = [next(iter(order_of), None) for order_of in order]
    if isinstance(inner(optimizer), torch.optim.LBFGS):  # which keeps the state of all parameters with the first
        return OptimizerPlan(load, starts, len(saved), notes)
    return OptimizerPlan(load, starts, len(saved), notes, partial(_late_notes, path, parameters, group_of, state))


def _not_filled(difference: str) -> OptimizerPlan:
    return OptimizerPlan(lambda: None, (), 0, (), difference=difference)


def _saved_group(group: Any, reader: ValueReader, path: str) -> _SavedGroup:
    names, options = reader.members(group, path, {"names": list, "options": object})
    shapes = group.get("shapes", [])
    if not all(type(name) is str for name in names) or type(shapes) is not list or len(shapes) not in (0, len(names)):
        reader.corrupt(path, "names of parameters and their shapes were", names)
    return _SavedGroup(names, options, shapes)


def _difference(
    optimizer: Any, saved_class: str, saved: Sequence[_SavedGroup], parameters: dict[str, torch.Tensor], path: str
) -> str | None:
    """Why the saved state cannot be that of the optimizer."""
    if saved_class != class_name(optimizer):
        return f"{path}: the checkpoint has the state of {saved_class:.80}, this is {class_name(optimizer)}"
    shapes = {name: shape for group in saved for name, shape in zip(group.names, group.shapes)}
    for name, parameter in parameters.items():
        if name in shapes and shapes[name] != list(parameter.shape):
            return f"{path}: {name!r} had the shape {shapes[name]!r:.80}, it has {list(parameter.shape)}"
    saved_names = [name for group in saved for name in group.names]
    if saved_names and parameters and parameters.keys().isdisjoint(saved_names):
        return f"{path}: the checkpoint has state of {some(map(repr, saved_names))}, none of which is a parameter of this optimizer"
    if isinstance(inner(optimizer), torch.optim.LBFGS) and saved_names != list(parameters):
        return f"{path}: the state of LBFGS is one vector of all parameters, which were others or had another order"
    return None


def _state_of(values: dict[str, Any], reader: ValueReader, path: str, onto: Onto) -> dict[str, Any]:
    state = {}
    for key, value in values.items():
        # torch keeps this counter on the host, and moves it itself for the variants that need it on the device.
        where = _ON_HOST if key == "step" and not _is_distributed(value) else onto
        if type(value) is dict and value.keys() == _TENSOR:  # nearly all of them
            state[key] = reader.new(value["tensor"], f"{path}[{key!r}]", where)
        else:
            state[key] = reader.value(value, f"{path}[{key!r}]", where)
    return state


def _is_distributed(value: Any) -> bool:
    return type(value) is dict and "placements" in value


def _saved_groups_of(at: int, listed: Sequence[str], saved: Sequence[_SavedGroup], group_of: dict[str, int]) -> list[int]:
    """The saved groups, each once, of the parameters ``listed`` in group ``at``. An empty group continues an empty one at its place."""
    if not listed and at < len(saved) and not saved[at].names:
        return [at]
    return list(dict.fromkeys(group_of[name] for name in listed if name in group_of))


def _loaded_groups(
    packed: Sequence[dict[str, Any]],
    optimizer: Any,
    saved: Sequence[_SavedGroup],
    order: Sequence[Sequence[int]],
    reader: ValueReader,
    path: str,
) -> tuple[list[dict[str, Any]], list[str], str | None]:
    """The groups to load, with the options that were saved for their parameters; notes; and why the optimizer cannot take them."""
    decoded = [reader.value(group.options, f"{path}, group {at}") for at, group in enumerate(saved)]
    for options in decoded:
        if type(options) is not dict or not NO_OPTIONS.isdisjoint(options):
            reader.corrupt(path, "the options of a group were", options)
    # torch asks for each value of the state whether its number is in a list of them; a range answers at once.
    quick = type(inner(optimizer)).load_state_dict is torch.optim.Optimizer.load_state_dict
    known = known_options(optimizer)
    loaded, notes = [], []
    for at, (group, sources) in enumerate(zip(packed, order)):
        numbers = group["params"]
        if quick and len(numbers) > 0 and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
            group = {**group, "params": range(numbers[0], numbers[0] + len(numbers))}
        if sources and all(saved[other].options == saved[sources[0]].options for other in sources):
            if wrong := wrong_option(decoded[sources[0]], group, known):
                return [], [], f"{path}, group {at}: {wrong}"
            if kept := [repr(name) for name in options_not_saved(optimizer, decoded[sources[0]])]:
                if is_of_torch(optimizer):
                    return [], [], f"{path}, group {at}: the option {some(kept)} was expected, the checkpoint has none"
                notes.append(f"{path}: group {at} keeps the options {some(kept)}, which were not saved")
            group = {**group, **decoded[sources[0]]}
        elif sources:
            notes.append(f"{path}: group {at} keeps its options, since its parameters were in groups with different ones")
        else:
            notes.append(f"{path}: group {at} is new and keeps its options")
        loaded.append(group)
    return loaded, notes, None


def _late_notes(
    path: str, parameters: dict[str, torch.Tensor], group_of: dict[str, int], state: dict[str, Any], flags_restored: bool
) -> list[str]:
    gone = [repr(name) for name in state if name not in parameters]
    fresh = [
        repr(name)
        for name, parameter in parameters.items()
        if name not in state and (name not in group_of or (state and parameter.requires_grad))
    ]
    frozen = [repr(name) for name in state if name in parameters and not (flags_restored or parameters[name].requires_grad)]
    notes = []
    if gone:
        notes.append(
            f"{path}: the state of {count(len(gone), 'parameter')} is unused, they are no longer stepped: {some(gone)}"
        )
    if fresh:
        notes.append(f"{path}: {count(len(fresh), 'parameter')} without saved state start fresh: {some(fresh)}")
    if frozen:
        are = "is" if len(frozen) == 1 else "are"
        notes.append(f"{path}: {count(len(frozen), 'parameter')} with saved state {are} frozen: {some(frozen)}")
    return notes


def _put_back(own: Any, saved: Any) -> None:
    """Puts values of ``saved`` in the place of those that torch cast to the dtype of the parameter, and of text, which it breaks."""
    keys = saved.keys() & own.keys() if isinstance(saved, dict) else range(min(len(saved), len(own)))
    for key in keys:
        value, loaded = saved[key], own[key]
        if isinstance(value, torch.Tensor):
            if isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                own[key] = value.to(loaded.device)
        elif isinstance(value, (str, tuple)):
            own[key] = value
        elif type(value) in (dict, list) and type(value) is type(loaded):
            _put_back(loaded, value)
