"""Tensors that `load_model` fills: of inference, that overlap, that share their memory, without a shape; which of them are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_load_model import Doubling, Pair, refused
from torch import nn

import shardsave
from support import same_bits, same_state


def test_inference_tensors(tmp_path: Path) -> None:
    """Catches an error from the flag or the version counter of an inference tensor after it was filled."""
    source = nn.Linear(3, 2)
    source.bias.requires_grad_(False)
    shardsave.save(source, tmp_path)
    with torch.inference_mode():
        module = nn.Linear(3, 2).requires_grad_(False)
        module.bias.requires_grad_(True)
    shardsave.load_model(module, tmp_path)
    assert same_state(module, source) and module.weight.is_inference()
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_in_inference_mode(tmp_path: Path) -> None:
    """Catches parameters created in the caller's inference mode: a meta model filled in it could never be trained."""
    source = nn.Linear(3, 2)
    shardsave.save(source, tmp_path)
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    plain = nn.Linear(3, 2)
    with torch.inference_mode():
        shardsave.load_model(module, tmp_path)
        shardsave.load_model(plain, tmp_path)
    for filled in (module, plain):
        filled(torch.ones(3)).sum().backward()
        assert same_state(filled, source) and filled.weight.grad is not None


def test_destinations_that_overlap(tmp_path: Path) -> None:
    """Catches workers that race for the same bytes, and a refusal of views that are interleaved but do not overlap."""
    shardsave.save({"a": torch.ones(7), "b": torch.zeros(5)}, tmp_path / "apart")
    base = torch.full((10,), 3.0)
    refused(
        Pair(base[:7], base[5:]),
        tmp_path / "apart",
        "'b' from .*memory of its own was expected, it shares .* 'a' and not the values on disk.*",
    )
    shardsave.save({"a": torch.ones(4, 3), "b": torch.zeros(4, 2)}, tmp_path / "columns")
    grid = torch.full((4, 5), 3.0)
    shardsave.load_model(Pair(grid[:, :3], grid[:, 3:]), tmp_path / "columns")
    assert grid.tolist() == [[1, 1, 1, 0, 0]] * 4
    shardsave.save({"a": torch.ones(12), "b": torch.zeros(4, 3)}, tmp_path / "whole")
    whole = torch.zeros(12)
    refused(Pair(whole, whole.view(4, 3)), tmp_path / "whole", "'b' from .*it shares a part of it with 'a'.*")


def test_memory_shared_with_a_loading_routine(tmp_path: Path) -> None:
    """Catches values that a sub-module's own routine loads and the rest of the load overwrites, or the reverse."""

    class Halving(Doubling):
        """Saved halved, loaded doubled."""

        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {name: value / 2 for name, value in super().state_dict(*arguments, **options).items()}

    def tied(kind: type[nn.Linear], swap: bool = False) -> nn.Sequential:
        own, plain = kind(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        plain.weight = own.weight
        return nn.Sequential(plain, own) if swap else nn.Sequential(own, plain)

    shardsave.save({"0.weight": torch.zeros(3, 3), "1.weight": torch.ones(3, 3)}, tmp_path / "apart")
    for swap in (False, True):
        module = tied(Doubling, swap)
        before = module[0].weight.detach().clone()
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match=r"one tensor .* equal on disk, they differ; .* unchanged$"
        ):
            shardsave.load_model(module, tmp_path / "apart")
        assert same_bits(module[0].weight, before)
    source = tied(Halving)
    shardsave.save({"0.weight": source[0].weight / 2, "1.weight": source[1].weight}, tmp_path / "halved")
    fresh = tied(Halving)
    shardsave.load_model(fresh, tmp_path / "halved")
    assert same_state(fresh, source)

    module, base = nn.Sequential(Doubling(3, 1, bias=False), nn.Linear(3, 1, bias=False)), torch.rand(5)
    module[0].weight.data, module[1].weight.data = base[:3].view(1, 3), base[2:].view(1, 3)
    shardsave.save(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)), tmp_path / "lines")
    refused(module, tmp_path / "lines", "'1.weight' from .*it shares a part of it with '0.weight'.*")


BASE = torch.arange(24.0)
VIEWS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "slice": lambda base: (base, base[5:9]),
    "slices": lambda base: (base[:15], base[10:]),
    "transpose": lambda base: (base.view(4, 6), base.view(4, 6).t()),
    "transposes of slices": lambda base: (base.view(4, 6)[:, 1:].t(), base.view(4, 6)[1:, :4]),
    "columns": lambda base: (base.view(4, 6)[:, :4], base.view(4, 6)[:, 3:]),
    "every second and every third": lambda base: (base[::2], base[1::3]),
    "reshape": lambda base: (base.view(2, 3, 4).permute(2, 0, 1), base),
    "scalar": lambda base: (base[3], base),
}


@pytest.mark.parametrize("way", VIEWS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_views_of_one_another(tmp_path: Path, way: str, turned: bool, dtype: torch.dtype) -> None:
    """Catches a model whose tensors are slices, transposes or reshapes of one another and that is saved and not loaded; and one that is
    loaded although the file has two values for one element, or filled with other values."""

    def pair(base: torch.Tensor) -> Pair:
        a, b = VIEWS[way](base.to(dtype))
        return Pair(b, a) if turned else Pair(a, b)

    source, model = pair(BASE.clone()), pair(torch.zeros(24))
    shardsave.save(source, tmp_path, durable=False)
    memory = model.a.untyped_storage().data_ptr()
    report = shardsave.load_model(model, tmp_path)
    assert same_state(model, source) and model.b.untyped_storage().data_ptr() == memory and report.tensors == 2
    wrong = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    shared = set(source.a.detach().flatten().tolist()) & set(source.b.detach().flatten().tolist())
    wrong["b"][wrong["b"] == min(shared, key=abs)] += 1
    shardsave.save(wrong, tmp_path, durable=False)
    words = "'[ab]' from .*memory of its own was expected, it shares a part of it with '[ab]' and not the values on disk.*"
    refused(pair(torch.zeros(24)), tmp_path, words)


def test_views_that_cannot_agree(tmp_path: Path) -> None:
    """Catches different bytes that count as equal under another dtype, and a comparison of a view and its conjugate."""
    base = torch.zeros(6, dtype=torch.complex64)
    shardsave.save({"a": torch.zeros(6, dtype=torch.complex64), "b": torch.zeros(4, dtype=torch.complex64)}, tmp_path)
    refused(Pair(base, base.conj()[:4]), tmp_path, "'[ab]' from .*memory of its own was expected.*")
    shardsave.save({"a": torch.zeros(6), "b": torch.ones(12, dtype=torch.bfloat16)}, tmp_path)
    floats = torch.zeros(6)
    refused(Pair(floats, floats.view(torch.bfloat16)), tmp_path, "'[ab]' from .*memory of its own was expected.*")


def test_views_read_from_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison that misses elements where its pieces meet."""
    from shardsave._loading import overlaps

    monkeypatch.setattr(overlaps, "_PIECE_ELEMENTS", 5)
    base = torch.rand(12, 7)
    shardsave.save(Pair(base, base.t()), tmp_path)
    empty = torch.zeros(12, 7)
    shardsave.load_model(model := Pair(empty, empty.t()), tmp_path)
    assert same_bits(model.a.data, base)
    for place in (0, 4, 5, 40, 83):
        other = base.t().contiguous()
        other.view(-1)[place] += 1
        shardsave.save({"a": base, "b": other}, tmp_path, durable=False)
        refused(Pair(empty, empty.t()), tmp_path, "'b' from .*not the values on disk.*")


def test_elements_that_share_their_memory(tmp_path: Path) -> None:
    """Catches overlapping windows of one tensor that overwrite each other, and a refusal of transposed or sliced tensors."""
    shardsave.save({"a": torch.rand(3, 4), "b": torch.rand(4, 3)}, tmp_path)
    windows = torch.zeros(6).as_strided((3, 4), (1, 1))
    words = r"'a' from .*memory for each element .*its strides are \[1, 1\]; call .contiguous\(\) on it first"
    refused(Pair(windows, torch.zeros(4, 3)), tmp_path, words)
    strided = Pair(torch.zeros(4, 3).t(), torch.zeros(8, 9)[::2, ::3])
    shardsave.load_model(strided, tmp_path)
    assert all(same_bits(value, strided.state_dict()[name]) for name, value in shardsave.load(tmp_path).items())


def test_lazy_parameters(tmp_path: Path) -> None:
    """Catches an error because a lazy parameter has no shape; lazy modules take the shape from the checkpoint."""
    source = nn.Linear(3, 2)
    shardsave.save(source, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(2)
    shardsave.load_model(lazy, tmp_path)
    assert same_state(lazy, source)
    bare = nn.Linear(3, 2)
    bare.weight = nn.parameter.UninitializedParameter()
    with pytest.raises(shardsave.UnsupportedTensorError, match=r"cannot fill 'weight' from .*it is lazy; run a forward"):
        shardsave.load_model(bare, tmp_path)


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    """Catches a raw write into memory that does not hold plain elements, and a cast that fails during the load."""

    class Odd(torch.Tensor):
        pass

    def holding(tensor: torch.Tensor) -> nn.Module:
        module = nn.Module()
        module.register_buffer("ok", torch.zeros(2))
        module.register_buffer("x", tensor)
        return module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    shardsave.save({"x": torch.ones(4), "ok": torch.ones(2)}, tmp_path / "float")
    refused(holding(quantized), tmp_path / "float", r"'x' from .*it is quantized \(qint8\)")
    refused(holding(torch.zeros(4).to_sparse()), tmp_path / "float", "'x' from .*its layout is sparse_coo")
    refused(holding(torch.zeros(4).as_subclass(Odd)), tmp_path / "float", "'x' from .*it is an Odd")
    refused(holding(torch.zeros(1).expand(4)), tmp_path / "float", r"'x' from .*it is expanded; call \.contiguous\(\).*")
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    shardsave.save({"x": packed, "ok": torch.ones(2)}, tmp_path / "packed")
    refused(holding(torch.zeros(4)), tmp_path / "packed", "'x' from .*float4_e2m1fn_x2 was expected, it is float32, and .*")
    same = holding(packed.clone())
    shardsave.load_model(same, tmp_path / "packed")
    assert same.ok.sum() == 2
