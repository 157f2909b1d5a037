"""Which code of a class would run on values from a file while a model is built, or when the built model calls an instance."""

from __future__ import annotations

import abc
import typing
from collections.abc import Collection

from shardsave._architecture.class_checks import bases_of, class_attribute, has_finaliser, module_of, owner_of
from shardsave._architecture.reviewed import is_utility
from shardsave._architecture.states import REVIEWED_STATES
from shardsave._architecture.uses import Use

_INSTANCES = frozenset([Use.OBJECT, Use.MEMBER, Use.TUPLE])
_HARMLESS_INITIALISERS = (object, typing.Generic, typing.Protocol)


def why_unsafe(target: object) -> str | None:
    """Why instances of a class must not be built from data; None if they may."""
    if not issubclass(type(target), type):
        return None
    kind: type = target  # type: ignore[assignment]
    if has_finaliser(kind):
        return "its __del__ would run with values from the file"
    if any(f"{module_of(base)}.".startswith("torch.nn.parallel.") for base in bases_of(kind)):
        return "torch.nn.parallel calls objects that the file chooses"
    return None


def own_setstate(kind: type) -> bool:
    """Whether ``kind`` has a ``__setstate__`` that is not one of torch's own."""
    owner = owner_of(kind, "__setstate__")
    return owner is not None and owner not in REVIEWED_STATES


def own_call(kind: type) -> bool:
    """Whether instances of ``kind``, which is no module, can be called."""
    return class_attribute(kind, "__call__") is not None and not is_utility(kind)


def own_creation(kind: type) -> str | None:
    """What would run of ``kind`` if a class were derived from it, as torch does for computed tensors; None if nothing would."""
    if type(kind) not in (type, abc.ABCMeta):
        return "metaclass"
    owner = owner_of(kind, "__init_subclass__")
    harmless = owner in _HARMLESS_INITIALISERS or (owner is not None and module_of(owner).startswith("torch.nn."))
    return None if harmless else "__init_subclass__"


def routines(target: object, uses: Collection[Use]) -> list[str]:
    """What would run of a class for these uses, each in words."""
    if not issubclass(type(target), type):
        return []
    kind: type = target  # type: ignore[assignment]
    words = []
    if own_setstate(kind) and not {Use.MODULE, Use.OBJECT}.isdisjoint(uses):
        words.append("its __setstate__ would run on values from the file")
    if own_call(kind) and not _INSTANCES.isdisjoint(uses):
        words.append("the model could call an instance, with values from the file")
    if Use.COMPUTED in uses and (creation := own_creation(kind)):
        words.append(f"its {creation} would run")
    return words
