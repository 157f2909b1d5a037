"""The global state: all ranks describe what they hold of a state, and each computes the same state of the whole job from it.

Digests of the descriptions go to rank 0 first. Where all are equal nothing else is needed; otherwise one rank of each kind sends its
description. What was joined is remembered, so that the next save of the same tensors sends digests alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardsave._common.assembled import Chunk
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._ranks.communicator import Communicator as Communicator
from shardsave._ranks.description import (
    Description,
    decoded_grids,
    describe,
    digest,
    encoded_grids,
    packed,
    unpacked,
)
from shardsave._ranks.joining import Global, Joining, View
from shardsave._state.module import Entry, State


class _Header(NamedTuple):
    """What each rank says first. ``known``: the key of the global state that it remembers."""

    digest: bytes
    known: bytes
    grids: bytes

    @classmethod
    def of(cls, data: bytes) -> _Header:
        return cls(data[:16], data[16:32], data[32:])


class Said(NamedTuple):
    """What one rank says of a state: its description, also as bytes, the digest of these, and its meshes."""

    description: Description
    encoded: bytes
    digest: bytes
    meshes: bytes

    @property
    def header(self) -> bytes:
        return self.digest + self.meshes


class _Survey(NamedTuple):
    """What rank 0 tells all of the headers. ``views``: the distinct ones, as (number of the description, meshes).

    ``which``: for each rank the number of its view. ``senders``: for each description, a rank that has it. ``key``: of all that.
    ``is_known``: whether all ranks remember the global state of this key.
    """

    views: Sequence[tuple[int, str]]
    which: Sequence[int]
    senders: Sequence[int]
    key: str
    is_known: bool


#: What a state is called → the key of the last global state of it that was joined, and that state; it holds no tensor.
_remembered: dict[str, tuple[str, Global]] = {}

_NOTHING = bytes(16)


#: What a state is called → what this rank said of it last.
_said: dict[str, Said] = {}


def say(state: State, what: str = "tensors") -> Said:
    """What this rank says of ``state``. ``what``: names the state; if the same was said of it last, it is not encoded again."""
    description, grids = describe(state)
    last = _said.get(what)  # read once: another thread may say something else meanwhile
    if last is not None and last.description == description:
        return last._replace(meshes=encoded_grids(grids))
    encoded = description.encoded()
    _said[what] = said = Said(description, encoded, digest(encoded), encoded_grids(grids))
    return said


def agree(
    session: Communicator, state: State, what: str = "tensors", said: Said | None = None, *, all_say_the_same: bool = False
) -> State:
    """``state`` of this rank as the state of all ranks: equal on all of them, each source a `Spread`.

    Entries have the order that one process would have; the natural order of their names if ranks have different ones. Raises
    UnsupportedTensorError on all ranks if what two ranks say of one tensor is contradictory. ``what``: names the state; what was agreed
    on last is remembered for each name. ``said``: what `say` returns, if that is known; if ``all_say_the_same``, nothing is exchanged.
    """
    remembered = _remembered.get(what)  # read once: another thread may agree on something else meanwhile
    said = say(state, what) if said is None else said
    description, meshes = said.description, said.meshes
    known = bytes.fromhex(remembered[0]) if remembered is not None else _NOTHING
    survey = _decoded(b"")
    if not all_say_the_same:
        headers = session.gather(what, said.digest + known + meshes)
        told = _survey(headers) if headers is not None else None
        survey = _decoded(session.publish(f"{what} of all ranks", _encoded(told) if told is not None else None))
    if len(survey.views) == 1:  # all say the same
        key = digest(said.digest + meshes + str(session.size).encode()).hex()
        survey = _Survey([(0, meshes.decode())], [0] * session.size, [], key, is_known=True)
    if not survey.is_known or remembered is None or remembered[0] != survey.key:
        remembered = _remembered[what] = survey.key, _joined(session, survey, description, said.encoded)
    return _applied(remembered[1], description, state)


def _survey(headers: Sequence[bytes]) -> _Survey:
    views: dict[tuple[bytes, bytes], int] = {}
    descriptions: dict[bytes, int] = {}
    senders: list[int] = []
    which = []
    read = [_Header.of(header) for header in headers]
    for rank, header in enumerate(read):
        if header.digest not in descriptions:
            descriptions[header.digest] = len(descriptions)
            senders.append(rank)
        which.append(views.setdefault((header.digest, header.grids), len(views)))
    key = digest(b"".join(header.digest + digest(header.grids) for header in read))
    is_known = all(header.known == key for header in read)
    numbered = [(descriptions[description], grids.decode()) for description, grids in views]
    return _Survey(numbered, which, senders, key.hex(), is_known)


def _encoded(survey: _Survey) -> bytes:
    if len(survey.views) == 1:
        return b""
    return zlib.compress(json.dumps(survey, separators=(",", ":")).encode(), 1)


def _decoded(data: bytes) -> _Survey:
    if not data:
        return _Survey([(0, "")], [], [], "", False)
    return _Survey(*json.loads(zlib.decompress(data)))


def _joined(session: Communicator, survey: _Survey, description: Description, encoded: bytes) -> Global:
    """The global state. ``description`` is that of this rank, ``encoded`` the same as bytes."""
    descriptions = [description]
    if len(survey.senders) > 1:
        sends = session.rank in survey.senders
        parts = session.gather("descriptions", packed(encoded) if sends else b"")
        mine = _framed([parts[rank] for rank in survey.senders]) if parts is not None else None
        descriptions = [unpacked(part) for part in _unframed(session.publish("descriptions of all ranks", mine))]
    ranks: list[list[int]] = [[] for _ in survey.views]
    for rank, number in enumerate(survey.which):
        ranks[number].append(rank)
    views = [View(number, decoded_grids(meshes.encode()), of_view) for (number, meshes), of_view in zip(survey.views, ranks)]
    return Joining(descriptions, views, session.size, session.name).join()


def _framed(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _unframed(data: bytes) -> list[bytes]:
    parts = []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        parts.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return parts


def _applied(joined: Global, description: Description, state: State) -> State:
    """The global state ``joined`` with what this rank holds of it in ``state``, of which ``description`` is."""
    files = {**joined.files, **state.files}
    entries = state.entries if _is_own(joined, description, state) else _entries(joined, state)
    return State(entries, joined.flags_known, joined.overlaps, files, joined.notes, joined.file_metadata)


def _is_own(joined: Global, description: Description, state: State) -> bool:
    """Whether all entries of ``state`` are those of the global state: nothing is tied, and all is placed as this rank says."""
    if joined.tied_to or joined.names != description.names:
        return False
    pairs = {pair: number for number, pair in enumerate(zip(description.forms, joined.forms))}
    for (_, form), number in pairs.items():
        source = state.entries[number].source
        if not isinstance(source, Spread) or source.layout != joined.table[form].layout:
            return False
    return True


def _entries(joined: Global, state: State) -> tuple[Entry, ...]:
    """The entries of ``joined``, with what this rank holds of them in ``state``."""
    own: Sequence[Entry | None] = state.entries
    by_name: dict[str, Entry] = {}
    if joined.tied_to or list(joined.names) != [entry.name for entry in state.entries]:
        by_name = {entry.name: entry for entry in state.entries}
        own = [by_name.get(name) for name in joined.names]
    tied = _tied_sources(joined.tied_to, by_name)
    equal: list[Any] = [None] * len(joined.table)  # for each form, a layout of this rank that equals the global one
    entries = []
    for name, number, entry in zip(joined.names, joined.forms, own):
        kind, frozen, dtype, layout = joined.table[number]
        if tied and (leader := joined.tied_to.get(name, name)) in tied:
            spread = Spread(dtype, layout, _chunks(tied[leader]))
            entries.append(Entry(name, kind, frozen, leader if leader != name else None, spread))
            continue
        source = entry.source if entry is not None else None
        if type(source) is Spread and entry is not None:
            if equal[number] is not source.layout and source.layout == layout:
                equal[number] = source.layout
            if equal[number] is source.layout:
                entries.append(entry)
                continue
        entries.append(Entry(name, kind, frozen, None, Spread(dtype, layout, _chunks(source))))
    return tuple(entries)


def _tied_sources(tied_to: Mapping[str, str], own: Mapping[str, Entry]) -> dict[str, Any]:
    """The first name of each group of tied tensors → the source that this rank has under one of their names, or None."""
    sources = {leader: own[leader].source if leader in own else None for leader in tied_to.values()}
    for name, leader in tied_to.items():
        if sources[leader] is None and name in own:
            sources[leader] = own[name].source
    return sources


def _chunks(source: Any) -> tuple[Chunk, ...]:
    if isinstance(source, Spread):
        return source.local
    if source is None or not source.nbytes:
        return ()
    assert type(source) is TensorSource
    return (Chunk((0,) * source.tensor.dim(), source.tensor),)
