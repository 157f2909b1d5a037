"""Joins what DCP has each rank save: every rank learns what all of them have, so that all plan the same files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from shardsave._common.assembled import Chunk
from shardsave._common.coverage import covered_once
from shardsave._common.layouts import Listed
from shardsave._common.spread import Spread
from shardsave._format.dtypes import BY_NAME, BY_TORCH
from shardsave._state.module import Entry, State
from shardsave.errors import UnsupportedTensorError
from shardsave.integrations._dcp_document import Document
from shardsave.integrations._dcp_names import Rule, name_of
from shardsave.integrations._dcp_plan import Arranged, Held, Weight


class Session(Protocol):
    """What this needs of a session of several ranks."""

    @property
    def rank(self) -> int: ...

    def name(self, rank: int) -> str: ...

    def gather(self, what: str, mine: bytes) -> list[bytes] | None: ...

    def publish(self, what: str, value: bytes | None = None) -> bytes: ...


class Joined(NamedTuple):
    """What all ranks save together. `State` and entries have sources with what this rank holds."""

    state: State
    others: tuple[Entry, ...]
    document: Document


def join(session: Session, part: Arranged, rule: Rule | None, order: Mapping[str, int]) -> Joined:
    """Joins the ``part`` of each rank. ``rule``: how weights are called; None if this rank has none. ``order``: DCP's name → its place in
    the state dict, which counts on rank 0.

    Raises UnsupportedTensorError on all ranks if ranks contradict each other, or if elements are missing.
    """
    parts = session.gather("tensors of a state dict", _packed(_description(part, rule)))
    joining = _Joining(session, order) if parts is not None else None
    for rank, data in enumerate(parts or ()):
        assert joining is not None
        joining.add(rank, _unpacked(data))
    told = session.publish("tensors of all ranks", _packed(joining.result()) if joining is not None else None)
    return _applied(_unpacked(told), part)


def _description(part: Arranged, rule: Rule | None) -> dict[str, Any]:
    """``part`` as JSON, without its elements."""
    document = part.document
    return {
        "weights": {
            name: _tensor(weight.held, weight.tied_to, weight.kind, weight.frozen) for name, weight in part.weights.items()
        },
        "others": {name: _tensor(held) for name, held in part.others.items()},
        "rule": [*rule] if rule is not None else None,
        "paths": [*document.paths.items()],
        "values": [*document.values.items()],
        "streams": [*document.streams],
        "flags_known": part.flags_known,
        "overlaps": [*part.overlaps],
    }


def _tensor(held: Held, tied_to: str | None = None, *flag: Any) -> list[Any]:
    """What must be equal on all ranks, the tie, and the boxes of this rank."""
    boxes = [[chunk.begin, [*chunk.tensor.shape]] for chunk in held.chunks if chunk.tensor.numel()]
    return [[BY_TORCH[held.dtype].name, held.shape, *flag], tied_to, boxes]


class _Joining:
    """What rank 0 knows of all ranks."""

    def __init__(self, session: Session, order: Mapping[str, int]) -> None:
        self._session = session
        self._order = order
        self._tensors: dict[str, dict[str, Any]] = {"weights": {}, "others": {}}
        self._first: dict[str, int] = {}  # the first rank that has a tensor
        self._rule: tuple[int, list[Any]] | None = None
        self._rest: dict[str, list[Any]] = {"paths": [], "values": [], "streams": [], "overlaps": []}
        self._flags_known = False

    def add(self, rank: int, description: dict[str, Any]) -> None:
        """Raises UnsupportedTensorError if ``rank`` contradicts a rank before it."""
        if (rule := description["rule"]) is not None:
            if self._rule is not None and self._rule[1] != rule:
                told = [json.dumps(self._rule[1]), json.dumps(rule)]
                self._refuse("the state dict", "one place of the model's tensors", self._rule[0], told[0], rank, told[1])
            self._rule = self._rule or (rank, rule)
        for kind, known in self._tensors.items():
            for name, (equal, tied_to, boxes) in description[kind].items():
                first = self._first.setdefault(f"{kind}/{name}", rank)
                told = known.setdefault(name, [equal, None, {}])
                if told[0] != equal:
                    self._refuse(repr(name), "one dtype, shape and flag", first, str(told[0]), rank, str(equal))
                told[1] = told[1] or tied_to  # a tie that one rank sees is one
                told[2][rank] = boxes
        for kind, listed in self._rest.items():
            listed += description[kind]
        self._flags_known |= description["flags_known"]

    def result(self) -> dict[str, Any]:
        """What all ranks save, for all of them. Raises UnsupportedTensorError if no rank has some elements, or two have the same ones."""
        rule: list[Any] = self._rule[1] if self._rule is not None else [*Rule()]
        paths = {name: tuple(path) for name, path in self._rest["paths"]}
        document = Document(Rule(tuple(rule[0]), rule[1]), paths, {})
        weights, others = self._tensors.values()
        for name, ((_, shape, *_), _, boxes) in (*weights.items(), *others.items()):
            if not covered_once(shape, [box for listed in boxes.values() for box in listed]):
                held = ", ".join(f"{self._session.name(rank)} {listed}" for rank, listed in boxes.items())
                raise UnsupportedTensorError(
                    f"cannot save {name!r}: each element of its shape {shape} was expected once in DCP's plans, they have {held} "
                    f"(begin and sizes of boxes); nothing was written"
                )
        return {
            **self._rest,
            "weights": self._sorted(weights, lambda name: name_of(document.path(name))),
            "others": self._sorted(others, lambda name: name.partition("/")[2]),
            "values": self._sorted({tuple(path): value for path, value in self._rest["values"]}, name_of),
            "rule": rule,
            "flags_known": self._flags_known,
        }

    def _sorted(self, items: dict[Any, Any], called: Any) -> list[Any]:
        """Pairs in the order of the state dict of rank 0; what it does not have comes last."""
        last = len(self._order)
        return sorted(items.items(), key=lambda item: self._order.get(called(item[0]), last))

    def _refuse(self, what: str, wanted: str, rank: int, one: str, other: int, another: str) -> NoReturn:
        raise UnsupportedTensorError(
            f"cannot save {what}: {wanted} was expected on all ranks, {self._session.name(rank)} has {one}, "
            f"{self._session.name(other)} has {another}; nothing was written"
        )


def _applied(told: dict[str, Any], part: Arranged) -> Joined:
    weights = dict(told["weights"])
    entries = []
    for name, ((dtype, shape, kind, frozen), tied_to, boxes) in weights.items():
        source = _spread(dtype, shape, boxes, _chunks(part.weights.get(name)))
        if tied_to is not None and (tied_to not in weights or weights[tied_to][0][:2] != [dtype, shape]):
            tied_to = None
        entries.append(Entry(name, kind, frozen, tied_to, source))
    others = [
        Entry(name, "tensor", None, None, _spread(dtype, shape, boxes, _chunks(part.others.get(name))))
        for name, ((dtype, shape), _, boxes) in told["others"]
    ]
    under, prefix = told["rule"]
    document = Document(
        Rule(tuple(under), prefix),
        {name: tuple(path) for name, path in told["paths"]},
        {tuple(path): value for path, value in told["values"]},
        [tuple(path) for path in told["streams"]],
    )
    overlaps = tuple((one, other) for one, other in told["overlaps"])
    return Joined(State(tuple(entries), told["flags_known"], overlaps), tuple(others), document)


def _chunks(of: Weight | Held | None) -> Iterable[Chunk]:
    held = of.held if isinstance(of, Weight) else of
    return [chunk._replace(tensor=chunk.tensor.detach()) for chunk in held.chunks if chunk.tensor.numel()] if held else ()


def _spread(dtype: str, shape: Sequence[int], boxes: Mapping[str, Sequence[Any]], chunks: Iterable[Chunk]) -> Spread:
    by_rank = {int(rank): [(tuple(begin), tuple(sizes)) for begin, sizes in listed] for rank, listed in boxes.items()}
    return Spread(BY_NAME[dtype].torch, Listed(by_rank, shape), [*chunks])


def _packed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, separators=(",", ":"), check_circular=False).encode(), 1)


def _unpacked(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))
