"""What torch itself must attach to a module once it has its contents: hooks, and tensors that are computed."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from shardsave._architecture.class_checks import in_class
from shardsave._architecture.describe import HOOKS
from shardsave._architecture.read_values import Document, Values
from shardsave._common.strict_json import glimpse
from shardsave.errors import an

#: How torch marks hooks, and what its wrapper of a hook takes over from the hook's own attributes.
_MARKS = frozenset(["_from_public_api", "hook", "module", "with_module"])


def attach_hooks(module: nn.Module, node: dict[str, Any], document: Document, values: Values) -> None:
    """By torch's own registration, whatever the module's class has in its place."""
    for group, hooks in values.names(node, "hooks"):
        if group not in HOOKS or not isinstance(hooks, list):
            document.bad(f"hooks expected to be of {', '.join(HOOKS)}", f"they are of {glimpse(group)}")
        for entry in hooks:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], bool):
                document.bad("a hook and a flag expected", f"it is {glimpse(entry)}")
            hook = values.value(entry[0])
            _check_hook(hook, module, document)
            if group == "_forward_pre_hooks":
                nn.Module.register_forward_pre_hook(module, hook)
            elif group == "_state_dict_hooks":
                nn.Module._register_state_dict_hook(module, hook)  # type: ignore[no-untyped-call]
            else:
                nn.Module._register_load_state_dict_pre_hook(module, hook, entry[1])  # type: ignore[no-untyped-call]


def _check_hook(hook: Any, module: nn.Module, document: Document) -> None:
    kind = type(hook)
    own_method = kind is types.MethodType and hook.__self__ is module
    if not own_method and not (callable(hook) and kind.__module__.startswith("torch.nn.utils.")):
        document.bad("hooks expected to be the module's methods or of torch.nn.utils", f"one is {an(kind.__qualname__)}")
    if marks := _MARKS & vars(hook).keys():
        document.bad("hooks expected without marks of torch's own", f"one has {min(marks)!r}")


def computed_tensors(module: nn.Module, node: dict[str, Any], document: Document) -> list[str]:
    """The names of tensors that parametrizations compute, each of which nothing else of the module has."""
    computed = node.get("parametrized", [])
    if not isinstance(computed, list) or not all(isinstance(name, str) and name.isidentifier() for name in computed):
        document.bad("parametrized expected to be a list of names", f"it is {glimpse(computed)}")
    own = object.__getattribute__(module, "__dict__")
    groups = [own.get(group, {}) for group in ("_parameters", "_buffers", "_modules")]
    taken = any(name in group for name in computed for group in (own, *groups))
    if taken or any(in_class(type(module), name) is not None for name in computed) or len(set(computed)) < len(computed):
        document.bad("parametrized expected to name tensors once", f"it is {glimpse(computed)}")
    lists = groups[2].get("parametrizations")
    if computed and (type(lists) is not nn.ModuleDict or set(computed) - nn.ModuleDict.keys(lists)):
        document.bad("parametrizations of what is parametrized expected", f"{glimpse(computed)} has none")
    return computed


def compute(module: nn.Module, names: list[str]) -> None:
    """Has tensors computed where they are asked for, as torch does."""
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
