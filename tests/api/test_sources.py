"""What `save` accepts: modules and parts of them, mappings, numpy arrays; and places where it cannot write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import shardsave
from shardsave._common import backend
from shardsave._state.module import read_state
from support import SmallModel, let_everybody_in, same_bits


def test_a_sub_module(tmp_path: Path, small_model: SmallModel) -> None:
    """Catches names that contain the path of the sub-module, and flags that are lost."""
    shardsave.save(small_model.encoder, tmp_path)
    info = shardsave.inspect(tmp_path)
    assert info.names == tuple(small_model.encoder.state_dict())
    assert info.frozen == {name for name, _ in small_model.encoder.named_parameters()}
    fresh = SmallModel(seed=5)
    shardsave.load_model(fresh.encoder, tmp_path)
    assert same_bits(fresh.encoder[0].weight, small_model.encoder[0].weight)
    assert not fresh.encoder[0].weight.requires_grad and fresh.narrow.weight.requires_grad


def test_mappings_of_parameters(tmp_path: Path) -> None:
    """Catches a flag for a plain tensor beside a Parameter, and ties within a mapping that are lost."""
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    state = {"w": weight, "again": weight, "free": nn.Parameter(torch.ones(2)), "plain": torch.ones(1)}
    shardsave.save(state, tmp_path)
    info = shardsave.inspect(tmp_path)
    assert info.frozen == {"w", "again"} and info.parameters == {"w", "again", "free"} and info.ties == {"again": "w"}


ARRAYS: dict[str, Any] = {
    "zero-d": np.array(3.0),
    "empty": np.zeros((3, 0), np.float32),
    "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "column": np.arange(12, dtype=np.int16).reshape(3, 4)[:, 1],
    "uint16": np.array([0, 65535], np.uint16),
    "uint64": np.array([2**64 - 1], np.uint64),
    "bool": np.array([True, False]),
    "complex64": np.array([1 + 2j], np.complex64),
    "half": np.array([1.5, -0.0], np.float16),
    "bfloat16": np.array([[1.5, -2.0], [3.0, 4.0]], ml_dtypes.bfloat16),
    "bfloat16 strided": np.arange(8).astype(ml_dtypes.bfloat16)[::2],
    "float8_e4m3fn": np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn),
    "float8_e8m0fnu": np.array([2.0, 4.0], ml_dtypes.float8_e8m0fnu),
}


@pytest.mark.parametrize("read_only", [False, True])
def test_numpy_arrays_of_all_kinds(tmp_path: Path, read_only: bool) -> None:
    """Catches an array whose dtype, strides or write protection torch does not expect; warnings count as errors."""
    arrays = {name: array.copy(order="K") if read_only else array for name, array in ARRAYS.items()}
    for array in arrays.values():
        array.flags.writeable = not read_only
    shardsave.save(arrays, tmp_path)
    loaded = shardsave.load(tmp_path)
    for name, array in arrays.items():
        assert str(loaded[name].dtype) == f"torch.{array.dtype.name}" and loaded[name].shape == array.shape
        values = loaded[name].contiguous().view(torch.uint8) if array.ndim and array.size else loaded[name]
        assert values.numpy().tobytes() == array.tobytes(), name


def test_numpy_arrays_are_not_copied() -> None:
    """Catches a copy of an array on its way to the engine: the entry must have the array's own address."""
    writable = {name: array for name, array in ARRAYS.items() if array.size}
    read_only = {f"{name}, read only": array.copy(order="K") for name, array in writable.items()}
    for array in read_only.values():
        array.flags.writeable = False
    arrays = writable | read_only
    for entry in read_state(arrays).entries:
        assert entry.tensor.data_ptr() == arrays[entry.name].ctypes.data, entry.name


def structured() -> Any:
    return np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i1"), ("b", "f4")])["b"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([object()]), "a dtype that torch has was expected, it is object"),
        (np.array(["text"]), "a dtype that torch has was expected, it is <U4"),
        (np.zeros(2, "M8[s]"), "a dtype that torch has was expected, it is datetime64"),
        (np.zeros(2, np.longdouble), "a dtype that torch has was expected, it is float128"),
        (np.zeros(2, np.complex128), "dtype complex128 has no safetensors equivalent"),
        (np.arange(3)[::-1], "positive strides of whole elements was expected, its strides are"),
        (structured(), r"positive strides of whole elements was expected, its strides are \(5,\) bytes"),
        (np.ma.array([1, 2], mask=[False, True]), "without a mask was expected"),
        (np.zeros(2, ml_dtypes.float4_e2m1fn), "a dtype that torch has was expected, it is float4_e2m1fn"),
        (np.float32(1), "a tensor was expected, it is a float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("read_only", [False, True])
def test_arrays_that_cannot_be_saved(tmp_path: Path, array: Any, words: str, read_only: bool) -> None:
    """Catches an array that is stored with other values, its bytes swapped or its mask lost; and an error without its name."""
    if read_only and isinstance(array, np.ndarray):
        array.flags.writeable = False
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot save 'x': .*{words}.*; nothing was written"):
        shardsave.save({"x": array}, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    """Catches an unclear error, or a file that is replaced by a directory."""
    (tmp_path / "taken").write_bytes(b"mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(shardsave.SaveNotCommittedError) as caught:
            shardsave.save({"x": torch.ones(1)}, path)
        assert str(caught.value) == (
            f"cannot save to {path}: mkdir of {tmp_path / 'taken'}: a directory was expected, it is a file; nothing was written"
        )
    assert (tmp_path / "taken").read_bytes() == b"mine"


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    """Catches an error without the reason, and a checkpoint that is damaged by a save that was not permitted."""
    shardsave.save({"x": torch.ones(1)}, tmp_path / "ckpt")
    (tmp_path / "ckpt").chmod(0o555)
    user = os.geteuid()
    let_everybody_in(tmp_path)
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(shardsave.SaveNotCommittedError, match=r"Permission denied.*; nothing was (committed|written)"):
            shardsave.save({"x": torch.zeros(1)}, tmp_path / "ckpt")
        with pytest.raises(shardsave.SaveNotCommittedError, match=r"cannot save to .*: Permission denied; nothing was written"):
            shardsave.save({"x": torch.zeros(1)}, tmp_path / "ckpt" / "new")
        assert shardsave.load(tmp_path / "ckpt")["x"] == 1
    finally:
        os.seteuid(user)
        (tmp_path / "ckpt").chmod(0o755)


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Runs the test as a user whose permissions are checked, even if the tests run as root."""
    user = os.geteuid()
    let_everybody_in(tmp_path)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def test_an_index_that_may_not_be_read(tmp_path: Path, as_nobody: None) -> None:
    """Catches an error that says there was no checkpoint although nobody could read the directory."""
    folder = tmp_path / "ckpt"
    shardsave.save({"x": torch.ones(1)}, folder)
    index = folder / "model.safetensors.index.json"
    index.chmod(0)
    for durable in (True, False):
        with pytest.raises(shardsave.SaveNotCommittedError) as caught:
            shardsave.save({"x": torch.zeros(1)}, folder, durable=durable)
        assert str(caught.value) == (
            f"cannot write {index}: open: Permission denied; nothing was written, existing files are unchanged"
        )
    index.chmod(0o644)
    assert shardsave.load(folder)["x"] == 1


@pytest.mark.parametrize("mask", [0o777, 0o577, 0o377, 0o677])
def test_a_mask_that_takes_all_permissions(tmp_path: Path, as_nobody: None, mask: int) -> None:
    """Catches a staging directory that is left behind because its own creator may not open it."""
    shardsave.save({"x": torch.ones(1)}, tmp_path / "ckpt")
    before = os.umask(mask)
    try:
        with pytest.raises(shardsave.SaveNotCommittedError, match=r"Permission denied; nothing was committed, the previous"):
            shardsave.save({"x": torch.zeros(1)}, tmp_path / "ckpt")
    finally:
        os.umask(before)
    assert len(os.listdir(tmp_path / "ckpt")) == 2 and shardsave.load(tmp_path / "ckpt")["x"] == 1


def test_a_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare error of Python for a relative path from a directory that no longer exists."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(shardsave.SaveNotCommittedError) as caught:
        shardsave.save({"x": torch.ones(1)}, "ckpt")
    assert str(caught.value) == (
        "cannot save to ckpt: the path is relative to the current directory, which does not exist any more: getcwd: "
        "No such file or directory; nothing was written"
    )
    for verb in (shardsave.load, shardsave.inspect, shardsave.verify):
        with pytest.raises(shardsave.CheckpointNotFoundError, match="no checkpoint at ckpt: No such file or directory"):
            verb("ckpt")
    assert shardsave.save({"x": torch.ones(1)}, tmp_path / "ckpt").tensors == 1


def test_modules_that_look_like_wrappers(tmp_path: Path) -> None:
    """Catches tensors that are lost because a name or a class looks like a wrapper's."""
    model = nn.Module()
    model._orig_mod, model.head = nn.Linear(2, 2), nn.Linear(2, 3)
    shardsave.save(model, tmp_path / "named")
    assert set(shardsave.inspect(tmp_path / "named").names) == {"weight", "bias", "head.weight", "head.bias"}

    class Scaled(nn.DataParallel):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.scale = nn.Parameter(torch.ones(1))

    shardsave.save(Scaled(nn.Linear(2, 2)), tmp_path / "scaled")
    assert "scale" in shardsave.inspect(tmp_path / "scaled").names
    model.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(shardsave.UnsupportedTensorError, match="one tensor of the name 'weight' was expected"):
        shardsave.save(model, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_errors_with_advice(tmp_path: Path) -> None:
    """Catches an error without advice for the most common mistakes of users of torch.save."""
    with pytest.raises(
        shardsave.UnsupportedTensorError, match="it is a dict: save the mapping of tensors itself, the one in 'model'"
    ):
        shardsave.save({"model": {"x": torch.ones(1)}}, tmp_path / "ckpt")  # type: ignore[dict-item]
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(
        shardsave.CheckpointNotFoundError, match="it holds a distributed checkpoint, and no pickle is read here"
    ):
        shardsave.load(tmp_path / "dcp")


@pytest.mark.parametrize("engine", ["native", "portable"])
def test_arrays_in_the_other_byte_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Catches an array of another kind of processor that is refused, copied, tied to its own bytes, or stored with swapped values."""
    if engine == "portable":
        monkeypatch.setattr(backend, "native", None)
    big = np.arange(5_000_000, dtype=">i4")
    arrays = {
        "big": big,
        "columns": np.arange(12, dtype=">f8").reshape(3, 4).T,
        "every second": np.arange(9, dtype=">i2")[::2],
        "complex": np.arange(3, dtype=">c8"),
        "scalar": np.array(7, dtype=">u2"),
        "empty": np.zeros((0, 3), ">f4"),
        "same bytes": big.view("<i4")[:10],
        "same bytes, swapped": big[:10],
        "bytes": np.arange(3, dtype=">u1"),
    }
    arrays["scalar"].flags.writeable = False
    shardsave.save(arrays, tmp_path, durable=False)
    loaded = shardsave.load(tmp_path)
    for name, array in arrays.items():
        assert np.array_equal(loaded[name].numpy(), array) and loaded[name].shape == array.shape, name
    assert read_state(arrays).entries[0].tensor.data_ptr() == big.ctypes.data

    class Module(nn.Module):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {"x": big}

    shardsave.save(Module(), tmp_path / "module", durable=False)
    assert np.array_equal(shardsave.load(tmp_path / "module")["x"].numpy(), big)


def test_advice_for_other_sources(tmp_path: Path) -> None:
    """Catches advice that leads nowhere: for an optimizer's state, for lists, and for plain values."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    cases: list[tuple[Any, str]] = [
        (
            optimizer.state_dict(),
            "cannot save the state dict of an optimizer: .*optimizers are not saved: keep torch.save for it",
        ),
        (
            {"a": [torch.ones(1)]},
            "cannot save 'a': a tensor was expected, it is a list: give each tensor a name of its own, such as 'a.0'",
        ),
        ({"a": (1, 2)}, "cannot save 'a': .* it is a tuple: pass plain values as metadata="),
        ({"a": None}, "cannot save 'a': .* it is a NoneType: pass plain values as metadata="),
    ]
    for source, words in cases:
        with pytest.raises(shardsave.UnsupportedTensorError, match=words):
            shardsave.save(source, tmp_path / "ckpt")
    shardsave.save(nn.Linear(2, 3), tmp_path / "other", durable=False)
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match="; strict=False loads what fits and reports the rest; the mod"
    ):
        shardsave.load_model(model, tmp_path / "other")
