"""Which tensor is stored in which shard, and at which offset: arithmetic only, no I/O.

Everything here is a pure function of the stored tensors: every process that has the same tensors plans the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from json.encoder import encode_basestring
from typing import NamedTuple

from shardsave._format.dtypes import item_bytes

#: The data of a file begins at a multiple of this, in bytes, and blocks are cut at multiples of it: no file system asks for more
#: with O_DIRECT (open(2), statx(2)).
ALIGNMENT = 4096

#: The longest header of a shard, in bytes: huggingface_hub reads no longer ones, although safetensors reads four times as much.
MAX_SHARD_HEADER_BYTES = 25_000_000

#: The most bytes in a header for a tensor besides its name and sizes: punctuation, the longest dtype, two offsets, a checksum.
_ENTRY_BYTES = len('"":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]},') + 2 * 19 + 16

#: The most bytes for one size of a shape, and for what a header has besides its tensors: length, metadata, padding.
_SIZE_BYTES, _REST_BYTES = 20, 8 + 200 + ALIGNMENT


class StoredTensor(NamedTuple):
    """A tensor in a file: ``dtype`` and ``shape`` as in the header; ``frozen`` and trainable tensors are packed apart."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    frozen: bool = False


class Shard(NamedTuple):
    """The tensors of one file in file order; ``begins``: where each begins, in bytes from the start of the data."""

    tensors: tuple[StoredTensor, ...]
    begins: tuple[int, ...]
    data_bytes: int


def pack(tensors: Sequence[StoredTensor], max_shard_size: int | None, kept: Sequence[Shard] = ()) -> tuple[Shard, ...]:
    """Distributes ``tensors`` over shards of at most ``max_shard_size`` bytes of data; frozen and trainable tensors are packed apart.

    A shard's header has at most `MAX_SHARD_HEADER_BYTES`, too. None: there is one shard for all, whatever its size.

    Greedy, in the order of ``tensors``; a tensor larger than the bound has a shard of its own. Between two repeated layers
    (``layers.3.`` and ``layers.4.``) a shard ends early if it is at least three quarters full: a layer stays in one file if that
    costs only a little room. Without tensors there is one empty shard.

    ``kept``: shards of an earlier checkpoint, which stay as they are whatever the flags of their tensors are now. They come first, in
    their order, and only the tensors that they do not hold are packed. So what one tensor changes is its own shard, and no other.
    """
    if kept:
        held = {tensor.name for shard in kept for tensor in shard.tensors}
        rest = [tensor for tensor in tensors if tensor.name not in held]
        return (*kept, *(pack(rest, max_shard_size) if rest else ()))
    if max_shard_size is None:
        return (_lay_out(tensors),)
    groups: list[list[StoredTensor]] = []
    for frozen in (True, False):
        alike = [tensor for tensor in tensors if tensor.frozen == frozen]
        if alike:
            groups.extend(_greedy(alike, max_shard_size))
    if _header_bound(tensors) > MAX_SHARD_HEADER_BYTES:
        groups = [part for group in groups for part in _with_short_headers(group)]
    return tuple(_lay_out(group) for group in groups) or (_lay_out([]),)


def _greedy(tensors: Iterable[StoredTensor], bound: int) -> list[list[StoredTensor]]:
    groups: list[list[StoredTensor]] = []
    current: list[StoredTensor] = []
    room, quarter = bound, bound // 4
    for tensor in tensors:
        nearly_full = room <= quarter and bool(current)
        at_boundary = nearly_full and _repeated_layer(tensor.name) != _repeated_layer(current[-1].name)
        if current and (tensor.nbytes > room or at_boundary):
            groups.append(current)
            current, room = [], bound
        current.append(tensor)
        room -= tensor.nbytes
    if current:
        groups.append(current)
    return groups


def _with_short_headers(group: list[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Cuts a group of tensors where their header would become too long. Only a model of very many tensors has such a group."""
    begin, length = 0, _REST_BYTES
    for at, tensor in enumerate(group):
        needed = _header_bound([tensor]) - _REST_BYTES
        if at > begin and length + needed > MAX_SHARD_HEADER_BYTES:
            yield group[begin:at]
            begin, length = at, _REST_BYTES
        length += needed
    yield group[begin:]


def _header_bound(tensors: Sequence[StoredTensor]) -> int:
    """A number of bytes that the header of ``tensors`` does not exceed."""
    names = "".join([tensor.name for tensor in tensors])
    simple = names.isascii() and names.isprintable() and '"' not in names and "\\" not in names
    name_bytes = len(names) if simple else len(encode_basestring(names).encode(errors="surrogatepass"))
    sizes = sum([len(tensor.shape) for tensor in tensors])
    return _REST_BYTES + len(tensors) * _ENTRY_BYTES + name_bytes + sizes * _SIZE_BYTES


def _repeated_layer(name: str) -> str | None:
    """``layers.3.mlp.weight`` → ``layers.3``: the name up to its first number; None without a number."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: depth + 1])
    return None


def _lay_out(tensors: Sequence[StoredTensor]) -> Shard:
    align = {dtype: -item_bytes(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    ordered = tensors
    if len(set(align.values())) > 1:  # the order is stable: tensors of one alignment stay in state order
        ordered = sorted(tensors, key=lambda tensor: align[tensor.dtype])
    *begins, end = accumulate((tensor.nbytes for tensor in ordered), initial=0)
    return Shard(tuple(ordered), tuple(begins), end)
