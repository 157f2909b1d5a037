"""Several ranks write what has not changed once: the same shards are taken over that one process takes over, and the files are the same.

Method: a whole model is saved by one process and a placed one by four ranks, both are changed in the same way, and both are saved again
with the earlier checkpoint of each.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from placements import PLACEMENTS
from test_save import same_files
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardsave
from jobs import run_ranks
from shardsave._ranks import box_sums, reading_back
from shardsave._storage.transaction import Transaction

SIZE = "2kB"
NAMES = ["rows", "columns", "hybrid", "fused_and_strided", "replicated_and_sharded", "the_same_on_all", "mostly_frozen"]

#: The bytes of tensors in a layer of `layers`.
LAYER = 4 * (40 * 40 + 40)


def mostly_frozen() -> tuple[nn.Module, nn.Module]:
    """Frozen layers with small trainable ones between them."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(20, 20 if number % 2 else 2) for number in range(6)))
    for layer in whole[1::2]:
        layer.requires_grad_(False)
    placed = copy.deepcopy(whole)
    for layer in placed:
        fully_shard(layer)
    return whole, placed


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


def save_twice(rank: int, folder: Path) -> list[Any]:
    reports = []
    for name in NAMES:
        whole, placed = PLACEMENTS[name]() if name in PLACEMENTS else mostly_frozen()
        options: dict[str, Any] = {"max_shard_size": SIZE, "metadata": {"of": name}}
        group = dist.group.WORLD if name == "the_same_on_all" else None

        def save_placed(where: str, earlier: Path | None = None) -> Any:
            return numbers(shardsave.save(placed, folder / name / where, reuse=earlier, process_group=group, **options))

        def save_whole(where: str, earlier: Path | None = None) -> Any:
            return numbers(shardsave.save(whole, folder / name / where, reuse=earlier, **options)) if rank == 0 else None

        save_placed("many"), save_whole("one")
        change(placed), change(whole)
        reports.append((save_placed("many-next", folder / name / "many"), save_whole("one-next", folder / name / "one")))
    return reports


def test_every_placement(tmp_path: Path) -> None:
    """Catches a shard that is written although nothing in it has changed, or taken over although something has; a plan that is not that of
    one process, a byte that differs, and ranks that report different numbers."""
    per_rank = run_ranks(4, save_twice, tmp_path)
    for name, (many, one), *others in zip(NAMES, *per_rank):
        assert many == one and all(other == many for other, _ in others), (name, many, one, others)
        nbytes, shards, written, *_ = many
        assert 0 < written < nbytes or (written == nbytes and shards < 3), (name, many)
        same_files(tmp_path / name / "one-next", tmp_path / name / "many-next")
        assert shardsave.verify(tmp_path / name / "many-next").verified
        before, after = (inodes(tmp_path / name / folder) for folder in ("many", "many-next"))
        assert len(before & after) == len(many[4])


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


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


def changes(rank: int, folder: Path) -> list[list[Any]]:
    return [changed(rank, folder / str(columns), layers(columns=columns)) for columns in (False, True)]


def changed(rank: int, folder: Path, model: nn.Sequential) -> list[Any]:
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


def test_changes(tmp_path: Path) -> None:
    """Catches a change on one rank that the others do not learn of, a frozen tensor that is believed to be as it was, and a flag that
    rewrites a shard; and everything written anew in the place of an earlier checkpoint."""
    ends = run_ranks(4, changes, tmp_path)
    assert all(end == ends[0] for end in ends)
    for saves in ends[0]:
        layers_of = [(written // LAYER, reused // LAYER) for written, reused, _, _ in saves]
        assert layers_of == [(5, 0), (0, 5), (1, 4), (0, 5), (2, 3), (5, 0)]
        assert not any(notes for *_, notes in saves)


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
        flip_last_byte(shards[0])
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


def flip_last_byte(path: Path) -> None:
    """Changes the last byte of a file, as a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
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
    assert all(shardsave.verify(tmp_path / name).verified for name in ("third", "fourth"))


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
    own, replicas = [True, False, False, True, True], [True, False, True, True, True]
    assert run_ranks(4, assume, tmp_path) == [[*own, *own, *replicas]] * 4


def assume_replicas(rank: int, folder: Path) -> list[float]:
    """Rank 0 changes each of some replicas, which torch counts there, and sends them to the others, where it does not."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(4), requires_grad=False) for _ in range(4)])
    for number in (None, None, 0, 1, 2, 3):
        if number is not None:
            with torch.no_grad():
                if rank == 0:
                    model[number].fill_(7)
            dist.broadcast(model[number].data, 0)
        save(model, folder, process_group=dist.group.WORLD, assume_frozen_unchanged=True)
    return [tensor[0].item() for tensor in shardsave.load(folder).values()]


def test_replicas_that_a_collective_has_changed(tmp_path: Path) -> None:
    """Catches a replica that is assumed to be unchanged since the rank that sums it has not seen the change."""
    assert run_ranks(4, assume_replicas, tmp_path) == [[7.0] * 4] * 4


def save_in_background(rank: int, folder: Path) -> list[list[Any]]:
    return [saved_in_background(folder / str(columns), columns) for columns in (False, True)]


def saved_in_background(folder: Path, columns: bool) -> list[Any]:
    model = layers(columns=columns)
    found: list[Any] = []
    summed: list[int] = []
    checksums = box_sums.checksums

    def note(sources: Any, **options: Any) -> Any:
        summed.append(len(sources))
        return checksums(sources, **options)

    with mock.patch.object(box_sums, "checksums", note):
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


def test_beside_a_training(tmp_path: Path) -> None:
    """Catches what is compared after the call and not as it was in the call, and copies that are summed a second time."""
    expected = [(2, 3), True, True, True]
    assert run_ranks(4, save_in_background, tmp_path) == [[[*expected, 0], expected]] * 4


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


def fail_while_comparing(rank: int, folder: Path) -> list[list[str]]:
    return [failed_while_comparing(rank, folder / str(victim), victim) for victim in (0, 2)]


def failed_while_comparing(rank: int, folder: Path, victim: int) -> list[str]:
    model, found = layers(), []
    save(model, folder / "ckpt")
    with torch.no_grad():
        model[0].weight.add_(1)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory for sums")

    place: Any = (
        mock.patch.object(box_sums, "checksums", fail) if victim else mock.patch.object(reading_back, "sums_on_disk", fail)
    )
    with place if rank == victim else contextlib.nullcontext():
        try:
            save(model, folder / "ckpt")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    found.append(str(sorted(os.listdir(folder / "ckpt"))))
    report = save(model, folder / "ckpt")
    return [*found, str((report.bytes_written // LAYER, report.bytes_reused // LAYER))]


def test_a_failure_while_shards_are_compared(tmp_path: Path) -> None:
    """Catches a failure of one rank, while sums are computed or a file is read back, that others do not raise or wait for, that leaves
    litter or changes the earlier checkpoint, and a next save that does not work."""
    ends = run_ranks(4, fail_while_comparing, tmp_path)
    assert all(end == ends[0] for end in ends), ends
    for victim, (error, names, after) in zip((0, 2), ends[0]):
        who = f"rank {victim}: " if victim else ""  # rank 0 reads back for all
        assert error == f"MemoryError: {who}no memory for sums", error
        assert ".shardsave" not in names and names.count("safetensors'") == 5, names
        assert after == "(1, 4)" and shardsave.verify(tmp_path / str(victim) / "ckpt").verified
