"""Records: what takes the place of the objects in a pickle. They hold what the pickle says of an object, and do nothing with it.

What stands for a name is called with what the file says, and may be changed by it. So it is a type whose attributes cannot be set (of C), a
class below `Inert`, or a value that cannot be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardsave._foreign.containers import Unread

#: Module and name of an object, as a pickle has them.
GlobalName = tuple[str, str]

#: How many values a key may have in it, and how many bits a number among them. Python hashes a key as a whole, without an end if it has
#: itself twice on each of a hundred levels.
_MAX_KEY_VALUES, _MAX_KEY_BITS = 100, 4096


class Forbidden(Exception):
    """A pickle does what no file of a checkpoint does."""


class Inert:
    """The base of all classes in tables. A pickle that tries to change the class itself fails, since `__setstate__` needs an instance."""

    def __setstate__(self, state: Any) -> None:
        raise Forbidden("sets the state of an object that has none")


class Record(Inert, Unread):
    """Takes the place of an object in a pickle. It keeps what the pickle says of that object, and does nothing with it."""

    name: str = ""

    #: A pickle may call something with a record as its arguments: without this, `__getitem__` would make it an endless sequence.
    __iter__ = None

    def __new__(cls, *arguments: Any, **more: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = (*arguments, *more.values())
        record.state = None
        record.entries = {}
        record.items = []
        return record

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any
        self.entries: dict[Any, Any]
        self.items: list[Any]

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The name of the object's class, for a message."""
        first = self.arguments[0] if self.arguments else None
        by_another = self.name in _MAKERS and isinstance(first, type) and issubclass(first, Record)
        return first.name if by_another and isinstance(first, type) and issubclass(first, Record) else self.name

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        """As a key in a path and in a message."""
        return f"<{self.kind}>"

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def __getitem__(self, name: str) -> Any:
        """A field, or None if it is missing."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    @property
    def is_module(self) -> bool:
        """Whether the object is a module of torch, by the attributes that every one has."""
        return isinstance(self.state, dict) and self.state.keys() >= {"_parameters", "_buffers", "_modules"}

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        self.items.extend(items)

    def placed(self, place: Callable[[Any], Any]) -> Record:
        """This record with ``place(value)`` for each value that it holds."""
        self.state, self.entries, self.items = place(self.state), place(self.entries), place(self.items)
        self.arguments = tuple(map(place, self.arguments))
        return self

    def parts(self) -> Mapping[str, Any]:
        """Everything in the record that may hold other values: the fields, entries and items of the object."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        fields = {key: value for state in states if isinstance(state, dict) for key, value in state.items()}
        others = [state for state in states if not isinstance(state, dict)]
        named = {"(arguments)": self.arguments, "(state)": others, "(items)": self.items}
        return {
            **{str(key): value for key, value in {**fields, **self.entries}.items()},
            **{k: v for k, v in named.items() if v},
        }


class Dict(Inert, dict[Any, Any]):
    """A mapping of a class that pickles as a call with a factory, a mapping or pairs: OrderedDict, defaultdict, Counter."""

    def __new__(cls, *arguments: Any) -> Dict:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, dict):
                self.update(argument)
            elif isinstance(argument, list):
                for key, value in argument:
                    check_key(key)
                    self[key] = value

    def __setstate__(self, state: Any) -> None:
        """Attributes of a mapping, such as the ``_metadata`` of a state dict, are no part of its content."""


class Sequence(Inert):
    """What takes the place of set, frozenset and torch.Size: a tuple, which needs no hashes of its elements."""

    def __new__(cls, items: Any = ()) -> tuple[Any, ...]:  # type: ignore[misc]
        if not isinstance(items, (list, tuple)):
            raise Forbidden("makes a sequence of something else")
        return tuple(items)


def check_key(key: Any) -> None:
    """Raises Forbidden for a key whose hash or text could take much longer than its pickle."""
    waiting, values = [key], 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            values += len(item)
            if values > _MAX_KEY_VALUES:
                raise Forbidden("has a key of very many values")
            waiting += item
        elif isinstance(item, int) and item.bit_length() > _MAX_KEY_BITS:
            raise Forbidden("has a key with a very long number")


#: What makes an object of the class that is its first argument.
_MAKERS = ("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")

#: Values of Python that stand for themselves.
PLAIN_TYPES: dict[GlobalName, Any] = {
    ("collections", "OrderedDict"): Dict,
    ("collections", "defaultdict"): Dict,
    ("collections", "Counter"): Dict,
    ("builtins", "set"): Sequence,
    ("builtins", "frozenset"): Sequence,
}

#: Names that usual checkpoints have beside the weights; all of a module with "*". They become records like every other name.
_HARMLESS = {
    "argparse": {"Namespace"},
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "int", "list", "object", "range", "slice", "str", "tuple", "type",
    },
    "collections": {"deque"},
    "copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"},
    "datetime": {"*"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "lightning_fabric": {"AttributeDict"},
    "ml_dtypes": {"*"},
    "numpy": {"*"},
    "omegaconf": {"*"},
    "pathlib": {"*"},
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID"},
    "_codecs": {"encode"},
}  # fmt: skip


def is_harmless(module: str, name: str) -> bool:
    """Whether usual checkpoints have objects of this name beside the weights."""
    names = _HARMLESS.get(module.partition(".")[0], set())
    return "*" in names or name in names


def record_class(module: str, name: str) -> type[Record]:
    return type(name, (Record,), {"name": f"{module}.{name}"})
