"""`verify` of damaged checkpoints: with ``keep_going`` everything readable is read, and the report lists damaged and intact."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import shardsave


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """Six tensors in three shards: t0 t1, t2 t3, t4 t5."""
    state = {f"t{n}": torch.full((500,), float(n)) for n in range(6)}
    shardsave.save({**state, "tied": state["t0"]}, tmp_path, max_shard_size=4000, durable=False)
    assert len(shardsave.inspect(tmp_path).shards) == 3
    return tmp_path


def shard(ckpt: Path, number: int) -> Path:
    return ckpt / f"model-0000{number}-of-00003.safetensors"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_nothing_damaged(ckpt: Path) -> None:
    """Catches damage reported for an intact checkpoint, and an intact tensor that is not in the report."""
    for report in (shardsave.verify(ckpt), shardsave.verify(ckpt, keep_going=True)):
        assert report.verified is True and report.damaged == () and report.tensors == 6 and report.bytes == 12_000
        assert [list(names) for names in report.intact.values()] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
        assert str(report).startswith(f"verified {ckpt}: 12.0 kB, 6 tensors in 3 shards")


def test_everything_that_is_damaged_is_named(ckpt: Path) -> None:
    """Catches a verification that ends at the first damage: here a bit is flipped in the data of two shards and in the header of one."""
    flip(shard(ckpt, 1), -1)
    flip(shard(ckpt, 2), 100)
    flip(shard(ckpt, 3), -1)
    flip(shard(ckpt, 3), 4096)
    report = shardsave.verify(ckpt, keep_going=True)
    assert [(damage.shard, damage.tensors) for damage in report.damaged] == [
        (shard(ckpt, 2).name, ("t2", "t3")),
        (shard(ckpt, 1).name, ("t1",)),
        (shard(ckpt, 3).name, ("t4",)),
        (shard(ckpt, 3).name, ("t5",)),
    ]
    assert report.intact == {shard(ckpt, 1).name: ("t0",), shard(ckpt, 3).name: ()}
    assert report.verified is False and report.tensors == 1
    assert "the index says a header with checksum" in report.damaged[0].message
    assert "tensor 't5' has checksum" in report.damaged[3].message
    assert str(report).startswith(f"damaged {ckpt}: t2, t3, t1 and 2 more; 1 tensor intact, ")
    with pytest.raises(shardsave.CorruptCheckpointError, match="header with checksum"):
        shardsave.verify(ckpt)


@pytest.mark.parametrize("accident", ["removed", "cut", "a directory"])
def test_shards_that_cannot_be_opened(ckpt: Path, accident: str) -> None:
    """Catches a missing, cut or replaced file that hides intact tensors."""
    lost = shard(ckpt, 2)
    if accident == "cut":
        os.truncate(lost, 5000)
    else:
        lost.unlink()
    if accident == "a directory":
        lost.mkdir()
    report = shardsave.verify(ckpt, keep_going=True)
    (damage,) = report.damaged
    assert damage.shard == lost.name and damage.tensors == ("t2", "t3") and lost.name in damage.message
    assert sorted(name for names in report.intact.values() for name in names) == ["t0", "t1", "t4", "t5"]


def test_a_shard_that_cannot_be_read(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bad sector in one file that stops the verification of the other files."""
    from shardsave._engine import engine
    from shardsave._engine.transfer import TransferFault

    real, bad = engine.read, shard(ckpt, 2).stat().st_ino

    def read(files: list[int], *rest: object, **options: object) -> object:
        if any(os.fstat(file).st_ino == bad for file in files):
            raise TransferFault(0, "pread", 5, 4096, 4000)
        return real(files, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "read", read)
    report = shardsave.verify(ckpt, keep_going=True)
    (damage,) = report.damaged
    assert damage.tensors == ("t2", "t3") and "pread of 4000 bytes at offset 4096: Input/output error" in damage.message
    assert report.tensors == 4 and len(report.intact[shard(ckpt, 1).name]) == 2
    with pytest.raises(shardsave.ShardSaveError, match="Input/output error"):
        shardsave.verify(ckpt)


def test_a_lone_file_and_an_index(ckpt: Path, tmp_path: Path) -> None:
    """Catches a broken single file that passes, and a broken index that raises no error: without it nothing is known."""
    path = tmp_path / "lone.safetensors"
    path.write_bytes(b"\x05")
    (damage,) = shardsave.verify(path, keep_going=True).damaged
    assert damage.shard == path.name and damage.tensors == () and "header" in damage.message
    assert str(shardsave.verify(path, keep_going=True)).startswith(f"damaged {path}: lone.safetensors; 0 tensors intact, ")
    flip(ckpt / "model.safetensors.index.json", 5)
    with pytest.raises(shardsave.CorruptCheckpointError, match="corrupt index"):
        shardsave.verify(ckpt, keep_going=True)


@pytest.mark.parametrize("part", ["architecture-*.json", "extra-*.tensors"])
@pytest.mark.parametrize("at", [20, -1])
def test_parts_beside_the_weights(tmp_path: Path, part: str, at: int) -> None:
    """Catches a damaged architecture that passes, or that makes the weights count as damaged."""
    model = torch.nn.Linear(3, 2)
    model.register_buffer("scratch", torch.arange(3.0), persistent=False)
    shardsave.save(model, tmp_path, architecture=True)
    whole = shardsave.verify(tmp_path, keep_going=True)
    assert whole.verified is True and len(whole.intact) == 3 and sum(map(len, whole.intact.values())) == 3
    (path,) = tmp_path.glob(part)
    flip(path, at)
    report = shardsave.verify(tmp_path, keep_going=True)
    (damage,) = report.damaged
    assert damage.shard == path.name and damage.tensors == (("scratch",) if at < 0 and "extra" in part else ())
    assert report.intact["model-00001-of-00001.safetensors"] == ("weight", "bias")
    with pytest.raises(shardsave.CorruptCheckpointError):
        shardsave.verify(tmp_path)


def test_a_save_during_verify(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint that is reported damaged because a save replaced it while it was being opened."""
    from shardsave._storage import open_checkpoint

    real, saves = open_checkpoint.parse_index, iter([True])

    def parse(data: bytes, where: str) -> object:
        index = real(data, where)
        if next(saves, False):
            shardsave.save({"new": torch.ones(3)}, ckpt, durable=False)
        return index

    monkeypatch.setattr(open_checkpoint, "parse_index", parse)
    report = shardsave.verify(ckpt, keep_going=True)
    assert report.verified is True and list(report.intact.values()) == [("new",)]


@pytest.mark.parametrize("content", ["torch", "old", "gguf", "dtype"])
def test_sound_files_of_another_kind(tmp_path: Path, content: str) -> None:
    """Catches a sound file that counts as damaged because shardsave does not read its kind."""
    path = tmp_path / "x.safetensors"
    if content in ("torch", "old"):
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=content == "torch")
    else:
        header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
        path.write_bytes(
            b"GGUF\3\0\0\0" + bytes(64) if content == "gguf" else len(header).to_bytes(8, "little") + header + b"123"
        )
    for keep_going in (False, True):
        with pytest.raises(shardsave.IncompatibleCheckpointError):
            shardsave.verify(path, keep_going=keep_going)
