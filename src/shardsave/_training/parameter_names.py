"""Names of the parameters of an optimizer: by identity, in the model and in other modules of the training state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Union

import torch
from torch import nn

from shardsave._state.wrappers import Names, unwrap
from shardsave._training.kinds import leaves_in

#: A model, a mapping from names to its tensors, or nothing.
Model = Union[nn.Module, Mapping[str, Any], None]


class ParameterNames:
    """Parameter → its name without wrappers in the model; ``critic/fc.weight`` in the module at ``training['critic']``."""

    def __init__(self, model: Model, training: Any) -> None:
        self._names: dict[int, str] = {}
        self._taken: set[str] = set()
        self._kept: list[torch.Tensor] = []  # an id is unique only while its object lives
        self.in_model: set[int] = set()
        if isinstance(model, nn.Module):
            self._add("", _named_parameters(model))
        elif model is not None:
            self._add("", ((name, value) for name, value in model.items() if isinstance(value, torch.Tensor)))
        self.in_model.update(self._names)
        for place, leaf in leaves_in(training):
            if isinstance(leaf, nn.Module):
                self._add(f"{place.name}/", _named_parameters(leaf))

    def _add(self, prefix: str, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        names, taken = self._names, self._taken
        for name, parameter in named:
            name = prefix + name
            if id(parameter) not in names and name not in taken:
                names[id(parameter)] = name
                taken.add(name)
                self._kept.append(parameter)

    def of_groups(self, groups: Iterable[Mapping[str, Any]]) -> list[list[str]]:
        """The names of the parameters of each group of an optimizer; ``group 0, parameter 3`` if nothing has a name for one."""
        return [
            [self._names.get(id(p)) or f"group {number}, parameter {at}" for at, p in enumerate(group["params"])]
            for number, group in enumerate(groups)
        ]

    def known(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._names


def _named_parameters(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    module = unwrap(module)
    named = list(module.named_parameters(remove_duplicate=False))
    names = Names.of(module).all_plain([name for name, _ in named])
    return zip(names, (parameter for _, parameter in named))
