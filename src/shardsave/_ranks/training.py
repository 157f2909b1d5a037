"""The training state of several ranks: all must say the same of what they share, and each plans the files that it writes itself.

Nothing is exchanged but digests and the lengths of files: each distinct box of a tensor is written by the lowest rank that holds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from shardsave._common.coverage import covered_once
from shardsave._common.layouts import Extent, Layout, Placed, Whole
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._common.words import count, some
from shardsave._format.boxes import BOXES, StoredBox
from shardsave._format.index import ShardRecord
from shardsave._format.training_state import TrainingIndex, encode_training_index
from shardsave._ranks.agree import Communicator, Said, agree
from shardsave._ranks.replicas import ReplicaSums, sum_replicas
from shardsave._saving.contents import OtherFile, PlannedDirectory
from shardsave._saving.training_directory import DescribedTraining, plan_training_directory
from shardsave._state.module import Entry, State
from shardsave._training.differences import first_difference
from shardsave.errors import UnsupportedTensorError, UnsupportedTrainingError

#: What the tensors of a training state are called, among ranks.
TRAINING = "tensors of the training state"


class OwnTraining(NamedTuple):
    """The directory of the training state, with the files of this rank. ``needs_boxes``: whether tensors are cut into boxes.

    ``sums``: of what other ranks have too, as it was when this was planned.
    """

    shared: bytes
    directory: PlannedDirectory
    needs_boxes: bool
    sums: ReplicaSums


def state_of(training: DescribedTraining) -> State:
    """The tensors that the ranks share."""
    return State(tuple(training.shared_entries), flags_known=False, overlaps=())


def plan_training(
    session: Communicator,
    training: DescribedTraining | None,
    max_shard_size: int,
    said: Said | None = None,
    *,
    all_say_the_same: bool = False,
) -> OwnTraining | None:
    """What this rank has of the training state; None if there is none. ``said``: of `state_of`.

    ``all_say_the_same``: it is known that all ranks have one, and describe what they share alike. Raises UnsupportedTrainingError on all
    ranks if they do not.
    """
    if not all_say_the_same and not _has_training(session, training):
        return None
    if training is None:
        return None
    if not all_say_the_same:
        _check_shared(session, training.shared)
    state = agree(session, state_of(training), TRAINING, said, all_say_the_same=all_say_the_same)
    sums = sum_replicas(state.entries, session.rank)
    entries, boxes = _written_here(state.entries, session.rank)
    directory = plan_training_directory(
        training.shared,
        {session.rank: training.leaves} if training.leaves is not None else {},
        {session.rank: [*entries, *training.own_entries]},
        max_shard_size,
        ranks=session.size,
        boxes=boxes,
    )
    return OwnTraining(training.shared, directory, bool(boxes) or training.has_distributed, sums)


def with_other_files(session: Communicator, training: OwnTraining, directory: PlannedDirectory) -> PlannedDirectory:
    """``directory``, which is that of ``training``, with the files of all ranks."""
    files = {name: (len(document), 0) for name, document in directory.documents.items()}
    files.update((name, (shard.reserved_bytes, shard.layout.data_bytes)) for name, shard in directory.shards.items())
    mine = json.dumps([training.needs_boxes, files]).encode()
    every = [json.loads(one) for one in session.exchange("files of ranks", mine)]
    others = {
        name: OtherFile(*lengths)
        for rank, (_, of_rank) in enumerate(every)
        if rank != session.rank
        for name, lengths in of_rank.items()
    }
    requires = (BOXES,) if any(needs for needs, _ in every) else ()

    def index(records: Mapping[str, ShardRecord]) -> bytes:
        in_order = {name: records[name] for name in sorted(records)}
        return encode_training_index(training.shared, TrainingIndex(session.size, in_order, requires))

    return replace(directory, others=others, index=index)


def _has_training(session: Communicator, training: DescribedTraining | None) -> bool:
    """Whether the ranks save a training state. Raises ValueError if only some of them do."""
    having = [bool(one) for one in session.exchange("training", b"" if training is None else b"1")]
    if any(having) and not all(having):
        lacking = [session.name(rank) for rank, has_one in enumerate(having) if not has_one]
        words = f"{some(lacking)} {'has' if len(lacking) == 1 else 'have'} none"
        _raise_on_first(session, ValueError(f"training= or rng=True was expected on all ranks, {words}; nothing was written"))
    return all(having)


def _check_shared(session: Communicator, shared: bytes) -> None:
    """Raises UnsupportedTrainingError on all ranks if ``shared`` is not the same everywhere; it names the first place that differs."""
    if len(set(session.exchange("shared values", hashlib.sha256(shared).digest()))) == 1:
        return
    first, own = (
        {"ranks": session.size, "shared": json.loads(document)}
        for document in (session.publish("values of the first rank", shared if session.rank == 0 else None), shared)
    )
    everywhere = [
        json.loads(one) for one in session.exchange("places that differ", json.dumps(first_difference(first, own)).encode())
    ]
    if not any(everywhere):  # only the order of keys differs
        return
    _raise_on_first(session, UnsupportedTrainingError(_difference(session, everywhere)))


def _difference(session: Communicator, everywhere: Sequence[Sequence[str | None] | None]) -> str:
    """The message for `first_difference` between rank 0 and each rank."""
    place, first, _ = next(found for found in everywhere if found is not None)
    there = {rank: found[2] for rank, found in enumerate(everywhere) if found is not None and found[0] == place}
    others = sum(1 for found in everywhere if found is not None and found[0] != place)
    more = f"; {count(others, 'more rank')} {'differs' if others == 1 else 'differ'} elsewhere" if others else ""
    differs = f"it differs between {session.name(0)} and {some(map(session.name, there))}"
    if first is not None and None not in there.values():
        on = {words: some(session.name(rank) for rank in there if there[rank] == words) for words in there.values()}
        differs = f"it is {first} on {session.name(0)}, {some(f'{words} on {ranks}' for words, ranks in on.items())}"
    return (
        f"cannot save {place}: the same on all ranks was expected, {differs}{more}; what each rank has for itself is marked by "
        f"shardsave.PerRank; nothing was written"
    )


def _raise_on_first(session: Communicator, error: Exception) -> NoReturn:
    """Raises ``error``, which all ranks have found: that of rank 0 on all."""
    if session.rank > 0:
        session.publish("the error of the first rank")
    raise error


def _written_here(entries: Sequence[Entry], rank: int) -> tuple[list[Entry], dict[str, StoredBox]]:
    """Of ``entries``, what ``rank`` writes: whole tensors by their names, and boxes by names of their own."""
    written: list[Entry] = []
    boxes: dict[str, StoredBox] = {}
    taken = {entry.name for entry in entries}
    chosen: dict[Layout, frozenset[Extent]] = {}  # many tensors have the same layout
    for entry in entries:
        assert isinstance(entry.source, Spread)
        dtype, layout = entry.source.dtype, entry.source.layout
        mine = chosen.get(layout)
        if mine is None:
            mine = chosen[layout] = _boxes_written_by(rank, layout, entry.name)
        if 0 in layout.shape and rank == min(layout.ranks):
            written.append(entry._replace(source=TensorSource.of(torch.empty(layout.shape, dtype=dtype))))
        for begin, tensor in entry.source.local:
            if (begin, tuple(tensor.shape)) not in mine:
                continue
            name, source = entry.name, TensorSource(tensor, dtype)
            if source.shape != layout.shape:
                name = _free_name(f"{entry.name} at {','.join(map(str, begin))}", taken)
                boxes[name] = StoredBox(entry.name, layout.shape, begin)
            written.append(Entry(name, "tensor", None, None, source))
    return written, boxes


def _boxes_written_by(rank: int, layout: Layout, name: str) -> frozenset[Extent]:
    """Those boxes of ``layout`` that no rank below ``rank`` holds too. Raises UnsupportedTensorError for boxes that overlap."""
    own = layout.boxes(rank)
    if isinstance(layout, Whole):
        return frozenset(own if rank == min(layout.ranks) else ())
    if isinstance(layout, Placed):  # whose boxes are those of replicas, or do not overlap
        return frozenset(own if own and rank == _lowest_replica(layout, rank) else ())
    distinct = {box for other in layout.ranks for box in layout.boxes(other)}
    if not covered_once(layout.shape, [*distinct]):
        raise UnsupportedTensorError(
            f"cannot save {name!r} of the training state: boxes that cover it once were expected, those of the ranks do not; nothing was "
            f"written"
        )
    return frozenset(box for box in own if not any(box in layout.boxes(other) for other in layout.ranks if other < rank))


def _lowest_replica(layout: Placed, rank: int) -> int:
    """The lowest rank that holds the same elements as ``rank``, which is in the mesh."""
    grid, coordinates = layout.grid, layout.grid.coordinates(rank)
    assert coordinates is not None
    along = [range(n) if split.dim < 0 else (at,) for n, split, at in zip(grid.sizes, layout.splits, coordinates)]
    places = np.ravel_multi_index([*zip(*product(*along))], grid.sizes)
    replicas: list[int] = [grid.ranks[place] for place in places.tolist()]
    return min(replica for replica in replicas if replica >= 0)


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, or one like it that nothing has."""
    while name in taken:
        name += "'"
    return name
