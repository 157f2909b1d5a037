"""Boxes: what the header of a file says of tensors of which it has only a part, since several ranks had the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._format.dtypes import BY_NAME
from shardsave._format.header import Header
from shardsave.errors import CorruptCheckpointError

#: The feature that a document requires if files that it names have boxes, or if one of its values says how a tensor was distributed.
BOXES = "boxes"

#: The key of ``__metadata__`` whose value is JSON: stored name → the name of the tensor, its shape, and the index at which the box begins.
BOXES_KEY = "shardsave.boxes"


class StoredBox(NamedTuple):
    """Of which ``tensor``, with which whole ``shape``, a stored tensor is the box that begins at index ``begin``."""

    tensor: str
    shape: tuple[int, ...]
    begin: tuple[int, ...]


def encode_boxes(boxes: Mapping[str, StoredBox]) -> dict[str, str]:
    """The entries of ``__metadata__`` for a file with ``boxes``, by their stored names; none without boxes."""
    return {BOXES_KEY: json.dumps(boxes, ensure_ascii=False, separators=(",", ":"))} if boxes else {}


def parse_boxes(header: Header, where: str) -> dict[str, StoredBox]:
    """Stored name → box, of all tensors of a file that are boxes. Raises CorruptCheckpointError."""
    text = header.metadata.get(BOXES_KEY)
    if text is None:
        return {}
    try:
        listed = parse_object(text.encode())
    except (NotJSON, UnicodeEncodeError):
        _bad(where, "to be JSON", text)
    columns = zip(header.tensors.names, header.tensors.dtypes, header.tensors.shapes)
    stored = {name: (dtype, sizes) for name, dtype, sizes in columns}
    boxes = {}
    known: dict[Any, _Place] = {}
    for name, entry in listed.items():
        if name not in stored:
            _bad(where, "to name tensors of the file", name)
        dtype, sizes = stored[name]
        box = _box(entry, sizes, known)
        if box is None or BY_NAME[dtype].bits < 8:
            _bad(where, f"to say of which larger tensor {glimpse(name)}, {dtype} of shape {[*sizes]}, is a box", entry)
        boxes[name] = box
    return boxes


class _Place(NamedTuple):
    """Of a tensor with which whole ``shape`` something is the box that begins at ``begin``; whether that can be."""

    shape: tuple[int, ...]
    begin: tuple[int, ...]
    is_possible: bool


def _box(entry: Any, sizes: tuple[int, ...], known: dict[Any, _Place]) -> StoredBox | None:
    """What ``entry`` says of a stored tensor of ``sizes``; None if it cannot be a box of what ``entry`` says.

    ``known``: what was found of others, since many tensors have the same boxes.
    """
    if type(entry) is not list or len(entry) != 3:
        return None
    tensor, shape, begin = entry
    if not (type(tensor) is str and type(shape) is type(begin) is list and {*map(type, shape), *map(type, begin)} <= {int}):
        return None
    key = (*shape, None, *begin, None, *sizes)
    place = known.get(key)
    if place is None:
        place = known[key] = _Place(tuple(shape), tuple(begin), _is_possible(shape, begin, sizes))
    return StoredBox(tensor, place.shape, place.begin) if place.is_possible else None


def _is_possible(shape: list[int], begin: list[int], sizes: tuple[int, ...]) -> bool:
    if not len(shape) == len(begin) == len(sizes):
        return False
    if (
        math.prod(whole or 1 for whole in shape) >= 1 << 60
    ):  # torch computes the strides of an empty tensor as if its zeros were ones
        return False
    return all(0 <= at <= whole - size for at, size, whole in zip(begin, sizes, shape))


def _bad(where: str, wanted: str, found: object) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt {where}: header: {BOXES_KEY} expected {wanted}, it has {glimpse(found)}; nothing else was read from it"
    )
