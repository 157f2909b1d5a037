"""Classes with code that Python calls implicitly, such as ``__del__``. Each piece of code records in ``ran`` that it ran."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import nn

ran: list[str] = []


class Closes:
    """Has a finaliser, as classes that own a file do."""

    def __del__(self) -> None:
        ran.append(f"__del__ with {vars(self)}")


class ClosesToo(Closes):
    pass


class Net(nn.Module):
    def __del__(self) -> None:
        ran.append("__del__ of a module")


class Pair(NamedTuple):
    left: Any
    right: Any


class ClosingPair(Pair):
    def __del__(self) -> None:
        ran.append(f"__del__ with {tuple(self)}")


class Hashed(Pair):
    def __hash__(self) -> int:
        ran.append(f"__hash__ with {tuple(self)}")
        return 1


class Compared(Pair):
    __hash__ = Pair.__hash__

    def __eq__(self, other: object) -> bool:
        ran.append(f"__eq__ with {tuple(self)}")
        return True


class Iterated(Pair):
    def __iter__(self) -> Any:
        ran.append("__iter__")
        return super().__iter__()


class Said(Pair):
    def __repr__(self) -> str:
        ran.append("__repr__")
        return "Said"


class Number:
    def __index__(self) -> int:
        ran.append("__index__")
        return 1


class Guesses(enum.IntFlag):
    ONE = 1
    TWO = 2

    @classmethod
    def _missing_(cls, value: object) -> Any:
        ran.append(f"_missing_ with {value}")
        return super()._missing_(value)


class Sets(enum.IntFlag):
    ONE = 1
    TWO = 2

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_value_" and value == 3:
            ran.append("__setattr__ of a flag")
        super().__setattr__(name, value)


class Looks(enum.Enum):
    """Looks up its name through code of its own, which ``hash`` does."""

    ONE = 1

    def __getattribute__(self, name: str) -> Any:
        ran.append(f"__getattribute__ of a member: {name}")
        return super().__getattribute__(name)


class Slots:
    __slots__ = ("slot",)


class BorrowsSlot:
    slot = Slots.slot  # type: ignore[attr-defined]


class Calls(enum.EnumMeta):
    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if arguments[0] == 1:
            ran.append("__call__ of a metaclass")
        return super().__call__(*arguments, **named)


class Called(enum.IntFlag, metaclass=Calls):
    ONE = 1


class Listed(dict):
    """Has an ``items`` method of its own."""

    def items(self) -> Any:
        ran.append("items")
        return super().items()


class Reader:
    def read(self) -> str:
        return "content"


class Watches:
    """Sees every access to its attributes."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        ran.append("__class__")
        return Watches

    def __getattribute__(self, name: str) -> Any:
        ran.append(f"__getattribute__ of {name}")
        return super().__getattribute__(name)


class Registers(nn.Linear):
    def register_forward_pre_hook(self, *arguments: Any, **named: Any) -> Any:
        ran.append("register_forward_pre_hook")
        return super().register_forward_pre_hook(*arguments, **named)

    def before(self, module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        pass


class Answers(Registers):
    """Sees every access to its attributes, and has a weight, whatever its state is."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        ran.append("__class__")
        return Answers

    def __getattribute__(self, name: str) -> Any:
        ran.append(f"__getattribute__ of {name}")
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        ran.append(f"__getattr__ of {name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        ran.append(f"__setattr__ of {name}")
        super().__setattr__(name, value)


class Empty(Registers):
    """Ignores its state."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        pass


class Callable:
    """Calls what it holds, as a partial does."""

    def __call__(self, *arguments: Any) -> Any:
        ran.append("__call__")
        return self.function(*arguments)  # type: ignore[attr-defined]


class CallableMember(enum.Enum):
    ONE = 1

    def __call__(self) -> None:
        ran.append("__call__ of a member")


class CallablePair(Pair):
    def __call__(self) -> None:
        ran.append("__call__ of a tuple")


class TakesState(dict):
    def __setstate__(self, state: Any) -> None:
        ran.append("__setstate__")


class Watched(nn.Module):
    def __init_subclass__(cls) -> None:
        ran.append("__init_subclass__")


class Makes(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        ran.append("__new__ of a metaclass")
        return super().__new__(mcs, name, bases, members)

    def __getattribute__(cls, name: str) -> Any:
        ran.append(f"__getattribute__ of a metaclass: {name}")
        return super().__getattribute__(name)


class Made(nn.Module, metaclass=Makes):
    pass
