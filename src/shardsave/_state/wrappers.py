"""Wrappers around modules, and names of tensors with and without them.

The table: ``torch.compile``, DistributedDataParallel, DataParallel, and torch's wrappers for activation checkpointing and offloading.
They compute what the module inside computes, and may be nested in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: The attribute in which ``torch.compile`` keeps the module that it wraps.
_COMPILED = "_orig_mod"
_PARALLEL = (DataParallel, DistributedDataParallel)
#: Classes of torch from which, with the class of a module, others are made.
_REPLACING = ("FSDPModule", "ReplicateModule")
#: The attribute in which torch's ``ActivationWrapper`` does. Its hooks remove it from the names in a state dict.
ACTIVATION = "_checkpoint_wrapped_module"


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, in whatever order they are nested."""
    while (attribute := wrapped_attribute(module)) is not None:
        module = module._modules[attribute]  # type: ignore[assignment]
    return module


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute in which a wrapper keeps the module that it wraps; None if ``module`` is no wrapper.

    One with tensors, sub-modules or hooks of its own, which unwrapping would lose, does not count as a wrapper.
    """
    attribute = _attribute(type(module))
    if attribute is None:
        return None
    if attribute == ACTIVATION and (len(module._load_state_dict_pre_hooks) != 1 or len(module._state_dict_hooks) != 1):
        return None
    alone = not (module._parameters or module._buffers) and module._modules.keys() == {attribute}
    return attribute if alone else None


def _attribute(kind: type[nn.Module]) -> str | None:
    """The attribute in which wrappers of this class keep a module; None if it is no class of wrappers."""
    if issubclass(kind, _PARALLEL):
        return "module"
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return _COMPILED
    if any(base.__name__ == "ActivationWrapper" and base.__module__.startswith("torch.") for base in kind.__mro__):
        return ACTIVATION
    return None


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before ``fully_shard`` or ``replicate`` of torch replaced it by one of its own, such as ``FSDPLinear``."""
    first, *others = kind.__bases__
    is_replaced = first.__name__ in _REPLACING and first.__module__.startswith("torch.distributed.") and len(others) == 1
    return plain_class(others[0]) if is_replaced else kind


@contextlib.contextmanager
def plain_classes(module: nn.Module) -> Iterator[None]:
    """Gives ``module`` and its sub-modules their `plain_class` for a moment, for libraries that go by the names of classes."""
    replaced = {kind: plain_class(kind) for kind in {type(part) for part in module.modules()}}
    changed = [(part, kind) for part in module.modules() if replaced[kind := type(part)] is not kind]
    try:
        for part, kind in changed:
            part.__class__ = replaced[kind]
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind


class Names:
    """Translates names of a module's tensors: with the wrappers around its sub-modules, as its state dict or `named_parameters` has
    them, and without them."""

    def __init__(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        """``named``: all sub-modules by all their names, in module order."""
        # For each wrapper, the prefix of its own name and the prefix of names inside it; outer wrappers come first.
        self._activation: list[tuple[str, str]] = []
        self._wrappers: list[tuple[str, str]] = []  # the other wrappers, by the names in a state dict
        kinds = {type(part) for _, part in named}  # few, even of very many modules
        wrappers = {kind for kind in kinds if _attribute(kind) is not None}
        for name, part in named if wrappers else ():
            if type(part) in wrappers and (attribute := wrapped_attribute(part)) is not None:
                start = f"{name}." if name else ""
                if attribute == ACTIVATION:
                    self._activation.append((start, f"{start}{attribute}."))
                else:
                    start = self._in_state_dict(start)
                    self._wrappers.append((start, f"{start}{attribute}."))

    @classmethod
    def of(cls, module: nn.Module) -> Names:
        return cls(list(module.named_modules(remove_duplicate=False)))

    def plain(self, name: str) -> str:
        """``name`` without wrappers."""
        name = self._in_state_dict(name)
        for start, inside in reversed(self._wrappers):
            if name.startswith(inside):
                name = start + name[len(inside) :]
        return plain_name(name)

    def all_plain(self, names: Collection[str]) -> Collection[str]:
        """Each of ``names`` without wrappers, in the same order."""
        if not (self._activation or self._wrappers) and not any(_COMPILED in name for name in names):
            return names
        return [self.plain(name) for name in names]

    def wrapped(self, name: str) -> str:
        """``name`` with the wrappers that the module has, as in its state dict."""
        for start, inside in self._wrappers:
            if name.startswith(start):
                name = inside + name[len(start) :]
        return name

    def _in_state_dict(self, name: str) -> str:
        for start, inside in reversed(self._activation):
            if name.startswith(inside):
                name = start + name[len(inside) :]
        return name


def plain_name(name: str) -> str:
    """``name`` without the attribute of ``torch.compile``; the names of other wrappers are known only from the module: see `Names`."""
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name
