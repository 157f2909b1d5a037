"""Optimizers as data: their state by the names of parameters, from their public ``state_dict()``. No step is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardsave._common.words import an, count
from shardsave._training.kinds import class_name
from shardsave._training.parameter_names import ParameterNames
from shardsave._training.places import Place, refuse
from shardsave._training.write_values import ValueWriter

#: Options of a group that are no options: its parameters, and their names that torch notes beside them.
NO_OPTIONS = frozenset({"params", "param_names"})


def packed_state(optimizer: Any, state: Any) -> bool:
    """Whether ``state``, what ``state_dict()`` returned, numbers the parameters of the groups of ``optimizer``, as torch does it."""
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict) and isinstance(state.get("param_groups"), list)):
        return False
    groups = getattr(optimizer, "param_groups", ())
    return len(groups) == len(state["param_groups"]) and all(
        isinstance(packed, dict) and len(packed.get("params", ())) == len(group["params"])
        for packed, group in zip(state["param_groups"], groups)
    )


def describe_optimizer(
    optimizer: Any, state: Mapping[str, Any], writer: ValueWriter, place: Place, names: ParameterNames
) -> Any:
    """The JSON of an optimizer whose ``state_dict()`` returned ``state``, as `packed_state` has it."""
    place_of_state = place.in_state()
    named = names.of_groups(optimizer.param_groups)
    name_of: dict[Any, str] = {}
    groups = []
    for at, (packed, group, group_names) in enumerate(zip(state["param_groups"], optimizer.param_groups, named)):
        name_of.update(zip(packed["params"], group_names))
        options = {key: value for key, value in packed.items() if key not in NO_OPTIONS}
        shapes = [list(parameter.shape) for parameter in group["params"]]
        place_of_group = place_of_state.at("param_groups").at(at)
        groups.append({"names": group_names, "shapes": shapes, "options": writer.value(options, place_of_group)})
    if len(set(name_of.values())) != sum(map(len, named)):
        refuse(place, "a parameter in one group was", "one is in two")
    states = {name_of[key]: values for key, values in state["state"].items() if key in name_of}
    others = {key: values for key, values in state["state"].items() if key not in name_of}
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    encoded = _usual_states(states, writer, place) or {
        name: _parameter_state(values, writer, place, name) for name, values in states.items()
    }
    if others:
        rest["state"] = others
    return {
        "optimizer": {
            "class": class_name(optimizer),
            "groups": groups,
            "state": encoded,
            "rest": writer.value(rest, place_of_state),
        }
    }


def note_on_names(optimizer: Any, place: Place, names: ParameterNames) -> tuple[str, bool]:
    """How many parameters have no name, "" if all have one; and whether that must be a warning: it may be an optimizer of another model."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = sum(not names.known(parameter) for parameter in parameters)
    if not unknown:
        return "", False
    if unknown == len(parameters) and names.in_model:
        return (
            f"{place.path}: parameters of the model that is saved were expected, this optimizer has none of them; its "
            f"{count(unknown, 'parameter')} of no module {'is' if unknown == 1 else 'are'} known by group and position"
        ), True
    return f"{place.path}: {count(unknown, 'parameter')} of no module, known by group and position", False


def _usual_states(states: Mapping[str, Any], writer: ValueWriter, place: Place) -> dict[str, dict[str, Any]] | None:
    """What `_parameter_state` returns for each of ``states``, in half the time, if they consist of tensors of their own; else None."""
    if not all(type(values) is dict and {*map(type, values)} <= {str} for values in states.values()):
        return None
    tensors = [value for values in states.values() for value in values.values()]
    if not {*map(type, tensors)} <= {torch.Tensor}:
        return None
    names = [f"{place.name}/{name}/{key}" for name, values in states.items() for key in values]
    stored = writer.usual_tensors(tensors, names)
    if stored is None:
        return None
    rest = iter(stored)
    return {name: {key: {"tensor": next(rest)} for key in values} for name, values in states.items()}


def _parameter_state(values: Any, writer: ValueWriter, place: Place, name: str) -> dict[str, Any]:
    start, path, encoded = f"{place.name}/{name}/", f"{place.path}.state[{name!r}]", {}
    if not isinstance(values, dict) or not {*map(type, values)} <= {str}:
        refuse(place, "state by text was", f"that of {name!r} is {an(type(values).__name__)} with other keys")
    for key, value in values.items():
        if type(value) is torch.Tensor:  # nearly all of them
            encoded[key] = {"tensor": writer.tensor(value, start + key, f"{path}[{key!r}]")}
        else:
            encoded[key] = writer.value(value, Place(f"{path}[{key!r}]", start + key))
    return encoded
