"""Checked by mypy, never run: what the public functions take and give, and what they must not take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import assert_type

import shardsave


def saving(model: torch.nn.Module, compiled: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> None:
    report = shardsave.save(model, "ckpt", max_shard_size="5GB", durable=True, metadata={"run": "7"}, progress=None)
    assert_type(report, shardsave.SaveReport)
    shardsave.save({"x": np.zeros(3), "y": torch.zeros(2)}, Path("ckpt"), max_shard_size=10**9, lock_timeout=1)
    shardsave.save(compiled, "ckpt", progress=lambda done, total: print(done / total), lock_timeout=0.5)
    shardsave.save(parameters, "ckpt", progress=True, metadata=None)
    shardsave.save(OrderedDict(model.state_dict()), "ckpt")
    shardsave.save(model, "ckpt", dtype="bfloat16", only="trainable")
    plan = shardsave.plan_save(model, "ckpt", dtype=torch.bfloat16, only=None, keep_last=3)
    assert_type(plan, shardsave.SavePlan)
    assert_type(plan.files, tuple[shardsave.PlannedFile, ...])
    assert_type(plan.fits, bool | None)
    assert_type(plan.keep_bytes, int | None)
    assert_type(report.left_out, tuple[str, ...])
    assert_type(report.bytes, int)
    assert_type(report.tensors, int)
    assert_type(report.shards, int)
    assert_type(report.seconds, float)
    assert_type(report.bytes_per_second, float)
    assert_type(report.phases, shardsave.Phases)
    assert_type(report.phases.plan + report.phases.transfer + report.phases.sync + report.phases.commit, float)
    assert_type(report.engine, str)
    assert_type(report.direct, bool)
    assert_type(report.pinned, bool)
    assert_type(report.staging_bytes, int)
    assert_type(report.wait_cleaned(timeout=0.5), bool)
    assert_type(report.durable, bool)
    assert_type(report.leftovers, tuple[str, ...])
    assert_type(report.overlaps, tuple[tuple[str, str], ...])
    assert_type(report.notes, tuple[str, ...])


def loading(model: torch.nn.Module) -> None:
    state = shardsave.load("ckpt", device="cuda:0", names=None, prefix="", verify=True, mmap=False)
    assert_type(state, dict[str, torch.Tensor])
    shardsave.load(Path("ckpt"), device=torch.device("cpu"), names={"a", "b"}, progress=False)
    shardsave.load("ckpt", device=0, names=(name for name in ["a"]), mmap=True)
    report = shardsave.load_model(model, "ckpt", device=None, prefix="", strict=True, restore_frozen=True, verify=True)
    assert_type(report, shardsave.LoadReport)
    shardsave.load_model(model, Path("ckpt"), device="cuda", progress=lambda done, total: None)
    assert_type(report.verified, bool | None)
    assert_type(report.missing, tuple[str, ...])
    assert_type(report.unexpected, tuple[str, ...])
    assert_type(report.mismatched, tuple[str, ...])
    assert_type(report.frozen, int | None)


def opening() -> None:
    with shardsave.open(Path("ckpt")) as ckpt:
        assert_type(ckpt, shardsave.OpenCheckpoint)
        assert_type(ckpt["x"], torch.Tensor)
        assert_type(ckpt.get("x"), torch.Tensor | None)
        part = ckpt.slice("x")
        assert_type(part, shardsave.TensorSlice)
        assert_type(part[0:10, ..., None], torch.Tensor)
        assert_type(part.shape, tuple[int, ...])
        assert_type(part.dtype, torch.dtype)
        assert_type(ckpt.names, tuple[str, ...])
        assert_type(ckpt.frozen, frozenset[str] | None)
        assert_type(ckpt.ties, Mapping[str, str])
        assert_type(ckpt.metadata, Mapping[str, Any])
        assert_type([name for name in ckpt], list[str])
        assert_type(dict(ckpt), dict[str, torch.Tensor])


def resuming(model: torch.nn.Module, training: dict[str, Any]) -> None:
    resumed = shardsave.resume(
        Path("ckpt"), model, training=training, rng=True, only=["optimizer"], skip=("ema",), strict=False
    )
    assert_type(resumed, shardsave.Resumed)
    assert_type(resumed.next_step, int)
    assert_type(resumed.report, shardsave.LoadReport | None)
    assert_type(shardsave.resume("ckpt", rng=True, on_world_change="raise", device="cpu").step, int | None)
    assert_type(shardsave.load_model(model, "ckpt", part="ema"), shardsave.LoadReport)


def whole_models(model: torch.nn.Module) -> None:
    shardsave.save(model, "ckpt", architecture=True, program=((torch.zeros(2),), {}))
    assert_type(
        shardsave.build_model("ckpt", device="cuda:0", trust=["mylib"], classes={"__main__.Net": torch.nn.Linear}),
        torch.nn.Module,
    )
    assert_type(shardsave.load_program("ckpt", device="cpu", verify=False), torch.nn.Module)


def converting() -> None:
    report = shardsave.convert("old.pt", Path("ckpt"), dtype=torch.bfloat16, drop="optimizer.*", rename=[("^", "x.")])
    assert_type(report, shardsave.ConvertReport)
    shardsave.convert(Path("ckpt"), "new.safetensors", to="safetensors", dtype="float16", key=None, progress=False)
    assert_type(shardsave.diff("a", "b"), shardsave.DiffReport)


def looking() -> None:
    info = shardsave.inspect(Path("ckpt"))
    assert_type(info, shardsave.CheckpointInfo)
    assert_type(info.names, tuple[str, ...])
    assert_type(info.frozen, frozenset[str] | None)
    assert_type(info.parameters, frozenset[str] | None)
    assert_type(info.ties, Mapping[str, str])
    assert_type(info.metadata, Mapping[str, Any])
    assert_type(info.durable, bool | None)
    assert_type(info.shards, tuple[str, ...])
    tensor = info.tensors["x"]
    assert_type(tensor, shardsave.TensorInfo)
    assert_type(tensor.dtype, torch.dtype)
    assert_type(tensor.shape, tuple[int, ...])
    assert_type(tensor.nbytes, int)
    assert_type(tensor.shard, str)
    assert_type(info.parts, Mapping[str, str])
    built = shardsave.build_model("ckpt", device="cuda", trust=["mylib"], classes={"mylib.Old": torch.nn.Linear})
    assert_type(built, torch.nn.Module)
    found = shardsave.diff("before", Path("after"), progress=None)
    assert_type(found, shardsave.DiffReport)
    assert_type(found.equal + found.added + found.removed, tuple[str, ...])
    assert_type(found.flags, Mapping[str, tuple[bool | None, bool | None]] | None)
    assert_type(found.same, bool)
    change = found.changed["x"]
    assert_type(change, shardsave.TensorChange)
    assert_type(change.dtype, tuple[torch.dtype, torch.dtype])
    assert_type(change.max_absolute, float | None)
    cleaned = shardsave.clean(Path("ckpt"), remove=False, other_hosts=True, lock_timeout=0.5)
    assert_type(cleaned, shardsave.CleanReport)
    assert_type(cleaned.found + cleaned.left, tuple[shardsave.Leaving, ...])
    assert_type(cleaned.removed + cleaned.leftovers, tuple[str, ...])
    assert_type(cleaned.found[0].dead, bool)
    report = shardsave.verify("ckpt", keep_going=True, progress=True)
    assert_type(report.damaged, tuple[shardsave.Damage, ...])
    assert_type(report.intact, Mapping[str, tuple[str, ...]])
    assert_type(report, shardsave.VerifyReport)
    assert_type(report.verified, bool | None)
    assert_type(shardsave.__version__, str)


def running(model: torch.nn.Module) -> None:
    with shardsave.CheckpointManager(
        "run", save_every="10min", keep_last=3, keep_best=("loss", "min", 2), durable=True
    ) as manager:
        assert_type(manager, shardsave.CheckpointManager[shardsave.SaveReport])
        assert_type(manager.step(1, model, metrics={"loss": torch.ones(())}, architecture=True), shardsave.SaveReport | None)
        assert_type(manager.save(2, model), shardsave.SaveReport)
        assert_type(manager.latest(), shardsave.StepInfo | None)
        assert_type(manager.steps(), tuple[shardsave.StepInfo, ...])
        assert_type(manager.preempted, bool)
        assert_type(manager.wait_removed(timeout=1), bool)
        manager.save_on_signal(15)
        resumed = manager.resume(model, strict=True)
        if resumed is not None:
            assert_type(resumed.next_step, int)
            assert_type(resumed.notes, tuple[str, ...])
    shardsave.CheckpointManager(
        Path("run"),
        save_every=5,
        policy=lambda steps: [info.step for info in steps if info.metrics["loss"] < 1],
        on_commit=print,
    )
    shardsave.CheckpointManager("run")  # type: ignore[call-overload]
    shardsave.CheckpointManager("run", save_every=1.5)  # type: ignore[call-overload]
    shardsave.CheckpointManager("run", save_every=1, on_corrupt="ignore")  # type: ignore[call-overload]


def in_the_background(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pending = shardsave.save_async(model, Path("ckpt"), training={"optimizer": optimizer}, staging="ring", if_busy="skip")
    assert_type(pending, shardsave.PendingSave)
    shardsave.save_async({"x": np.zeros(3)}, "ckpt", check_unchanged=True, background_workers=2, step_timeout=1, durable=False)
    assert_type(pending.done(), bool)
    assert_type(pending.exception(), BaseException | None)
    assert_type(pending.staged.wait(timeout=1), bool)
    assert_type(pending.cancel(), bool)
    report = pending.wait(timeout=1.5)
    assert_type(report, shardsave.SaveReport)
    assert_type((report.staging, report.staging_reason), tuple[str, str])
    assert_type(report.stall_seconds + report.queue_seconds + report.step_wait_seconds, float)
    assert_type(report.drain_seconds + report.durable_seconds, float)
    assert_type(report.skipped, bool)
    with shardsave.CheckpointManager("run", save_every=1, asynchronous=True, staging="snapshot") as manager:
        assert_type(manager, shardsave.CheckpointManager[shardsave.PendingSave])
        assert_type(manager.step(1, model, if_busy="raise"), shardsave.PendingSave | None)
        assert_type(manager.save(2, model), shardsave.PendingSave)
    shardsave.save_async(model, "ckpt", staging="blocking")  # type: ignore[arg-type]
    shardsave.save_async(model, "ckpt", if_busy=True)  # type: ignore[arg-type]
    shardsave.save_async(model, "ckpt", "ring")  # type: ignore[call-arg]


def errors() -> None:
    try:
        shardsave.load("ckpt")
    except (shardsave.CheckpointNotFoundError, shardsave.CorruptCheckpointError, shardsave.DirectoryBusyError) as error:
        assert_type(error.args, tuple[Any, ...])
    committed: type[shardsave.ShardSaveError] = shardsave.DurabilityUncertainError
    not_committed: type[shardsave.SaveNotCommittedError] = shardsave.OutOfSpaceError
    others: list[type[shardsave.ShardSaveError]] = [shardsave.IncompatibleCheckpointError, shardsave.UnsupportedTensorError]
    print(committed, not_committed, others)


def refused(model: torch.nn.Module, report: shardsave.SaveReport) -> None:
    """Each line is an error; mypy reports an ignore that is not needed."""
    shardsave.save([torch.ones(1)], "ckpt")  # type: ignore[arg-type]
    shardsave.save(model, 3)  # type: ignore[arg-type]
    shardsave.save(model, "ckpt", "5GB")  # type: ignore[call-arg]
    shardsave.save(model, "ckpt", max_shard_size=5.0)  # type: ignore[arg-type]
    shardsave.save(model, "ckpt", durable="yes")  # type: ignore[arg-type]
    shardsave.save(model, "ckpt", progress=lambda done: None)  # type: ignore[arg-type, misc]
    shardsave.load("ckpt", "cuda")  # type: ignore[call-arg]
    shardsave.load("ckpt", device=1.5)  # type: ignore[arg-type]
    shardsave.load("ckpt", names=[1])  # type: ignore[list-item]
    shardsave.load("ckpt", strict=True)  # type: ignore[call-arg]
    shardsave.load_model({"x": torch.ones(1)}, "ckpt")  # type: ignore[arg-type]
    shardsave.load_model("ckpt", model)  # type: ignore[arg-type]
    shardsave.open("ckpt", "r")  # type: ignore[call-arg]
    shardsave.open("ckpt")["x"] = torch.ones(1)  # type: ignore[index]
    shardsave.clean("ckpt", False)  # type: ignore[call-arg]
    shardsave.diff("ckpt")  # type: ignore[call-arg]
    shardsave.inspect("ckpt", True)  # type: ignore[call-arg]
    shardsave.build_model("ckpt", "cpu")  # type: ignore[call-arg]
    shardsave.build_model("ckpt", trust=3)  # type: ignore[arg-type]
    report.bytes = 3  # type: ignore[misc]
