"""`load_model` on many kinds of modules: which are filled, which are refused by name, and what stays unchanged."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import SmallModel, same_bits, same_state


class Pair(nn.Module):
    """Two parameters, ``a`` and ``b``, with the memory of the two arguments."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


class Doubling(nn.Linear):
    """A sub-module that loads itself: it doubles the stored weight."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]


def refused(module: nn.Module, path: Path, words: str) -> None:
    """Asserts that loading raises UnsupportedTensorError with ``words``, and changes no tensor that has values."""
    before = [t.detach().clone() if t.layout is torch.strided else t for t in module.state_dict().values()]
    with pytest.raises(shardsave.UnsupportedTensorError, match=rf"cannot fill {words}; the module is unchanged"):
        shardsave.load_model(module, path)
    for old, new in zip(before, module.state_dict().values()):
        assert old.layout is not torch.strided or old.is_meta or old.is_quantized or same_bits(old, new)


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


@pytest.fixture
def one_process_group() -> Iterator[None]:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_distributed_wrappers(tmp_path: Path, one_process_group: None) -> None:
    """Catches DDP's prefix on disk or in a load, a job of one process that cannot save or load DTensors, and a wrapper of FSDP's older
    version, whose collective calls would hang in a single process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    source[0].requires_grad_(False)
    shardsave.save(DistributedDataParallel(source), tmp_path / "ckpt")
    assert shardsave.inspect(tmp_path / "ckpt").names == tuple(source.state_dict())
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    shardsave.load_model(DistributedDataParallel(fresh), tmp_path / "ckpt")
    assert same_state(fresh, source) and not fresh[0].weight.requires_grad
    sharded = fully_shard(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), mesh=init_device_mesh("cpu", (1,)))
    report = shardsave.load_model(sharded, tmp_path / "ckpt")
    assert report.ranks == 1 and torch.equal(sharded[1].weight.full_tensor(), source[1].weight)
    shardsave.save(sharded, tmp_path / "sharded")
    shardsave.load_model(fresh.requires_grad_(True), tmp_path / "sharded")
    assert same_state(fresh, source) and not fresh[0].weight.requires_grad
    older = nn.Sequential(FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu")))
    words = "module '0': a module that is whole in this process was expected, it is a FullyShardedDataParallel"
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot save {words}.*; nothing was written"):
        shardsave.save(older, tmp_path / "sharded")
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot fill {words}.*; the module is unchanged"):
        shardsave.load_model(older, tmp_path / "ckpt")


@pytest.mark.slow
def test_compiled_sub_module(tmp_path: Path) -> None:
    """Catches ``_orig_mod.`` inside names, on disk or in the module."""
    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    source[0] = torch.compile(source[0])  # type: ignore[assignment]
    shardsave.save(source, tmp_path)
    assert shardsave.inspect(tmp_path).names == ("0.weight", "0.bias", "1.weight", "1.bias")
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fresh[1] = torch.compile(fresh[1])  # type: ignore[assignment]
    shardsave.load_model(fresh, tmp_path)
    assert all(same_bits(a, b) for a, b in zip(fresh.parameters(), source.parameters()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_wrappers_around_sub_modules(tmp_path: Path, one_process_group: None) -> None:
    """Catches a wrapper's prefix in the middle of a name: on disk, in a load, or missing for a loading routine."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 3)

    def model(wrap: Callable[[nn.Module], nn.Module] | None, hooked: str | None = None) -> nn.Module:
        modules = nn.ModuleDict({"a": nn.Sequential(Mine(), nn.BatchNorm1d(3)), "b": nn.Linear(3, 2)})
        modules["a"][0].module.weight.requires_grad_(False)
        if wrap is not None:
            modules["a"] = wrap(modules["a"])
        if hooked is not None:
            modules.get_submodule(hooked).register_load_state_dict_post_hook(lambda module, keys: None)
        return modules

    compiled: Callable[[nn.Module], nn.Module] = torch.compile
    wrappers = (
        DataParallel,
        DistributedDataParallel,
        compiled,
        lambda part: DataParallel(compiled(part)),
        lambda part: compiled(DistributedDataParallel(part)),
    )
    plain = model(None)
    for number, wrap in enumerate(wrappers):
        source = model(wrap)
        shardsave.save(source, path := tmp_path / str(number))
        info = shardsave.inspect(path)
        assert set(info.names) == set(plain.state_dict()) and info.frozen == {"a.0.module.weight"}
        for fresh in (model(None), *(model(wrap, hooked) for hooked in (None, "a", ""))):
            report = shardsave.load_model(fresh, path)
            assert report.frozen == 1 and [p.requires_grad for p in fresh.parameters()] == [False] + [True] * 5
            assert all(map(same_bits, fresh.state_dict().values(), source.state_dict().values()))


def test_optimizer_stays_valid(tmp_path: Path) -> None:
    """Catches replaced parameters, which an optimizer would no longer update."""
    model = nn.Linear(3, 2)
    shardsave.save(model, tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    shardsave.load_model(model, tmp_path)
    assert [ref() for ref in before] == list(model.parameters())
    loaded = model.weight.detach().clone()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, loaded)


def test_flags_are_set_last(tmp_path: Path) -> None:
    """Catches flags that change in a load that fails."""
    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(False)
    shardsave.save(source, tmp_path)
    damage(tmp_path, source[1].weight)
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(shardsave.CorruptCheckpointError):
        shardsave.load_model(fresh, tmp_path)
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def damage(folder: Path, tensor: torch.Tensor) -> None:
    """Flips a bit of ``tensor`` in the shard that has its bytes."""
    needle = tensor.detach().numpy().tobytes()
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        at = content.find(needle)
        if at >= 0:
            content[at] ^= 1
            path.write_bytes(content)
            return
    raise AssertionError("the tensor is not there")


def test_partly_loaded_is_counted(tmp_path: Path) -> None:
    """Catches a count that includes tensors with a wrong checksum, or tensors that a routine never received."""
    source = nn.Sequential(Doubling(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    shardsave.save(source, tmp_path / "direct")
    damage(tmp_path / "direct", source[1].weight)
    damage(tmp_path / "direct", source[2].weight)
    fresh = nn.Sequential(Doubling(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(
        shardsave.CorruptCheckpointError, match="1 more tensors are damaged; the module is partly loaded, 4 of 6"
    ):
        shardsave.load_model(fresh, tmp_path / "direct")
    assert same_bits(fresh[1].bias, source[1].bias) and torch.equal(fresh[0].weight, source[0].weight * 2)
    shardsave.save(source, tmp_path / "hooked")
    damage(tmp_path / "hooked", source[0].weight)
    with pytest.raises(shardsave.CorruptCheckpointError, match="'0.weight' .*the module is partly loaded, 0 of 6 tensors"):
        shardsave.load_model(nn.Sequential(Doubling(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)), tmp_path / "hooked")


def test_without_flags(tmp_path: Path) -> None:
    """Catches ``restore_frozen=False`` that still changes flags."""
    shardsave.save(nn.Linear(3, 2).requires_grad_(False), tmp_path)
    fresh = nn.Linear(3, 2)
    report = shardsave.load_model(fresh, tmp_path, restore_frozen=False)
    assert fresh.weight.requires_grad and report.frozen is None and "flags left alone" in str(report)


def test_flags_are_for_floating_point_parameters(tmp_path: Path) -> None:
    """Catches a flag set on a buffer or an integer parameter, which raises, or on a head that was not loaded."""

    class Mixed(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.head = nn.Linear(2, classes)
            self.register_buffer("mean", torch.zeros(2))

    source = Mixed(2)
    source.head.requires_grad_(False)
    shardsave.save(source, tmp_path)
    fresh = Mixed(2)
    assert shardsave.load_model(fresh, tmp_path).frozen == 2
    assert not fresh.table.requires_grad and not fresh.mean.requires_grad and not fresh.head.weight.requires_grad
    other = Mixed(5)
    report = shardsave.load_model(other, tmp_path, strict=False)
    assert len(report.mismatched) == 2 and other.head.weight.requires_grad


def test_tied_here_and_saved_apart_with_different_flags(tmp_path: Path) -> None:
    """Catches a tied parameter that is frozen because only one of its names was frozen."""
    for frozen in ("a", "b"):
        apart = {name: nn.Parameter(torch.ones(2), requires_grad=name != frozen) for name in ("a", "b")}
        shardsave.save(apart, tmp_path)
        tied = Pair(torch.zeros(2), torch.zeros(2))
        tied.b = tied.a
        assert shardsave.load_model(tied, tmp_path).frozen == 0
        assert tied.a.requires_grad and tied.a.tolist() == [1, 1]


def test_names_with_spaces_and_lists(tmp_path: Path) -> None:
    """Catches names that are split at anything but dots, and ParameterLists or ParameterDicts that are ignored."""
    source = nn.ModuleDict({"d": nn.ParameterDict({"a b": torch.ones(2), "c": torch.ones(1)})})
    source["l"] = nn.ParameterList([torch.ones(2), torch.zeros(3)])  # type: ignore[assignment]
    shardsave.save(source, tmp_path)
    same = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.fill_(7)
    shardsave.load_model(same, tmp_path)
    assert same_state(same, source)
    other = nn.ModuleDict(
        {"d": nn.ParameterDict({"a b": torch.zeros(3), "c": torch.zeros(1)}), "l": copy.deepcopy(source["l"])}
    )
    report = shardsave.load_model(other, tmp_path, strict=False)
    assert report.mismatched == ("d.a b [2] on disk, [3] in the module",)
    assert other["d"]["a b"].tolist() == [0, 0, 0] and other["d"]["c"].tolist() == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_are_refused(tmp_path: Path) -> None:
    """Catches packed weights that are saved as other values."""
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear})
    with pytest.raises(shardsave.UnsupportedTensorError, match=r"cannot save '0._packed_params.*; nothing was written"):
        shardsave.save(quantised, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_batch_norm_state_from_before_it_counted(tmp_path: Path) -> None:
    """Catches a counter that is reported missing, reset, or left on the meta device; and another such buffer that is not reported."""
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    shardsave.save(state, tmp_path)
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked += 5
    shardsave.load_model(norm, tmp_path)
    assert norm.num_batches_tracked == 5
    with torch.device("meta"):
        empty = nn.BatchNorm1d(3)
    shardsave.load_model(empty, tmp_path)
    assert empty.num_batches_tracked.device.type == "cpu" and empty.num_batches_tracked == 0
    other = nn.Module()
    other.register_buffer("num_batches_tracked", torch.zeros(()))
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="1 missing from the checkpoint: num_batches_tracked"):
        shardsave.load_model(other, tmp_path)


def test_meta_parameters_keep_their_attributes(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a materialised model that loses classes, attributes, ties or flags, or is on the wrong device."""
    shardsave.save(small_model, tmp_path)
    for device in (None, "cpu"):
        with torch.device("meta"):
            empty = SmallModel()
        empty.scratch = torch.zeros(3)
        empty.embed.weight.no_decay = True
        shardsave.load_model(empty, tmp_path, device=device, restore_frozen=False)
        assert type(empty.embed.weight) is nn.Parameter and empty.embed.weight.no_decay
        assert empty.head.weight is empty.embed.weight and same_state(empty, small_model)
        assert all(t.device.type == "cpu" for t in empty.state_dict().values())
        assert not empty.encoder[0].weight.requires_grad and empty.narrow.weight.requires_grad
        assert "steps" in dict(empty.named_buffers()) and not empty.steps.is_meta


def test_meta_parameters_that_are_not_stored(tmp_path: Path) -> None:
    """Catches undefined memory in a parameter that a non-strict load did not fill."""
    shardsave.save({"weight": torch.ones(2, 3)}, tmp_path)
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    report = shardsave.load_model(empty, tmp_path, strict=False)
    assert report.missing == ("bias",) and empty.bias.is_meta and empty.weight.sum() == 6


def test_scalars_saved_as_vectors(tmp_path: Path) -> None:
    """Catches a refusal of torch's oldest scalars, which have one dimension."""
    shardsave.save({"x": torch.tensor([3.0])}, tmp_path)
    module = nn.Module()
    module.register_buffer("x", torch.tensor(0.0))
    shardsave.load_model(module, tmp_path)
    assert module.x.shape == () and module.x == 3


def test_every_difference_is_listed(tmp_path: Path) -> None:
    """Catches a strict load that names only the first few."""
    shardsave.save({f"old.{n}": torch.ones(1) for n in range(40)} | {"shape": torch.ones(2)}, tmp_path)
    module = nn.ParameterDict({f"new{n}": torch.zeros(1) for n in range(40)} | {"shape": torch.zeros(3)})
    with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
        shardsave.load_model(module, tmp_path)
    text = str(caught.value)
    assert all(f"old.{n}" in text and f"new{n}" in text for n in range(40)) and "shape [2] on disk, [3]" in text
    assert text.endswith("the module is unchanged") and all(p.sum() == 0 for p in module.values())


def test_saved_tied_and_loaded_apart(tmp_path: Path) -> None:
    """Catches a second tensor that stays empty: two names are one tensor on disk, and two tensors in the module."""
    tied = nn.ModuleDict({"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)})
    tied["b"].weight = tied["a"].weight
    shardsave.save(tied, tmp_path)
    apart = nn.ModuleDict({"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)})
    shardsave.load_model(apart, tmp_path)
    assert same_state(apart, tied) and apart["a"].weight is not apart["b"].weight


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Catches a parameter that silently stays unfilled, because without the names of wrappers another one has the same name."""
    shardsave.save({"scale": torch.ones(1)}, tmp_path)
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(1))
    model._orig_mod = nn.Module()
    model._orig_mod.scale = nn.Parameter(torch.zeros(1))
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match="two are named 'scale' without the names of wrappers; the module is unch"
    ):
        shardsave.load_model(model, tmp_path)
    assert not model.scale.any() and not model._orig_mod.scale.any()


def test_third_party_metadata_that_looks_like_a_tie(tmp_path: Path) -> None:
    """Catches a refusal because a metadata value in a third-party file happens to be the name of a tensor."""
    from safetensors.torch import save_file

    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt", "quantized": "weight"})
    report = shardsave.load_model(nn.Linear(2, 2), tmp_path)
    assert report.tensors == 2 and report.unexpected == ()


def test_routines_receive_no_inference_tensors(tmp_path: Path) -> None:
    """Catches a tensor that a loading routine keeps and that could never be trained, because the caller was in inference mode."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(2)

        def get_extra_state(self) -> torch.Tensor:
            return self.scale

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.scale = state

    shardsave.save(Keeps(), tmp_path)
    model = Keeps()
    with torch.inference_mode():
        shardsave.load_model(model, tmp_path)
    assert not model.scale.is_inference()


def test_names_behind_a_prefix(tmp_path: Path) -> None:
    """Catches a refusal that lists all names and does not say which ``prefix`` makes them fit, or says one that does not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    state = {f"a.module.{name}": tensor.detach() + 1 for name, tensor in model.state_dict().items()}
    shardsave.save({**state, "a.module.other": torch.ones(1), "epoch": torch.ones(1)}, tmp_path / "more", durable=False)
    for prefix in ("", "a."):
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match="; prefix='a.module.' loads the names that begin with it; "
        ):
            shardsave.load_model(model, tmp_path / "more", prefix=prefix)
    shardsave.save(state, tmp_path / "ckpt", durable=False)
    shardsave.load_model(model, tmp_path / "ckpt", prefix="a.module.")
    assert torch.equal(model[0].weight, state["a.module.0.weight"])
