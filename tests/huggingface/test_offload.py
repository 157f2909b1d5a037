"""Models that accelerate offloads to the CPU or the disk: saved and filled where accelerate's hooks read the values, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import shardsave
from support import SmallModel, same_bits, same_state
from transformers_models import tiny

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")

TOKENS = torch.arange(8)
SPLIT = {"embed": "cpu", "encoder": "disk", "narrow": "cpu", "head": "disk", "steps": "cpu", "scratch": "cpu"}


def by_blocks(model: nn.Module, _: Path) -> nn.Module:
    """What dispatch_model does with a GPU and "cpu" in its device map: values in the state dict of an OffloadedWeightsLoader."""
    weights = accelerate.utils.OffloadedWeightsLoader(state_dict={name: t.clone() for name, t in model.state_dict().items()})
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={"": "cpu", **dict.fromkeys(SPLIT, "cpu")},
        offload=dict.fromkeys(SPLIT, True),
        weights_map=weights,
    )
    return model


def nested(model: nn.Module, _: Path) -> nn.Module:
    """An offloading hook between other hooks, two levels deep."""
    hooks.add_hook_to_module(model.encoder[0], hooks.ModelHook(), append=True)
    accelerate.cpu_offload(model)
    hooks.add_hook_to_module(model.encoder[0], hooks.ModelHook(), append=True)
    assert isinstance(model.encoder[0]._hf_hook.hooks[0], hooks.SequentialHook)
    return model


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "CPU": lambda model, _: accelerate.cpu_offload(model),
    "CPU, with buffers": lambda model, _: accelerate.cpu_offload(model, offload_buffers=True),
    "CPU, whole": lambda model, _: accelerate.cpu_offload(model, preload_module_classes=["Sequential"], offload_buffers=True),
    "CPU, nested hooks": nested,
    "CPU, by blocks": by_blocks,
    "disk": lambda model, folder: accelerate.disk_offload(model, folder),
    "disk, with buffers": lambda model, folder: accelerate.disk_offload(model, folder, offload_buffers=True),
    "dispatched": lambda model, folder: accelerate.dispatch_model(model, SPLIT, offload_dir=folder),
    "with hook": lambda model, _: accelerate.cpu_offload_with_hook(model, "cpu")[0],
}


@pytest.fixture(params=OFFLOADS)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], Any]:
    """Offloads a model in one of the ways that accelerate has."""
    return lambda model: OFFLOADS[request.param](model.eval(), tmp_path / "offload")


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("used", [False, True])
def test_loaded(tmp_path: Path, offload: Callable[[nn.Module], Any], used: bool) -> None:
    """Catches a load that fills the placeholders of an offloaded model, which the next forward pass replaces by the old values, and one
    that forgets a tied name with a copy of its own. ``used``: a forward pass has replaced the placeholders before."""
    source = SmallModel(1).eval()
    source.narrow.requires_grad_(False)
    shardsave.save(source, tmp_path / "ckpt")
    model = offload(SmallModel(2))
    if used:
        model(TOKENS)
    assert not torch.equal(model(TOKENS), source(TOKENS))
    placeholders = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    shardsave.load_model(model, tmp_path / "ckpt")
    assert {name for name, tensor in model.state_dict().items() if tensor.is_meta} == placeholders
    assert flags(model) == flags(source)
    for _ in range(2):
        assert same_bits(model(TOKENS), source(TOKENS))
    assert model.steps.is_meta or same_bits(model.steps, source.steps)
    hooks.remove_hook_from_submodules(model)
    assert same_state(model, source)


@pytest.mark.parametrize("used", [False, True])
def test_saved(tmp_path: Path, offload: Callable[[nn.Module], Any], used: bool) -> None:
    """Catches a save of an offloaded model that is refused, that stores other values than the model computes with, or that loses the
    flags of the placeholders."""
    model = offload(SmallModel(2))
    if used:
        model(TOKENS)
    shardsave.save(model, tmp_path / "ckpt")
    plain = SmallModel(3).eval()
    plain.encoder.requires_grad_(True)
    shardsave.load_model(plain, tmp_path / "ckpt")
    assert same_state(plain, SmallModel(2)) and flags(plain) == flags(SmallModel(2))
    assert same_bits(plain(TOKENS), model(TOKENS))


@pytest.mark.parametrize("way", ["CPU, with buffers", "disk", "dispatched"])
def test_saved_as_accelerate_saves(tmp_path: Path, way: str) -> None:
    """Catches other names or other bits than those that accelerate's own save_model finds for an offloaded model."""
    model = OFFLOADS[way](nn.ModuleDict(SmallModel(2).named_children()), tmp_path / "offload")
    accelerate.Accelerator().save_model(model, tmp_path / "accelerate")
    shardsave.save(model, tmp_path / "ckpt")
    expected, saved = shardsave.load(tmp_path / "accelerate"), shardsave.load(tmp_path / "ckpt")
    assert saved.keys() >= expected.keys() and saved.keys() - expected.keys() <= {
        "embed.weight",
        "head.weight",
    }  # it drops tied names
    assert all(same_bits(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("way", ["CPU", "dispatched"])
def test_ties(tmp_path: Path, way: str) -> None:
    """Catches a tied tensor of an offloaded model that is stored twice."""
    model = OFFLOADS[way](SmallModel(2).eval(), tmp_path / "offload")
    shardsave.save(model, tmp_path / "ckpt")
    assert shardsave.inspect(tmp_path / "ckpt").ties == {"head.weight": "embed.weight"}


def test_copies_that_differ(tmp_path: Path) -> None:
    """Catches names of one placeholder that are stored as tied although accelerate holds different values for them."""
    model = OFFLOADS["dispatched"](SmallModel(2).eval(), tmp_path / "offload")
    copy = torch.from_file(str(tmp_path / "offload" / "head.weight.dat"), shared=True, size=800)
    copy.fill_(7)
    shardsave.save(model, tmp_path / "ckpt")
    assert torch.equal(shardsave.load(tmp_path / "ckpt")["head.weight"], torch.full((50, 16), 7.0))
    assert same_bits(shardsave.load(tmp_path / "ckpt")["embed.weight"], model.embed.weight)


def test_layerwise_casting(tmp_path: Path) -> None:
    """Catches a load into a model whose hooks cast its weights that computes with other values than the stored ones."""
    source = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16).float()
    shardsave.save(source, tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    accelerate.big_modeling.attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
    shardsave.load_model(model, tmp_path)
    assert torch.equal(model(torch.ones(4)), source(torch.ones(4))) and model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_dtypes_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches a dtype or a scalar of accelerate's copies on disk that is read or filled wrongly."""

    def module(value: float) -> Any:
        owner = nn.Module()
        owner.matrix = nn.Parameter(torch.full((3, 5), value).to(dtype), requires_grad=False)
        owner.scalar = nn.Parameter(torch.tensor(value).to(dtype), requires_grad=False)
        return owner

    shardsave.save(module(1), tmp_path / "ones")
    model = accelerate.disk_offload(module(0), tmp_path / "offload")
    shardsave.save(model, tmp_path / "zeros")
    shardsave.load_model(model, tmp_path / "ones")
    shardsave.save(model, tmp_path / "again")
    for name in ("matrix", "scalar"):
        for value, folder in ((0, "zeros"), (1, "again")):
            assert same_bits(shardsave.load(tmp_path / folder)[name], getattr(module(value), name).data), (name, folder)
        assert same_bits(model._hf_hook.hooks[-1].weights_map[name].reshape(()) if name == "scalar" else
                         model._hf_hook.hooks[-1].weights_map[name], getattr(module(1), name).data)  # fmt: skip


def test_values_of_another_dtype(tmp_path: Path) -> None:
    """Catches values in accelerate's map that are stored in their own dtype, and not in that of the model."""
    model = nn.Linear(4, 3).to(torch.bfloat16)
    wide = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, state_dict=wide)
    shardsave.save(model, tmp_path)
    for name, tensor in shardsave.load(tmp_path).items():
        assert same_bits(tensor, wide[name].to(torch.bfloat16))


def peak(action: Callable[[Any], object]) -> int:
    """By how many bytes the process's own memory grows during a save or load; ``action`` receives its progress callback."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    before, seen = anonymous(), [0]
    action(lambda done, total: seen.append(anonymous() - before))
    return max(seen)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Catches a save or a load that reads all offloaded weights into memory."""
    with torch.no_grad():
        model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])  # 134 MB
    accelerate.disk_offload(model, tmp_path / "offload")
    shardsave.save(nn.Linear(2, 2), tmp_path / "warm")  # allocates the staging memory
    saving = peak(lambda progress: shardsave.save(model, tmp_path / "ckpt", progress=progress, durable=False))
    loading = peak(lambda progress: shardsave.load_model(model, tmp_path / "ckpt", progress=progress))
    assert max(saving, loading) < 64e6, (saving, loading)


def refused(action: Callable[[], object], words: str) -> None:
    with pytest.raises(shardsave.UnsupportedTensorError, match=words):
        action()


def test_what_cannot_be_filled(tmp_path: Path) -> None:
    """Catches a load that claims to have filled what it has not, or that writes into a file that is not accelerate's own copy."""
    shardsave.save(nn.Linear(2, 2), tmp_path / "ckpt")

    def offloaded(folder: str) -> nn.Linear:
        return accelerate.disk_offload(nn.Linear(2, 2), tmp_path / folder)  # type: ignore[no-any-return]

    def fill(model: nn.Module, words: str, **arguments: Any) -> None:
        expected = f"cannot fill 'weight' from .*accelerate offloads it.*{words}.*; the module is unchanged"
        refused(lambda: shardsave.load_model(model, tmp_path / "ckpt", **arguments), expected)

    model = offloaded("linked")
    before = (tmp_path / "linked" / "weight.dat").read_bytes()
    os.link(tmp_path / "linked" / "weight.dat", tmp_path / "other")
    fill(model, "no writable file of its own")
    assert (tmp_path / "other").read_bytes() == before
    model = offloaded("symbolic")
    (tmp_path / "symbolic" / "weight.dat").rename(tmp_path / "target")
    (tmp_path / "symbolic" / "weight.dat").symlink_to(tmp_path / "target")
    fill(model, "no writable file of its own")
    shardsave.save(model, tmp_path / "saved")
    model = offloaded("short")
    os.truncate(tmp_path / "short" / "weight.dat", 8)
    fill(model, "8 bytes instead of 16")
    refused(lambda: shardsave.save(model, tmp_path / "saved"), "cannot save 'weight': .*8 bytes instead of 16")
    model = offloaded("gone")
    (tmp_path / "gone" / "weight.dat").unlink()
    fill(model, "FileNotFoundError")
    fill(offloaded("moved"), "leave out device=", device="cpu")
    fill(accelerate.cpu_offload(nn.Linear(2, 2), state_dict={"bias": torch.ones(2)}), "no entry 'weight'")
    fill(accelerate.cpu_offload(nn.Linear(2, 2), state_dict={"weight": torch.ones(3), "bias": torch.ones(2)}), r"shape \[3\]")
    fill(accelerate.cpu_offload(nn.Linear(2, 2), state_dict=Anew(nn.Linear(2, 2).state_dict())), "Anew, makes it anew")


class Anew(dict[str, torch.Tensor]):
    """A map that makes a new tensor each time."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).clone()


class OtherHook(hooks.ModelHook):  # type: ignore[misc, name-defined]
    """A hook that is not accelerate's own."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("meta")


class LoadsItself(nn.Linear):
    """Doubles its weight, and puts another parameter in the place of its bias, with more elements if ``grows``."""

    grows = False

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]
        self.bias = nn.Parameter(3 * state[prefix + "bias"].repeat(2 if self.grows else 1))


@pytest.mark.parametrize("grows", [False, True])
def test_modules_that_load_themselves(tmp_path: Path, grows: bool) -> None:
    """Catches a loading routine that copies values into placeholders, and a tensor of it that the next forward pass replaces."""
    source = nn.Linear(2, 2)
    shardsave.save(source, tmp_path / "ckpt")
    model = LoadsItself(2, 2)
    model.grows = grows
    accelerate.disk_offload(model, tmp_path / "offload")
    if grows:
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match=r"cannot load 'bias': .* made it of shape \[4\]; .* partly loaded"
        ):
            shardsave.load_model(model, tmp_path / "ckpt")
    else:
        shardsave.load_model(model, tmp_path / "ckpt")
        x = torch.ones(2)
        assert torch.equal(model(x), nn.functional.linear(x, source.weight * 2, source.bias * 3))
    assert model.weight.is_meta and model.bias.is_meta
    (tmp_path / "offload" / "weight.dat").chmod(0o444)
    os.link(tmp_path / "offload" / "weight.dat", tmp_path / "other")
    refused(lambda: shardsave.load_model(model, tmp_path / "ckpt"), "cannot fill 'weight' from .*; the module is unchanged")


def test_hooks_of_others(tmp_path: Path) -> None:
    """Catches placeholders of a foreign hook that are filled for nothing."""
    shardsave.save(nn.Linear(2, 2), tmp_path)
    foreign = nn.Linear(2, 2)
    hooks.add_hook_to_module(foreign, OtherHook())
    refused(lambda: shardsave.load_model(foreign, tmp_path), "cannot fill 'weight' from .*OtherHook; the module is unchanged")
    refused(lambda: shardsave.save(foreign, tmp_path), "cannot save 'weight': .*OtherHook; nothing was written")


def test_placeholders_of_nobody(tmp_path: Path) -> None:
    """Catches a meta tensor beside offloaded ones that is saved, not named, or refused without its cause: PEFT leaves
    the weights of an adapter so if their layer is on disk."""
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 2)))
    model.append(nn.Linear(2, 2, device="meta"))
    refused(
        lambda: shardsave.save(model, tmp_path),
        "cannot save '1.weight': .*meta device, and accelerate, which .* off the disk .*; nothing was",
    )


def test_programs_are_refused(tmp_path: Path) -> None:
    """Catches torch.export run on an offloaded model, in which it leaves tensors of its own."""
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="cannot save a program: .*accelerate offloads it.*; nothing was written"
    ):
        shardsave.save(model, tmp_path, program=((torch.ones(2),), {}))
    model(torch.ones(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["Llama, tied", "Qwen3-MoE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_onto_the_disk(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Catches a save that refuses a model whose weights transformers reads from its checkpoint, one that stores them in the dtype of that
    checkpoint, and a load that writes into the checkpoint."""
    original = tiny(name)
    original.save_pretrained(tmp_path / "original")
    files = {path: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    places = {child: "disk" for child, _ in original.named_children()} | {"model.norm": "cpu"}
    places |= {f"model.{child}": "disk" for child, _ in original.model.named_children() if child != "norm"}
    del places["model"]
    model = type(original).from_pretrained(
        tmp_path / "original", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=dtype
    )
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    shardsave.save(model, tmp_path / "saved")
    assert {tensor.dtype for tensor in shardsave.load(tmp_path / "saved").values()} == {dtype}
    expected = type(original).from_pretrained(tmp_path / "original", dtype=dtype)
    assert same_state(type(original).from_pretrained(tmp_path / "saved"), expected)
    words = "cannot fill .* from .*accelerate reads it from the checkpoint file .*from_pretrained.*; the module is unchanged"
    refused(lambda: shardsave.load_model(model, tmp_path / "saved"), words)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("way", ["the directory", "a link to it", "links in it", "a file of its own"])
@pytest.mark.parametrize("writer", ["shardsave", "transformers", "sharded"])
def test_saved_where_the_model_reads(tmp_path: Path, writer: str, way: str) -> None:
    """Catches a save that removes the files which the saved model itself goes on reading, through links too."""
    transformers = pytest.importorskip("transformers")
    source, target, read_from = tiny("GPT-2"), tmp_path / "ckpt", tmp_path / "ckpt"
    if writer == "shardsave":
        shardsave.save(source, target, durable=False)
    else:
        source.save_pretrained(target, **({"max_shard_size": "20KB"} if writer == "sharded" else {}))
    if way == "a link to it":
        target = tmp_path / "link"
        target.symlink_to(read_from)
    elif way == "links in it":  # as in the cache of the hub
        read_from.rename(tmp_path / "blobs")
        read_from.mkdir()
        for name in os.listdir(tmp_path / "blobs"):
            (read_from / name).symlink_to(f"../blobs/{name}")
    places = {
        "transformer.wte": "cpu",
        "transformer.wpe": "disk",
        "transformer.h": "disk",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    model = transformers.GPT2LMHeadModel.from_pretrained(read_from, **options).eval()
    expected = model(TOKENS[None]).logits
    if way == "a file of its own":
        target = tmp_path / "new"
        shardsave.save(model, target, durable=False)
        assert same_state(type(model).from_pretrained(target), source)
    before = sorted(os.listdir(read_from))
    with pytest.raises(
        shardsave.SaveNotCommittedError, match=r"accelerate reads 'transformer\..*save to another directory.*intact"
    ):
        shardsave.save(model, read_from if way == "a file of its own" else target, durable=False)
    assert sorted(os.listdir(read_from)) == before and torch.equal(model(TOKENS[None]).logits, expected)


class Tied(nn.Module):
    """Two matrices that are tied, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = (nn.Linear(4, 4) for _ in range(3))
        for part in (self.one, self.two, self.other):
            nn.init.zeros_(part.bias)
        self.two.weight = self.one.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.other(self.two(self.one(values)))


class Declared(Tied):
    """Says what it ties."""

    _tied_weights_keys: ClassVar = {"two.weight": "one.weight"}


class Listed(Tied):
    """Says what it ties, as models for older versions of transformers do."""

    _tied_weights_keys: ClassVar = ["two.weight"]


@pytest.mark.parametrize("kind", [Tied, Declared, Listed])
@pytest.mark.parametrize("way", ["disk", "all dispatched"])
def test_ties_on_disk(tmp_path: Path, way: str, kind: type[Tied]) -> None:
    """Catches a tie that is lost without a note because both names have a copy on disk, and copies that differ but count as tied."""
    model, folder = kind(), tmp_path / "offload"
    if way == "disk":
        accelerate.disk_offload(model, folder)
    else:
        accelerate.dispatch_model(
            model, dict.fromkeys(("one", "two", "other"), "disk"), "cpu", offload_dir=folder, force_hooks=True
        )
    notes = shardsave.save(model, tmp_path / "ckpt", durable=False).notes
    if kind is Tied and way == "disk":  # nothing tells
        (note,) = notes
        assert (
            note.startswith("one.weight, two.weight have equal values on disk")
            and not shardsave.inspect(tmp_path / "ckpt").ties
        )
    else:
        assert not notes and shardsave.inspect(tmp_path / "ckpt").ties == {"two.weight": "one.weight"}
    torch.from_file(str(folder / "two.weight.dat"), shared=True, size=16).fill_(7)
    assert not shardsave.save(model, tmp_path / "ckpt", durable=False).notes and not shardsave.inspect(tmp_path / "ckpt").ties
    assert torch.equal(shardsave.load(tmp_path / "ckpt")["two.weight"], torch.full((4, 4), 7.0))


@pytest.mark.parametrize("preloaded", ["Tied", "Sequential"])
def test_one_module_with_two_names(tmp_path: Path, preloaded: str) -> None:
    """Catches a second name of a module that accelerate places as a whole: it looks like a tensor without data."""
    part = Tied()
    source = nn.Sequential(part, part)
    shardsave.save(source, tmp_path / "plain", durable=False)
    model = nn.Sequential(*[Tied()] * 2)
    accelerate.cpu_offload(model, preload_module_classes=[preloaded])
    shardsave.load_model(model, tmp_path / "plain")
    values = torch.ones(4)
    assert torch.equal(model(values), source(values))
    shardsave.save(model, tmp_path / "ckpt", durable=False)
    assert shardsave.inspect(tmp_path / "ckpt").ties == shardsave.inspect(tmp_path / "plain").ties
    stored, expected = (shardsave.load(tmp_path / name) for name in ("ckpt", "plain"))
    assert all(same_bits(stored[name], tensor) for name, tensor in expected.items())
