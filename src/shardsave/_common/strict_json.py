"""Parses JSON as strictly as safetensors' own reader; every refusal says what was expected and what was found."""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any, NoReturn, Union

Buffer = Union[bytes, memoryview]

#: The longest whole number that is read, in digits. Other readers store numbers as doubles, and a longer one would be infinite.
MAX_DIGITS = 308

#: The most memory that one document may take as text and as Python objects, in bytes, by the estimate of `check_memory`.
MAX_DOCUMENT_MEMORY = 800_000_000

#: Upper bounds of the memory that CPython (64 bits) takes for what begins with each character, or follows it, in bytes: an object; an
#: array, with room for four values; half a string, without its text; a key, in its object and while that is read; a number, in its array.
_VALUE_COSTS = {b"{": 112, b"[": 100, b'"': 32, b":": 130, b",": 48}

#: No JSON takes more memory for each of its bytes (arrays in arrays take 50), so shorter documents are not counted.
_LARGEST_COST = 64

_FOUR_BYTES = re.compile(rb"[\xf0-\xf4]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

#: Matches one escape, or the two of a surrogate pair; the group is half of a pair alone.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|u([dD][89a-fA-F]..)|.)", re.DOTALL)
_NOT_SPACE = re.compile(r"\S")


class NotJSON(Exception):
    """The bytes are not the JSON that was expected; ``wanted`` and ``found`` are the two halves of a message."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(wanted, found)
        self.wanted = wanted
        self.found = found


def is_counted(data: Buffer) -> bool:
    """Whether ``data`` is so long that its memory has to be counted."""
    return len(data) * _LARGEST_COST > MAX_DOCUMENT_MEMORY


def is_wide(data: Buffer) -> bool:
    """Whether ``data`` has a character because of which each character of the text takes four bytes of memory."""
    return _FOUR_BYTES.search(data) is not None


def check_memory(data: Buffer) -> None:
    """Raises NotJSON if ``data`` could take more than `MAX_DOCUMENT_MEMORY` once it is parsed.

    Many small values take up to 50 times the memory of their text; what a saver writes takes 4 to 7 times. Nothing is parsed:
    characters are counted, also those within strings.
    """
    if not is_counted(data):
        return
    data = bytes(data)
    # Where each character takes four bytes, the strings that are made of the text can be as long as the text itself.
    width = 1 if data.isascii() else 8 if is_wide(data) else 2
    most = len(data) * width + sum(cost * data.count(character) for character, cost in _VALUE_COSTS.items())
    if most > MAX_DOCUMENT_MEMORY:
        raise NotJSON(f"JSON that takes at most {MAX_DOCUMENT_MEMORY} bytes of memory expected", f"it may take {most}")


def parse_object(data: Buffer) -> dict[str, Any]:
    """Parses ``data``, a JSON object with unique keys, finite numbers and Unicode text. Raises NotJSON."""
    check_memory(data)
    try:
        text = str(data, "utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_finite)
        if _SURROGATE.search(data):
            _refuse_half_pairs(data)
    except UnicodeDecodeError as error:
        raise NotJSON("UTF-8 expected", f"byte {error.start} is {data[error.start]:#04x}") from error
    except RecursionError as error:
        raise NotJSON("JSON expected", "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise NotJSON("JSON expected", _syntax_error(text, error)) from error
    if not isinstance(value, dict):
        raise NotJSON("a JSON object expected", f"it is {glimpse(value)}")
    return value


def _refuse_half_pairs(data: Buffer) -> None:
    for escape in _ESCAPE.finditer(data):
        if escape[1] is not None:
            raise NotJSON("text in Unicode expected", f"it has half of a surrogate pair, {chr(int(escape[1], 16))!r}")


def _syntax_error(text: str, error: json.JSONDecodeError) -> str:
    if text.startswith("\ufeff"):
        return "it begins with a byte order mark"
    if not _NOT_SPACE.search(text, error.pos) or error.msg.startswith("Unterminated string"):
        return "it is empty" if not _NOT_SPACE.search(text) else f"it ends in the middle, after {len(text)} characters"
    if error.msg.startswith("Extra data"):
        return f"something follows it, at character {error.pos}"
    return f"it is broken at character {error.pos}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotJSON("keys expected once", f"{glimpse(repeated)} appears twice")
    return mapping


def _constant(name: str) -> NoReturn:
    raise NotJSON("JSON expected", f"{name} is no JSON value")


def _integer(digits: str) -> float:
    if digits == "-0":
        return -0.0  # as serde_json reads it; a float, so it is refused as a size or an offset
    length = len(digits.lstrip("-"))
    if length > MAX_DIGITS:
        raise NotJSON(f"numbers of at most {MAX_DIGITS} digits expected", f"one has {length}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise NotJSON("finite numbers expected", f"there is {digits if len(digits) <= 40 else digits[:40] + '…'}")
    return number


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlist = _short.maxdict = 4
_short.maxlevel = 3


def glimpse(value: object) -> str:
    """``value`` for a message, always short, whatever the file holds."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _short.repr(value)
