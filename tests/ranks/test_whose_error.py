"""Whose error a rank raises: its own, that of another rank with its name, or one that all ranks have alike."""

from __future__ import annotations

import enum
import re
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardsave
from jobs import run_ranks

RANKS = 4


class Odd(RuntimeError):
    """A class that other ranks need not have."""


class Raised(NamedTuple):
    kind: str
    message: str
    functions: tuple[str, ...] = ()


def raised(call: Callable[[], object]) -> Raised:
    """The class and the message of what ``call`` raises, and the functions in its traceback."""
    try:
        call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return Raised(type(error).__name__, str(error), tuple(frame.name for frame in frames))
    return Raised("", "")


class Failing(nn.Linear):
    """Fails in hooks of the user, once it is ``odd``."""

    odd = False

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.fail_on_one_rank()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.fail_on_one_rank()
        super()._load_from_state_dict(*arguments)

    def fail_on_one_rank(self) -> None:
        if self.odd:
            raise Odd("a hook of the user")


class Loader:
    """A data loader that fails."""

    def __init__(self, saves: bool, loads: bool) -> None:
        self.fails = {"save": saves, "load": loads}

    def state_dict(self) -> dict[str, int]:
        self.fail_on_one_rank("save")
        return {"position": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.fail_on_one_rank("load")

    def fail_on_one_rank(self, verb: str) -> None:
        if self.fails[verb]:
            raise Odd("a hook of the user")


def fail_on_one_rank(done: int, total: int) -> None:
    raise Odd("a hook of the user")


def own_errors(rank: int, folder: Path) -> dict[str, Raised]:
    """Rank 2 fails in its own code."""
    group, struck, path = dist.group.WORLD, rank == 2, folder / "ckpt"
    shardsave.save(Failing(2, 2), path, process_group=group, training={"loader": Loader(False, False)})
    model = Failing(2, 2)
    model.odd = struck
    ends = {"save: state_dict": raised(lambda: shardsave.save(model, path, process_group=group))}
    tensors = {name: torch.ones(64) for name in "abcd"}
    progress = fail_on_one_rank if struck else None
    options: dict[str, Any] = {"process_group": group, "max_shard_size": "256B", "progress": progress}
    ends["save: progress"] = raised(lambda: shardsave.save(tensors, path, **options))
    ends["save: in the background"] = raised(lambda: shardsave.save_async(tensors, path, **options).wait(60))
    ends["load: progress"] = raised(lambda: shardsave.load_model(nn.Linear(2, 2), path, process_group=group, progress=progress))
    # what one process reports in an error of ours
    training = {"loader": Loader(struck, struck)}
    ends["load: load_state_dict"] = raised(lambda: shardsave.load_model(model, path, process_group=group))
    ends["training"] = raised(lambda: shardsave.save(nn.Linear(2, 2), path, process_group=group, training=training))
    ends["resume"] = raised(lambda: shardsave.resume(path, nn.Linear(2, 2), process_group=group, training=training))
    return ends


OURS = {
    "training": "UnsupportedTrainingError",
    "resume": "IncompatibleCheckpointError",
}


def test_an_error_of_the_user_on_one_rank(tmp_path: Path) -> None:
    """Catches a rank whose own exception comes out as another class or without its traceback, and others that cannot tell whose it is."""
    ends = run_ranks(RANKS, own_errors, tmp_path)
    for case in ends[0].keys() - OURS.keys():
        own = ends[2][case]
        assert (own.kind, own.message) == ("Odd", "a hook of the user"), (case, own)
        assert "fail_on_one_rank" in own.functions or case == "save: in the background", (case, own)
        others = {ends[rank][case][:2] for rank in (0, 1, 3)}
        assert len(others) == 1, (case, others)
        kind, message = others.pop()
        assert kind == ("SaveNotCommittedError" if case.startswith("save") else "ShardSaveError"), (case, kind)
        begin = (
            f"cannot {'save to' if case.startswith('save') else 'load'} {tmp_path / 'ckpt'}: rank 2: Odd: a hook of the user"
        )
        end = "; nothing was committed" if case.startswith("save") else ""
        assert message.startswith(begin) and message.endswith(end), (case, message)
    for case, kind in OURS.items():
        assert len({end[case][:2] for end in ends}) == 1, [end[case][:2] for end in ends]
        found = ends[0][case]
        assert found[0] == kind and found[1].startswith("rank 2: ") and "raised Odd: a hook of the user" in found[1], (
            case,
            found,
        )


def alike(rank: int, folder: Path) -> dict[str, Raised]:
    """All ranks fail for the same reason, or rank 0 fails for all."""
    group, path, model = dist.group.WORLD, folder / "ckpt", nn.Linear(2, 2)
    if rank == 0:
        shardsave.save(nn.Linear(3, 2), folder / "other shape")
        (folder / "file").touch()
    dist.barrier()
    sparse = {"c": torch.ones(2).to_sparse()}
    ends = {
        "argument": raised(lambda: shardsave.save(model, path, process_group=group, max_shard_size=-1)),
        "argument of some": raised(
            lambda: shardsave.save(model, path, process_group=group, max_shard_size=-1 if rank % 2 else 100)
        ),
        "argument in the background": raised(lambda: shardsave.save_async(model, path, process_group=group, if_busy="no")),
        "ring": raised(lambda: shardsave.save_async(model, path, process_group=group, staging="ring")),
        "argument of a load": raised(lambda: shardsave.load_model(model, path, process_group=group, strict=2)),
        "not savable": raised(lambda: shardsave.save(sparse, path, process_group=group)),
        "nothing to load": raised(lambda: shardsave.load_model(model, path, process_group=group)),
        "nothing to resume": raised(lambda: shardsave.resume(path, model, process_group=group)),
        "another shape": raised(lambda: shardsave.load_model(model, folder / "other shape", process_group=group)),
        "no directory": raised(lambda: shardsave.save(model, folder / "file", process_group=group)),
        "contradiction": raised(lambda: shardsave.save({"x": torch.ones(2 + rank % 2)}, path, process_group=group)),
        "metric": raised(lambda: shardsave.save(model, path, process_group=group, metrics={"a": 1, "loss": rank})),
        "lacking metric": raised(
            lambda: shardsave.save(model, path, process_group=group, metrics={"a": 1, **({"loss": 1} if rank else {})})
        ),
    }
    return ends


#: What all ranks say, but for the path.
ALIKE = {
    "argument": ("ValueError", "max_shard_size must be"),
    "argument of some": ("ValueError", "rank 1, rank 3: max_shard_size must be"),
    "argument in the background": ("ValueError", "if_busy must be one of"),
    "ring": ("ValueError", "staging='ring' needs a save by one process"),
    "argument of a load": ("TypeError", "strict must be"),
    "not savable": ("UnsupportedTensorError", "cannot save 'c': a strided tensor was expected"),
    "nothing to load": ("CheckpointNotFoundError", "no checkpoint at CKPT"),
    "nothing to resume": ("CheckpointNotFoundError", "no checkpoint at CKPT"),
    "another shape": ("IncompatibleCheckpointError", "cannot load"),
    "no directory": ("SaveNotCommittedError", "cannot"),
    "contradiction": ("UnsupportedTensorError", "cannot save 'x'"),
    "metric": ("ValueError", "cannot save to CKPT: the same metric 'loss' was expected on all ranks, it is 0 on rank 0, 1 on rank 1, 2"),
    "lacking metric": ("ValueError", "cannot save to CKPT: the same metric 'loss' was expected on all ranks, it is missing on rank 0, 1"),
}  # fmt: skip


def test_an_error_of_all_ranks(tmp_path: Path) -> None:
    """Catches a message that blames one rank for what all have, or for what rank 0 did for all; and one that does not name a metric."""
    ends = run_ranks(RANKS, alike, tmp_path)
    for case, (kind, begin) in ALIKE.items():
        (found,) = {end[case][:2] for end in ends}
        assert found[0] == kind and found[1].startswith(begin.replace("CKPT", str(tmp_path / "ckpt"))), (case, found)
    assert not (tmp_path / "ckpt").exists()


class Slow(nn.Linear):
    """Is not ready before the others have given up."""

    given_up: Path

    def _save_to_state_dict(self, *arguments: Any) -> None:
        end = time.monotonic() + 60
        while not self.given_up.exists() and time.monotonic() < end:
            time.sleep(0.01)
        super()._save_to_state_dict(*arguments)


def late(rank: int, folder: Path) -> dict[str, Raised]:
    group, model = dist.group.WORLD, (Slow if rank == 3 else nn.Linear)(2, 2)
    model.given_up = given_up = folder / "given up"
    options: dict[str, Any] = {"process_group": group, "phase_timeout": 1.0}
    wrong = {"process_group": group, "phase_timeout": -1 if rank == 1 else 60}
    ends = {
        "wrong": raised(lambda: shardsave.save(nn.Linear(2, 2), folder / "ckpt", **wrong)),
        "wrong load": raised(lambda: shardsave.load_model(nn.Linear(2, 2), folder / "ckpt", **wrong)),
        "late": raised(lambda: shardsave.save(model, folder / "ckpt", **options)),
    }
    given_up.touch()
    return ends


def test_a_phase_takes_too_long(tmp_path: Path) -> None:
    """Catches a limit that no verb takes, and a rank that waits longer for others than its caller allowed."""
    ends = run_ranks(RANKS, late, tmp_path)
    for case, kind, words in (
        ("wrong", "ValueError", "rank 1: phase_timeout must be"),
        ("wrong load", "ValueError", "rank 1: phase_timeout must be"),
        ("late", "SaveNotCommittedError", "was expected within phase_timeout=1 s, still waiting for rank 3: alive, but stuck or slow"),
    ):  # fmt: skip
        (found,) = {end[case][:2] for end in ends}
        assert found[0] == kind and words in found[1], (case, found)


VERBS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "save to": lambda path, options: shardsave.save(nn.Linear(2, 2), path, **options),
    "save to, in the background": lambda path, options: shardsave.save_async(nn.Linear(2, 2), path, **options),
    "plan to save to": lambda path, options: shardsave.plan_save(nn.Linear(2, 2), path, **options),
    "load": lambda path, options: shardsave.load_model(nn.Linear(2, 2), path, **options),
    "resume from": lambda path, options: shardsave.resume(path, nn.Linear(2, 2), **options),
}


def call_alone(rank: int, folder: Path, caller: int) -> dict[str, tuple[Raised, float]]:
    ends = {}
    for verb, call in VERBS.items() if rank == caller else ():
        began = time.monotonic()
        options = {"process_group": dist.group.WORLD, "rank_timeout": 0.4}
        ends[verb] = raised(lambda call=call, options=options: call(folder / "ckpt", options)), time.monotonic() - began  # type: ignore[misc]
    return ends


@pytest.mark.parametrize("caller", [0, 2])
def test_one_rank_calls_alone(tmp_path: Path, caller: int) -> None:
    """Catches a verb that waits longer than ``rank_timeout`` for ranks that do not make the call, or does not say which."""
    missing = "ranks 1 to 3" if caller == 0 else "ranks 0, 1, 3"
    for verb, (end, seconds) in run_ranks(RANKS, call_alone, tmp_path, caller)[caller].items():
        words = (
            f"cannot {verb.partition(',')[0]} {tmp_path / 'ckpt'}: all 4 ranks of the group were expected to call it "
            f"within rank_timeout=0.4 s, {missing} did not, or ended; the call is collective: either all ranks make it or none"
        )
        assert end.message.startswith(words) and seconds < 20, (verb, end, seconds)
        assert (end.kind == "SaveNotCommittedError") == ("save" in verb), (verb, end)
    assert not (tmp_path / "ckpt").exists()


class Status(enum.Enum):
    """As in DeepSpeed."""

    NOT_AVAILABLE = 2


def older_fsdp() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return nn.Sequential(FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu")))


def zero_3() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    for parameter in model.parameters():
        given: Any = parameter
        given.ds_shape, given.ds_numel, given.ds_status = parameter.shape, parameter.numel(), Status.NOT_AVAILABLE
        parameter.data = torch.empty(0)
    return model


def refused_wrappers(rank: int, folder: Path) -> dict[str, Raised]:
    warnings.simplefilter("ignore")
    group, ends = dist.group.WORLD, {}
    if rank == 0:
        shardsave.save(nn.Sequential(nn.Linear(8, 8)), folder / "plain")
    dist.barrier()
    for name, make in (("FSDP1", older_fsdp), ("ZeRO-3", zero_3)):
        model, path = make(), folder / name
        optimizer = torch.optim.SGD(model.parameters())
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: shardsave.save(model, path, process_group=group),
            "save_async": lambda: shardsave.save_async(model, path, process_group=group),
            "training": lambda: shardsave.save(
                nn.Linear(2, 2), path, process_group=group, training={"teacher": model, "optimizer": optimizer}
            ),
            "load": lambda: shardsave.load_model(model, folder / "plain", process_group=group),
            "resume": lambda: shardsave.resume(folder / "plain", model, process_group=group),
        }
        ends.update({f"{name}: {verb}": raised(call) for verb, call in calls.items()})
    return ends


def load_few(rank: int, folder: Path) -> tuple[int, int]:
    model = nn.ModuleDict({str(number): nn.Linear(8, 8) for number in range(rank + 1)})
    report = shardsave.load_model(model, folder, process_group=dist.group.WORLD, strict=False)
    return report.shards, report.tensors


def test_shards_of_a_load(tmp_path: Path) -> None:
    """Catches reports of one load that name, on each rank, the number of files that this rank has read."""
    source = nn.ModuleDict({str(number): nn.Linear(8, 8) for number in range(RANKS)})
    saved = shardsave.save(source, tmp_path / "ckpt", max_shard_size="300B")
    assert saved.shards == RANKS
    assert run_ranks(RANKS, load_few, tmp_path / "ckpt") == [(RANKS, 2 * rank + 2) for rank in range(RANKS)]


def test_what_other_libraries_shard(tmp_path: Path) -> None:
    """Catches a model of FSDP1 or ZeRO-3 that a job of ranks saves or fills in part, waits for, or refuses in other words on each rank."""
    ends = run_ranks(RANKS, refused_wrappers, tmp_path)
    for case in ends[0]:
        (found,) = {end[case][:2] for end in ends}
        library, _, verb = case.partition(": ")
        assert found[0] == "UnsupportedTensorError", (case, found)
        begin = "fill" if verb in ("load", "resume") else "save"
        assert re.match(f"cannot {begin} ", found[1]), (case, found)
        assert ("FSDP2" if library == "FSDP1" else "zero_to_fp32") in found[1], (case, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
