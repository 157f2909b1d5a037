"""What is refused of a training state of several ranks: on all of them, by the same words, and before anything is written or changed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from trainings import TRAININGS, Training

import shardsave
from jobs import run_ranks
from shardsave._common.os_calls import CallFailed
from shardsave._storage.staging import Staging
from training_state import training_directory

Outcome = tuple[str, str]


def outcome(call: Callable[[], Any]) -> Outcome:
    try:
        result = call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "\n".join(result.notes)


def differing_epoch(rank: int, training: Training) -> dict[str, Any]:
    return {**training.state, "epoch": 7 if rank in (1, 3) else 3}


def missing_on_one(rank: int, training: Training) -> Any:
    return None if rank == 2 else training.state


def unstepped_on_one(rank: int, training: Training) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(training.model.parameters(), foreach=True)
    return {**training.state, "optimizer": training.state["optimizer"] if rank != 3 else optimizer, "scheduler": 0}


def function_on_one(rank: int, training: Training) -> dict[str, Any]:
    return {**training.state, "callback": print if rank == 1 else 0}


def summands(rank: int, training: Training) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,))
    return {**training.state, "sum": DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)}


SAVES: dict[str, tuple[Callable[[int, Training], Any], Outcome]] = {
    "differing epoch": (
        differing_epoch,
        (
            "UnsupportedTrainingError",
            "cannot save training['epoch']: the same on all ranks was expected, it is 3 on rank 0, 7 on rank 1, rank 3; what "
            "each rank has for itself is marked by shardsave.PerRank; nothing was written",
        ),
    ),
    "missing on one": (
        missing_on_one,
        ("ValueError", "training= or rng=True was expected on all ranks, rank 2 has none; nothing was written"),
    ),
    "unstepped on one": (
        unstepped_on_one,
        (
            "UnsupportedTrainingError",
            "cannot save training['optimizer'].state_dict()['param_groups']: the same on all ranks was expected, it differs "
            "between rank 0 and rank 3; what each rank has for itself is marked by shardsave.PerRank; nothing was written",
        ),
    ),
    "function on one": (
        function_on_one,
        (
            "UnsupportedTrainingError",
            "cannot save training['callback']: plain data, a tensor or an object with state_dict and load_state_dict was expected, it is a "
            "builtin_function_or_method; nothing was written",
        ),
    ),
    "summands": (
        summands,
        (
            "UnsupportedTensorError",
            "cannot save training['sum']: a tensor of which each rank has a part or a copy was expected, it is ",
        ),
    ),
}


def save_what_is_refused(rank: int, folder: Path) -> dict[str, Outcome]:
    training = TRAININGS["rows"](0)
    training.steps(1)
    found = {}
    for name, (change, _) in SAVES.items():
        changed = training._replace(state=change(rank, training))
        found[name] = outcome(lambda: shardsave.save(training.model, folder, training=changed.state, durable=False))
        dist.barrier()
        found[f"{name}: files"] = ("", " ".join(os.listdir(folder) if folder.exists() else []))
    training.save(folder)
    return found


def test_saves(tmp_path: Path) -> None:
    """Catches a rank that does not raise, or something else than the others; files that stay; a later save that fails."""
    for found in run_ranks(4, save_what_is_refused, tmp_path / "ckpt"):
        for name, (_, (kind, message)) in SAVES.items():
            assert found[name][0] == kind and message in found[name][1], found[name]
            assert found[f"{name}: files"] == ("", "")
    assert shardsave.verify(tmp_path / "ckpt").verified


def save_diverged(rank: int, folder: Path) -> list[Outcome]:
    training = TRAININGS["data_parallel"](0)
    training.steps(1)
    states = training.state["optimizer"].state
    state, whole = next(iter(states.values())), training.whole()
    state["exp_avg"][0] += float(rank == 2)
    found = [outcome(lambda: training.save(folder)), outcome(lambda: training.save(folder, on_divergence="lowest_rank"))]
    training = TRAININGS["data_parallel"](1)
    training.resume(folder)
    again = training.whole()
    name = next(name for name in whole if "exp_avg 0" in name)
    assert torch.equal(whole[name], again[name])
    return found


def test_replicas(tmp_path: Path) -> None:
    """Catches one of several different replicas that is saved without a word."""
    for found in run_ranks(4, save_diverged, tmp_path):
        (kind, message), (no_kind, notes) = found
        assert kind == "UnsupportedTensorError" and "rank 2" in message
        assert message.startswith("cannot save the training state's 'optimizer/up.weight/exp_avg': the same values")
        assert "what each rank has for itself is marked by shardsave.PerRank; on_divergence='lowest_rank' saves" in message
        assert no_kind == "" and "optimizer/up.weight/exp_avg" in notes


class Refusing:
    """Its state is refused by rank 1."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("no room")


def save_for_resumes(rank: int, folder: Path) -> None:
    training = TRAININGS["rows"](0)
    training.steps(2)
    training.save(folder)
    training.state["refusing"] = Refusing()
    training.save(folder.with_name("refusing"))


def resume_what_is_refused(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def attempt(name: str, where: Path = folder, change: dict[str, Any] | None = None, **options: Any) -> None:
        training = TRAININGS["rows"](4)
        training.state.update(change or {})
        before = training.digest()
        found[name] = outcome(lambda: training.resume(where, **options)), training.digest() == before

    parameters = [p for p in TRAININGS["rows"](4).model.parameters() if p.requires_grad]
    attempt("other class", change={"optimizer": torch.optim.SGD(parameters)} if rank == 1 else {})
    attempt("other arguments", strict=rank != 2)
    attempt("missing leaf", change={"more": torch.ones(2)} if rank == 3 else {})
    attempt("damaged", folder.with_name("damaged"))
    attempt("file missing", folder.with_name("missing"))
    attempt("refusing", folder.with_name("refusing"), {"refusing": Refusing()})
    attempt("nothing there", folder.with_name("nothing"))
    attempt("in the end")
    return found


def test_resumes(tmp_path: Path) -> None:
    """Catches a rank that goes on where another one cannot, or that is changed although one refuses."""
    folder = tmp_path / "ckpt"
    run_ranks(4, save_for_resumes, folder)
    for name in ("damaged", "missing"):
        shardsave.convert(folder, tmp_path / name)
    damaged = training_directory(tmp_path / "damaged") / "rank-00002-00001.tensors"
    content = bytearray(damaged.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    name = next(name for name in header if name.startswith("optimizer/up.weight/exp_avg at "))
    content[begin + header[name]["data_offsets"][0]] ^= 1
    damaged.write_bytes(content)
    (training_directory(tmp_path / "missing") / "rank-00003-00001.tensors").unlink()
    words = {
        "other class": ("IncompatibleCheckpointError", "the checkpoint has the state of AdamW, this is SGD"),
        "other arguments": (
            "ValueError",
            "the same strict was expected on all ranks, it is True on rank 0, rank 1, rank 3, False on rank 2",
        ),
        "missing leaf": ("IncompatibleCheckpointError", "training['more']: the checkpoint has nothing for a Tensor"),
        "damaged": ("CorruptCheckpointError", "tensor 'optimizer/up.weight/exp_avg at "),
        "file missing": ("CorruptCheckpointError", "rank-00003-00001.tensors, there is no such file"),
        "refusing": ("IncompatibleCheckpointError", "it raised RuntimeError: no room"),
        "nothing there": ("CheckpointNotFoundError", ""),
        "in the end": ("", ""),
    }
    ends = run_ranks(4, resume_what_is_refused, folder)
    for name, (kind, message) in words.items():
        outcomes = [found[name][0] for found in ends]
        assert {k for k, _ in outcomes} == {kind} and all(message in text for _, text in outcomes), (name, outcomes)
        assert kind == "" or len({text for _, text in outcomes}) == 1, (name, outcomes)
        assert all(found[name][1] == (name not in ("refusing", "in the end")) for found in ends), name


def resume_with_less(rank: int, folder: Path) -> list[Outcome]:
    training = TRAININGS["rows"](4)
    before = training.digest()
    found = [outcome(lambda: training.resume(folder, on_world_change="raise"))]
    assert training.digest() == before
    return found


def test_another_number_of_ranks_can_be_refused(tmp_path: Path) -> None:
    """Catches a resume on another number of ranks that nobody wanted."""
    run_ranks(4, save_for_resumes, tmp_path / "ckpt")
    for ((kind, message),) in run_ranks(2, resume_with_less, tmp_path / "ckpt"):
        assert kind == "IncompatibleCheckpointError" and "2 ranks were expected, 4 saved it; nothing was changed" in message


def save_without_room(rank: int, folder: Path) -> list[Any]:
    training = TRAININGS["rows"](0)
    training.steps(1)
    training.save(folder)
    names, create = sorted(os.listdir(folder)), Staging.create

    def full(self: Staging, name: str, length: int) -> Any:
        if rank == 2 and name.startswith("training-"):
            raise CallFailed("fallocate", name, errno.ENOSPC, "No space left on device")
        return create(self, name, length)

    with mock.patch.object(Staging, "create", full):
        found = outcome(lambda: training.save(folder))
    dist.barrier()
    same = sorted(os.listdir(folder)) == names
    dist.barrier()
    training.save(folder)
    return [found, same]


def test_a_rank_without_room_for_its_file(tmp_path: Path) -> None:
    """Catches a file of a rank that is missing in a commit, or that outlives a save that failed."""
    for (kind, message), same in run_ranks(4, save_without_room, tmp_path):
        assert (
            kind == "OutOfSpaceError" and message.startswith("rank 2: cannot write ") and "rank-00002-00001.tensors" in message
        )
        assert same
    assert shardsave.verify(tmp_path).verified and len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
