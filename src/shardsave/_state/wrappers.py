"""Wrappers around modules (``torch.compile``, DistributedDataParallel, DataParallel), and names of tensors with and without them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: The attribute in which ``torch.compile`` keeps the module that it wraps.
_COMPILED = "_orig_mod"
_PARALLEL = (DataParallel, DistributedDataParallel)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, in whatever order they are nested."""
    while _is_wrapper(module):
        module = module.module if isinstance(module, _PARALLEL) else module._orig_mod  # type: ignore[assignment]
    return module


def _is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is a known wrapper without tensors or sub-modules of its own, which unwrapping would lose."""
    kind = type(module)
    compiled = kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch.")
    if not compiled and not issubclass(kind, _PARALLEL):
        return False
    return not (module._parameters or module._buffers or len(module._modules) > 1)


class Names:
    """Translates names of a module's tensors: with the wrappers around its sub-modules, and without them."""

    def __init__(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        """``named``: all sub-modules by all their names, in module order."""
        # For each wrapper, the prefix of its own name and the prefix of names inside it; outer wrappers come first.
        self._wrappers: list[tuple[str, str]] = []
        for name, part in named:
            if _is_wrapper(part):
                start = f"{name}." if name else ""
                self._wrappers.append((start, f"{start}{'module' if isinstance(part, _PARALLEL) else _COMPILED}."))

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        return cls(module.named_modules(remove_duplicate=False))

    def plain(self, name: str) -> str:
        """``name`` without wrappers."""
        for start, inside in reversed(self._wrappers):
            if name.startswith(inside):
                name = start + name[len(inside) :]
        return plain_name(name)

    def wrapped(self, name: str) -> str:
        """``name`` with the wrappers that the module has."""
        for start, inside in self._wrappers:
            if name.startswith(start):
                name = inside + name[len(start) :]
        return name


def plain_name(name: str) -> str:
    """``name`` without the attribute of ``torch.compile``; the names of other wrappers are known only from the module: see `Names`."""
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name
