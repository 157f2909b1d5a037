"""Follows stored tensors through a loading routine: a parameter may be filled from a tensor of another name, or from several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from shardsave._common.memory import address, tensors_in
from shardsave._state.wrappers import Names


class Origins(TorchFunctionMode):
    """While it is active, it sees where the tensors in ``names`` (name → tensor) are copied, converted and assigned."""

    def __init__(self, names: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._of: MutableMapping[torch.Tensor, tuple[str, ...]] = WeakIdKeyDictionary()
        self._filled: dict[int, tuple[str, ...]] = {}  # by address
        for name, tensor in names.items():
            self._of[tensor] = (name,)
            self._filled[address(tensor)] = (name,)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = list(tensors_in((args, kwargs or {})))
        origins = [origin for tensor in given for origin in self._of.get(tensor, ())]
        for tensor in tensors_in(result):
            if origins:
                self._of[tensor] = self._filled[address(tensor)] = tuple(dict.fromkeys(origins))
            elif not given:
                self._filled.pop(address(tensor), None)  # new memory, where an intermediate result may have been
        return result

    def of_parameters(self, module: nn.Module) -> dict[str, tuple[str, ...]]:
        """The name of each parameter of ``module`` that was filled → the names that it was filled from."""
        names = Names.of(module)
        parameters = module.named_parameters(remove_duplicate=False)
        filled = {names.plain(name): self._filled.get(address(p) or -1) for name, p in parameters if not is_lazy(p)}
        return {name: origins for name, origins in filled.items() if origins is not None}
