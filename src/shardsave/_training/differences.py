"""Which values of two stored training states differ, by their places. Both are as they stand in the documents; nothing is believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardsave._common.strict_json import glimpse

#: A value that one side does not have.
_ABSENT: Any = object()

#: Lists of more items are not shown.
_MOST_ITEMS = 4

#: The place of a value, and what is there on both sides.
_Pair = tuple[str, Any, Any]


def differing_values(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[str, ...]:
    """The places of the values that differ, such as ``training['optimizer'].state_dict()['param_groups'][0]['lr']``, in order.

    ``left``, ``right``: what `TrainingFiles.values` returns. A list without containers in it is one value, and so is what only one side
    has.
    """
    return tuple(place for place, _, _ in _differences(left, right))


def first_difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[str, str | None, str | None] | None:
    """The place of the first value that differs, and what is there on both sides, in words; None for the words of what is long.

    ``left``, ``right``: as in `differing_values`.
    """
    for place, a, b in _differences(left, right):
        return place, _words(a), _words(b)
    return None


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[_Pair]:
    waiting = [*reversed([*_outermost(left, right)])]
    while waiting:
        place, a, b = waiting.pop()
        inside = _inside(place, a, b)
        if inside is not None:
            waiting += reversed(inside)
        elif not _equal(a, b):
            yield place, a, b


def _words(value: Any) -> str | None:
    """A short ``value`` for a message; None for a long one, and for what is no plain data."""
    if value is _ABSENT:
        return "missing"
    try:
        plain = _plain(value)
    except (TypeError, ValueError):
        return None
    return repr(plain) if plain is None or isinstance(plain, bool) else glimpse(plain)


def _plain(value: Any, depth: int = 0) -> Any:
    """What ``value`` stands for, if that is a scalar or a short list or tuple of such. Raises TypeError, ValueError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) is not dict:
        raise TypeError
    ((tag, content),) = value.items()
    if tag == "float":
        return float(content)
    if tag == "scalar":
        return _plain(content[1])
    if tag in ("dtype", "device"):
        return content
    if tag in ("list", "tuple") and depth < 2 and len(content) <= _MOST_ITEMS:
        return (list if tag == "list" else tuple)(_plain(item, depth + 1) for item in content)
    raise TypeError


def _outermost(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[_Pair]:
    yield "the number of ranks", left["ranks"], right["ranks"]
    yield "training", left["shared"], right["shared"]
    ranks = [name for name in {**left, **right} if name not in ("ranks", "shared")]
    for rank in ranks:
        of_rank = f"{rank}, " if len(ranks) > 1 else ""
        a, b = left.get(rank, {}), right.get(rank, {})
        for key in {**a, **b}:
            yield f"{of_rank}{key}", a.get(key, _ABSENT), b.get(key, _ABSENT)


def _inside(place: str, a: Any, b: Any) -> list[_Pair] | None:
    """The values in ``a`` and ``b``; None if they are values themselves, or no containers of one kind."""
    if not (type(a) is type(b) is dict and len(a) == 1 and a.keys() == b.keys()):
        return None
    (tag,) = a
    a, b = a[tag], b[tag]
    if type(a) is not type(b):
        return None
    if tag == "dict" and type(a) is dict:
        return _by_key(place, a, b)
    if type(a) is list and len(a) == len(b):
        if tag in ("list", "tuple") and any(isinstance(item, dict) for item in (*a, *b)):
            return [(f"{place}[{at}]", x, y) for at, (x, y) in enumerate(zip(a, b))]
        if tag == "pairs" and _keys(a) is not None and _keys(a) == _keys(b):
            return [(f"{place}[{glimpse(key)}]", x, y) for (key, x), (_, y) in zip(a, b)]
    if tag in _INSIDE_LEAVES and type(a) is dict and a.keys() == b.keys():
        return _INSIDE_LEAVES[tag](place, a, b)
    return None


def _by_key(place: str, a: Any, b: Any) -> list[_Pair]:
    if not (type(a) is type(b) is dict):
        return [(place, a, b)]
    return [(f"{place}[{glimpse(key)}]", a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in {**a, **b}]


def _keys(pairs: list[Any]) -> list[Any] | None:
    """The keys of what follows the tag ``pairs``; None if it has another form."""
    well_formed = all(type(pair) is list and len(pair) == 2 for pair in pairs)
    return [key for key, _ in pairs] if well_formed else None


def _of_object(place: str, a: dict[str, Any], b: dict[str, Any]) -> list[_Pair]:
    return [_class(place, a, b), (f"{place}.state_dict()", a.get("state"), b.get("state"))]


def _of_module(place: str, a: dict[str, Any], b: dict[str, Any]) -> list[_Pair]:
    members = [_by_key(f"{place}.state_dict()", a.get(member), b.get(member)) for member in ("tensors", "others")]
    return [_class(place, a, b), *members[0], *members[1]]


def _of_optimizer(place: str, a: dict[str, Any], b: dict[str, Any]) -> list[_Pair]:
    state = f"{place}.state_dict()"
    pairs = [_class(place, a, b)]
    groups, others = a.get("groups"), b.get("groups")
    if not (type(groups) is type(others) is list and len(groups) == len(others)):
        pairs.append((f"{state}['param_groups']", groups, others))
    else:
        for at, (group, other) in enumerate(zip(groups, others)):
            pairs += _of_group(f"{state}['param_groups'][{at}]", group, other)
    for name, values, other_values in _by_key(f"{state}['state']", a.get("state"), b.get("state")):
        pairs += _by_key(name, values, other_values)
    return [*pairs, (state, a.get("rest"), b.get("rest"))]


def _of_group(place: str, a: Any, b: Any) -> list[_Pair]:
    if not (type(a) is type(b) is dict):
        return [(place, a, b)]
    of_a, of_b = ([group.get(member) for member in ("names", "shapes")] for group in (a, b))
    return [(f"{place}['params']", of_a, of_b), (place, a.get("options"), b.get("options"))]


def _class(place: str, a: dict[str, Any], b: dict[str, Any]) -> _Pair:
    return f"the class of {place}", a.get("class"), b.get("class")


#: The tag of a leaf → the values in what follows it.
_INSIDE_LEAVES = {"object": _of_object, "generator": _of_object, "module": _of_module, "optimizer": _of_optimizer}


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except RecursionError:  # nested far deeper than any document that a save writes
        return False
