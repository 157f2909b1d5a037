"""What the caller of `build_model` trusts, and whether that is enough for what a document asks for.

To trust a package is to allow instances of its classes, but none of its code to run on values from the file. Whatever would run, and
whatever the model could call, needs its exact name. SECURITY.md says the same to users.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from shardsave._architecture.names import dotted, module_part, package_of
from shardsave._architecture.reviewed import VALUES, in_torch_nn, only_computes
from shardsave._architecture.routines import routines
from shardsave._architecture.uses import Use, Uses
from shardsave._common.words import build_arguments
from shardsave.errors import UntrustedCodeError

#: How many names an error lists.
_MOST_NAMES = 200

_CALLED = "the model could call it, with values from the file"
_BOUND = "it is to be called with more than plain values from the file"
_EXTRA_STATE = "its set_extra_state would run on values from the file"
_NO_MODULE = "it is neither a module nor a hook that computes a weight"

_PACKAGES_OF_TORCH = frozenset(["torch", "functorch", "torchgen"])
_UNKNOWN = object()


class Trust:
    """``entries``: packages, modules and exact names. ``classes``: dotted name → the class or function that stands for it."""

    def __init__(self, entries: Iterable[str] = (), classes: Mapping[str, Any] | None = None) -> None:
        self.entries = frozenset(entries)
        self.classes = classes or {}

    def exact(self, name: str) -> bool:
        """Whether ``name`` itself is trusted, so that all of its code may run."""
        return dotted(name) in self.entries or dotted(name) in self.classes

    def covers(self, name: str) -> bool:
        """Whether instances of the class ``name`` may be made, if no code of it runs."""
        if self.exact(name) or in_torch_nn(name) or name in VALUES:
            return True
        module = module_part(name)
        return not only_exact(name) and any(module == entry or module.startswith(f"{entry}.") for entry in self.entries)

    def method(self, kind: str, method: str) -> bool:
        """Whether the method ``method`` of the class ``kind`` may be a value."""
        return f"{dotted(kind)}.{method}" in self.entries


class Lacking(NamedTuple):
    """Something that is not trusted.

    ``name`` is dotted. ``reason``: why the package is not enough; empty if it is. ``entry``: the entry of ``trust`` that would cover it;
    None for a class of a script, which needs ``classes``.
    """

    name: str
    reason: str
    entry: str | None


def only_exact(name: str) -> bool:
    """Whether ``name`` is of torch or of the standard library, whose packages are too broad to be trusted as a whole."""
    package = package_of(name)
    return package in _PACKAGES_OF_TORCH or package in sys.stdlib_module_names


def check_entries(entries: Iterable[str]) -> None:
    """Raises ValueError for an entry that is a module of torch or of the standard library."""
    for entry in entries:
        if only_exact(entry) and _is_module(entry):
            raise ValueError(
                f"trust must name classes and functions of torch and of the standard library one by one, such as "
                f"'torch.nn.modules.normalization.LayerNorm', not the module {entry!r}; modules and functions of torch.nn need no trust"
            )


def _is_module(entry: str) -> bool:
    if "." not in entry or entry in sys.modules:
        return True
    try:
        return importlib.util.find_spec(entry) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def lacking(name: str, uses: Collection[Use], trust: Trust, target: Any = _UNKNOWN) -> Lacking | None:
    """What is lacking to use ``name`` for ``uses``; None if nothing is. Without ``target``, only what the name itself tells."""
    if trust.exact(name):
        return None
    reasons = []
    if Use.VALUE in uses and name not in VALUES:
        reasons.append(_CALLED)
    if Use.BOUND in uses:
        reasons.append(_BOUND)
    if Use.EXTRA_STATE in uses:
        reasons.append(_EXTRA_STATE)
    if target is not _UNKNOWN:
        reasons += routines(target, uses)
        if in_torch_nn(name) and name not in VALUES and not (issubclass(type(target), type) and only_computes(target)):
            reasons.append(_NO_MODULE)
    if reasons:
        return Lacking(dotted(name), "; ".join(reasons), None if package_of(name) == "__main__" else dotted(name))
    if trust.covers(name):
        return None
    return Lacking(dotted(name), "", None if package_of(name) == "__main__" else _broadest(name))


def all_lacking(uses: Uses, trust: Trust, targets: Mapping[str, Any] | None = None) -> list[Lacking]:
    """Everything that a document asks for and ``trust`` does not allow. ``targets``: name → class or function, once they are imported."""
    found = [
        lacking(name, of_name, trust, _UNKNOWN if targets is None else targets[name]) for name, of_name in uses.names.items()
    ]
    methods = [lacking_method(kind, method) for kind, method in uses.methods if not trust.method(kind, method)]
    return [*(item for item in found if item is not None), *methods]


def lacking_method(kind: str, method: str) -> Lacking:
    """A method that is a value and is not trusted."""
    return Lacking(f"{dotted(kind)}.{method}", _CALLED, f"{dotted(kind)}.{method}")


def trust_entries(items: Iterable[Lacking]) -> tuple[str, ...]:
    """The entries of ``trust`` that would cover ``items``, sorted."""
    return tuple(sorted({item.entry for item in items if item.entry is not None}))


def script_classes(items: Iterable[Lacking]) -> tuple[str, ...]:
    """The names of ``items`` that are of a script, and need an entry in ``classes``."""
    return tuple(item.name for item in items if item.entry is None)


def refuse(where: str, items: list[Lacking], trust: Trust, state: str) -> NoReturn:
    """Raises UntrustedCodeError, which lists ``items``, each with what would run of it, and the arguments that would allow them."""
    listed = [f"{item.name} ({item.reason})" if item.reason else item.name for item in items[:_MOST_NAMES]]
    more = f" and {len(items) - _MOST_NAMES} more" if len(items) > _MOST_NAMES else ""
    entries = sorted({*trust.entries, *trust_entries(items[:_MOST_NAMES])})
    of_script = script_classes(items[:_MOST_NAMES])
    remark = " for classes of the script that saved it" if of_script else ""
    raise UntrustedCodeError(
        f"cannot build {where}: only trusted code is used, it asks for {', '.join(listed)}{more}; "
        f"if you trust it, pass {build_arguments(entries, of_script)}{remark}; {state}"
    )


def _broadest(name: str) -> str:
    """The entry of ``trust`` that covers instances of ``name``: its package, except for torch and the standard library."""
    return dotted(name) if only_exact(name) else package_of(name)


def version_in_words(version: str | None) -> str:
    """The version that a file names, for a message."""
    if version is None:
        return "an unknown version"
    return version if re.fullmatch(r"[\w .+-]{1,100}", version, re.ASCII) else ascii(version[:100])
