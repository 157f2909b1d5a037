"""Reads pickles without running anything that they name: each object becomes an inert record, or a value of our own.

`pickle._Unpickler` is Python's unpickler in Python. It reads every protocol; unlike the one in C it allocates no table whose size the
file chooses. It reaches names only by `find_class`, which here looks them up in tables and never imports anything.

What a table returns is called with what the file says, and may be changed by it. So it is a type whose attributes cannot be set (of C), a
class below `Inert`, or a value that cannot be called.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, ClassVar

from shardsave._common.words import human_bytes
from shardsave._foreign.containers import Unread

#: Module and name of an object, as a pickle has them.
GlobalName = tuple[str, str]

#: The largest pickle that is read, in bytes. It describes tensors and does not contain them.
MAX_PICKLE_BYTES = 512_000_000

#: The most memory that containers and objects may take, in bytes. A million tensors are some 2 GB by this count.
MAX_OBJECT_BYTES = 4 << 30

#: How many values a key may have in it, and how many bits a number among them. Python hashes a key as a whole, without an end if it has
#: itself twice on each of a hundred levels.
_MAX_KEY_VALUES, _MAX_KEY_BITS = 100, 4096

#: Opcodes that are handled in another way than Python does.
_BYTEARRAY8, _EXTENSIONS = 0x96, (0x82, 0x83, 0x84)
_EMPTY_SET, _ADDITEMS, _FROZENSET = 0x8F, 0x90, 0x91
_KEYED = (pickle.SETITEM[0], pickle.SETITEMS[0], pickle.DICT[0])
_CALLS = (pickle.REDUCE[0], pickle.NEWOBJ[0], pickle.NEWOBJ_EX[0], pickle.OBJ[0], pickle.INST[0])

#: What other opcodes of one byte may take, in bytes.
_COSTS = {
    **dict.fromkeys(b"](lt", 72), **dict.fromkeys(b"}d", 80), **dict.fromkeys(pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3, 72),
    pickle.MEMOIZE[0]: 100, _EMPTY_SET: 72, _FROZENSET: 72,
}  # fmt: skip

#: What a call takes that copies only a few elements, and each element of a longer container that it may copy.
_CALL_COST, _FEW, _ENTRY_COST = 400, 64, 100


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


class Unpickler(pickle._Unpickler):
    """Reads one pickle of ``file``. ``find`` returns what takes the place of a global name; ``find_storage`` that of a persistent id."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    proto = 0

    def __init__(
        self, file: BinaryIO, find: Callable[[str, str], Any], find_storage: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._find = find
        self._find_storage = find_storage
        self._charged = 0

    def find_class(self, module: str, name: str) -> Any:
        """Looks a name up, in the spelling of Python 3. Older protocols have the names of Python 2."""
        if self.proto < 3:
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        return self._find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._find_storage is None:
            raise Forbidden("refers to a storage")
        return self._find_storage(pid)

    def charge(self, cost: int) -> None:
        """Counts ``cost`` bytes of memory. A few bytes of a pickle can make large objects, and copy them again and again."""
        self._charged += cost
        if self._charged > MAX_OBJECT_BYTES:
            raise Forbidden(f"needs more than {human_bytes(MAX_OBJECT_BYTES)} of memory for its objects")

    def _read_bytearray(self) -> None:
        """Python's own version allocates the length that the file says before it reads anything."""
        machine: Any = self
        length = int.from_bytes(machine.read(8), "little")
        data = machine.read(length)
        if len(data) != length:
            raise Forbidden("ends too early")
        machine.append(bytearray(data))

    def _refuse_extension(self) -> None:
        """An extension code leads to objects that this process has registered, past `find_class`."""
        raise Forbidden("has an extension code")

    def _add_to_set(self) -> None:
        """A set is a list here, since its elements would have to be hashed."""
        machine: Any = self
        items = machine.pop_mark()
        machine.stack[-1].extend(items)

    dispatch[_BYTEARRAY8] = _read_bytearray
    dispatch.update(dict.fromkeys(_EXTENSIONS, _refuse_extension))
    dispatch[_EMPTY_SET] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[_ADDITEMS] = _add_to_set
    dispatch[_FROZENSET] = dispatch[pickle.TUPLE[0]]


def _charged(load: Callable[[Any], None], cost: int) -> Callable[[Any], None]:
    def run(machine: Any) -> None:
        machine.charge(cost)
        load(machine)

    return run


def _checked_keys(load: Callable[[Any], None], values: int | None) -> Callable[[Any], None]:
    """``load``, which takes pairs of keys and values from the last ``values`` of the stack, with checks of the keys."""

    def run(machine: Any) -> None:
        pairs = machine.stack if values is None else machine.stack[-values:]
        machine.charge(len(pairs) * _ENTRY_COST // 2)
        for key in pairs[::2]:
            if not isinstance(key, str):
                check_key(key)
        load(machine)

    return run


def _charged_call(load: Callable[[Any], None], arguments: int | None) -> Callable[[Any], None]:
    """``load``, whose arguments are the last ``arguments`` containers on the stack, or all that is on it."""

    def run(machine: Any) -> None:
        copied: Iterable[Any] = machine.stack
        if arguments is not None:
            copied = [value for each in machine.stack[-arguments:] for value in (each, *_values(each))]
        sizes = (len(each) for each in copied if isinstance(each, (tuple, list, dict)))
        machine.charge(_CALL_COST + _ENTRY_COST * sum(size for size in sizes if size > _FEW))
        load(machine)

    return run


def _values(arguments: Any) -> Iterable[Any]:
    return arguments.values() if isinstance(arguments, dict) else arguments if isinstance(arguments, (tuple, list)) else ()


Unpickler.dispatch.update({opcode: _charged(Unpickler.dispatch[opcode], cost) for opcode, cost in _COSTS.items()})
for _opcode, _pairs in zip(_KEYED, (2, None, None)):
    Unpickler.dispatch[_opcode] = _checked_keys(Unpickler.dispatch[_opcode], _pairs)
for _opcode, _arguments in zip(_CALLS, (1, 1, 2, None, None)):
    Unpickler.dispatch[_opcode] = _charged_call(Unpickler.dispatch[_opcode], _arguments)
