"""Opening a checkpoint for reading: from a path to checked files, of which it is known where each tensor is.

A save may replace the checkpoint at any moment meanwhile; then everything starts over.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from shardsave._common.gc_pause import gc_paused
from shardsave._common.os_calls import absolute_path
from shardsave._common.strict_json import glimpse
from shardsave._format.header import Header
from shardsave._format.index import TRAINING, Index, Part, ties_in_metadata
from shardsave._format.index_parsing import parse_index
from shardsave._format.quantised import torchao_entries
from shardsave._format.rank_files import SHARDING_KEY
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.find import FoundFiles, find
from shardsave._storage.located import StoredChunk, located
from shardsave._storage.rank_files import assemble, chunks_of, refuse_lone_rank, shape_notes
from shardsave._storage.several import refuse_several
from shardsave._storage.shard_files import Broken, HeaderCheck
from shardsave._storage.training import open_training
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    IncompatibleCheckpointError,
    ShardSaveError,
)

#: For how many seconds a reader starts over while savers keep replacing the checkpoint.
CHANGING_SECONDS = 30.0


def open_checkpoint(
    path: str | os.PathLike[str],
    wanted: Callable[[str], bool] | None = None,
    *,
    parts: Iterable[str] = (),
    broken: Broken = None,
    header_check: HeaderCheck | None = None,
) -> Checkpoint:
    """Opens the checkpoint at ``path``: a directory, an index or one safetensors file, written by shardsave or another library.

    With ``wanted`` only shards that hold a wanted tensor are opened; all tensors of these shards are listed. ``parts``: the roles of
    the parts to open. With ``broken``, a file that cannot be opened is left out, and its error is put there. ``header_check``: a
    further check of each header. Starts over if the index is replaced meanwhile.
    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError; ShardSaveError itself if
    a file cannot be read.
    """
    path = absolute_path(os.fspath(path))
    deadline = time.monotonic() + CHANGING_SECONDS
    while True:
        files = find(path)
        try:
            checkpoint = _open_found(path, files, wanted, parts, broken, header_check)
            if not broken or not _changed(path, files):
                return checkpoint
            checkpoint.close()
            broken.clear()
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if not _changed(path, files):
                raise
        except IncompatibleCheckpointError:
            if not files.ranks or find(path).ranks == files.ranks:  # a save may be about to remove those that it has replaced
                raise
        if time.monotonic() > deadline:
            raise DirectoryBusyError(
                f"cannot read {path}: its index was replaced each time while its shards were opened, for "
                f"{CHANGING_SECONDS:.0f} s; another process keeps saving there"
            )


@gc_paused()
def _open_found(
    path: str,
    files: FoundFiles,
    wanted: Callable[[str], bool] | None,
    parts: Iterable[str],
    broken: Broken,
    header_check: HeaderCheck | None,
) -> Checkpoint:
    index = parse_index(files.index_bytes, f"index {files.index_name}") if files.index_bytes is not None else None
    refuse_several(files, index)
    checkpoint = Checkpoint(path, files, index, header_check)
    try:
        if index is not None:
            _admit(checkpoint, _shards_to_open(index, wanted), broken)
            _admit_parts(checkpoint, parts, broken)
        elif files.lone is not None:
            _admit(checkpoint, {files.lone: 0}, broken)
        else:
            _admit_ranks(checkpoint, files.ranks, broken)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _admit(checkpoint: Checkpoint, shards: Mapping[str, int], broken: Broken) -> None:
    """Opens ``shards`` (file → how many tensors it holds according to the index) and notes the places of their tensors."""
    checkpoint.shards = tuple(shards)
    for shard, count in sorted(shards.items()):  # in the order in which they will be read
        try:
            file, header = checkpoint.open_shard(shard)
            checkpoint.hold(shard, file)
            _note_tensors(checkpoint, shard, header, count)
        except ShardSaveError as error:
            # Without an index, nothing says that the file should be another one than it is.
            is_damaged = checkpoint.index is not None or isinstance(error, CorruptCheckpointError)
            if broken is None or not is_damaged:
                raise
            checkpoint.drop(shard)
            broken[shard] = error


def _admit_ranks(checkpoint: Checkpoint, files: tuple[str, ...], broken: Broken) -> None:
    """Opens ``files``, each with the chunks of one rank, and notes the places of the tensors that these chunks make up."""
    checkpoint.shards = files
    checkpoint.shape_notes = shape_notes(files)
    chunks: defaultdict[str, list[StoredChunk]] = defaultdict(list)
    for file in files:
        try:
            opened, header = checkpoint.open_shard(file)
            checkpoint.hold(file, opened)
            for name, chunk in chunks_of(file, header, located(file, header)):
                chunks[name].append(chunk)
        except ShardSaveError as error:
            if broken is None:
                raise
            checkpoint.drop(file)
            broken[file] = error
    try:
        if not broken:
            checkpoint.tensors = assemble(checkpoint.path, files, chunks)
            return
    except ShardSaveError as error:
        if broken is None:
            raise
        broken["shard-*.safetensors"] = error
    # What is there does not make up whole tensors: each chunk counts as one.
    checkpoint.tensors = {f"{name} in {c.shard}": c for name, stored in chunks.items() for _, c in stored}


def _admit_parts(checkpoint: Checkpoint, roles: Iterable[str], broken: Broken) -> None:
    """Opens those parts ``roles`` that the checkpoint has: reads JSON whole, and notes the places of extra tensors."""
    for role in roles:
        if role not in checkpoint.parts:
            continue
        try:
            _admit_part(checkpoint, role, checkpoint.parts[role], broken)
        except ShardSaveError as error:
            if broken is None:
                raise
            broken[checkpoint.parts[role].file] = error


def _admit_part(checkpoint: Checkpoint, role: str, part: Part, broken: Broken) -> None:
    shard = part.file
    assert checkpoint.records is not None  # an index with parts has records
    checkpoint.records[shard] = part.record
    if not shard.endswith(".json"):
        file, header = checkpoint.open_shard(shard)
        checkpoint.hold(shard, file)
        checkpoint.kept.update(located(shard, header))
    elif role == TRAINING:
        checkpoint.training = open_training(checkpoint, part, broken)
    else:
        checkpoint.documents[role] = checkpoint.read_document(shard)


def _note_tensors(checkpoint: Checkpoint, shard: str, header: Header, count: int) -> None:
    held = header.tensors.names
    if checkpoint.index is not None and not len(held) == count == [*map(checkpoint.index.weight_map.get, held)].count(shard):
        named = {name for name, file in checkpoint.index.weight_map.items() if file == shard}
        missing, surplus = named.difference(held), set(held) - named
        difference = (
            f"the index says that it holds {glimpse(min(missing))}, it does not"
            if missing
            else f"the index does not say that it holds {glimpse(min(surplus))}, it does"
        )
        raise CorruptCheckpointError(f"corrupt shard {shard}: {difference}; index and shard belong to different saves")
    if checkpoint.record is None and SHARDING_KEY in header.metadata:
        refuse_lone_rank(checkpoint.path_of(shard), shard, checkpoint.folder, header)
    checkpoint.tensors.update(located(shard, header))
    checkpoint.quantised.update(torchao_entries(header.metadata))
    if checkpoint.index is None:
        checkpoint.file_metadata.update(header.metadata)
        checkpoint.lone_ties = ties_in_metadata(header.metadata, checkpoint.tensors)
        checkpoint.shape_notes = shape_notes([shard]) if SHARDING_KEY in header.metadata else ()


def _shards_to_open(index: Index, wanted: Callable[[str], bool] | None) -> dict[str, int]:
    """File → how many tensors it holds."""
    counts = dict.fromkeys(index.record.shards if index.record is not None else (), 0) | Counter(index.weight_map.values())
    if wanted is not None:
        needed = {shard for name, shard in index.weight_map.items() if wanted(name)}
        needed.update(index.weight_map[stored] for name, stored in index.ties.items() if wanted(name))
        return {shard: count for shard, count in counts.items() if shard in needed}
    return counts


def _changed(path: str, seen: FoundFiles) -> bool:
    """Whether the index at ``path`` is no longer the one in ``seen``."""
    try:
        return find(path).index_bytes != seen.index_bytes
    except CheckpointNotFoundError:
        return seen.index_bytes is not None
