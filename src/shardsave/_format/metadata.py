"""Checks the user's metadata: only JSON values that a load returns unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from shardsave._common.strict_json import MAX_DIGITS, NotJSON, glimpse, parse_object
from shardsave._common.words import an

#: How deep metadata may be nested: far less than the stack of any JSON reader allows.
_LEVELS = 64


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the metadata as a load will return it: tuples become lists. Raises TypeError."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, not {type(metadata).__name__}")
    plain = dict(metadata)
    _check_value(plain, "metadata", _LEVELS)
    try:
        return parse_object(json.dumps(plain, allow_nan=False, ensure_ascii=False).encode())
    except NotJSON as error:
        raise TypeError(f"metadata must be JSON values that can be read back: {error.wanted}, {error.found}") from error


def _check_value(value: object, place: str, levels: int) -> None:
    """Refuses values that JSON does not have or that readers would change; ``place`` is, for example, ``metadata['run'][0]``."""

    def refuse(found: str) -> NoReturn:
        raise TypeError(f"metadata must be JSON values that can be read back: {place} {found}")

    if levels == 0:
        raise TypeError(
            f"metadata must be nested at most {_LEVELS} levels deep, since deeper JSON cannot be read back: "
            f"{place if len(place) <= 80 else place[:80] + '…'} is deeper"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                refuse(f"has the key {glimpse(key)}, which is no string")
            _check_value(key, f"the key {glimpse(key)} of {place}", levels)
            _check_value(inner, f"{place}[{glimpse(key)}]", levels - 1)
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            _check_value(inner, f"{place}[{at}]", levels - 1)
    elif isinstance(value, str):
        if not _encodes(value):
            refuse("has half of a surrogate pair")
    elif isinstance(value, float):
        if not math.isfinite(value):
            refuse(f"is {value}")
    elif isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            refuse(f"has more than {MAX_DIGITS} digits")
    elif value is not None:
        refuse(f"is {an(type(value).__name__)}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
