"""What must be the same on all ranks: what each rank tells of it, and the words for what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr

from shardsave._common.words import count, some
from shardsave._printable import printable

#: A value of so many characters travels as it is; of a longer one, a digest.
_LONGEST = 80
#: So many different values are shown.
_MOST = 3

_DIGEST = "#"  # no JSON begins with it

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxdict = 4
_short.maxlevel = 3


def told(values: Mapping[str, object]) -> bytes:
    """What a rank tells of ``values``, which are JSON values, or digests as bytes, by the names that a message has for them."""
    return json.dumps({name: _token(value) for name, value in values.items()}).encode()


def difference(everywhere: Sequence[bytes], rank_name: Callable[[int], str]) -> str | None:
    """The first difference between what ranks have `told`, in words; None if there is none."""
    if len({*everywhere}) < 2:
        return None
    tokens: list[dict[str, str]] = [json.loads(one) for one in everywhere]
    for name in dict.fromkeys(name for of_rank in tokens for name in of_rank):
        ranks: dict[str | None, list[int]] = {}
        for rank, of_rank in enumerate(tokens):
            ranks.setdefault(of_rank.get(name), []).append(rank)
        if len(ranks) > 1:
            found = _found({token: some(map(rank_name, on)) for token, on in ranks.items()})
            return printable(f"the same {name} was expected on all ranks, {found}")
    return None


def shown(value: object) -> str:
    """``value`` for a message, always short."""
    return printable(_short.repr(value))


def _token(value: object) -> str:
    if isinstance(value, bytes):
        return _DIGEST + value.hex()
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else _DIGEST + hashlib.sha256(text.encode()).hexdigest()[:16]


def _found(ranks: Mapping[str | None, str]) -> str:
    """``ranks``: what was told, None for nothing → the names of the ranks that have told it."""
    (_, first), *others = ranks.items()
    if None not in ranks and any(token is not None and token.startswith(_DIGEST) for token in ranks):
        return f"{' and '.join(names for _, names in others[:_MOST])} {'have' if _is_plural(others) else 'has'} another than {first}"
    words = [f"{_words(token)} on {names}" for token, names in ranks.items()]
    more = [f"{count(len(words) - _MOST, 'more value')} on others"] if len(words) > _MOST else []
    return f"it is {', '.join([*words[:_MOST], *more])}"


def _is_plural(others: Sequence[tuple[object, str]]) -> bool:
    return len(others) > 1 or "," in others[0][1] or " and " in others[0][1]


def _words(token: str | None) -> str:
    if token is None:
        return "missing"
    return "there" if token.startswith(_DIGEST) else shown(json.loads(token))
