"""NumPy arrays in files of torch.save: they are read as tensors, or they are counted with their bytes; none is lost.

Method: torch.save writes arrays of all dtypes, orders and layouts in every protocol. Pickles that describe impossible arrays are
made by hand.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_convert import same
from test_torch_files import Rebuilt, converted

import shardsave
from shardsave._foreign import placing, torch_archive

W = {"a": torch.arange(60.0).reshape(20, 3), "b": torch.ones(2)}


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    base = np.arange(6).reshape(2, 3)
    dtypes = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8")
    return {
        **{dtype: base.astype(dtype) for dtype in dtypes},
        **{f"swapped {dtype}": base.astype(f">{dtype}") for dtype in ("i2", "f4", "c8")},
        "columns": np.asfortranarray(base), "both": np.asfortranarray(base.astype(">f8")), "slice": base[:, 1:], "reversed": base[::-1],
        "scalar": np.array(2.5), "empty": np.zeros((0, 3)), "matrix": np.ones((1, 2)).view(np.matrix),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_tensors(tmp_path: Path, protocol: int, zipped: bool) -> None:
    """Catches weights that are NumPy arrays and are left out, are refused, or come back in another order of bytes or elements."""
    torch.save({**W, **arrays()}, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    state, notes = converted(tmp_path / "x.pt")
    native = {name: torch.from_numpy(np.array(a, dtype=a.dtype.newbyteorder("="))) for name, a in arrays().items()}
    assert same(state, {**W, **native}) and notes == ()


def test_dtypes_of_ml_dtypes(tmp_path: Path) -> None:
    """Catches arrays of bfloat16, as JAX has them, that are refused without a way on."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    torch.save({"w": np.array([1.5, -2], ml_dtypes.bfloat16)}, tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt")[0], {"w": torch.tensor([1.5, -2], dtype=torch.bfloat16)})


def test_a_state_of_arrays_beside_the_weights(tmp_path: Path) -> None:
    """Catches a second state that is left out without a question because its weights are arrays."""
    torch.save({"model": W, "ema": {"w": np.ones((10, 10))}}, tmp_path / "x.pt")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'ema' \(1 tensor, 800 B\)"):
        converted(tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt", key="ema")[0], {"w": torch.ones(10, 10, dtype=torch.float64)})
    _, notes = converted(tmp_path / "x.pt", key="model")
    assert notes == ("left out, since not in 'model': 'ema' (dict, 1 tensor, 800 B)",)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(10, "M8[s]"), "NumPy array of M8, 80 B"),
        (np.zeros(10, [("x", "f4")]), "NumPy array of V4, 40 B"),
        (np.ma.array(np.zeros(10)), "NumPy array with a mask, 80 B"),
    ],
    ids=["dates", "fields", "mask"],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_torch_has_not_are_counted(tmp_path: Path, array: Any, words: str, protocol: int) -> None:
    """Catches an array without a dtype of torch that is left out as if it were a setting, without its bytes and without a question."""
    torch.save({"model": W, "more": array}, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"at its top 'more' \(1 tensor, \d+ B\).*drop='more'"):
        converted(tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt", drop="more")[0], W)
    assert converted(tmp_path / "x.pt", key="model")[1] == (f"left out, since not in 'model': 'more' ({words})",)
    torch.save({**W, "more": array}, tmp_path / "y.pt", pickle_protocol=protocol)
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=rf"it has 'more' \({words}\) among its tensors.*drop='more'"
    ):
        converted(tmp_path / "y.pt")


def test_generators_of_numpy_are_training_state(tmp_path: Path) -> None:
    """Catches a usual file that is refused because a generator's state has an array of words."""
    state = np.random.RandomState(0)
    random = {
        "rng_states": {"numpy": state.get_state(), "torch": torch.get_rng_state()}, "np_rng_state": state.get_state(),
        "numpy_random": state.get_state(legacy=False), "rng_state": [{"np_rng_state": state.get_state()}],
        "generator": np.random.default_rng(0).bit_generator.state,
    }  # fmt: skip
    torch.save({"model": W, **random}, tmp_path / "x.pt")
    loaded, (note,) = converted(tmp_path / "x.pt")
    assert same(loaded, W) and "'np_rng_state' (training state, 1 tensor, 2.5 kB)" in note


F4 = Rebuilt(np.dtype, ("f4", False, True))


@pytest.mark.parametrize(
    "arguments",
    [(b"1234", F4, (2,), "C"), (b"12345678", F4, (0, 1 << 61), "C"), (b"1234", F4, (-1,), "C"), (b"1234", F4, "x", "C"),
     ("\u1234", F4, (1,), "C"), (b"1234", "f4", (1,), "C"), (b"1234", F4)],
)  # fmt: skip
def test_impossible_arrays(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    """Catches an array that reads outside of its bytes, takes memory that the file does not have, or ends in a raw error."""
    buffer = Rebuilt(np._core.numeric._frombuffer, arguments)
    torch.save({"w": buffer}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(shardsave.CorruptCheckpointError, match="its pickle is broken"):
        converted(tmp_path / "x.pt")


def test_an_array_without_a_state(tmp_path: Path) -> None:
    """Catches an array that the pickle only begins, and that ends in a raw error."""
    begun = Rebuilt(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"))
    torch.save({"w": begun}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(shardsave.CorruptCheckpointError, match="describes an array that cannot be"):
        converted(tmp_path / "x.pt")
    assert pickle.loads(pickle.dumps(begun)).shape == (0,)


def test_arrays_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sound file that is called corrupt because its arrays make a long pickle."""
    torch.save({"w": np.zeros(10_000)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch_archive, "MAX_PICKLE_BYTES", 10_000)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"at most 10.0 kB of pickle were expected, it has 80"):
        converted(tmp_path / "x.pt")


def test_many_arrays_of_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a few bytes of a pickle that make as many copies of an array as the file wants."""
    raw = bytes(10_000)
    arrays = [Rebuilt(np._core.numeric._frombuffer, (raw, F4, (2_500,), "C")) for _ in range(1000)]
    torch.save({"w": arrays}, tmp_path / "x.pt", pickle_protocol=4)
    monkeypatch.setattr(placing, "MAX_PICKLE_BYTES", 1_000_000)
    with pytest.raises(shardsave.CorruptCheckpointError, match="has arrays of more bytes than a pickle may have"):
        converted(tmp_path / "x.pt")


def test_many_tensors_with_the_same_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a few bytes of a pickle that make as many copies of a tensor's attributes as the file wants."""
    state = {str(number): number for number in range(1000)}
    rebuild = torch._utils._rebuild_parameter_with_state
    tensors = [Rebuilt(rebuild, (torch.ones(1), False, {}, state)) for _ in range(100)]
    torch.save({"w": tensors}, tmp_path / "x.pt")
    monkeypatch.setattr(placing, "_MAX_ATTRIBUTES", 10_000)
    with pytest.raises(shardsave.CorruptCheckpointError, match="its tensors have more than 10000 attributes"):
        converted(tmp_path / "x.pt")
