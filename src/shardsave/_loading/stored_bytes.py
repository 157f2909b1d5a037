"""The bytes of single stored tensors, read without the engine: compared, or streamed in pieces of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from shardsave._common.os_calls import CallFailed, read_at
from shardsave._format.crc64 import crc64, finish, shift
from shardsave._format.dtypes import BY_NAME
from shardsave._loading.mapped import Maps
from shardsave._loading.read import damage_message
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.find import cannot_read
from shardsave._storage.located import Located
from shardsave.errors import CorruptCheckpointError

#: How many bytes of each side are compared at a time.
_COMPARED_BYTES = 1 << 20


def same_bytes(checkpoint: Checkpoint, left: Located, right: Located) -> bool:
    """Whether two stored tensors of one checkpoint have the same dtype, shape and bytes; if both have checksums, nothing is read."""
    if (left.dtype, left.shape) != (right.dtype, right.shape) or not (left.shard and right.shard):
        return False
    if left.checksum is not None and right.checksum is not None:
        return left.checksum == right.checksum
    if (left.shard, left.offset, left.chunks) == (right.shard, right.offset, right.chunks):
        return True
    if left.chunks or right.chunks:
        pieces = zip(stream(checkpoint, left, _COMPARED_BYTES), stream(checkpoint, right, _COMPARED_BYTES))
        return all(a == b for a, b in pieces)
    a, b = checkpoint.descriptors([left.shard, right.shard])
    try:
        for at in range(0, left.nbytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, left.nbytes - at)
            if read_at(a, size, left.offset + at) != read_at(b, size, right.offset + at):
                return False
    except CallFailed as error:
        raise cannot_read(checkpoint.path_of(left.shard), error) from error
    return True


def stream(checkpoint: Checkpoint, located: Located, elements: int) -> Iterator[bytes]:
    """The bytes of a stored tensor in pieces of ``elements`` elements; ``elements`` is even, because two F4 elements share a byte.

    After the last piece, raises CorruptCheckpointError if the checksum is wrong.
    """
    if located.chunks:
        yield from _assembled(checkpoint, located, elements * BY_NAME[located.dtype].bits // 8)
        return
    step, at, raw_sum = elements * BY_NAME[located.dtype].bits // 8, 0, 0
    while at < located.nbytes:
        size = min(step, located.nbytes - at)
        try:
            piece = read_at(checkpoint.descriptor(located.shard), size, located.offset + at)
        except CallFailed as error:
            raise cannot_read(checkpoint.path_of(located.shard), error) from error
        if len(piece) < size:
            raise CorruptCheckpointError(
                f"corrupt shard {located.shard}: tensor {located.name!r} was expected to have {located.nbytes} bytes, the file ends "
                f"after {at + len(piece)} of them; it was cut while it was compared"
            )
        at += size
        if located.checksum is not None:
            # `finish` is its own inverse: applied to a finished sum, it restores the raw sum, which is linear.
            raw_sum ^= shift(finish(crc64(piece), size), located.nbytes - at)
        yield piece
    checkpoint.release(located.shard)
    if located.checksum is not None and (computed := finish(raw_sum, located.nbytes)) != located.checksum:
        raise CorruptCheckpointError(damage_message(located, computed))


def _assembled(checkpoint: Checkpoint, located: Located, step: int) -> Iterator[bytes]:
    source = Maps(checkpoint, aligned=False).assembled(located)
    for at in range(0, located.nbytes, step):
        piece = bytearray(min(step, located.nbytes - at))
        source.gather(at, memoryview(piece))
        yield bytes(piece)
