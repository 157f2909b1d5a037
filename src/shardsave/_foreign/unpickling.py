"""Reads pickles without running anything that they name: each object becomes an inert record (`records.py`), or a value of our own.

`pickle._Unpickler` is Python's unpickler in Python. It reads every protocol; unlike the one in C it allocates no table whose size the
file chooses. It reaches names only by `find_class`, which here looks them up in tables and never imports anything.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar

from shardsave._common.words import human_bytes
from shardsave._foreign.records import Forbidden, check_key

#: The largest pickle that is read, in bytes. It describes tensors and does not contain them.
MAX_PICKLE_BYTES = 512_000_000

#: The most memory that containers and objects may take, in bytes. A million tensors are some 2 GB by this count.
MAX_OBJECT_BYTES = 4 << 30

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
