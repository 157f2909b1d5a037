"""How a document names a class or a function, and what a name leads to.

A name is ``module:qualified name``. It is looked up through classes only, never through another module: ``mylib:os.system`` leads to
nothing.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import types
from typing import Any

import torch
import torch.nn.functional

from shardsave._architecture.class_checks import FUNCTION_TYPES, module_of, namespace, title
from shardsave._architecture.reviewed import BUILTIN_TYPES
from shardsave.errors import CorruptCheckpointError

#: Modules to search for functions whose ``__module__`` is wrong, in this order; the trusted ones come first.
_HOMES: tuple[types.ModuleType, ...] = (torch.nn.functional, torch, torch.special, math)

#: The longest name that is accepted, in characters.
_MAX_NAME = 1000


def name_of(target: Any) -> str | None:
    """The name under which a class or function can be imported again; None if there is none (a lambda, a local class)."""
    module, qualified, short = (getattr(target, key, None) for key in ("__module__", "__qualname__", "__name__"))
    homes = [f"{home.__name__}:{short}" for home in _HOMES if isinstance(short, str) and vars(home).get(short) is target]
    if homes and isinstance(target, types.BuiltinFunctionType):  # those of torch have the __module__ torch._C
        return homes[0]
    if module == "builtins" and short not in BUILTIN_TYPES:
        return None
    if isinstance(module, str) and isinstance(qualified, str) and follow(sys.modules.get(module), qualified) is target:
        return f"{module}:{qualified}"
    return homes[0] if homes else None


def version_of(name: str) -> str | None:
    """The package that ``name`` is from, with its version: ``"torch 2.13.0"``; None if it has no version."""
    package = package_of(name)
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


def module_part(name: str) -> str:
    """``mylib.models:Net`` → ``mylib.models``."""
    return name.partition(":")[0]


def package_of(name: str) -> str:
    """``mylib.models:Net`` → ``mylib``."""
    return module_part(name).partition(".")[0]


def is_dunder(name: str) -> bool:
    """Whether Python reserves ``name``, such as ``__class__``."""
    return name.startswith("__") and name.endswith("__")


def check_name(name: str, where: str) -> None:
    """Raises CorruptCheckpointError if ``name`` does not have the form of a name."""
    module, colon, qualified = name.partition(":")
    parts = [*(module.split(".") if module != "__main__" else ()), *qualified.split(".")]
    if not colon or len(name) > _MAX_NAME or not all(part.isidentifier() and not is_dunder(part) for part in parts):
        raise CorruptCheckpointError(
            f"corrupt {where}: names of the form 'module:Class' expected, it asks for {name[:80]!r}; nothing was imported"
        )


def why_no_value(name: str, target: Any) -> str | None:
    """Why the function ``target`` must not be named ``name`` in a document; None if it may, or if it is a class.

    A function that a class holds is a method. As a plain function, it could be called with any object in the place of its instance.
    """
    if issubclass(type(target), type) or "." not in name.partition(":")[2]:
        return None
    return "a method as a plain function; only a method of an instance can be a value"


def import_target(name: str, where: str) -> Any:
    """Imports the class or function ``name``, which its module must define itself."""
    module, _, qualified = name.partition(":")
    target = follow(importlib.import_module(module), qualified)
    if target is None:
        raise AttributeError(f"module {module} has no {qualified}")
    if not issubclass(type(target), (type, *FUNCTION_TYPES)) or not _defined_in(target, module):
        raise CorruptCheckpointError(
            f"corrupt {where}: {dotted(name)} expected to be a class or a function that {module} defines, it is "
            f"{_origin_of(target)}; nothing was built"
        )
    return target


def follow(module: types.ModuleType | None, qualified: str) -> Any:
    """The object that ``qualified`` names in ``module``, looked up through classes only; None if there is none."""
    target: Any = module
    for part in qualified.split("."):
        if target is None or (target is not module and not issubclass(type(target), type)):
            return None
        target = (vars(target) if target is module else namespace(target)).get(part)
    return target


def _defined_in(target: Any, module: str) -> bool:
    if type(target) is types.BuiltinFunctionType and any(home.__name__ == module for home in _HOMES):
        return True
    return bool((module_of(target) if issubclass(type(target), type) else target.__module__) == module)


def _origin_of(target: Any) -> str:
    if issubclass(type(target), types.ModuleType):
        return f"the module {target.__name__}"
    kind = type(target)
    return f"{title(kind)} of {module_of(target) if issubclass(kind, type) else getattr(target, '__module__', 'nowhere')}"
