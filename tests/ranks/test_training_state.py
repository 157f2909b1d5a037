"""The training state of several ranks: saved with boxes, resumed on the same number of ranks bit for bit, on others value for value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainings import TRAININGS, WHOLE, differences

import shardsave
from jobs import run_ranks

#: The number of steps before the save, and after it.
STEPS = {**dict.fromkeys(TRAININGS, 3), "rows": 10}


def train_and_save(rank: int, folder: Path) -> dict[str, Any]:
    """Trains each, and saves it half-way. Returns the digest at the end, and everything that was saved."""
    ends = {}
    for name, build in TRAININGS.items():
        training = build(0)
        training.steps(STEPS[name])
        training.save(folder / name, max_shard_size="1kB")
        whole = training.whole()
        training.steps(STEPS[name])
        ends[name] = training.digest(), whole
    return ends


def resume_and_train(rank: int, folder: Path) -> dict[str, Any]:
    ends = {}
    for name, build in TRAININGS.items():
        training = build(5)
        resumed = training.resume(folder / name)
        training.steps(STEPS[name])
        ends[name] = training.digest(), resumed.notes
    return ends


def resume_all(rank: int, folder: Path) -> dict[str, Any]:
    ends = {}
    for name, build in TRAININGS.items():
        training = build(7)
        resumed = training.resume(folder / name)
        ends[name] = training.whole(), resumed.notes
    return ends


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Trainings that four ranks saved, and how each went on."""
    folder = tmp_path_factory.mktemp("trainings")
    return folder, run_ranks(4, train_and_save, folder)


def test_goes_on_as_if_it_had_never_stopped(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Catches anything of a training on several ranks that is not saved or not restored, bit for bit, on each of them."""
    folder, straight = saved
    again = run_ranks(4, resume_and_train, folder)
    for name in TRAININGS:
        assert [ends[name] for ends in again] == [(ends[name][0], ()) for ends in straight], name


LOADER = "training['loader']: it belongs to a rank and is not filled, since the number of ranks is another one"


@pytest.mark.parametrize("size", [2, 1])
def test_another_number_of_ranks(saved: tuple[Path, list[dict[str, Any]]], size: int) -> None:
    """Catches a value that differs on another number of ranks, and what belongs to a rank that is filled there, or not named."""
    folder, straight = saved
    for ends in run_ranks(size, resume_all, folder):
        for name in TRAININGS:
            whole, notes = ends[name]
            assert differences(straight[0][name][1], whole) == [], name
            assert set(notes) == {LOADER, "rng: not set, since 4 ranks saved it"}, name


def resume_some(rank: int, folder: Path) -> dict[str, Any]:
    ends = {}
    for name in WHOLE:
        training = TRAININGS[name](9)
        resumed = training.resume(folder / name)
        ends[name] = training.whole(), resumed.notes
    return ends


def test_one_process_without_shards(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Catches a value that differs in one process that knows nothing of ranks, or on ranks that go on from what that saved."""
    folder, straight = saved
    for name, build in WHOLE.items():
        training = build(3)
        resumed = training.resume(folder / name)
        assert differences(straight[0][name][1], training.whole()) == [], name
        assert set(resumed.notes) == {LOADER, "rng: not set, since 4 ranks saved it"}
        training.save(tmp_path / name)
    for ends in run_ranks(4, resume_some, tmp_path):
        for name in WHOLE:
            whole, notes = ends[name]
            assert differences(straight[0][name][1], whole) == [], name
            assert set(notes) == {LOADER, "rng: not set, since 1 ranks saved it"}


def test_a_part_of_it_fills_a_model(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Catches an averaged model that cannot be put together from boxes."""
    folder, straight = saved
    model = WHOLE["rows"](1).model
    report = shardsave.load_model(model, folder / "rows", part="ema", strict=False)
    assert report.verified and report.missing == ("scale",)
    averages = {name: straight[0]["rows"][1][f"ema {name}"] for name, _ in model.named_parameters()}
    assert differences(averages, dict(model.named_parameters())) == []
