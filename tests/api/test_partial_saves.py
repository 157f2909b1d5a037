"""Saves that change or leave out tensors on the way to disk: `dtype=` and `only=`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import shardsave
from support import SmallModel, limited_memory, same_bits, same_state


class Mixed(SmallModel):
    """Has tensors of every kind that a cast treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.randn(6).to(torch.float8_e4m3fn))
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("strided", torch.randn(300, 7).t())
        self.register_buffer("wide", torch.randn(5, dtype=torch.float64))
        self.register_buffer("special", torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.4e38]))
        self.register_buffer("empty", torch.empty(0, 3))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64", torch.float8_e5m2], ids=str)
def test_a_cast_save_is_a_save_and_a_conversion(tmp_path: Path, dtype: Any) -> None:
    """Catches other bits, names, flags or ties than `convert(dtype=)` writes, a changed model, and a cast that is not reported."""
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = shardsave.save(model, tmp_path / "cast", dtype=dtype)
    shardsave.save(model, tmp_path / "whole")
    converted = shardsave.convert(tmp_path / "whole", tmp_path / "converted", dtype=dtype)
    assert files_of(tmp_path / "cast") == files_of(tmp_path / "converted")
    assert report.cast == converted.cast > 5 and f"{report.cast} tensors cast" in str(report)
    assert all(same_bits(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = shardsave.load(tmp_path / "cast")
    assert loaded["mask"].dtype == torch.bool and loaded["small"].dtype == torch.float8_e4m3fn
    assert loaded["steps"].dtype == torch.int64 and loaded["complex"].dtype == torch.complex64


@pytest.mark.parametrize("options", [{"training": {"epoch": 1}}, {"rng": True}], ids=str)
def test_a_cast_save_has_no_training_state(tmp_path: Path, options: dict[str, Any]) -> None:
    """Catches a training that goes on from weights which a save has cast."""
    verbs = (shardsave.save, shardsave.save_async, shardsave.plan_save)
    for verb in (*verbs, lambda *both, **more: shardsave.CheckpointManager(both[1], save_every=1).step(1, both[0], **more)):
        with pytest.raises(
            ValueError, match=r"dtype='bfloat16' saves no training state: .*leave out training= and rng=, or dtype="
        ):
            verb(SmallModel(), tmp_path / "cast", dtype=torch.bfloat16, **options)
    assert not (tmp_path / "cast").exists()


def test_casts_of_arrays_in_another_byte_order(tmp_path: Path) -> None:
    """Catches an array whose bytes are swapped after the cast instead of before, or in the wrong width."""
    values = np.linspace(-3, 7, 3_000_001, dtype=np.float32)
    plain = {
        "x": values,
        "y": values[:11].astype(np.float64),
        "z": values[:4].astype(ml_dtypes.bfloat16),
        "n": np.arange(3, dtype=">i4"),
    }
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) if name in "xy" else array for name, array in plain.items()}
    for dtype in (torch.float16, torch.float64, torch.float32):
        shardsave.save(swapped, tmp_path / "swapped", dtype=dtype)
        loaded = shardsave.load(tmp_path / "swapped")
        assert loaded["n"].tolist() == [0, 1, 2]
        for name in "xyz":
            wanted = torch.from_numpy(plain[name].astype(np.float32 if name == "z" else plain[name].dtype)).to(dtype)
            assert same_bits(loaded[name], wanted), (dtype, name)


@pytest.mark.slow
def test_a_cast_takes_bounded_memory(memory: Path) -> None:
    """Catches a second copy of the model, or of one tensor: a cast needs the engine's slots and a little working memory."""
    values = np.zeros(48 << 20, dtype=np.float32)  # 200 MB, and 400 MB when they are cast
    model = {"native": torch.from_numpy(values), "swapped": values.astype(">f4")}
    with limited_memory():
        assert shardsave.save(model, memory, dtype="float64", durable=False).bytes == 16 * len(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "Llama, tied"])
def test_a_transformers_model_in_another_dtype(tmp_path: Path, name: str, quiet_transformers: None) -> None:
    """Catches a config that names the dtype before the cast, and other tensors than the model has after `to`."""
    transformers = pytest.importorskip("transformers")
    from transformers_models import ARCHITECTURES

    kind, config, arguments = ARCHITECTURES[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()
    shardsave.save(model, tmp_path / "half", dtype="bfloat16")
    shardsave.save(model, tmp_path / "whole")
    shardsave.convert(tmp_path / "whole", tmp_path / "converted", dtype="bfloat16")
    assert files_of(tmp_path / "half") == files_of(tmp_path / "converted")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    half = getattr(transformers, kind).from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and same_state(half, model.to(torch.bfloat16))


@pytest.fixture
def quiet_transformers() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Thawed(nn.Module):
    """Frozen but for a head, a normalisation and a spectral norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.scale = nn.BatchNorm1d(6)
        self.spectral = spectral_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.output = nn.Linear(6, 3, bias=False)
        self.output.weight = self.head.weight
        self.register_buffer("table", torch.randn(8))
        self.requires_grad_(False)
        for part in (self.scale, self.spectral, self.head):
            part.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.spectral(self.scale(self.body(x))))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_trainable_part_and_the_base_make_the_model(tmp_path: Path) -> None:
    """Catches a tensor that training changed and `only="trainable"` left out, frozen weights on disk, lost flags, and unnamed gaps."""
    base, model = Thawed(), Thawed()
    train(model)
    report = shardsave.save(model, tmp_path, only="trainable")
    names = set(shardsave.inspect(tmp_path).names)
    frozen = {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias"}
    assert set(report.left_out) == frozen | {"table"} == set(model.state_dict()) - names
    assert {"output.weight", "scale.running_mean", "body.1.running_var", "spectral.parametrizations.weight.0._u"} <= names
    assert report.notes == ("buffers of layers without trainable parameters were left out: table",)
    assert "7 names left out" in str(report)
    base.requires_grad_(True)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as refusal:
        shardsave.load_model(base, tmp_path)
    assert (
        "; 6 of the missing names were frozen and left out by the save: load these first, then this with strict=False"
        in str(refusal.value)
    )
    loaded = shardsave.load_model(base, tmp_path, strict=False)
    assert same_state(base, model) and set(loaded.missing) == set(report.left_out) and not loaded.unexpected
    assert loaded.notes == ("6 of the missing names were frozen and left out by the save; they keep the values that they had",)
    assert [p.requires_grad for p in base.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_trainable_part_of_a_mapping(tmp_path: Path) -> None:
    """Catches plain tensors and frozen Parameters among what is saved of a mapping; and a tie that loses its first name."""
    shared = torch.ones(3)
    source = {
        "frozen": nn.Parameter(torch.zeros(2), requires_grad=False),
        "first": nn.Parameter(shared, requires_grad=False),
        "tied": nn.Parameter(shared),
        "plain": torch.zeros(1),
    }
    report = shardsave.save(source, tmp_path, only="trainable")
    assert set(shardsave.load(tmp_path)) == {"first", "tied"} and report.left_out == ("frozen", "plain")


@pytest.mark.slow
def test_the_trainable_part_of_transformers_models(tmp_path: Path, quiet_transformers: None) -> None:
    """Catches a directory that `from_pretrained` opens with random weights, and tensors under names that the model does not find again."""
    transformers = pytest.importorskip("transformers")
    from transformers_models import ARCHITECTURES

    kind, config, arguments = ARCHITECTURES["Mixtral"]
    arguments = getattr(transformers, config)(**arguments)
    model, base = getattr(transformers, kind)(arguments), getattr(transformers, kind)(arguments)
    base.load_state_dict(model.state_dict())
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    for parameter in model.model.layers[1].parameters():
        parameter.data.add_(1)
    shardsave.save(model, tmp_path, only="trainable", dtype="float64")
    assert not list(tmp_path.glob("*config.json"))
    assert all(name.startswith("model.layers.1.") for name in shardsave.inspect(tmp_path).names)
    loaded = shardsave.load_model(base, tmp_path, strict=False)
    assert same_state(base, model) and len(loaded.missing) > 5
    assert [p.requires_grad for p in base.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.slow
def test_a_trained_adapter_without_peft(tmp_path: Path) -> None:
    """Catches the base weights of a PEFT model, or the loss of an adapter's, in a save of the trainable part."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    report = shardsave.save(model, tmp_path, only="trainable")
    assert report.tensors == 2 and len(report.left_out) == 4
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    shardsave.load_model(model, tmp_path, strict=False)
    assert all(same_bits(values[name], tensor) for name, tensor in model.state_dict().items())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown dtype": ({"dtype": "int8"}, ValueError, "dtype must be one of float16, "),
    "no dtype": ({"dtype": 16}, TypeError, "dtype must be a torch.dtype or its name, not int"),
    "unknown part": ({"only": "frozen"}, ValueError, "only must be 'trainable' or None, not 'frozen'"),
    "dtype and architecture": ({"dtype": "float16", "architecture": True}, ValueError, "dtype='float16' saves no architecture"),
    "part and architecture": (
        {"only": "trainable", "architecture": True},
        ValueError,
        "only='trainable' saves no architecture",
    ),
    "part and program": ({"only": "trainable", "program": ((torch.ones(1, 4),), {})}, ValueError, "only='trainable' saves no"),
    "two parts": ({"only": "trainable", "adapter_only": True}, ValueError, "exclude each other"),
    "all frozen": (
        {"only": "trainable"},
        ValueError,
        "at least one trainable parameter, every parameter is frozen; nothing was",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("verb", [shardsave.save, shardsave.plan_save])
def test_refused(tmp_path: Path, verb: Any, arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    """Catches a combination that would write something else than its arguments say."""
    with pytest.raises(kind, match=words):
        verb(nn.Linear(4, 2).requires_grad_(False), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_mapping_without_flags_has_no_trainable_part(tmp_path: Path) -> None:
    """Catches an empty checkpoint of a plain state dict."""
    with pytest.raises(ValueError, match="a mapping of plain tensors says nothing about that"):
        shardsave.save({"x": torch.ones(1)}, tmp_path / "new", only="trainable")
    assert not (tmp_path / "new").exists()
