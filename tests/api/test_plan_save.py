"""`plan_save`: what it says is what `save` then does, and it writes nothing."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from faults.beneath import read_record
from faults.running import run_beneath
from shardsave._storage.directory import Directory
from support import SmallModel

WITH_PARTS: dict[str, Any] = {"architecture": True, "max_shard_size": 4000, "metadata": {"run": "é"}}

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "model": (SmallModel, {}),
    "sharded": (SmallModel, {"max_shard_size": 3000, "durable": False}),
    "with parts": (SmallModel, WITH_PARTS),
    "mapping": (lambda: {"x": torch.ones(3), "empty": torch.ones(0)}, {}),
    "cast": (SmallModel, {"dtype": "float64"}),
    "trainable": (SmallModel, {"only": "trainable"}),
    "nothing": (lambda: {}, {}),
}


def files_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith(".")}


def check(plan: shardsave.SavePlan, report: shardsave.SaveReport, files: dict[str, int]) -> None:
    """Each file matches one planned name, and the numbers agree."""
    assert len(files) == len(plan.files)
    for name, length in files.items():
        assert [file.bytes for file in plan.files if fnmatch.fnmatchcase(name, file.name)] == [length], (name, plan.files)
    assert (plan.bytes, plan.tensors, plan.shards) == (report.bytes, report.tensors, report.shards)
    assert plan.disk_bytes == sum(files.values()) <= plan.needed_bytes <= plan.disk_bytes + 4096 * len(files)
    assert (plan.cast, plan.left_out) == (report.cast, report.left_out)
    assert report.staging_bytes <= plan.memory_bytes <= 64 << 20


@pytest.mark.parametrize(("make", "arguments"), KINDS.values(), ids=KINDS)
def test_the_files_of_a_save(tmp_path: Path, make: Callable[[], Any], arguments: dict[str, Any]) -> None:
    """Catches a file that was not planned, a wrong length or name, on a first save, an overwrite, and in the place of a lone file."""
    model, folder = make(), tmp_path / "new" / "ckpt"
    for _ in range(2):
        plan = shardsave.plan_save(model, folder, **arguments)
        check(plan, shardsave.save(model, folder, reuse=False, **arguments), files_in(folder))
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    plan = shardsave.plan_save(model, tmp_path / "lone", **arguments)
    check(plan, shardsave.save(model, tmp_path / "lone", **arguments), files_in(tmp_path / "lone"))


@pytest.mark.slow
def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    """Catches a second name that is counted as a second file, and a config that is forgotten."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], r=2))
    plan = shardsave.plan_save(model, tmp_path, adapter_only=True)
    report = shardsave.save(model, tmp_path, adapter_only=True)
    files = files_in(tmp_path)
    assert os.path.samefile(tmp_path / "adapter_model.safetensors", next(tmp_path.glob("model-*")))
    del files["adapter_model.safetensors"]
    check(plan, report, files)


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch, shardsave
from faults.beneath import recorded
from support import SmallModel
model, folder = SmallModel(), Path(sys.argv[1])
for place in ("new/ckpt", "old"):
    with recorded(folder, Path(sys.argv[2]) / place.partition("/")[0]):
        plan = shardsave.plan_save(model, folder / place, architecture=True)
        assert plan.fits
"""

READING = {
    "access", "close", "closedir", "fcntl", "fdopendir", "fstat", "fstatat", "fstatvfs", "lstat", "openat", "opendir", "readdir", "stat",
}  # fmt: skip


@pytest.mark.slow
def test_nothing_is_written(beneath: Path, tmp_path: Path) -> None:
    """Catches a file, a directory or a lock that a plan creates, even for a moment, and a file opened for writing."""
    folder, records = tmp_path / "watched", tmp_path / "records"
    records.mkdir()
    shardsave.save(SmallModel(), folder / "old", architecture=True)
    before = files_in(folder / "old")
    run_beneath(beneath, "native", ["-c", SCRIPT, str(folder), str(records)])
    assert files_in(folder / "old") == before and os.listdir(folder) == ["old"]
    for name in ("new", "old"):
        calls = read_record(records / name)
        assert calls and {call.call for call in calls} <= READING, {call.call for call in calls}
        assert not any(call.a & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for call in calls if call.call == "openat")


def test_room_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that fits where the save does not, and the other way round; the old checkpoint is not free space."""
    model = SmallModel()
    plan = shardsave.plan_save(model, tmp_path / "ckpt", keep_last=3)
    assert plan.fits and plan.keep_bytes == 4 * plan.disk_bytes
    for free, fits in ((plan.needed_bytes, True), (plan.bytes // 2, False), (None, None)):
        monkeypatch.setattr(Directory, "free_bytes", lambda self, free=free: free)
        plan = shardsave.plan_save(model, tmp_path / "ckpt")
        assert plan == replace(shardsave.plan_save(model, tmp_path / "ckpt", reuse=False), free_memory=plan.free_memory)
        assert (plan.free_bytes, plan.fits) == (free, fits)
        if fits is False:
            with pytest.raises(shardsave.OutOfSpaceError):
                shardsave.save(model, tmp_path / "ckpt", reuse=False)
            shardsave.save(model, tmp_path / "ckpt")  # which of its shards need no room, only their tensors tell
            assert "does not fit" in str(plan)
        else:
            shardsave.save(model, tmp_path / "ckpt", reuse=False)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    """Catches a plan for what a save refuses; both say the same."""
    (tmp_path / "file").touch()
    cases: list[tuple[Any, Path, dict[str, Any]]] = [
        ({"x": torch.ones(2).to_sparse()}, tmp_path / "a", {}),
        (nn.Linear(2, 2, device="meta"), tmp_path / "a", {}),
        ({"x": torch.ones(1)}, tmp_path / "file" / "a", {}),
        ({"x": torch.ones(1)}, tmp_path / "a", {"max_shard_size": "many"}),
        ({"x": torch.ones(1)}, tmp_path / "a", {"architecture": True}),
        (nn.Sequential(nn.Linear(2, 2)), tmp_path / "a", {"adapter_only": True}),
        ({"x": torch.ones(1)}, tmp_path / "a", {"lock_timeout": -1}),
        ({"x": torch.ones(1)}, tmp_path / "a", {"metadata": {"x": object()}}),
    ]
    for source, folder, arguments in cases:
        said = []
        for verb in (shardsave.plan_save, shardsave.save):
            with pytest.raises((TypeError, ValueError, shardsave.ShardSaveError)) as refusal:
                verb(source, folder, **arguments)
            said.append((refusal.type, str(refusal.value)))
        assert said[0] == said[1]
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="keep_last must be a number of checkpoints"):
            shardsave.plan_save({}, tmp_path / "a", keep_last=wrong)  # type: ignore[arg-type]
