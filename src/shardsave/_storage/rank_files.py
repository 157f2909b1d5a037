"""Puts together the tensors that several ranks wrote, each rank its chunks into files of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence

from shardsave._common.coverage import covered_once
from shardsave._common.os_calls import call
from shardsave._common.strict_json import glimpse
from shardsave._common.words import count, some
from shardsave._format.dtypes import BY_NAME
from shardsave._format.header import Header, parse_header
from shardsave._format.rank_files import SHARDING_KEY, absent_files, chunk_begins, is_rank_file, missing_file, other_series
from shardsave._storage.located import Located, StoredChunk
from shardsave._storage.shard_files import read_header
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

_INFERRED = (
    "whole shapes are not recorded in files of ranks, but inferred from the files that are there: that the files of the last ranks are "
    "missing, or are from another save, cannot be noticed"
)

_CAUSE = "files of some ranks are missing, or files of several saves lie together"


def has_chunks(fd: int, name: str) -> bool:
    """Whether the file behind ``fd`` says of its tensors where in whole tensors they begin. Raises CallFailed."""
    length = call(os.fstat, name, fd).st_size
    try:
        header = parse_header(read_header(fd, length, f"shard {name}"), length, f"shard {name}")
    except CorruptCheckpointError:
        return False
    return SHARDING_KEY in header.metadata


def refuse_lone_rank(path: str, name: str, folder: str, header: Header) -> None:
    """Raises IncompatibleCheckpointError if the file ``name`` at ``path`` has the chunks of one rank, and not whole tensors."""
    begins = chunk_begins(header, f"shard {name}")
    if begins is not None and (is_rank_file(name) or any(map(any, begins.values()))):
        raise IncompatibleCheckpointError(
            f"cannot read {path}: whole tensors were expected, it has the chunks of one rank of several, as "
            f"HuggingFaceStorageWriter writes them; to read all ranks, give the path of their directory: {folder}"
        )


def shape_notes(files: Iterable[str]) -> tuple[str, ...]:
    """What nobody can tell about the shapes of tensors in ``files`` of ranks."""
    absent = absent_files(files)
    if not absent:
        return (_INFERRED,)
    return (
        f"{_INFERRED}; other ranks wrote files of these numbers, which is normal if these have no part of them: {some(absent, 5)}",
    )


def chunks_of(file: str, header: Header, tensors: Iterable[tuple[str, Located]]) -> list[tuple[str, StoredChunk]]:
    """Name → the chunk of this tensor in ``file``, which has ``tensors``. Raises CorruptCheckpointError."""
    begins = chunk_begins(header, f"shard {file}")
    if begins is None:
        raise CorruptCheckpointError(
            f"corrupt shard {file}: header: {SHARDING_KEY} expected, which says where each chunk begins, there is none; "
            f"nothing else was read from it"
        )
    return [(name, StoredChunk(begins[name], located)) for name, located in tensors]


def assemble(folder: str, files: Sequence[str], chunks: Mapping[str, Sequence[StoredChunk]]) -> dict[str, Located]:
    """The whole tensors of ``chunks``, which ``files`` hold, by name.

    Raises CorruptCheckpointError unless the chunks cover each tensor once, and the files have all numbers of their series.
    """
    if (missing := missing_file(files)) is not None:
        raise CorruptCheckpointError(
            f"corrupt checkpoint {folder}: a file {missing} was expected, there is none; the checkpoint was copied or downloaded in part"
        )
    if (pair := other_series(files)) is not None:
        raise CorruptCheckpointError(
            f"corrupt checkpoint {folder}: files of one save were expected, {pair[0]} and {pair[1]} count different numbers of files; "
            f"{_CAUSE}"
        )
    return {name: _assembled(folder, name, parts) for name, parts in chunks.items()}


def _assembled(folder: str, name: str, chunks: Sequence[StoredChunk]) -> Located:
    first = chunks[0].located
    if len(chunks) == 1 and not any(chunks[0].begin):
        return first
    other = next((c for _, c in chunks if c.dtype != first.dtype or len(c.shape) != len(first.shape)), None)
    if other is not None:
        _bad(
            folder,
            name,
            f"to have {first.dtype} and {count(len(first.shape), 'dimension')}, in {other.shard} it has other ones",
        )
    if BY_NAME[first.dtype].bits < 8:
        raise IncompatibleCheckpointError(
            f"cannot read {folder}: chunks of whole bytes were expected, {glimpse(name)} in {first.shard} has dtype {first.dtype}"
        )
    ends = ([at + size for at, size in zip(begin, located.shape)] for begin, located in chunks)
    shape = tuple(map(max, zip(*ends)))
    nbytes = math.prod(shape) * BY_NAME[first.dtype].bits // 8
    # A tensor never has more bytes than its chunks, so a huge size cannot make a reader allocate memory.
    if nbytes != sum(located.nbytes for _, located in chunks) or not covered_once(shape, [(b, c.shape) for b, c in chunks]):
        _bad(folder, name, f"of shape {[*shape]} to be covered once by its {count(len(chunks), 'chunk')}, it is not")
    filled = tuple(chunk for chunk in chunks if chunk.located.nbytes)
    if len(filled) < 2:
        return filled[0].located if filled else first._replace(shape=shape)
    return first._replace(shape=shape, nbytes=nbytes, offset=-1, chunks=filled)


def _bad(folder: str, name: str, found: str) -> None:
    raise CorruptCheckpointError(f"corrupt checkpoint {folder}: tensor {glimpse(name)} expected {found}; {_CAUSE}")
