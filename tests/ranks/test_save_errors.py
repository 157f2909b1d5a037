"""What goes wrong on one rank of a save is raised on all, and nothing is committed; the next save works."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import shardsave
from jobs import run_ranks
from shardsave._common.os_calls import CallFailed
from shardsave._storage import staging
from support import raised


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (4,))
    return {name: distribute_tensor(torch.full((16, 8), value), mesh, [Shard(0)]) for name in "abcd"}


def saved(rank: int, folder: Path, case: str) -> tuple[str, str, bool]:
    """The error of the save on this rank, and whether the next one works."""
    error = raised(lambda: CASES[case][0](rank, folder / "ckpt"))
    dist.barrier()
    litter = [name for name in os.listdir(folder / "ckpt")] if (folder / "ckpt").exists() else []
    dist.barrier()
    shardsave.save(state(2.0), folder / "ckpt", durable=False)
    return (*error, bool(litter))


def wrong_argument(rank: int, path: Path) -> None:
    shardsave.save(state(), path, max_shard_size="much" if rank == 2 else "1GB")


def wrong_directory(rank: int, path: Path) -> None:
    shardsave.save(state(), 7 if rank == 1 else path)  # type: ignore[arg-type]


def other_directory(rank: int, path: Path) -> None:
    shardsave.save(state(), path.parent / "other" if rank == 3 else path)


def not_shared(rank: int, path: Path) -> None:
    """On one rank, another directory has the path."""
    found = (lambda *_: False) if rank == 1 else staging.Staging.join
    with mock.patch.object(staging.Staging, "join", found):
        shardsave.save(state(), path)


def other_metadata(rank: int, path: Path) -> None:
    shardsave.save(state(), path, metadata={"rank": rank // 2})


def other_metrics(rank: int, path: Path) -> None:
    shardsave.save(state(), path, metrics={"loss": float(rank)})


def other_divergence(rank: int, path: Path) -> None:
    shardsave.save(state(), path, on_divergence="lowest_rank" if rank == 3 else "raise")


def other_dtype(rank: int, path: Path) -> None:
    shardsave.save(state(), path, dtype="bfloat16" if rank == 2 else None)


def other_only(rank: int, path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    shardsave.save(
        model, path, only="trainable" if rank == 0 else None, process_group=dist.group.WORLD, on_divergence="lowest_rank"
    )


def long_metadata(rank: int, path: Path) -> None:
    shardsave.save(state(), path, metadata={"same": [1, None], "text": "x" * (1000 + min(rank, 1))})


def unprintable_metadata(rank: int, path: Path) -> None:
    shardsave.save(state(), path, metadata={"text": "ab"[rank % 2] + "\x1b[1m"})


def not_savable(rank: int, path: Path) -> None:
    more = {"c": torch.tensor(0.0).to_sparse()} if rank == 1 else {"c": torch.tensor(0.0)}
    shardsave.save({**state(), **more}, path, process_group=dist.group.WORLD)


def partial(rank: int, path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    shardsave.save({"sum": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, path)


def replicas_differ(rank: int, path: Path) -> None:
    shardsave.save({"same": torch.ones(3), "drifted": torch.tensor([float(rank == 3)])}, path, process_group=dist.group.WORLD)


def contradiction(rank: int, path: Path) -> None:
    shardsave.save({"x": torch.ones(3 if rank else 4)}, path, process_group=dist.group.WORLD)


#: Case → what all ranks raise: the class, and what the message says.
CASES: dict[str, tuple[Callable[[int, Path], object], str, str]] = {
    "wrong argument": (wrong_argument, "ValueError", "rank 2: .*max_shard_size"),
    "wrong directory": (wrong_directory, "(ValueError|TypeError)", "(rank 1: .*directory|same call)"),
    "other directory": (other_directory, "ValueError", "all ranks were expected to make the same call.*rank 3.*other"),
    "not shared": (not_shared, "SaveNotCommittedError", "rank 1: .*not a shared directory.*nothing was committed"),
    "other metadata": (
        other_metadata,
        "ValueError",
        r"the same metadata\['rank'\] was expected on all ranks, it is 0 on rank 0, rank 1, 1 on rank 2, rank 3; nothing",
    ),
    "other metrics": (other_metrics, "ValueError", "the same metric 'loss' .*, it is 0.0 on rank 0, 1.0 on rank 1, 2.0 on"),
    "other divergence": (
        other_divergence,
        "ValueError",
        "the same on_divergence was expected on all ranks, it is 'raise' on rank 0, rank 1, rank 2, 'lowest_rank' on rank 3",
    ),
    "other dtype": (
        other_dtype,
        "ValueError",
        "the same dtype was expected on all ranks, it is None on rank 0, rank 1, rank 3, 'torch.bfloat16' on rank 2; nothing",
    ),
    "other only": (
        other_only,
        "ValueError",
        "the same only was expected .*, it is 'trainable' on rank 0, None on rank 1, rank 2",
    ),
    "long metadata": (
        long_metadata,
        "ValueError",
        r"the same metadata\['text'\] was expected on all ranks, rank 1, rank 2, rank 3 have another than rank 0; nothing",
    ),
    "unprintable metadata": (
        unprintable_metadata,
        "ValueError",
        r"it is 'a\\x1b\[1m' on rank 0, rank 2, 'b\\x1b\[1m' on rank 1, rank 3; nothing",
    ),
    "not savable": (not_savable, "UnsupportedTensorError", "rank 1: cannot save 'c': a strided tensor was expected"),
    "partial": (partial, "UnsupportedTensorError", "cannot save 'sum'.*summands"),
    "replicas": (
        replicas_differ,
        "UnsupportedTensorError",
        "'drifted'.*rank 3.*on_divergence='lowest_rank'.*nothing was written",
    ),
    "contradiction": (contradiction, "UnsupportedTensorError", "'x'"),
}


def all_cases(rank: int, folder: Path) -> dict[str, tuple[str, str, bool]]:
    return {case: saved(rank, folder / case, case) for case in CASES}


def test_errors_of_one_rank(tmp_path: Path) -> None:
    """Catches a rank that raises something else than the others, or nothing, or hangs; and a save after it that does not work."""
    for case in CASES:
        (tmp_path / case).mkdir()
    ranks = run_ranks(4, all_cases, tmp_path)
    for case, (_, kind, words) in CASES.items():
        ends = {ends[case] for ends in ranks}
        assert len(ends) == 1, (case, ends)
        error, message, litter = ends.pop()
        assert re.fullmatch(kind, error) and re.search(words, message), (case, error, message)
        assert not litter, case
        assert shardsave.load(tmp_path / case / "ckpt")["a"][0, 0] == 2
        assert not [name for name in os.listdir(tmp_path / case / "ckpt") if name.startswith(".shardsave")], case


def alone(rank: int, folder: Path) -> str:
    tensors = state()
    if rank:
        return ""
    try:
        shardsave.save(tensors, folder / "ckpt", rank_timeout=1.0)
    except shardsave.SaveNotCommittedError as error:
        return str(error)
    return "no error"


def test_one_rank_calls_alone(tmp_path: Path) -> None:
    """Catches a rank that waits for ever for others that do not make the call, or is not told which."""
    message = run_ranks(4, alone, tmp_path, seconds=60)[0]
    assert re.search("within rank_timeout=1 s, .*1.*3 did not", message), message
    assert not (tmp_path / "ckpt").exists()


def lowest(rank: int, folder: Path) -> list[str]:
    tensors = {"same": torch.ones(3), "drifted": torch.tensor([float(rank)])}
    report = shardsave.save(tensors, folder / "ckpt", process_group=dist.group.WORLD, on_divergence="lowest_rank")
    return [*report.notes]


def test_the_lowest_rank_is_taken(tmp_path: Path) -> None:
    """Catches a drifted buffer of another rank in the files, or one of which no note tells."""
    notes = run_ranks(4, lowest, tmp_path)
    assert all("'drifted'" in " ".join(found) for found in notes)
    assert shardsave.load(tmp_path / "ckpt")["drifted"] == 0


def save_into_a_full_disk(rank: int, folder: Path) -> tuple[str, str]:
    def full(fd: int, path: str, length: int) -> None:
        raise CallFailed("fallocate", path, errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(staging, "allocate", full if rank == 3 else staging.allocate):
        return raised(lambda: shardsave.save(state(), folder / "ckpt", max_shard_size="512B"))


def test_a_full_disk_on_one_rank(tmp_path: Path) -> None:
    """Catches an error of one writer that the others do not raise, or litter."""
    (ends,) = {*run_ranks(4, save_into_a_full_disk, tmp_path)}
    assert ends[0] == "OutOfSpaceError" and "rank 3: cannot write" in ends[1] and "nothing was committed" in ends[1], ends
    assert os.listdir(tmp_path / "ckpt") == []
