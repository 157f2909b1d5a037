"""Puts together the tensors of a training state that several ranks stored in boxes, each rank its own in files of its own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import NoReturn

from shardsave._common.coverage import covered_once
from shardsave._common.strict_json import glimpse
from shardsave._common.words import count
from shardsave._format.boxes import StoredBox
from shardsave._format.dtypes import BY_NAME
from shardsave._storage.located import Located, StoredChunk
from shardsave.errors import CorruptCheckpointError


def assemble(folder: str, stored: Mapping[str, Located], boxes: Mapping[str, StoredBox]) -> dict[str, Located]:
    """The tensors that ``stored`` make up, by name: those that are no ``boxes``, and those of which these are the boxes.

    Raises CorruptCheckpointError unless the boxes cover each element of their tensor once.
    """
    tensors = {name: located for name, located in stored.items() if name not in boxes}
    chunks: defaultdict[str, list[tuple[StoredChunk, tuple[int, ...]]]] = defaultdict(list)
    for name, box in boxes.items():
        chunks[box.tensor].append((StoredChunk(box.begin, stored[name]), box.shape))
    covered: set[Hashable] = set()  # many tensors have the same boxes
    for tensor, parts in chunks.items():
        first, shape = parts[0][0].located, parts[0][1]
        if tensor in stored:
            _bad(folder, tensor, "to have a name that no stored tensor has", f"{stored[tensor].shard} has one")
        if (other := next((c for c, whole in parts if c.located.dtype != first.dtype or whole != shape), None)) is not None:
            _bad(folder, tensor, f"to be {first.dtype} of shape {[*shape]}", f"{other.located.shard} says something else")
        extents = tuple((begin, located.shape) for (begin, located), _ in parts)
        nbytes = math.prod(shape) * BY_NAME[first.dtype].bits // 8
        # A tensor never has more bytes than its boxes, so a huge shape cannot make a reader allocate memory.
        is_covered = nbytes == sum(chunk.located.nbytes for chunk, _ in parts)
        if is_covered and (shape, extents) not in covered:
            covered.add((shape, extents))
            is_covered = covered_once(shape, extents)
        if not is_covered:
            _bad(folder, tensor, f"of shape {[*shape]} to be covered once", f"its {count(len(parts), 'part')} do not do that")
        filled = tuple(chunk for chunk, _ in parts if chunk.located.nbytes) or (parts[0][0],)
        tensors[tensor] = Located(tensor, first.dtype, shape, nbytes, filled[0].located.shard, -1, None, filled)
    return tensors


def _bad(folder: str, name: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt training state in {folder}: tensor {glimpse(name)} expected {wanted}, {found}; files of several saves lie together, or "
        f"they were changed"
    )
