"""`load_model` on many kinds of modules: which are filled, which are refused by name, and what stays unchanged."""

from __future__ import annotations

import copy
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
