"""Small models with everything that real ones have, for tests of architectures. They are imported like a user's package."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Mode(enum.Enum):
    FAST = 1
    EXACT = "two"

    def describe(self) -> str:
        return f"mode {self.value}"


class Point(NamedTuple):
    x: int
    y: Any


@dataclasses.dataclass
class Config:
    width: int = 4
    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])
    again: Config | None = None

    def wider(self) -> int:
        return self.width + 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: float


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self) -> None:
        self.left, self.right = 1, [2]


class Outer:
    class Inner(nn.Module):
        pass


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Remembers(nn.Module):
    """Has ``__getstate__`` and ``__setstate__``, and extra state for its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 7
        self.cache = object()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state.get("cache") == "raises":
            raise ValueError("a cache that raises")
        self.cache = "made again"

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "history": (1.5, None)}

    def set_extra_state(self, state: Any) -> None:
        self.restored = state


class Property(nn.Module):
    changed: ClassVar[list[Any]] = []

    @property
    def level(self) -> int:
        return 1

    @level.setter
    def level(self, value: int) -> None:
        self.changed.append(value)

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        pass


class Settings(dict):
    """A dict whose items are also its attributes, as in many configuration classes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Loud(dict):
    """A dict whose class overrides a method, and which may have attributes beside its items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("a build must not call this")


class Permission(enum.IntFlag):
    READ = 1
    WRITE = 2


class WithSlot(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = 7
        self.flag = Permission.READ | Permission.WRITE


class Stack(list):
    limit = 3


def everything() -> dict[str, Any]:
    """Name → value, with one value of each kind that an attribute may have."""
    shared = [1, 2]
    config = Config()
    config.again = config
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return {
        "none": None,
        "yes": True,
        "big": 10**300,
        "text": "naïve ☃",
        "small": -0.0,
        "infinite": float("-inf"),
        "complex": 1 - 2.5j,
        "bytes": b"\x00\xff",
        "tuple": (1, ("a", [3])),
        "set": {1, "b", (2, 3)},
        "frozenset": frozenset({4}),
        "dict": {1: "one", "two": {None: [2]}, (3, 4): 3.0},
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"k": [1]}),
        "counter": collections.Counter("aab"),
        "settings": Settings(width=3, inner=Settings(depth=(1, 2))),
        "loud": Loud({"a": shared}),
        "stack": Stack([1, shared]),
        "deque": collections.deque([1, 2], maxlen=5),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        "slice": slice(1, None, 2),
        "range": range(0, 10, 3),
        "ellipsis": ...,
        "layout": torch.strided,
        "memory_format": torch.channels_last,
        "path": Path("some/where"),
        "mode": Mode.EXACT,
        "point": Point(1, [2]),
        "config": config,
        "frozen": Frozen(0.5),
        "slotted": Slotted(),
        "function": double,
        "builtin": F.gelu,
        "torch_function": torch.tanh,
        "class": nn.LayerNorm,
        "partial": functools.partial(nn.LayerNorm, eps=1e-6),
        "shared": shared,
        "shared_again": {"it": shared},
        "cyclic": cyclic,
        "array": np.arange(6).reshape(2, 3),
        "scalar": np.float32(0.1),
        "tensor": torch.arange(3.0),
    }


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = self.first
        self.values = nn.ParameterList([nn.Parameter(torch.randn(2)), self.first.weight])
        self.by_name = nn.ModuleDict({"act": nn.GELU(), "none_like": nn.Identity()})
        self.absent: nn.Module | None
        self.register_module("absent", None)
        self.register_parameter("no_parameter", None)
        self.register_buffer("counter", torch.tensor(3))
        self.register_buffer("scratch", torch.randn(5), persistent=False)
        self.register_buffer("same_scratch", self.scratch, persistent=False)
        self.inner = Outer.Inner()
        self.remembers = Remembers()
        for name, value in everything().items():
            setattr(self, f"a_{name}", value)
        self.method = self.helper
        self.parts = [self.first, self.values[0]]
        self.__dict__["parent_of_first"] = (self,)

    def helper(self) -> int:
        return 41

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_function(self.by_name["act"](self.first(x))) + self.values[0].sum()
