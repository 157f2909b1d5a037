"""A second opinion on the headers of safetensors files: safetensors' own parser must read the same tensors from the same bytes."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

import safetensors

from shardsave._common import strict_json
from shardsave._common.descriptors import file_in_memory
from shardsave._common.strict_json import glimpse
from shardsave._common.words import human_bytes, some
from shardsave._format.header import Header
from shardsave.errors import CorruptCheckpointError

#: Upper bounds of the memory that safetensors 0.8 takes for each byte of a header, each tensor, size in a shape and entry of
#: `__metadata__`, in bytes. Where the text has characters of four bytes, Python's copies of it take four more.
_BYTE_COST, _WIDE_COST, _TENSOR_COST, _SIZE_COST, _ENTRY_COST = 5, 4, 700, 64, 400


class SecondOpinion:
    """Compares headers that our parser has accepted with what safetensors reads from the same bytes.

    ``notes``: which headers safetensors could not judge, and why. That is no damage: an older safetensors does not know every dtype.
    """

    def __init__(self) -> None:
        self._unjudged: dict[str, dict[str, None]] = {}  # reason → files

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"safetensors {safetensors.__version__} has no second opinion on the header of {some(files)}: {reason}"
            for reason, files in self._unjudged.items()
        )

    def check(self, raw: bytes, file_length: int, header: Header, file: str) -> None:
        """Raises CorruptCheckpointError if safetensors refuses ``raw``, the start of ``file``, or does not read ``header`` from it.

        safetensors maps the whole file that it is given. So it is given one in memory, with the header and the right length: that takes no
        memory for the data, and nobody can truncate it meanwhile, which would kill this process. It takes up to 25 times the memory of a
        hostile header, beside what ours has taken: a header for which that is too much stays without a second opinion.
        """
        needed = _memory(raw, header)
        if needed > strict_json.MAX_DOCUMENT_MEMORY // 2:
            return self._leave_unjudged(file, f"that would take up to {human_bytes(needed)} of memory")
        try:
            with file_in_memory(raw, file_length) as copy, safetensors.safe_open(f"/proc/self/fd/{copy.fd}", "numpy") as opened:
                _compare(opened, header, file)
        except safetensors.SafetensorError as refusal:
            unknown = sorted(dtype for dtype in set(header.tensors.dtypes) if not _knows(dtype))
            if not unknown:
                _bad(file, f"it refuses it ({refusal})")
            self._leave_unjudged(file, f"it does not know {', '.join(unknown)}")
        except (OSError, MemoryError) as error:
            self._leave_unjudged(file, f"it cannot be asked ({error})")

    def _leave_unjudged(self, file: str, reason: str) -> None:
        self._unjudged.setdefault(reason, {})[file] = None


def _memory(raw: bytes, header: Header) -> int:
    """How many bytes of memory safetensors takes for the header ``raw``, at most."""
    sizes = sum(map(len, header.tensors.shapes))
    text = len(raw) * (_BYTE_COST + (_WIDE_COST if strict_json.is_wide(raw) else 0))
    return text + _TENSOR_COST * len(header.tensors.names) + _SIZE_COST * sizes + _ENTRY_COST * len(header.metadata)


def _compare(opened: Any, header: Header, file: str) -> None:
    """Raises CorruptCheckpointError if the names, dtypes, shapes, offsets or metadata in ``opened`` are not those in ``header``."""
    names, dtypes, shapes, begins, sizes = header.tensors
    numbers = {name: number for number, name in enumerate(names)}
    begin = 0
    for name in opened.offset_keys():
        tensor = opened.get_slice(name)
        theirs = tensor.get_dtype(), tuple(tensor.get_shape()), begin
        number = numbers.pop(name, None)
        ours = (dtypes[number], shapes[number], begins[number]) if number is not None else None
        if number is None or theirs != ours:
            _bad(file, f"for {glimpse(name)} it reads {_words(theirs)}, shardsave reads {_words(ours)}")
        begin += sizes[number]  # safetensors tells only the order of the tensors; it accepts neither gaps nor overlaps
    if numbers:
        _bad(file, f"it reads no tensor {glimpse(min(numbers))}")
    if (opened.metadata() or {}) != header.metadata:
        _bad(file, "it reads another __metadata__")


@cache
def _knows(dtype: str) -> bool:
    """Whether this version of safetensors reads ``dtype``."""
    text = f'{{"x":{{"dtype":"{dtype}","shape":[0],"data_offsets":[0,0]}}}}'.encode()
    try:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def _words(tensor: tuple[str, tuple[int, ...], int] | None) -> str:
    if tensor is None:
        return "no such tensor"
    dtype, shape, begin = tensor
    return f"{dtype} of shape {glimpse([*shape])} at {begin}"


def _bad(file: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt shard {file}: header: safetensors' own parser expected to read the same as shardsave, {found}; nothing else was "
        f"read from it"
    )
