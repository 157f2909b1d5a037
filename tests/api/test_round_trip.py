"""Saves and loads through the public verbs: tensors, names, ties, flags and metadata are restored bit for bit."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import shardsave
from shardsave._common import backend
from shardsave._format.dtypes import BY_TORCH
from support import ROOT, SmallModel, same_bits
from warm_python import warm_python


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(10_000, dtype=torch.float32).reshape(100, 100)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(3, 0, 2),
        "transposed": base.clone().t(),
        "column slice": base.clone()[:, 3:11],
        "expanded": torch.arange(7.0).reshape(7, 1).expand(7, 9),
        "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
        "conjugate": torch.randn(4, 3, dtype=torch.complex64).conj(),
        "offset": torch.arange(1000)[7:],
        "dots.and/slashes": torch.ones(2),
        'quotes"\\': torch.ones(1),
        "ünïcødé 🧊": torch.ones(1),
        "": torch.zeros(1),
    }


def test_every_dtype(tmp_path: Path) -> None:
    """Catches a dtype with a wrong name, size or copy."""
    tensors = {str(dtype): random_bits((3, 5, 4), dtype) for dtype in BY_TORCH}
    shardsave.save(tensors, tmp_path)
    loaded = shardsave.load(tmp_path)
    assert all(same_bits(tensors[name], loaded[name]) for name in tensors)


def test_odd_tensors(tmp_path: Path) -> None:
    """Catches a plain copy of memory whose layout is not that of the file."""
    tensors = odd_tensors()
    shardsave.save(tensors, tmp_path, max_shard_size=5000)
    for loaded in (shardsave.load(tmp_path), shardsave.load(tmp_path, mmap=True)):
        assert loaded.keys() == tensors.keys()
        assert all(same_bits(tensors[name], loaded[name]) for name in tensors)


def test_many_blocks(tmp_path: Path) -> None:
    """Catches blocks or staged pieces that overlap or leave a gap where a tensor is cut."""
    tensors = {
        "plain": torch.randn(5_000_001),
        "strided": torch.randn(1500, 3001).t(),
        "bytes": torch.arange(97).to(torch.uint8),
    }
    shardsave.save(tensors, tmp_path)
    loaded = shardsave.load(tmp_path)
    assert all(same_bits(tensors[name], loaded[name]) for name in tensors)


def test_a_module_and_its_flags(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a lost requires_grad, a lost tie, and parameters that lose their identity."""
    shardsave.save(small_model, tmp_path, metadata={"run": "7", "step": 3})
    fresh = SmallModel(seed=9).requires_grad_(True)
    identities = [id(parameter) for parameter in fresh.parameters()]
    report = shardsave.load_model(fresh, tmp_path)
    assert [id(parameter) for parameter in fresh.parameters()] == identities
    assert all(same_bits(a, b) for a, b in zip(small_model.state_dict().values(), fresh.state_dict().values()))
    flags = [parameter.requires_grad for parameter in small_model.parameters()]
    assert [parameter.requires_grad for parameter in fresh.parameters()] == flags
    assert fresh.head.weight is fresh.embed.weight
    assert report.verified is True and report.frozen == sum(not flag for flag in flags)
    info = shardsave.inspect(tmp_path)
    assert info.frozen == {name for name, p in small_model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    assert info.metadata == {"run": "7", "step": 3}
    assert info.ties == {"head.weight": "embed.weight"}
    assert "encoder: 6 of 6 frozen" in str(info) and "narrow: 0 of 2 frozen" in str(info)


def test_flags_of_mappings(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a plain state dict that is saved with flags, and Parameters in a mapping that lose their flags."""
    shardsave.save(small_model.state_dict(), tmp_path / "plain")
    assert shardsave.inspect(tmp_path / "plain").frozen is None
    shardsave.save(dict(small_model.named_parameters()), tmp_path / "parameters")
    frozen = {name for name, parameter in small_model.named_parameters() if not parameter.requires_grad}
    assert shardsave.inspect(tmp_path / "parameters").frozen == frozen
    fresh = SmallModel().requires_grad_(True)
    shardsave.load_model(fresh, tmp_path / "plain")
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_partial_loads(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a filter that selects too much or too little, and a sub-module that gets another's tensors."""
    shardsave.save(small_model, tmp_path)
    assert shardsave.load(tmp_path, prefix="narrow.").keys() == {"weight", "bias"}
    assert shardsave.load(tmp_path, names=["head.weight"]).keys() == {"head.weight"}
    other = SmallModel(seed=5)
    shardsave.load_model(other.encoder, tmp_path, prefix="encoder.")
    assert same_bits(other.encoder[0].weight, small_model.encoder[0].weight)
    assert not other.encoder[0].weight.requires_grad
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="'narrow.wieght' was asked for .*'narrow.weight'"):
        shardsave.load(tmp_path, names=["narrow.wieght"])
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="begin with embed, encoder, head, narrow, steps"):
        shardsave.load(tmp_path, prefix="decoder.")


def test_partial_load_reads_only_what_it_needs(tmp_path: Path) -> None:
    """Catches a partial load that reads other shards: here they are damaged."""
    shardsave.save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path, max_shard_size=4000)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    assert shardsave.load(tmp_path, names=["a"])["a"].sum() == 1000


def test_numpy_arrays(tmp_path: Path) -> None:
    """Catches arrays that are copied wrongly, and read-only arrays that cause a warning."""
    arrays = {"a": np.arange(12.0).reshape(3, 4), "strided": np.arange(24).reshape(4, 6)[:, ::2]}
    arrays["a"].flags.writeable = False
    shardsave.save(arrays, tmp_path)
    loaded = shardsave.load(tmp_path)
    assert all(np.array_equal(loaded[name].numpy(), array) for name, array in arrays.items())
    with pytest.raises(shardsave.UnsupportedTensorError, match="'r': an array with positive strides of whole elements"):
        shardsave.save({"r": np.arange(3)[::-1]}, tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, dtype=torch.complex128), "dtype complex128 has no safetensors equivalent"),
        (torch.zeros(2).to_sparse(), "layout is sparse_coo"),
        (torch.zeros(2, device="meta"), "meta device"),
        (
            torch.empty_strided((2**40, 0, 2**40), (1, 1, 1)),
            r"fewer than 2\^63, its zeros aside, .* shape is \[1099511627776, 0, 109",
        ),
        ("text", "it is a str"),
        (nn.parameter.UninitializedParameter(), "UninitializedParameter"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, value: object, words: str) -> None:
    """Catches a refusal that comes after something was written, or that does not name the tensor and the reason."""
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot save 'bad': .*{words}.*nothing was written"):
        shardsave.save({"good": torch.ones(1), "bad": value}, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_sizes_beside_a_zero(tmp_path: Path) -> None:
    """Catches an empty tensor that is refused although other readers accept it, or that shardsave cannot load itself."""
    shapes = {"a": (2**31, 0, 2**31), "b": (0, 2**62), "c": (2**62, 0)}
    shardsave.save({name: torch.empty(shape) for name, shape in shapes.items()}, tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in shardsave.load(tmp_path).items()} == shapes
    by_safetensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in by_safetensors.items()} == shapes


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_cannot_be_saved(tmp_path: Path, name: str) -> None:
    """Catches names that safetensors can write but not read."""
    with pytest.raises(shardsave.UnsupportedTensorError):
        shardsave.save({name: torch.ones(1)}, tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    """Catches a wrong argument that is refused only after something happened."""
    for size in ("5 gigs", "-1GB", 0, ""):
        with pytest.raises(ValueError):
            shardsave.save({}, tmp_path / "x", max_shard_size=size)
    with pytest.raises(TypeError):
        shardsave.save({}, tmp_path / "x", metadata={"f": object()})
    with pytest.raises(TypeError):
        shardsave.save([torch.ones(1)], tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        shardsave.save({}, tmp_path / "x", progress=3)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    """Catches progress that moves back or ends too early, and an error of the callback that is lost."""
    calls: list[tuple[int, int]] = []
    shardsave.save({"x": torch.ones(5_000_000)}, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1] == (20_000_000, 20_000_000)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        shardsave.save({"x": torch.zeros(5_000_000)}, tmp_path, progress=stop)
    assert shardsave.load(tmp_path)["x"].min() == 1
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("chosen", ["native", "portable"])
def test_errors_of_a_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """Catches a MemoryError of the callback that counts as an error of the engine, and becomes an OutOfSpaceError."""
    if chosen == "portable":
        monkeypatch.setattr(backend, "native", None)
    callback_error = MemoryError("of the callback")

    def stop(done: int, total: int) -> None:
        raise callback_error

    shardsave.save({"x": torch.ones(5_000_000)}, tmp_path)
    for verb in (functools.partial(shardsave.save, {"x": torch.zeros(5_000_000)}), shardsave.load, shardsave.verify):
        with pytest.raises(MemoryError) as caught:
            verb(tmp_path, progress=stop)
        assert caught.value is callback_error
    assert shardsave.load(tmp_path)["x"].min() == 1 and len(os.listdir(tmp_path)) == 2


def test_shards_keep_the_bound_and_frozen_apart(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches shards beyond the bound, and frozen tensors in a shard with trainable ones."""
    shardsave.save(small_model, tmp_path, max_shard_size=3000)
    info = shardsave.inspect(tmp_path)
    assert info.frozen is not None and info.parameters is not None
    for shard in info.shards:
        inside = {name: tensor for name, tensor in info.tensors.items() if tensor.shard == shard and name not in info.ties}
        assert sum(tensor.nbytes for tensor in inside.values()) <= 3000 or len(inside) == 1
        kinds = {name in info.frozen for name in inside if name in info.parameters}
        assert len(kinds) <= 1


def test_meta_model_is_materialised(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a meta model that stays on the meta device, loses its ties, or gets buffers without values."""
    shardsave.save(small_model, tmp_path)
    with torch.device("meta"):
        empty = SmallModel()
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="on the meta device: scratch"):
        shardsave.load_model(empty, tmp_path)
    assert empty.embed.weight.is_meta
    empty.scratch = torch.zeros(3)
    shardsave.load_model(empty, tmp_path)
    assert empty.head.weight is empty.embed.weight
    assert all(same_bits(a, b) for a, b in zip(small_model.state_dict().values(), empty.state_dict().values()))


def test_strict_load_lists_everything_and_changes_nothing(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a strict load that stops at the first difference, or writes before it has found all of them."""
    state = small_model.state_dict()
    state["narrow.weight"] = torch.zeros(2, 2)
    state["surplus"] = state.pop("steps")
    shardsave.save(state, tmp_path)
    fresh = SmallModel(seed=3)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
        shardsave.load_model(fresh, tmp_path)
    differences = (
        "1 missing from the checkpoint: steps",
        "1 not in the module: surplus",
        "1 mismatched: narrow.weight [2, 2] on disk",
    )
    assert all(words in str(caught.value) for words in differences)
    assert all(same_bits(before[name], tensor) for name, tensor in fresh.state_dict().items())
    report = shardsave.load_model(fresh, tmp_path, strict=False)
    assert report.missing == ("steps",) and report.unexpected == ("surplus",) and len(report.mismatched) == 1
    assert same_bits(fresh.embed.weight, state["embed.weight"]) and same_bits(fresh.narrow.weight, before["narrow.weight"])


def test_casts_as_load_state_dict_does(tmp_path: Path) -> None:
    """Catches bytes of one dtype that are read as another."""
    source = nn.Linear(30, 20)
    shardsave.save(source, tmp_path)
    target, expected = nn.Linear(30, 20).to(torch.bfloat16), nn.Linear(30, 20).to(torch.bfloat16)
    expected.load_state_dict(source.state_dict())
    shardsave.load_model(target, tmp_path)
    assert same_bits(target.weight, expected.weight)


def test_stale_backward_raises(tmp_path: Path) -> None:
    """Catches in-place writes that autograd does not notice, and so silently wrong gradients."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shardsave.save(model, tmp_path)
    loss = model(torch.ones(4)).sum()
    shardsave.load_model(model, tmp_path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_values_for_one_tied_tensor(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a tied parameter that silently takes one of two different values."""
    state = {name: tensor.clone() for name, tensor in small_model.state_dict().items()}
    shardsave.save(state, tmp_path)
    shardsave.load_model(SmallModel(), tmp_path)
    state["head.weight"] += 1
    shardsave.save(state, tmp_path)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'embed.weight' and 'head.weight' are one tensor"):
        shardsave.load_model(SmallModel(), tmp_path)


def test_module_with_its_own_loading(tmp_path: Path) -> None:
    """Catches a load hook that is not called."""

    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *rest)

    source, target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), Doubling(3, 3))
    shardsave.save(source, tmp_path)
    shardsave.load_model(target, tmp_path)
    assert torch.equal(target[1].weight, source[1].weight * 2) and torch.equal(target[0].weight, source[0].weight)


def test_expanded_destination_is_refused(tmp_path: Path) -> None:
    """Catches a write into memory that several elements share."""
    model = nn.Linear(3, 2)
    shardsave.save(model, tmp_path)
    model.weight = nn.Parameter(torch.zeros(1, 3).expand(2, 3))
    with pytest.raises(shardsave.UnsupportedTensorError, match="cannot fill 'weight'.*it is expanded"):
        shardsave.load_model(model, tmp_path)


@pytest.mark.slow
def test_wrappers(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches names on disk that carry a wrapper's prefix."""
    shardsave.save(nn.DataParallel(torch.compile(small_model)), tmp_path)  # type: ignore[arg-type]
    assert set(shardsave.inspect(tmp_path).names) == set(small_model.state_dict())
    fresh = SmallModel(seed=2)
    shardsave.load_model(torch.compile(fresh), tmp_path)  # type: ignore[arg-type]
    assert same_bits(fresh.narrow.weight, small_model.narrow.weight)


@pytest.mark.slow
def test_hundred_thousand_tensors(tmp_path: Path) -> None:
    """Catches run time that grows faster than the number of tensors."""
    tensors = {f"layers.{n}.w": torch.full((2,), n) for n in range(100_000)}
    shardsave.save(tensors, tmp_path)
    loaded = shardsave.load(tmp_path)
    assert len(loaded) == 100_000 and loaded["layers.99999.w"].tolist() == [99_999, 99_999]


def test_empty_checkpoint(tmp_path: Path) -> None:
    """Catches arithmetic that needs at least one tensor."""
    shardsave.save({}, tmp_path)
    assert shardsave.load(tmp_path) == {} and shardsave.verify(tmp_path).tensors == 0


@pytest.mark.slow
def test_engines_write_the_same_bytes(tmp_path: Path) -> None:
    """Catches any difference between the files of the two engines, and a file that one of them cannot read."""
    program = (
        "import sys, torch, shardsave; sys.path[:0] = ['tests', 'tests/api'];"
        "from test_round_trip import odd_tensors; from support import same_bits; torch.manual_seed(0);"
        "t = odd_tensors() | {'big': torch.arange(3_000_001)}; shardsave.save(t, sys.argv[1], max_shard_size='10MB');"
        "l = shardsave.load(sys.argv[2] if len(sys.argv) > 2 else sys.argv[1]); assert all(same_bits(t[n], l[n]) for n in t)"
    )
    folders = {}
    for chosen in ("native", "portable"):
        folders[chosen] = tmp_path / chosen
        other = [str(folders["native"])] if chosen == "portable" else []
        warm_python().run(["-c", program, folders[chosen], *other], ROOT, SHARDSAVE_ENGINE=chosen).check_returncode()
    names = sorted(path.name for path in folders["native"].iterdir())
    assert names == sorted(path.name for path in folders["portable"].iterdir())
    for name in names:
        assert (folders["native"] / name).read_bytes() == (folders["portable"] / name).read_bytes()
