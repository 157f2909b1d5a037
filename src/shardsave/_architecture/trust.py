"""Classes and functions by name: how an architecture names them, which of them are trusted, and what a name leads to.

A name is ``module:qualified name``. What it leads to must have been defined in that very module, and is reached through
classes alone, never through another module: trusting ``mylib`` does not trust what ``mylib`` imports.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import math
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional
from torch import nn

from shardsave._architecture.class_checks import has_finaliser
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError

#: Functions of ``torch`` that compute a tensor from tensors, and nothing else. (Others read and write files.)
_TORCH_FUNCTIONS = frozenset([
    "abs", "add", "bmm", "cat", "celu", "clamp", "cos", "div", "einsum", "erf", "exp", "hardshrink", "log", "log1p",
    "log_softmax", "matmul", "maximum", "minimum", "mul", "neg", "relu", "rsqrt", "selu", "sigmoid", "sin", "softmax",
    "sqrt", "square", "stack", "sub", "sum", "tanh", "where",
])  # fmt: skip
_BUILTIN_TYPES = frozenset(["bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"])

#: Where functions of torch.nn may be from, and classes of its utilities: those that compute. Others import, compile or register.
_NN_FUNCTIONS = ("torch.nn.functional", "torch.nn.init")
_NN_UTILITIES = frozenset(
    f"torch.nn.utils.{name}" for name in ("weight_norm", "spectral_norm", "prune", "parametrize", "parametrizations", "rnn")
)

#: Modules in which functions that do not say truly where they are from are looked for, the trusted ones first.
_HOMES: tuple[types.ModuleType, ...] = (torch.nn.functional, torch, torch.special, math)

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def name_of(thing: Any) -> str | None:
    """The name by which a class or function will be found again, None where there is none (a lambda, a local class)."""
    module, qualified, short = (getattr(thing, key, None) for key in ("__module__", "__qualname__", "__name__"))
    homes = [f"{home.__name__}:{short}" for home in _HOMES if isinstance(short, str) and vars(home).get(short) is thing]
    if homes and isinstance(thing, types.BuiltinFunctionType):  # those of torch say that they are from torch._C
        return homes[0]
    if module == "builtins" and short not in _BUILTIN_TYPES:
        return None
    if isinstance(module, str) and isinstance(qualified, str) and _walk(sys.modules.get(module), qualified) is thing:
        return f"{module}:{qualified}"
    return homes[0] if homes else None


def version_of(name: str) -> str | None:
    """The version of the package that ``name`` comes from, with the package: ``"torch 2.13.0"``; None where it has none."""
    package = name.partition(":")[0].partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(package)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return None
    return f"{package} {version}"


def dotted(name: str) -> str:
    """``mylib.models:Net`` as people write it: ``mylib.models.Net``."""
    return name.replace(":", ".", 1)


def resolve(
    imports: Mapping[str, str | None], trust: Collection[str], classes: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """What each name of ``imports`` (name → the version that was saved) leads to.

    Imports nothing before every name is known to be trusted. Raises UntrustedCodeError with all that are not, and
    IncompatibleCheckpointError with all that cannot be found, or must not be made from data.
    """
    for name in imports:
        _check_form(name, where)
    unknown = [name for name in imports if dotted(name) not in classes and not _trusted(name, trust)]
    if unknown:
        raise UntrustedCodeError(
            f"cannot build {where}: only what is trusted is imported, it asks for {', '.join(map(dotted, unknown))}; "
            f"if you know them, say {_how_to_trust(unknown)}; nothing was imported"
        )
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name, version in imports.items():
        if dotted(name) in classes:
            found[name] = classes[dotted(name)]
            continue
        try:
            found[name] = _import(name, where)
        except CorruptCheckpointError:
            raise
        except (Exception, SystemExit) as error:  # whatever a module does while it is imported
            saved = f"saved with {version}" if version else "saved without a version"
            said = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
            missing.append(f"{dotted(name)} ({saved}; {said})")
    wrong = []
    if missing:
        wrong.append(
            f"what it is made of was expected to be there, not found: {', '.join(missing)}; "
            f"for what was renamed say classes={{'old.Name': NewClass}}"
        )
    unfit = [f"{dotted(name)} ({why})" for name, thing in found.items() if (why := why_not_made(thing))]
    if unfit:
        wrong.append(f"classes that can safely be made from data expected, it asks for {', '.join(unfit)}")
    if wrong:
        raise IncompatibleCheckpointError(f"cannot build {where}: {'; '.join(wrong)}; nothing was built")
    return found


def why_not_made(thing: Any) -> str | None:
    """Why instances of a class must not be made from data; None where they may."""
    if not isinstance(thing, type):
        return None
    if has_finaliser(thing):
        return "its __del__ would run with what the file says"
    if any(f"{base.__module__}.".startswith("torch.nn.parallel.") for base in thing.__mro__):
        return "torch.nn.parallel calls what the file says"
    return None


def _check_form(name: str, where: str) -> None:
    module, colon, qualified = name.partition(":")
    parts = [*(module.split(".") if module != "__main__" else ()), *qualified.split(".")]
    if not colon or not all(part.isidentifier() and not is_dunder(part) for part in parts):
        raise CorruptCheckpointError(
            f"corrupt {where}: names of the form 'module:Class' expected, it asks for {name[:80]!r}; nothing was imported"
        )


def is_dunder(name: str) -> bool:
    """Whether ``name`` is one that Python keeps for itself, as ``__class__``."""
    return name.startswith("__") and name.endswith("__")


def _trusted(name: str, trust: Iterable[str]) -> bool:
    module, _, qualified = name.partition(":")
    if module == "builtins":
        return qualified in _BUILTIN_TYPES
    if module == "torch":
        return qualified in _TORCH_FUNCTIONS or dotted(name) in trust
    if module == "math" or module == "torch.nn":
        return True
    if module.startswith("torch.nn.") and "._" not in module:  # the private ones are not even imported
        return True
    return any(module == given or module.startswith(f"{given}.") or dotted(name) == given for given in trust)


def _import(name: str, where: str) -> Any:
    module, _, qualified = name.partition(":")
    thing = _walk(importlib.import_module(module), qualified)
    if thing is None:
        raise AttributeError(f"module {module} has no {qualified}")
    if not isinstance(thing, (type, *_FUNCTIONS)) or not _defined_in(thing, module):
        raise CorruptCheckpointError(
            f"corrupt {where}: {dotted(name)} expected to be a class or a function that {module} defines, it is "
            f"{_what(thing)}; nothing was built"
        )
    if module.startswith("torch.nn") and not (_harmless(thing) if isinstance(thing, type) else _computes(thing, module)):
        raise CorruptCheckpointError(
            f"corrupt {where}: a module or a function of torch.nn expected, it asks for {dotted(name)}, which is none; nothing was built"
        )
    return thing


def _walk(module: types.ModuleType | None, qualified: str) -> Any:
    """From a module to what it calls ``qualified``, through classes alone; None where that leads nowhere."""
    thing: Any = module
    for part in qualified.split("."):
        if thing is None or (thing is not module and not isinstance(thing, type)):
            return None
        thing = vars(thing).get(part)
    return thing


def _defined_in(thing: Any, module: str) -> bool:
    if any(home.__name__ == module for home in _HOMES):
        return isinstance(thing, types.BuiltinFunctionType) or thing.__module__ == module
    return bool(thing.__module__ == module)


def _harmless(thing: type) -> bool:
    """Of ``torch.nn``: modules, parameters, enums, named tuples, and the hooks by which its utilities compute a weight."""
    return issubclass(thing, (nn.Module, torch.Tensor, enum.Enum, tuple)) or thing.__module__ in _NN_UTILITIES


def _computes(function: Any, module: str) -> bool:
    """Of ``torch.nn``'s functions, those for everybody that compute from tensors, and call nothing that is given to them."""
    return module in _NN_FUNCTIONS and not function.__name__.startswith("_") and "distance" not in function.__name__


def _what(thing: Any) -> str:
    if isinstance(thing, types.ModuleType):
        return f"the module {thing.__name__}"
    return f"{type(thing).__name__} of {getattr(thing, '__module__', 'nowhere')}"


def _to_trust(name: str) -> str:
    """The package that ``name`` is from; of torch and of Python's own, which do more than most would trust, ``name`` alone."""
    package = name.partition(":")[0].partition(".")[0]
    return dotted(name) if package == "torch" or package in sys.stdlib_module_names else package


def _how_to_trust(names: Iterable[str]) -> str:
    packages = sorted({_to_trust(name) for name in names} - {"__main__"})
    mine = [dotted(name) for name in names if name.startswith("__main__:")]
    given = ", ".join(f"'{name}': {name.rpartition('.')[2]}" for name in mine)
    said = [f"trust={packages}"] if packages else []
    return ", ".join([*said, f"classes={{{given}}} for those of the script that saved it"] if mine else said)
