"""When a step is saved and which steps stay: small values, without a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from shardsave._runs.policies import EverySeconds, EverySteps, Keep, KeepBest, KeepChosen, KeepEvery, KeepLast, kept, save_when
from shardsave._runs.steps import State, StepInfo


def run(
    *steps: int, losses: Mapping[int, float] | None = None, pinned: int = 0, states: Mapping[int, State] | None = None
) -> list[StepInfo]:
    return [
        StepInfo(
            step,
            f"run/step-{step:08d}",
            (states or {}).get(step, "committed"),
            metrics={"loss": losses[step]} if losses and step in losses else {},
            pinned=step == pinned,
        )
        for step in steps
    ]


@pytest.mark.parametrize(
    ("policies", "stay"),
    [
        ([], [10, 20, 30, 40, 50]),
        ([KeepLast(2)], [40, 50]),
        ([KeepLast(9)], [10, 20, 30, 40, 50]),
        ([KeepEvery(20)], [20, 40, 50]),
        ([KeepEvery(25)], [30, 50]),
        ([KeepBest("loss", "min", 2)], [20, 40, 50]),
        ([KeepBest("loss", "max", 1)], [10, 50]),
        ([KeepBest("accuracy", "max", 1)], [50]),
        ([KeepLast(1), KeepEvery(30), KeepBest("loss", "min", 1)], [30, 40, 50]),
        ([KeepChosen(lambda steps: [steps[0].step, 7])], [10, 50]),
    ],
)
def test_what_stays(policies: list[Keep], stay: list[int]) -> None:
    """Catches a policy that keeps another step than it says, and the removal of the latest step."""
    infos = run(10, 20, 30, 40, 50, losses={10: 5.0, 20: 1.0, 30: math.nan, 40: 1.0, 50: 3.0})
    assert list(kept(infos, policies)) == stay


def test_why_a_step_stays() -> None:
    """Catches a missing reason, and of equal metrics the earlier step as the better one."""
    infos = run(10, 20, 30, losses={10: 1.0, 20: 1.0, 30: 2.0}, pinned=10)
    assert kept(infos, [KeepLast(1), KeepBest("loss", "min", 1)]) == {
        10: ("pinned",),
        20: ("best loss, 1 of 1",),
        30: ("latest", "last 1"),
    }
    assert kept(infos, []) == {
        10: ("pinned", "no policy removes it"),
        20: ("no policy removes it",),
        30: ("latest", "no policy removes it"),
    }


def test_only_committed_steps_count() -> None:
    """Catches a corrupt or unfinished step that takes the place of one that can be loaded."""
    infos = run(10, 20, 30, 40, states={40: "corrupt", 30: "saving"})
    assert kept(infos, [KeepLast(1)]) == {20: ("latest", "last 1")}


def test_one_step_for_each_multiple_stays_for_ever() -> None:
    """Catches a policy that forgets, once other steps are gone, which step it kept for a multiple: then it would keep more and more."""
    there: list[int] = []
    for step in range(7, 400, 7):
        there.append(step)
        there = list(kept(run(*there), [KeepEvery(50), KeepLast(1)]))
    assert there == [56, 105, 154, 203, 252, 301, 350, 399]


def test_every_so_many_steps() -> None:
    """Catches a save at each step after a resume, a missed multiple where not every step is reported, and a save at a first step."""
    when = EverySteps(10)
    assert [step for step in range(1, 41) if when.due(step)] == [10, 20, 30, 40]
    when = EverySteps(10)
    assert [step for step in range(1003, 1060, 7) if when.due(step)] == [1010, 1024, 1031, 1045, 1052]
    when = EverySteps(10)
    when.done(25)
    assert [step for step in range(26, 45) if when.due(step)] == [30, 40]


def test_every_so_many_seconds() -> None:
    """Catches an interval that begins before the save has ended, or that counts steps."""
    now = [0.0]
    when = EverySeconds(600, clock=lambda: now[0])
    for now[0], due in ((1.0, False), (599.0, False), (600.0, True)):
        assert when.due(1) == due
    now[0] = 700.0
    when.done(1)
    for now[0], due in ((1299.0, False), (1300.0, True)):
        assert when.due(2) == due


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10min", 600), ("1.5 h", 5400), ("2d", 172800)])
def test_times(text: str, seconds: float) -> None:
    """Catches a unit that is read as another one."""
    found = save_when(text)
    assert isinstance(found, EverySeconds) and found.seconds == seconds


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "10", "min", "0s", "10 years", "", b"10s", [], "9" * 400 + "d"])
def test_wrong_intervals(wrong: object) -> None:
    """Catches an interval that would never save, or always."""
    with pytest.raises((TypeError, ValueError), match="save_every must be"):
        save_when(wrong)  # type: ignore[arg-type]
