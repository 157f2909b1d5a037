"""Files with the chunks of one rank: what `HuggingFaceStorageWriter` of torch writes on several ranks if it does not consolidate them.

The names in such a file are those of whole tensors, but the tensors are chunks of these. Only an entry of ``__metadata__`` says where each
chunk begins, and nothing says how large the whole tensor is: it ends where its last chunk ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._format.header import Header
from shardsave.errors import CorruptCheckpointError

#: The keys of `__metadata__` that say where chunks begin, and in which version of the format.
SHARDING_KEY, SHARDING_VERSION_KEY = "DCP_SHARDING_INFO", "DCP_VERSION"

_NAME = re.compile(r"shard-([0-9]{5,9})-model-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors")


def is_rank_file(name: str) -> bool:
    """Whether torch gives this name to a file with the chunks of one rank."""
    return _NAME.fullmatch(name) is not None


def missing_file(names: Iterable[str]) -> str | None:
    """The pattern of a file that no rank wrote, although ``names`` says that it is one of several; None if there is none."""
    numbers = [(int(match[2]), match[3]) for match in map(_NAME.fullmatch, names) if match is not None]
    present = {number for number, _ in numbers}
    total = max((total for _, total in numbers), key=int, default="0")
    # One number more than there are files is enough to find one that is absent.
    absent = next((number for number in range(1, min(int(total), len(present) + 1) + 1) if number not in present), None)
    return f"shard-*-model-{absent:05d}-of-{total}.safetensors" if absent is not None else None


def other_series(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of ``names`` that count different numbers of files, which one save never does; None if there are none."""
    by_total: dict[int, str] = {}
    for name in names:
        if (match := _NAME.fullmatch(name)) is not None:
            by_total.setdefault(int(match[3]), name)
    return (by_total[min(by_total)], by_total[max(by_total)]) if len(by_total) > 1 else None


def absent_files(names: Iterable[str]) -> list[str]:
    """The files that some of the ranks in ``names`` wrote and others did not. A rank without chunks for a file does not write it."""
    matches = [match for match in map(_NAME.fullmatch, names) if match is not None]
    present = {(match[1], match[2]) for match in matches}
    ranks, files = sorted({rank for rank, _ in present}), sorted({(match[2], match[3]) for match in matches})
    return [f"shard-{r}-model-{n}-of-{total}.safetensors" for r in ranks for n, total in files if (r, n) not in present]


def chunk_begins(header: Header, where: str) -> dict[str, tuple[int, ...]] | None:
    """The index in the whole tensor at which each tensor of a file begins; None if the file does not say it.

    Raises CorruptCheckpointError.
    """
    text = header.metadata.get(SHARDING_KEY)
    if text is None:
        return None
    try:
        listed = parse_object(text.encode())
    except (NotJSON, UnicodeEncodeError):
        listed = {}
    begins = {}
    for name, shape in zip(header.tensors.names, header.tensors.shapes):
        entry = listed.get(name)
        begin = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(begin, list) or len(begin) != len(shape) or not all(map(_fits, begin, shape)):
            raise CorruptCheckpointError(
                f"corrupt {where}: header: {SHARDING_KEY} expected to say where each chunk begins, of {glimpse(name)} it says "
                f"{glimpse(begin)}; nothing else was read from it"
            )
        begins[name] = tuple(begin)
    return begins


def _fits(begin: object, size: int) -> bool:
    return type(begin) is int and begin >= 0 and begin + size < 1 << 63
