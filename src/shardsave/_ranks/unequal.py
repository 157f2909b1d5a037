"""What must be the same on all ranks: what each rank tells of it, and the words for what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr
from typing import NamedTuple

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


class Difference(NamedTuple):
    """``ranks``: what was told of ``name``, None for nothing → the ranks that have told it."""

    name: str
    ranks: Mapping[str | None, Sequence[int]]

    def words(self, rank_name: Callable[[int], str]) -> str:
        found = _found({token: some(map(rank_name, ranks)) for token, ranks in self.ranks.items()})
        return printable(f"the same {self.name} was expected on all ranks, {found}")


def first_difference(everywhere: Sequence[bytes]) -> Difference | None:
    """The first difference between what ranks have `told`; None if there is none."""
    if len({*everywhere}) < 2:
        return None
    tokens: list[dict[str, str]] = [json.loads(one) for one in everywhere]
    for name in dict.fromkeys(name for of_rank in tokens for name in of_rank):
        ranks: dict[str | None, list[int]] = {}
        for rank, of_rank in enumerate(tokens):
            ranks.setdefault(of_rank.get(name), []).append(rank)
        if len(ranks) > 1:
            return Difference(name, ranks)
    return None


def difference(everywhere: Sequence[bytes], rank_name: Callable[[int], str]) -> str | None:
    """`first_difference` in words."""
    found = first_difference(everywhere)
    return None if found is None else found.words(rank_name)


def different_tensors(kinds: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """Which tensors differ, and how, in words; None if they are the same. ``kinds``: the names of ranks, and what they have, by name."""
    names = dict.fromkeys(name for _, tensors in kinds for name in tensors)
    different = [name for name in names if len({tensors.get(name) for _, tensors in kinds}) > 1]
    if not different:
        return None

    def words(name: str) -> str:
        ranks: dict[str, list[str]] = {}
        for of_ranks, tensors in kinds:
            ranks.setdefault(tensors.get(name, "missing"), []).append(of_ranks)
        return f"{shown(name)} is {', '.join(f'{what} on {some(on)}' for what, on in ranks.items())}"

    more = len(different) - _MOST
    rest = f"; {count(more, 'more tensor')} {'differs' if more == 1 else 'differ'}" if more > 0 else ""
    return printable("; ".join(map(words, different[:_MOST])) + rest)


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
