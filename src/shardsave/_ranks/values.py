"""Lists of values as bytes: equal ones are stored once."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

_LEVEL = 1


def pack(values: Sequence[bytes]) -> bytes:
    """A list of bytes as bytes."""
    distinct = {value: number for number, value in enumerate(dict.fromkeys(values))}
    runs = [(number, len(list(run))) for number, run in groupby(distinct[value] for value in values)]
    numbers = [len(distinct), len(runs), *map(len, distinct), *(number for run in runs for number in run)]
    return zlib.compress(struct.pack(f"<{len(numbers)}Q", *numbers) + b"".join(distinct), _LEVEL)


def unpack(packed: bytes) -> list[bytes]:
    """The list that `pack` was given."""
    data = zlib.decompress(packed)
    distinct, runs = struct.unpack_from("<2Q", data)
    lengths = struct.unpack_from(f"<{distinct}Q", data, 16)
    numbers = struct.unpack_from(f"<{2 * runs}Q", data, 16 + 8 * distinct)
    ends = list(accumulate(lengths, initial=16 + 8 * distinct + 16 * runs))
    values = [data[begin:end] for begin, end in pairwise(ends)]
    return [values[number] for number, count in zip(numbers[::2], numbers[1::2], strict=True) for _ in range(count)]
