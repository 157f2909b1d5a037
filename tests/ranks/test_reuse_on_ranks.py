"""Several ranks write what has not changed once: the same shards are taken over that one process takes over, and the files are the same.

Method: a whole model is saved by one process and a placed one by four ranks, both are changed in the same way, and both are saved again
with the earlier checkpoint of each.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import PLACEMENTS
from test_save import same_files
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardsave
from jobs import run_ranks
from shardsave._ranks import box_sums
from shardsave._saving import reuse
from shardsave._storage.transaction import Transaction

SIZE = "2kB"
NAMES = [name for name in PLACEMENTS if name != "low_rank_adapters"]

#: The bytes of tensors in a layer of `layers`.
LAYER = 4 * (40 * 40 + 40)


def group_of(name: str) -> Any:
    return dist.group.WORLD if name == "the_same_on_all" else None


def numbers(report: shardsave.SaveReport) -> tuple[Any, ...]:
    """What a report says of reuse."""
    return report.bytes, report.shards, report.bytes_written, report.bytes_reused, report.reused, report.notes


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Changes one tensor in place, and the flags of two."""
    parameters = [*model.parameters()]
    parameters[0].add_(1)
    for parameter in (parameters[0], parameters[-1]):
        parameter.requires_grad_(not parameter.requires_grad)


def save_twice(rank: int, folder: Path, names: list[str]) -> list[Any]:
    reports = []
    for name in names:
        whole, placed = PLACEMENTS[name]()
        options: dict[str, Any] = {"max_shard_size": SIZE, "metadata": {"of": name}}
        many = shardsave.save(placed, folder / name / "many", process_group=group_of(name), **options)
        assert many.bytes_reused == 0
        if rank == 0:
            shardsave.save(whole, folder / name / "one", **options)
        for number, again in enumerate(("next", "third")):
            for model in (whole, placed) if number else ():
                change(model)
            earlier = ("one", "many") if number == 0 else ("one-next", "many-next")
            if rank == 0:
                one = shardsave.save(whole, folder / name / f"one-{again}", reuse=folder / name / earlier[0], **options)
            path = folder / name / f"many-{again}"
            many = shardsave.save(placed, path, reuse=folder / name / earlier[1], process_group=group_of(name), **options)
            reports.append((name, again, numbers(many), numbers(one) if rank == 0 else None))
    return reports


@pytest.mark.parametrize("names", [NAMES, pytest.param(["low_rank_adapters"], marks=pytest.mark.slow)], ids=["all", "PEFT"])
def test_every_placement(tmp_path: Path, names: list[str]) -> None:
    """Catches a shard that is written although nothing in it has changed, or taken over although something has; a plan that is not that of
    one process, a byte that differs, and ranks that report different numbers."""
    per_rank = run_ranks(4, save_twice, tmp_path, names)
    for name, again, many, one in per_rank[0]:
        assert many == one and (many[2] == 0 if again == "next" else 0 < many[2] < many[0]), (name, again, many, one)
        same_files(tmp_path / name / f"one-{again}", tmp_path / name / f"many-{again}")
        shardsave.verify(tmp_path / name / f"many-{again}")
    for reports in per_rank[1:]:
        assert [report[2] for report in reports] == [report[2] for report in per_rank[0]]
    for name in names:
        files = {path.stat().st_ino for path in (tmp_path / name / "many").glob("*.safetensors")}
        assert files == {path.stat().st_ino for path in (tmp_path / name / "many-next").glob("*.safetensors")}


def layers(count: int = 5, trainable: int = 1, *, columns: bool = False) -> nn.Sequential:
    """Equal layers by rows or by columns, of which only the last ``trainable`` are not frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(count)))
    for layer in model[: count - trainable]:
        layer.requires_grad_(False)
    options: dict[str, Any] = {}
    if columns:
        from torch.distributed.tensor import Shard

        options["shard_placement_fn"] = lambda parameter: Shard(parameter.dim() - 1)
    for layer in model:
        fully_shard(layer, **options)
    return model


def save(model: Any, folder: Path, **options: Any) -> shardsave.SaveReport:
    return shardsave.save(model, folder, progress=False, **{"max_shard_size": LAYER, **options})


def local(model: nn.Sequential, layer: int) -> torch.Tensor:
    weight: Any = model[layer].weight
    return weight.to_local().detach()  # type: ignore[no-any-return]


def changes(rank: int, folder: Path, columns: bool) -> list[Any]:
    model = layers(columns=columns)
    found: list[Any] = []

    def again(**options: Any) -> None:
        dist.barrier()
        report = save(model, folder / "ckpt", **options)
        expected = {name: value.full_tensor() for name, value in model.state_dict().items()}
        loaded = shardsave.load(folder / "ckpt")
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        found.append((report.bytes_written, report.bytes_reused, report.reused, report.notes))
        dist.barrier()

    again()
    again()
    if rank == 2:  # one element on one rank, of a frozen layer
        local(model, 1).view(-1)[-1] += 1
    again()
    model[2].requires_grad_(True)  # a flag alone
    again()
    with torch.no_grad():
        model[2].weight.mul_(2)
        model[4].bias.add_(1)
    again()
    again(reuse=False)
    return found


@pytest.mark.parametrize("columns", [False, True])
def test_changes(tmp_path: Path, columns: bool) -> None:
    """Catches a change on one rank that the others do not learn of, a frozen tensor that is believed to be as it was, and a flag that
    rewrites a shard; and everything written anew in the place of an earlier checkpoint."""
    ends = run_ranks(4, changes, tmp_path, columns)
    assert all(end == ends[0] for end in ends)
    assert [(written // LAYER, reused // LAYER) for written, reused, _, _ in ends[0]] == [
        (5, 0),
        (0, 5),
        (1, 4),
        (0, 5),
        (2, 3),
        (5, 0),
    ]
    assert not any(notes for *_, notes in ends[0])


def train(rank: int, folder: Path) -> list[tuple[int, int, int]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 99), nn.Linear(100, 1, bias=False))
    model[0].requires_grad_(False)
    for layer in model:
        fully_shard(layer)
    reports = []
    with shardsave.CheckpointManager(folder / "run", save_every=1, keep_last=2, max_shard_size="1kB") as manager:
        for step in range(1, 12):
            with torch.no_grad():
                model[1].weight.add_(1)
            report = manager.step(step, model)
            assert isinstance(report, shardsave.SaveReport)
            reports.append((report.bytes_written, report.bytes_reused, report.bytes))
    return reports


def test_ten_saves_of_a_model_that_is_mostly_frozen(tmp_path: Path) -> None:
    """Catches frozen weights that a manager of several ranks writes with every step, and a step that is damaged when another one goes."""
    ends = run_ranks(4, train, tmp_path)
    assert all(end == ends[0] for end in ends)
    first, *later = ends[0]
    assert first[:2] == (first[2], 0) and sum(written for written, *_ in later) <= 0.015 * sum(total for *_, total in later)
    steps = sorted((tmp_path / "run").glob("step-*"))
    assert [step.name for step in steps] == ["step-00000010", "step-00000011"]
    assert all(shardsave.verify(step).verified for step in steps)


def damage_and_save(rank: int, folder: Path) -> list[Any]:
    model, found = layers(), []
    save(model, folder / "earlier")
    if rank == 0:
        shards = sorted((folder / "earlier").glob("*.safetensors"))
        _flip(shards[0])
        os.truncate(shards[1], 100)
    dist.barrier()
    report = save(model, folder / "next", reuse=folder / "earlier")
    found.append((report.bytes_written // LAYER, report.notes))
    take = Transaction.take_over

    def remove_first(transaction: Transaction, name: str, *rest: Any) -> Any:
        for path in (folder / "next").glob("*.safetensors"):
            path.unlink()
        return take(transaction, name, *rest)

    with mock.patch.object(Transaction, "take_over", remove_first):
        report = save(model, folder / "third", reuse=folder / "next")
    found.append((report.bytes_written // LAYER, len(report.notes)))
    report = save(model, folder / "fourth", reuse=folder / "missing")
    found.append((report.bytes_written // LAYER, report.notes))
    return found


def _flip(path: Path) -> None:
    """Changes the last byte of a file, as a failing disk does."""
    status, content = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_earlier_checkpoint_that_is_damaged_or_gone(tmp_path: Path) -> None:
    """Catches damage that is taken over or not named on all ranks, and a save that fails because of it, or because files go meanwhile."""
    ends = run_ranks(4, damage_and_save, tmp_path)
    assert all(end == ends[0] for end in ends)
    (written, notes), third, (all_written, missing) = ends[0]
    assert written == 2 and third == (5, 1) and all_written == 5
    assert "model-00001-of-00005.safetensors of" in notes[1] and "is damaged, it was written anew: tensor '0.bias'" in notes[1]
    assert "model-00002-of-00005.safetensors" in notes[0] and notes[0].endswith("was written anew")
    assert missing == (f"no shard of {tmp_path / 'missing'} was taken over: open: No such file or directory",)
    for name in ("next", "third", "fourth"):
        if name != "next":
            shardsave.verify(tmp_path / name)


def assume(rank: int, folder: Path) -> list[bool]:
    models = {"rows": layers(), "columns": layers(columns=True), "plain": nn.Linear(40, 40).requires_grad_(False)}
    nn.init.ones_(models["plain"].weight)
    nn.init.ones_(models["plain"].bias)
    found: list[bool] = []
    for name, model in models.items():
        group = dist.group.WORLD if name == "plain" else None
        weight: Any = model.weight if name == "plain" else model[0].weight
        memory = weight.detach() if name == "plain" else local(model, 0)

        def is_saved(**options: Any) -> None:
            report = save(model, folder / name, process_group=group, **options)
            found.append(report.bytes_written > 0)
            dist.barrier()

        def unnoticed() -> None:
            memory.data.add_(1)

        is_saved(assume_frozen_unchanged=True)
        is_saved(assume_frozen_unchanged=True)
        unnoticed()
        is_saved(assume_frozen_unchanged=True)
        with torch.no_grad():
            weight.add_(1)
        is_saved(assume_frozen_unchanged=True)
        unnoticed()
        is_saved()
    return found


def test_assumed_to_be_unchanged(tmp_path: Path) -> None:
    """Catches a pass over frozen parameters that may be assumed to be unchanged, and a change that torch counts and that is not saved."""
    assert run_ranks(4, assume, tmp_path) == [[True, False, False, True, True] * 3] * 4


def save_in_background(rank: int, folder: Path, columns: bool) -> list[Any]:
    model = layers(columns=columns)
    found = []
    summed: list[int] = []
    checksums = box_sums._checksums

    def note(sources: Any, *rest: Any) -> Any:
        summed.append(len(sources))
        return checksums(sources, *rest)

    with mock.patch.object(box_sums, "_checksums", note):
        for _ in range(2):
            pending = shardsave.save_async(model, folder / "ckpt", max_shard_size=LAYER)
            with torch.no_grad():
                model[4].weight.mul_(2)
                model[0].weight.mul_(2)
            pending.wait(60)
            dist.barrier()
        pending = shardsave.save_async(model, folder / "ckpt", max_shard_size=LAYER)
        with torch.no_grad():
            model[1].weight.mul_(2)
        report = pending.wait(60)
    found.append((report.bytes_written // LAYER, report.bytes_reused // LAYER))
    loaded = shardsave.load(folder / "ckpt")
    for layer in (0, 1, 4):
        value = model[layer].weight.detach().full_tensor()
        found.append(torch.equal(loaded[f"{layer}.weight"], value / 2 if layer == 1 else value))
    if not columns:
        found.append(sum(summed))
    return found


@pytest.mark.parametrize("columns", [False, True])
def test_beside_a_training(tmp_path: Path, columns: bool) -> None:
    """Catches what is compared after the call and not as it was in the call, and copies that are summed a second time."""
    expected = [(2, 3), True, True, True, *([] if columns else [0])]
    assert run_ranks(4, save_in_background, tmp_path, columns) == [expected] * 4


def note_opened(rank: int, folder: Path) -> list[str]:
    model = layers()
    save(model, folder / "earlier")
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)
    report = save(model, folder / "next", reuse=folder / "earlier")
    assert report.bytes_written == 0
    return [path for path in opened if path.endswith(".safetensors") and _exists_in(folder / "earlier", path)]


def _exists_in(folder: Path, path: str) -> bool:
    return (folder / os.path.basename(path)).exists()


def test_nobody_opens_the_earlier_files_for_writing(tmp_path: Path) -> None:
    """Catches a rank that writes to a file that two checkpoints have. A file that is cloned into is a new one, and stays empty here."""
    opened = run_ranks(4, note_opened, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "earlier").glob("*.safetensors")}
    assert opened[1:] == [[]] * 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "next").glob("*.safetensors")} == before


def fail_while_taking_over(rank: int, folder: Path, victim: int) -> list[str]:
    model, found = layers(), []
    save(model, folder / "ckpt")
    with torch.no_grad():
        model[0].weight.add_(1)

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory for sums")

    place: Any = mock.patch.object(box_sums, "_checksums", fail) if victim else mock.patch.object(reuse, "_is_intact", fail)
    with place if rank == victim else contextlib.nullcontext():
        try:
            save(model, folder / "ckpt")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    found.append(str(sorted(os.listdir(folder / "ckpt"))))
    report = save(model, folder / "ckpt")
    return [*found, str((report.bytes_written // LAYER, report.bytes_reused // LAYER))]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_failure_while_shards_are_compared(tmp_path: Path, victim: int) -> None:
    """Catches a failure of one rank, while sums are computed or a file is read back, that others do not raise or wait for, that leaves
    litter or changes the earlier checkpoint, and a next save that does not work."""
    ends = run_ranks(4, fail_while_taking_over, tmp_path, victim)
    assert all(end == ends[0] for end in ends), ends
    error, names, after = ends[0]
    assert "MemoryError" in error and ".shardsave" not in names and names.count("safetensors'") == 5, ends[0]
    assert after == "(1, 4)"
    shardsave.verify(tmp_path / "ckpt")


_ = Callable
