"""Which classes and functions `build_model` may import: how a document names them, which are trusted, and what a name resolves to.

A name is ``module:qualified name``. It must name a class or a function that this module itself defines, and it is looked up through classes
only, never through another module: trusting ``mylib`` does not trust what ``mylib`` imports.
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

from shardsave._architecture.class_checks import FUNCTION_TYPES, has_finaliser
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError

#: Functions of ``torch`` that only compute tensors from tensors. (Other functions of ``torch`` read and write files.)
_TORCH_FUNCTIONS = frozenset([
    "abs", "add", "bmm", "cat", "celu", "clamp", "cos", "div", "einsum", "erf", "exp", "hardshrink", "log", "log1p",
    "log_softmax", "matmul", "maximum", "minimum", "mul", "neg", "relu", "rsqrt", "selu", "sigmoid", "sin", "softmax",
    "sqrt", "square", "stack", "sub", "sum", "tanh", "where",
])  # fmt: skip
_BUILTIN_TYPES = frozenset(["bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"])

#: The modules of torch.nn whose functions only compute, and those whose classes only compute. Others import, compile or register.
_NN_FUNCTIONS = ("torch.nn.functional", "torch.nn.init")
_NN_UTILITIES = frozenset(
    f"torch.nn.utils.{name}" for name in ("weight_norm", "spectral_norm", "prune", "parametrize", "parametrizations", "rnn")
)

#: Modules to search for functions whose ``__module__`` is wrong, in this order; the trusted ones come first.
_HOMES: tuple[types.ModuleType, ...] = (torch.nn.functional, torch, torch.special, math)


def name_of(target: Any) -> str | None:
    """The name under which a class or function can be imported again; None if there is none (a lambda, a local class)."""
    module, qualified, short = (getattr(target, key, None) for key in ("__module__", "__qualname__", "__name__"))
    homes = [f"{home.__name__}:{short}" for home in _HOMES if isinstance(short, str) and vars(home).get(short) is target]
    if homes and isinstance(target, types.BuiltinFunctionType):  # those of torch have the __module__ torch._C
        return homes[0]
    if module == "builtins" and short not in _BUILTIN_TYPES:
        return None
    if isinstance(module, str) and isinstance(qualified, str) and _follow(sys.modules.get(module), qualified) is target:
        return f"{module}:{qualified}"
    return homes[0] if homes else None


def version_of(name: str) -> str | None:
    """The package that ``name`` is from, with its version: ``"torch 2.13.0"``; None if it has no version."""
    package = _package_of(name)
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
    """Imports the names in ``imports`` (name → saved version). Returns name → class or function.

    Imports nothing until every name is known to be trusted. Raises UntrustedCodeError, which lists every name that is not trusted, and
    IncompatibleCheckpointError, which lists every name that is missing or must not be built from data.
    """
    for name in imports:
        _check_form(name, where)
    untrusted = [name for name in imports if dotted(name) not in classes and not _is_trusted(name, trust)]
    if untrusted:
        raise UntrustedCodeError(
            f"cannot build {where}: only trusted code is imported, it asks for {', '.join(map(dotted, untrusted))}; "
            f"if you trust it, pass {_arguments_to_pass(untrusted)}; nothing was imported"
        )
    resolved: dict[str, Any] = {}
    missing: list[str] = []
    for name, version in imports.items():
        if dotted(name) in classes:
            resolved[name] = classes[dotted(name)]
            continue
        try:
            resolved[name] = _import(name, where)
        except CorruptCheckpointError:
            raise
        except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
            saved = f"saved with {version}" if version else "saved without a version"
            reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
            missing.append(f"{dotted(name)} ({saved}; {reason})")
    problems = []
    if missing:
        problems.append(
            f"its classes and functions were expected to be importable, not found: {', '.join(missing)}; "
            f"if one was renamed, pass classes={{'old.Name': NewClass}}"
        )
    unsafe = [f"{dotted(name)} ({danger})" for name, target in resolved.items() if (danger := why_unsafe(target))]
    if unsafe:
        problems.append(f"classes that can safely be built from data expected, it asks for {', '.join(unsafe)}")
    if problems:
        raise IncompatibleCheckpointError(f"cannot build {where}: {'; '.join(problems)}; nothing was built")
    return resolved


def why_unsafe(target: Any) -> str | None:
    """Why instances of a class must not be built from data; None if they may."""
    if not isinstance(target, type):
        return None
    if has_finaliser(target):
        return "its __del__ would run with values from the file"
    if any(f"{base.__module__}.".startswith("torch.nn.parallel.") for base in target.__mro__):
        return "torch.nn.parallel calls objects that the file chooses"
    return None


def _check_form(name: str, where: str) -> None:
    module, colon, qualified = name.partition(":")
    parts = [*(module.split(".") if module != "__main__" else ()), *qualified.split(".")]
    if not colon or not all(part.isidentifier() and not is_dunder(part) for part in parts):
        raise CorruptCheckpointError(
            f"corrupt {where}: names of the form 'module:Class' expected, it asks for {name[:80]!r}; nothing was imported"
        )


def is_dunder(name: str) -> bool:
    """Whether Python reserves ``name``, such as ``__class__``."""
    return name.startswith("__") and name.endswith("__")


def _is_trusted(name: str, trust: Iterable[str]) -> bool:
    module, _, qualified = name.partition(":")
    if module == "builtins":
        return qualified in _BUILTIN_TYPES
    if module == "torch":
        return qualified in _TORCH_FUNCTIONS or dotted(name) in trust
    if module == "math" or module == "torch.nn":
        return True
    if module.startswith("torch.nn.") and "._" not in module:  # private modules are not even imported
        return True
    return any(module == entry or module.startswith(f"{entry}.") or dotted(name) == entry for entry in trust)


def _import(name: str, where: str) -> Any:
    module, _, qualified = name.partition(":")
    target = _follow(importlib.import_module(module), qualified)
    if target is None:
        raise AttributeError(f"module {module} has no {qualified}")
    if not isinstance(target, (type, *FUNCTION_TYPES)) or not _defined_in(target, module):
        raise CorruptCheckpointError(
            f"corrupt {where}: {dotted(name)} expected to be a class or a function that {module} defines, it is "
            f"{_origin_of(target)}; nothing was built"
        )
    if module.startswith("torch.nn") and not (
        _is_harmless(target) if isinstance(target, type) else _only_computes(target, module)
    ):
        raise CorruptCheckpointError(
            f"corrupt {where}: a module of torch.nn, or a function of it that only computes, expected, it asks for {dotted(name)}, "
            f"which is neither; nothing was built"
        )
    return target


def _follow(module: types.ModuleType | None, qualified: str) -> Any:
    """The object that ``qualified`` names in ``module``, looked up through classes only; None if there is none."""
    target: Any = module
    for part in qualified.split("."):
        if target is None or (target is not module and not isinstance(target, type)):
            return None
        target = vars(target).get(part)
    return target


def _defined_in(target: Any, module: str) -> bool:
    if any(home.__name__ == module for home in _HOMES):
        return isinstance(target, types.BuiltinFunctionType) or target.__module__ == module
    return bool(target.__module__ == module)


def _is_harmless(kind: type) -> bool:
    """For classes of ``torch.nn``: whether this is a module, a tensor, an enum, a named tuple, or a hook that computes a weight."""
    return issubclass(kind, (nn.Module, torch.Tensor, enum.Enum, tuple)) or kind.__module__ in _NN_UTILITIES


def _only_computes(function: Any, module: str) -> bool:
    """For functions of ``torch.nn``: whether this is a public one that computes from tensors and calls none of its arguments."""
    return module in _NN_FUNCTIONS and not function.__name__.startswith("_") and "distance" not in function.__name__


def _origin_of(target: Any) -> str:
    if isinstance(target, types.ModuleType):
        return f"the module {target.__name__}"
    return f"{type(target).__name__} of {getattr(target, '__module__', 'nowhere')}"


def _package_of(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


def _trust_entry(name: str) -> str:
    """The entry of ``trust`` that would cover ``name``: its package; for torch and the standard library only ``name`` itself."""
    package = _package_of(name)
    return dotted(name) if package == "torch" or package in sys.stdlib_module_names else package


def _arguments_to_pass(names: Iterable[str]) -> str:
    """The arguments of `build_model` that would trust ``names``."""
    packages = sorted({_trust_entry(name) for name in names} - {"__main__"})
    script_classes = [dotted(name) for name in names if name.startswith("__main__:")]
    classes = ", ".join(f"'{name}': {name.rpartition('.')[2]}" for name in script_classes)
    arguments = [f"trust={packages}"] if packages else []
    if script_classes:
        arguments.append(f"classes={{{classes}}} for classes of the script that saved it")
    return ", ".join(arguments)
