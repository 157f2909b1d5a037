"""Attaches hooks and parametrizations (computed tensors) to a filled module, as torch does."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from shardsave._architecture.class_checks import class_attribute, instance_dict, owner_of, title
from shardsave._architecture.document import HOOK_GROUPS, Document
from shardsave._architecture.read_values import ValueReader
from shardsave._architecture.reviewed import is_utility
from shardsave._common.strict_json import glimpse
from shardsave._common.words import an

#: Attributes that torch sets on a hook to mark it, or that torch's wrapper copies from the hook.
_MARKS = frozenset(["_from_public_api", "hook", "module", "with_module"])


def attach_hooks(module: nn.Module, node: dict[str, Any], document: Document, values: ValueReader) -> None:
    """Registers hooks as torch does, but without looking up anything in the module, whose class may define ``__getattribute__``."""
    for group, hooks in values.named_items(node, "hooks"):
        if group not in HOOK_GROUPS or not isinstance(hooks, list):
            document.refuse(f"hooks expected to be in {', '.join(HOOK_GROUPS)}", f"they are in {glimpse(group)}")
        for entry in hooks:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], bool):
                document.refuse("a hook and a flag expected", f"it is {glimpse(entry)}")
            hook = values.value(entry[0])
            _check_hook(hook, module, document)
            registered = (instance_dict(module) or {})[group]
            if group == "_load_state_dict_pre_hooks":
                hook = _WrappedHook(hook, module if entry[1] else None)
            registered[RemovableHandle(registered).id] = hook


def _check_hook(hook: Any, module: nn.Module, document: Document) -> None:
    kind = type(hook)
    own_method = kind is types.MethodType and hook.__self__ is module
    if not own_method and not (callable(hook) and is_utility(kind)):
        document.refuse("hooks expected to be methods of the module or objects of torch.nn.utils", f"one is {an(title(kind))}")
    if marks := _MARKS & vars(hook.__func__ if own_method else hook).keys():
        document.refuse("hooks expected to have no attributes that torch sets on hooks", f"one has {min(marks)!r}")


def computed_tensors(module: nn.Module, node: dict[str, Any], document: Document) -> list[str]:
    """The names of tensors that parametrizations compute. Nothing else in the module may have one of these names."""
    computed = node.get("parametrized", [])
    if not isinstance(computed, list) or not all(isinstance(name, str) and name.isidentifier() for name in computed):
        document.refuse("parametrized expected to be a list of names", f"it is {glimpse(computed)}")
    own = instance_dict(module) or {}
    groups = [own.get(group, {}) for group in ("_parameters", "_buffers", "_modules")]
    in_module = any(name in group for name in computed for group in (own, *groups))
    in_class = any(class_attribute(type(module), name) is not None for name in computed)
    if in_module or in_class or len(set(computed)) < len(computed):
        document.refuse("parametrized expected to list names that nothing else has", f"it is {glimpse(computed)}")
    lists = groups[2].get("parametrizations")
    if computed and (type(lists) is not nn.ModuleDict or set(computed) - nn.ModuleDict.keys(lists)):
        document.refuse("parametrizations expected for every name in parametrized", f"some of {glimpse(computed)} have none")
    return computed


def attach_parametrizations(module: nn.Module, names: list[str]) -> None:
    """Turns the tensors ``names`` into properties that torch computes on access.

    Torch makes the properties on a plain module, and a class derived from the module's own gets them: torch itself would run
    ``__class__``, ``__getattr__`` and ``__setattr__`` of the module.
    """
    plain = nn.Module()
    parametrize._inject_new_class(plain)
    for name in names:
        parametrize._inject_property(plain, name)
    kind = type(module)
    wanted = {*names, "__module__", "__getstate__", "__deepcopy__"}
    members = {name: value for name, value in vars(type(plain)).items() if name in wanted}
    if owner_of(kind, "__deepcopy__") is not None:
        del members["__deepcopy__"]
    derived = type(f"Parametrized{type.__dict__['__name__'].__get__(kind)}", (kind,), members)
    object.__dict__["__class__"].__set__(module, derived)
