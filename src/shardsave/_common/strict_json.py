"""JSON as safetensors' own reader takes it: stricter than Python's, and every refusal in words."""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any, NoReturn

#: The longest whole number that is read, in digits: what other readers, with a double for it, take too.
MAX_DIGITS = 308

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class NotJSON(Exception):
    """``data`` is not what was wanted; ``wanted`` and ``found`` are the two halves of a message."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(wanted, found)
        self.wanted = wanted
        self.found = found


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that ``data`` is. Keys stand once, numbers are finite, text is Unicode. Raises NotJSON."""
    try:
        text = data.decode()
        made = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_finite)
        if _SURROGATE.search(data):
            json.dumps(made, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise NotJSON("UTF-8 expected", f"byte {error.start} is {data[error.start]:#04x}") from error
    except UnicodeEncodeError as error:
        raise NotJSON("text in Unicode expected", f"it has half of a surrogate pair, {error.object[error.start]!r}") from error
    except RecursionError as error:
        raise NotJSON("JSON expected", "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise NotJSON("JSON expected", _broken(text, error)) from error
    if not isinstance(made, dict):
        raise NotJSON("a JSON object expected", f"it is {glimpse(made)}")
    return made


def _broken(text: str, error: json.JSONDecodeError) -> str:
    if text.startswith("\ufeff"):
        return "it begins with a byte order mark"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated string"):
        return "it is empty" if not text.strip() else f"it ends in the middle, after {len(text)} characters"
    if error.msg.startswith("Extra data"):
        return f"something follows it, at character {error.pos}"
    return f"it is broken at character {error.pos}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotJSON("keys expected once", f"{glimpse(twice)} stands twice")
    return made


def _constant(name: str) -> NoReturn:
    raise NotJSON("JSON expected", f"{name} is no JSON value")


def _integer(digits: str) -> float:
    if digits == "-0":
        return -0.0  # as serde_json reads it: no size and no offset
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
    """``value`` for a message: never long, whatever a file may hold."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _short.repr(value)
