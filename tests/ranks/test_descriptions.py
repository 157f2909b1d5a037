"""What ranks with different tensors agree on, and what is contradictory: over threads, each with a state of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ranks.sessions import ThreadSession, on_threads
from shardsave._common.assembled import Chunk
from shardsave._common.layouts import Grid, Listed, Placed, Split, Whole
from shardsave._common.spread import Spread, local_chunks
from shardsave._ranks import agree as agree_module
from shardsave._ranks.agree import agree
from shardsave._ranks.description import decoded_grids, encoded_grids
from shardsave._ranks.replicas import check_replicas
from shardsave._state.module import Entry, State, read_state
from shardsave.errors import UnsupportedTensorError

Source = Any


def agreed(*sources: Source) -> list[State]:
    """What each rank gets if it has one of ``sources``: a module, a mapping, or a state."""

    def of_rank(session: ThreadSession) -> State:
        source = sources[session.rank]
        return agree(session, source if isinstance(source, State) else read_state(source))

    results = on_threads(len(sources), of_rank)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def refused(*sources: Source) -> str:
    """The message of the error, which must be the same on all ranks."""
    results = on_threads(len(sources), lambda session: agree(session, read_state(sources[session.rank])))
    assert all(type(result) is UnsupportedTensorError for result in results), results
    (message,) = {str(result) for result in results}
    return message


def by_name(state: State) -> dict[str, Entry]:
    return {entry.name: entry for entry in state.entries}


def test_stages_with_names_of_their_own() -> None:
    """Catches a tensor that only one rank has and others do not know of, and names that are not in natural order."""
    stages = [{f"layers.{n}.weight": torch.full((2,), float(n)) for n in (10 * rank, 10 * rank + 2)} for rank in range(3)]
    states = agreed(*stages)
    for rank, state in enumerate(states):
        assert [e.name for e in state.entries] == [f"layers.{n}.weight" for n in (0, 2, 10, 12, 20, 22)]
        assert [e.source.layout.ranks for e in state.entries] == [(0,), (0,), (1,), (1,), (2,), (2,)]
        assert [bool(e.source.local) for e in state.entries] == [r == rank for r in (0, 0, 1, 1, 2, 2)]
    assert [e.source.layout for e in states[0].entries] == [e.source.layout for e in states[2].entries]


def test_what_some_ranks_share() -> None:
    """Catches replicas that are thought to be on all ranks, or on one of them only."""
    shared = {"norm": torch.ones(3)}
    states = agreed({**shared, "a": torch.ones(1)}, shared, {"b": torch.ones(1), **shared}, {"b": torch.ones(1)})
    ranks = {name: tuple(entry.source.layout.ranks) for name, entry in by_name(states[3]).items()}
    assert ranks == {"a": (0,), "b": (2, 3), "norm": (0, 1, 2)}


def test_the_same_names_in_another_order() -> None:
    """Catches an order that differs between ranks; it is that of the lowest rank."""
    states = agreed(*[{name: torch.ones(1) for name in names} for names in ("zab", "abz")])
    assert [[e.name for e in state.entries] for state in states] == [["z", "a", "b"]] * 2


def test_a_tie_that_only_some_ranks_see() -> None:
    """Catches tied tensors that are stored twice, because a rank has only one of the names."""
    weight = torch.arange(4.0)
    states = agreed({"head": weight}, {"embed": weight, "head": weight}, {"other": torch.ones(1)})
    for state in states:
        entries = by_name(state)
        assert entries["head"].tied_to == "embed" and entries["embed"].tied_to is None
        assert entries["head"].source.layout == entries["embed"].source.layout
        assert tuple(entries["embed"].source.layout.ranks) == (0, 1)
    assert states[0].entries[0].source.is_whole  # "embed", which this rank has under the name "head"


def one(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value}


CONTRADICTIONS: list[tuple[Sequence[Source], str]] = [
    (
        [one("w", torch.ones(2)), one("w", torch.ones(2).half()), one("w", torch.ones(2).half())],
        "cannot save 'w': the same dtype on all ranks was expected, it is float32 on rank 0, float16 on rank 1, rank 2; nothing",
    ),
    (
        [one("w", torch.ones(2)), one("w", torch.ones(3)), one("w", torch.ones(2))],
        "the same shape on all ranks was expected, it is [2] on rank 0, rank 2, [3] on rank 1; nothing was written",
    ),
    (
        [one("w", nn.Parameter(torch.ones(2))), one("w", nn.Parameter(torch.ones(2), requires_grad=False))],
        "it is a trainable parameter on rank 0, a frozen parameter on rank 1; nothing was written",
    ),
    (
        [(lambda w: {"a": w, "b": w})(torch.ones(2)), {"a": torch.ones(2), "b": torch.ones(2)}],
        "cannot save 'b': memory of 'a' was expected on all ranks, as on rank 0, it has memory of its own on rank 1; nothing was",
    ),
    (
        [{"a": (w := torch.ones(2)), "b": w}, {"b": torch.ones(3)}],
        "cannot save 'a': the same shape on all ranks was expected, it is [2] on rank 0, [3] on rank 1",
    ),
]


@pytest.mark.parametrize(("sources", "message"), CONTRADICTIONS)
def test_contradictions(sources: Sequence[Source], message: str) -> None:
    """Catches ranks that say different things of one tensor, and of which one is believed."""
    assert message in refused(*sources)


def test_a_repeated_agreement() -> None:
    """Catches descriptions that travel again, and a global state that is remembered after a rank has changed."""
    stages = [{f"stage{rank}": torch.ones(2)} for rank in range(3)]
    sent = []

    def twice(session: ThreadSession) -> list[list[str]]:
        names = []
        for more in ({}, {}, {"new": torch.ones(1)} if session.rank == 2 else {}):
            before = session.sent
            state = agree(session, read_state({**stages[session.rank], **more}))
            names.append([entry.name for entry in state.entries])
            sent.append((session.rank, session.sent - before))
        return names

    agree_module._remembered.clear()
    for names in on_threads(3, twice):
        assert names == [["stage0", "stage1", "stage2"]] * 2 + [["new", "stage0", "stage1", "stage2"]]
    first, second, third = [bytes_sent for rank, bytes_sent in sent if rank == 1]
    assert second == 34 < first and second < third


def part(rank: int, box: tuple[Any, Any], whole: torch.Tensor) -> State:
    """A state of one tensor, of which this rank lists one box, as tensors of Megatron do."""
    local = whole[tuple(slice(at, at + size) for at, size in zip(*box))]
    layout = Listed({rank: [box]}, whole.shape)
    return State((Entry("w", "tensor", None, None, Spread(whole.dtype, layout, [Chunk(box[0], local)])),), False, ())


def test_boxes_that_ranks_list_themselves() -> None:
    """Catches boxes of other ranks that are lost, and elements that nobody has."""
    whole = torch.arange(12.0).reshape(4, 3)
    boxes = [((0, 0), (1, 3)), ((1, 0), (3, 2)), ((1, 2), (3, 1))]
    for state in agreed(*[part(rank, box, whole) for rank, box in enumerate(boxes)]):
        layout = state.entries[0].source.layout
        assert [layout.boxes(rank) for rank in range(3)] == [(box,) for box in boxes]
    with pytest.raises(
        UnsupportedTensorError, match="all of its 12 elements were expected on the 2 ranks of the group, 9 are there"
    ):
        agreed(*[part(rank, box, whole) for rank, box in enumerate(boxes[:2])])


def test_meshes_in_few_bytes() -> None:
    """Catches a mesh that is another one after its way to the other ranks."""
    grids = [
        Grid(range(4096), (64, 64)),
        Grid(range(5, 40, 7), (5,)),
        Grid([0, 2, 1, 3], (2, 2)),
        Grid([3, 1, 4, 15, 9], (5,)),
        Grid([-1, 0, 1, -1], (2, 2)),
        Grid([7], (1, 1)),
    ]
    assert decoded_grids(encoded_grids(grids)) == grids
    assert len(encoded_grids(grids[:1])) < 40


def replicas(changed: Callable[[int, dict[str, torch.Tensor]], None]) -> Callable[[ThreadSession, Any], Any]:
    """Rank r of 4 has a part of ``w`` on a mesh of 2 × 2, a whole ``n``, and ``r``, which ranks 0 and 1 do not have."""

    def check(session: ThreadSession, on_divergence: Any) -> Any:
        values = {
            "w": torch.arange(10.0).reshape(5, 2),
            "n": torch.ones(3),
            **({"r": torch.ones(2)} if session.rank > 1 else {}),
        }
        changed(session.rank, values)
        layout = Placed(Grid(range(4), (2, 2)), (Split(-1), Split(0)), (5, 2))
        rows = slice(0, 3) if session.rank % 2 == 0 else slice(3, 5)
        spread = Spread(torch.float32, layout, local_chunks(layout, session.rank, values.pop("w")[rows]))
        state = read_state(values)
        state = state._replace(entries=(Entry("w", "tensor", None, None, spread), *state.entries))
        return check_replicas(session, agree(session, state), on_divergence)

    return check


def change(rank: int, name: str, row: int) -> Callable[[int, dict[str, torch.Tensor]], None]:
    def changed(of_rank: int, values: dict[str, torch.Tensor]) -> None:
        if of_rank == rank:
            values[name][row] = -1.0

    return changed


def test_equal_replicas() -> None:
    """Catches an error for replicas that are equal, and a state that is changed for nothing."""
    check = replicas(lambda rank, values: None)
    for state, notes, _ in on_threads(4, lambda session: check(session, "raise")):
        assert not notes and isinstance(by_name(state)["n"].source.layout, Whole)


DIVERGED = [
    (change(3, "w", 4), "'w'", "rank 3 and rank 1 differ"),
    (change(1, "w", 4), "'w'", "rank 3 and rank 1 differ"),
    (change(2, "n", 1), "'n'", "rank 2 and rank 0 differ"),
    (change(0, "n", 1), "'n'", "rank 1, rank 2, rank 3 and rank 0 differ"),
    (change(3, "r", 1), "'r'", "rank 3 and rank 2 differ"),
]


@pytest.mark.parametrize(("changed", "name", "ranks"), DIVERGED)
def test_replicas_that_differ(changed: Callable[[int, dict[str, torch.Tensor]], None], name: str, ranks: str) -> None:
    """Catches one of several values that is saved as if it were the only one, and ranks or tensors that are named wrongly."""
    check = replicas(changed)
    results = on_threads(4, lambda session: check(session, "raise"))
    (message,) = {str(result) for result in results}
    assert type(results[0]) is UnsupportedTensorError
    assert re.match(
        f"cannot save {name}: the same values on all ranks that hold them were expected, {ranks}; on_divergence=", message
    )
    for rank, (state, notes, _) in enumerate(on_threads(4, lambda session: check(session, "lowest_rank"))):
        assert notes == (f"of replicas, those of the lowest rank were saved: {message[12 : message.index(';')]}",)
        for name, ranks_with_elements in {"w": (0, 1), "n": (0,), "r": (2,)}.items():
            source = by_name(state)[name].source
            assert tuple(r for r in range(4) if source.layout.boxes(r)) == ranks_with_elements
            assert bool(source.local) == (rank in ranks_with_elements)
            assert {sender for sender, _ in source.senders(3, [0] * 4)} == set(ranks_with_elements)


def test_boxes_that_overlap_in_part() -> None:
    """Catches elements that two ranks hold in different boxes and that are not compared."""
    whole = torch.arange(12.0).reshape(4, 3)
    other = whole.clone()
    boxes = [((0, 0), (3, 3)), ((2, 0), (2, 3))]

    def check(session: ThreadSession, values: list[torch.Tensor]) -> Any:
        return check_replicas(session, agree(session, part(session.rank, boxes[session.rank], values[session.rank])), "raise")

    assert not any(isinstance(result, Exception) for result in on_threads(2, lambda session: check(session, [whole, other])))
    other[3, 1] = -1  # only rank 1 has it
    assert not any(isinstance(result, Exception) for result in on_threads(2, lambda session: check(session, [whole, other])))
    other[2, 1] = -1
    for result in on_threads(2, lambda session: check(session, [whole, other])):
        assert "'w': the same values on all ranks that hold them were expected, rank 1 and rank 0 differ" in str(result)
