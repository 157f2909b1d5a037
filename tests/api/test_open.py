"""`open`: tensors one by one from mapped files, and errors for bad files, unknown names and closed checkpoints."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardsave
from support import SmallModel, holds_in_child, same_bits

#: Every kind of basic index for a tensor of shape (4, 6, 3).
INDICES: list[Any] = [
    0, -1, slice(1, 3), slice(None, None, 2), ..., None, (), (1, 2, 0), (slice(2), 3), (..., 1), (slice(None), ..., 2), (None, 0, ...),
    (slice(1, 3), None, slice(0, 5, 3), -1), (0, None),
]  # fmt: skip


def lone_file(path: Path, dtype: str, shape: list[int], data: bytes, lead: int = 0) -> Path:
    """A third-party safetensors file: one tensor ``x`` after ``lead`` bytes of another one, without padding."""
    end = lead + len(data)
    parts = [f'"a":{{"dtype":"U8","shape":[{lead}],"data_offsets":[0,{lead}]}}'] if lead else []
    parts.append(f'"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{lead},{end}]}}')
    header = ("{" + ",".join(parts) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(lead) + data)
    return path


def test_it_equals_load(tmp_path: Path, small_model: SmallModel) -> None:
    """Catches a name, tensor, tie, flag or metadata that is missing, wrong, or in another order."""
    shardsave.save(small_model, tmp_path, max_shard_size=3000, metadata={"run": 7})
    loaded, info = shardsave.load(tmp_path), shardsave.inspect(tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        assert list(ckpt) == list(loaded) == list(ckpt.names) and len(ckpt) == len(loaded) == 14
        assert all(same_bits(ckpt[name], loaded[name]) and not ckpt[name].requires_grad for name in ckpt)
        assert {name: tensor.shape for name, tensor in ckpt.items()} == {name: t.shape for name, t in loaded.items()}
        assert "embed.weight" in ckpt and "embed" not in ckpt and None not in ckpt and ckpt.get("embed") is None
        assert ckpt["head.weight"].data_ptr() == ckpt["embed.weight"].data_ptr()
        assert ckpt.frozen == info.frozen and ckpt.ties == {"head.weight": "embed.weight"} and ckpt.metadata == {"run": 7}
        assert ckpt.path == str(tmp_path) and repr(ckpt) == f"<shardsave.OpenCheckpoint {tmp_path}: 14 names>"
        assert ckpt == ckpt and ckpt != shardsave.open(tmp_path) and hash(ckpt)
    shardsave.save(small_model.state_dict(), tmp_path)
    assert shardsave.open(tmp_path / "model.safetensors.index.json").frozen is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices(tmp_path: Path, dtype: torch.dtype, index: Any) -> None:
    """Catches a part that differs from the indexed tensor."""
    whole = torch.arange(4 * 6 * 3 * dtype.itemsize, dtype=torch.uint8).view(4, 6, -1)
    whole = (whole % 2).view(dtype) if dtype == torch.bool else whole.view(dtype)
    shardsave.save({"x": whole}, tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        part = ckpt.slice("x")
        assert part.shape == tuple(whole.shape) and part.dtype == dtype and len(part) == 4
        assert same_bits(part[index], whole[index]), index


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_of_tensors_that_are_not_aligned(tmp_path: Path, index: Any) -> None:
    """Catches an element that is cut, a part that copies the whole tensor, and a part in unaligned memory."""
    whole = torch.arange(72).view(4, 6, 3)
    path = next(
        path for lead in range(1, 9)
        if (path := lone_file(tmp_path / f"{lead}", "I64", [4, 6, 3], whole.numpy().tobytes(), lead)).stat().st_size % 8 == 3
    )  # fmt: skip
    with shardsave.open(path) as ckpt:
        part = ckpt.slice("x")[index]
        assert same_bits(part, whole[index]) and part.data_ptr() % 8 == 0 and same_bits(ckpt["x"], whole)
        assert part.untyped_storage().nbytes() == part.nbytes


def test_a_scalar_and_nothing(tmp_path: Path) -> None:
    """Catches a tensor without dimensions or without elements that cannot be sliced."""
    shardsave.save({"one": torch.tensor(3.0), "none": torch.zeros(0, 5)}, tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        assert ckpt.slice("one")[...] == 3 and ckpt.slice("one").shape == () and ckpt["one"].item() == 3
        assert ckpt.slice("none")[:, 2].shape == (0,) and ckpt["none"].shape == (0, 5)
        with pytest.raises(TypeError, match="tensor 'one' has no length, it is a scalar"):
            len(ckpt.slice("one"))
        with pytest.raises(IndexError):
            ckpt.slice("one")[0]


def test_nothing_is_read_before_access(tmp_path: Path) -> None:
    """Catches a file that is read, copied or counted as used memory when it is opened: this one is larger than any memory."""
    path = lone_file(tmp_path / "model.safetensors", "U8", [1], b"\x07")
    size = 4 << 40
    header = b'{"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x05")
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no files of 4 TiB")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with shardsave.open(path) as ckpt:
        assert ckpt["x"].shape == (size,) and ckpt["x"][0] == 5 and ckpt.slice("x")[-3:].tolist() == [0, 0, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_writes_stay_private(tmp_path: Path) -> None:
    """Catches a write into a tensor that changes the file, or what other readers of it see."""
    shardsave.save({"x": torch.zeros(1000)}, tmp_path)
    with shardsave.open(tmp_path) as ckpt, shardsave.open(tmp_path) as other:
        ckpt["x"].fill_(5)
        assert ckpt.slice("x")[3] == 5 and other["x"].sum() == 0
    assert shardsave.verify(tmp_path).verified


def test_all_tensors_are_from_one_save(tmp_path: Path) -> None:
    """Catches tensors of two saves in one open checkpoint: a second save happens between opening and reading."""
    state = {f"t{n}": torch.full((600,), 1.0) for n in range(4)}
    shardsave.save(state, tmp_path, max_shard_size=3000)
    with shardsave.open(tmp_path) as ckpt:
        shardsave.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path, max_shard_size=3000)
        assert all((tensor == 1).all() for tensor in ckpt.values())
        with shardsave.open(tmp_path) as again:
            assert all((tensor == 2).all() for tensor in again.values())


def test_after_close(tmp_path: Path) -> None:
    """Catches a closed checkpoint that crashes or still returns tensors, and tensors that become invalid with it."""
    shardsave.save({"x": torch.ones(3), "y": torch.ones(2)}, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with shardsave.open(tmp_path) as ckpt:
        kept, part = ckpt["x"], ckpt.slice("y")
    words = rf"cannot read '[xy]' from {tmp_path}: an open checkpoint was expected, it was closed; tensors that were asked for"
    asked: list[Callable[[], object]] = [lambda: ckpt["x"], lambda: ckpt.slice("x")[0], lambda: part[0], lambda: dict(ckpt)]
    for ask in asked:
        with pytest.raises(ValueError, match=words):
            ask()
    assert ckpt.closed and list(ckpt) == ["x", "y"] and part.shape == (2,) and repr(ckpt).endswith("2 names, closed>")
    ckpt.close()
    assert kept.sum() == 3
    del kept
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    """Catches an error that is not a KeyError, as a mapping needs, or not one of this package; and one without a hint."""
    shardsave.save({"layer.weight": torch.ones(3)}, tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        asked: list[Callable[[], object]] = [lambda: ckpt["layer.wieght"], lambda: ckpt.slice("layer.wieght")]
        for ask in asked:
            for kind in (KeyError, shardsave.IncompatibleCheckpointError):
                with pytest.raises(kind) as caught:
                    ask()
                assert str(caught.value) == (
                    f"cannot read from {tmp_path}: 'layer.wieght' was asked for (the closest is 'layer.weight'), the checkpoint "
                    f"has no tensor of that name"
                )


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_a_forked_child(tmp_path: Path) -> None:
    """Catches a forked child (of a DataLoader, say) whose descriptors are closed and which then maps some other file."""
    shardsave.save({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int64)}, tmp_path, max_shard_size=16)
    with shardsave.open(tmp_path) as ckpt:
        assert ckpt["x"].sum() == 3  # one shard is mapped by now, the other is not
        assert holds_in_child(lambda: ckpt["x"].tolist() == [1, 1, 1] and ckpt["y"].tolist() == [1, 1])


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    """Catches a checkpoint that cannot be opened, or not be read completely, because it has many shards."""
    state = {f"t{n}": torch.full((2,), float(n)) for n in range(60)}
    shardsave.save(state, tmp_path, max_shard_size=8, durable=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 70, hard))
    try:
        with shardsave.open(tmp_path) as ckpt:
            assert all(ckpt[name].tolist() == [n, n] for n, name in enumerate(state))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("length", [0, 5000])
def test_a_file_that_is_cut_while_open(tmp_path: Path, length: int) -> None:
    """Catches a tensor mapped beyond the end of its file: access to it kills the process."""
    shardsave.save({"x": torch.ones(10_000)}, tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        os.truncate(tmp_path / "model-00001-of-00001.safetensors", length)
        with pytest.raises(shardsave.CorruptCheckpointError, match="it was cut while the checkpoint was open"):
            ckpt["x"]


def test_wrong_paths(tmp_path: Path) -> None:
    """Catches a path of a wrong type, and a missing checkpoint that raises an error of another package."""
    with pytest.raises(shardsave.CheckpointNotFoundError, match="no checkpoint at"):
        shardsave.open(tmp_path)
    with pytest.raises(TypeError, match="the path of a checkpoint must be a string or a pathlib.Path, not int"):
        shardsave.open(3)  # type: ignore[arg-type]


def test_metadata_of_a_single_file(tmp_path: Path) -> None:
    """Catches the metadata of a third-party file that are lost, and entries that mean something else among them."""
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt", "license": "mit", "tied": "a"})
    with shardsave.open(tmp_path / "x.safetensors") as ckpt:
        assert ckpt.metadata == {"license": "mit"} and ckpt.ties == {"tied": "a"}
    assert shardsave.inspect(tmp_path / "x.safetensors").metadata == {"license": "mit"}
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    assert shardsave.open(tmp_path / "y.safetensors").metadata == {}
    report = shardsave.convert(tmp_path / "x.safetensors", tmp_path / "z.safetensors", to="safetensors")
    assert shardsave.open(report.path).metadata == {"license": "mit"}
