"""Weights that torchao has quantised: stored as its own safetensors layout has them, and filled in place. Skipped without torchao."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import shardsave

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int8 dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "float8": Float8WeightOnlyConfig,
    "intx": IntxWeightOnlyConfig,
}
X = torch.arange(64.0).reshape(2, 32) / 64


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32, bias=False))


def quantised(name: str = "int8", seed: int = 0) -> nn.Sequential:
    model = plain(seed)
    quantize_(model, CONFIGS[name]())
    return model


def in_files(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and all metadata, as torchao's readers collect them."""
    tensors, metadata = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            metadata.update(file.metadata())
    return tensors, {name: value for name, value in metadata.items() if name != "format" and not name.startswith("shardsave")}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_those_of_torchao(tmp_path: Path, name: str) -> None:
    """Catches other names or metadata than torchao's, and files that its reader does not make the same tensors of."""
    model = quantised(name)
    report = shardsave.save(model, tmp_path / "c", max_shard_size="1500B")
    assert report.shards > 2
    tensors, metadata = in_files(tmp_path / "c")
    wanted, wanted_metadata = flatten_tensor_state_dict(model.state_dict())
    assert metadata == wanted_metadata and tensors.keys() == wanted.keys()
    assert all(same(tensors[key], wanted[key]) for key in wanted)
    rebuilt, left = unflatten_tensor_state_dict(tensors, metadata)
    assert left == {} and torch.equal(rebuilt["0.weight"].dequantize(), model[0].weight.dequantize())  # type: ignore[operator]
    loaded = shardsave.load(tmp_path / "c")
    assert loaded.keys() == wanted.keys() and all(type(t) is torch.Tensor and same(t, wanted[k]) for k, t in loaded.items())
    assert shardsave.save(model.state_dict(), tmp_path / "mapping").tensors == report.tensors
    assert in_files(tmp_path / "mapping")[1] == wanted_metadata


@pytest.mark.parametrize("name", CONFIGS)
def test_filled_in_place(tmp_path: Path, name: str) -> None:
    """Catches parts that are replaced, cast or not filled, and parameters that are replaced."""
    model, other = quantised(name), quantised(name, seed=1)
    shardsave.save(model, tmp_path / "c", durable=False)
    parameters, memory = list(other.parameters()), other[0].weight.qdata.data_ptr()
    assert not torch.equal(other(X), model(X))
    report = shardsave.load_model(other, tmp_path / "c")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert torch.equal(other(X), model(X)) and other[0].weight.qdata.data_ptr() == memory
    assert all(old is new for old, new in zip(parameters, other.parameters()))
    flattened, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(flattened, tmp_path / "model.safetensors", metadata)  # a file without our record
    third = quantised(name, seed=2)
    shardsave.load_model(third, tmp_path / "model.safetensors")
    assert torch.equal(third(X), model(X))


def test_flags_and_a_prefix(tmp_path: Path) -> None:
    """Catches freeze flags of quantised parameters that are lost, and parts that are not found under a prefix."""
    model = quantised()
    assert not model[0].weight.requires_grad
    model[2].weight.requires_grad_(True)
    shardsave.save(nn.ModuleDict({"inner": model}), tmp_path / "c", durable=False)
    other = quantised(seed=1)
    report = shardsave.load_model(other, tmp_path / "c", prefix="inner.")
    assert torch.equal(other(X), model(X)) and (report.frozen, report.changed_flags) == (1, 1)
    assert not other[0].weight.requires_grad and other[2].weight.requires_grad
    third = nn.ModuleDict({"inner": quantised(seed=2)})
    assert shardsave.restore_flags(third, tmp_path / "c").unexpected == ()
    assert third["inner"][2].weight.requires_grad  # type: ignore[index]


def test_tied_and_trainable(tmp_path: Path) -> None:
    """Catches a tied quantised weight that is stored twice, and a trainable one that is left out of the trainable part."""
    model, other = quantised(), quantised(seed=1)
    for module in (model, other):
        module.append(nn.Linear(48, 32, bias=False))
        module[3].weight = module[2].weight
    report = shardsave.save(model, tmp_path / "tied", durable=False)
    assert report.tensors == len(shardsave.load(tmp_path / "tied")) - 3
    shardsave.load_model(other, tmp_path / "tied")
    assert torch.equal(other[3](X.repeat(1, 2)[:, :48]), model[2](X.repeat(1, 2)[:, :48]))
    model[2].weight.requires_grad_(True)
    report = shardsave.save(model, tmp_path / "trainable", only="trainable", durable=False)
    assert "0._weight_qdata" in report.left_out and "2._weight_qdata" in shardsave.load(tmp_path / "trainable")
    third = quantised(seed=2).append(nn.Linear(48, 32, bias=False))
    third[3].weight = third[2].weight
    shardsave.load_model(third, tmp_path / "trainable", strict=False)
    assert torch.equal(third[2].weight.qdata, model[2].weight.qdata)


def test_modules_that_are_not_quantised_alike(tmp_path: Path) -> None:
    """Catches parts that fill a tensor that was quantised in another way, and an error that does not say what to do."""
    shardsave.save(quantised(), tmp_path / "int8", durable=False)
    shardsave.save(plain(), tmp_path / "plain", durable=False)
    refused: list[tuple[nn.Module, str, str]] = [
        (plain(), "int8", "the checkpoint has quantised weights: quantise the module in the same way first"),
        (
            quantised(),
            "plain",
            "the module has quantised weights, the checkpoint has not: load it before the module is quantised",
        ),
        (
            quantised("int8 dynamic"),
            "int8",
            "'0._weight_.*act_quant_kwargs is None on disk, 'QuantizeTensorToInt8Kwargs' in the module",
        ),
        (quantised("intx"), "int8", "type is 'Int8Tensor' on disk, 'IntxUnpackedToInt8Tensor' in the module"),
        (quantised("float8"), "int8", "0._weight_zero_point"),
    ]
    for model, folder, message in refused:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=rf"{message}.*the module is unchanged"):
            shardsave.load_model(model, tmp_path / folder)
        assert all(
            torch.equal(*(t.dequantize() if hasattr(t, "qdata") else t for t in pair))
            for pair in zip(before.values(), model.state_dict().values())
        )
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="prefix='0.' loads the names that begin with it"):
        shardsave.save(nn.Sequential(quantised()), tmp_path / "deeper", durable=False)
        shardsave.load_model(quantised(), tmp_path / "deeper")
    report = shardsave.load_model(plain(), tmp_path / "int8", strict=False)
    assert report.missing == ("0.weight", "2.weight") and "0._weight_scale" in report.unexpected


def test_what_is_refused(tmp_path: Path) -> None:
    """Catches a cast of scales, an architecture without its parts, names that would collide, and parts that would not move as a whole."""
    model = quantised()
    error = shardsave.UnsupportedTensorError
    with pytest.raises(
        error, match="cannot save '0.weight' with dtype=: a plain tensor was expected, it is quantised; nothing was"
    ):
        shardsave.save(model, tmp_path / "c", dtype="bfloat16")
    with pytest.raises(error, match="cannot save '0.weight' with an architecture or a program: .* it is quantised"):
        shardsave.save(model, tmp_path / "c", architecture=True)
    with pytest.raises(error, match=r"cannot save .*training\['teacher'\].*it is an Int8Tensor"):
        shardsave.save(plain(), tmp_path / "c", training={"teacher": model})
    model[0].register_buffer("_weight_scale", torch.ones(1))
    with pytest.raises(
        error, match="cannot save '0._weight_scale': no other tensor of the name of a part of '0.weight' was expected"
    ):
        shardsave.save(model, tmp_path / "c")
    with pytest.raises(error, match="cannot save 'format': another name was expected"):
        shardsave.save({"format": torch.ones(1), **quantised().state_dict()}, tmp_path / "c")
    del model[0]._buffers["_weight_scale"]
    other = type("Int8Tensor", (type(model[2].weight),), {"__module__": type(model[2].weight).__module__})
    model[2].weight.__class__ = other
    with pytest.raises(error, match="cannot save '2.weight': a plain tensor was expected, it is an Int8Tensor"):
        shardsave.save(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    shardsave.save(quantised(), tmp_path / "c", durable=False)
    with pytest.raises(
        error, match="'0._weight_.*': a part of an Int8Tensor with memory on the wanted device was .* on the meta device"
    ):
        shardsave.load_model(quantised().to("meta"), tmp_path / "c")

    class Own(nn.Sequential):
        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            return super().load_state_dict(*arguments, **options)

    own = Own(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32, bias=False))
    quantize_(own, CONFIGS["int8"]())
    with pytest.raises(
        error, match="a plain tensor was expected, it is a part of an Int8Tensor, in a module that loads itself"
    ):
        shardsave.load_model(own, tmp_path / "c")


def test_conversions(tmp_path: Path) -> None:
    """Catches a converted checkpoint that torchao can no longer read, and scales that are cast."""
    model = quantised()
    model.append(nn.Linear(48, 32, bias=False))
    model.append(model[3])
    shardsave.save(model, tmp_path / "c", durable=False)
    metadata = in_files(tmp_path / "c")[1]
    shardsave.convert(tmp_path / "c", tmp_path / "d", max_shard_size="1500B", durable=False)
    assert in_files(tmp_path / "d")[1] == metadata
    (tmp_path / "e").mkdir()
    shardsave.convert(tmp_path / "d", tmp_path / "e" / "model.safetensors", to="safetensors", durable=False)
    tensors, in_file = in_files(tmp_path / "e")
    assert in_file.pop("4.weight") == "3.weight"  # a tie
    rebuilt, left = unflatten_tensor_state_dict(tensors, in_file)
    assert left == {} and torch.equal(rebuilt["2.weight"].dequantize(), model[2].weight.dequantize())  # type: ignore[operator]
    for source in ("c", "e"):
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match="to another dtype: .*'0._weight_.*is a part of one; nothing"
        ):
            shardsave.convert(tmp_path / source, tmp_path / "f", dtype="bfloat16")
    report = shardsave.convert(tmp_path / "c", tmp_path / "g", rename=[("^", "x.")], durable=False)
    assert any("what torchao says about quantised tensors was left out" in note for note in report.notes)
    assert in_files(tmp_path / "g")[1] == {}
    shardsave.convert(tmp_path / "e" / "model.safetensors", tmp_path / "h", durable=False)
    assert (
        in_files(tmp_path / "h")[1].keys() == metadata.keys() - {"4.weight"}
        and shardsave.inspect(tmp_path / "h").metadata == {}
    )


def test_hostile_metadata(tmp_path: Path) -> None:
    """Catches metadata that are believed, or that raise another error than ours."""
    model = quantised()
    flattened, metadata = flatten_tensor_state_dict(model.state_dict())
    form = json.loads(metadata["0.weight"])
    attacks: list[tuple[str, bool]] = [
        ('{"_type": ' * 50_000, True), ('{"_type": "Int8Tensor", "_type": 1}', True), ('{"_type": 1}', True), ("[]", True), ("", True),
        (json.dumps({**form, "_tensor_data_names": None}), True), (json.dumps({**form, "_tensor_data_names": [["qdata"], 3]}), True),
        (json.dumps({**form, "_type": "os.system"}), False), (json.dumps({**form, "_data": 3}), False),
        (json.dumps({**form, "_data": {**form["_data"], "block_size": {"_type": "torch.dtype", "_data": "load"}}}), False),
        (json.dumps({**form, "_tensor_data_names": ["qdata", ["scale"], {}]}), False),
    ]  # fmt: skip
    for number, (text, loads) in enumerate(attacks):
        save_file(flattened, tmp_path / f"{number}.safetensors", {**metadata, "0.weight": text})
        other = quantised(seed=1)
        before = other[0].weight.qdata.clone()
        if loads:  # what says nothing about the tensor
            shardsave.load_model(other, tmp_path / f"{number}.safetensors")
            assert torch.equal(other(X), model(X))
        else:
            with pytest.raises(shardsave.IncompatibleCheckpointError, match="'0._weight_.*the module is unchanged") as caught:
                shardsave.load_model(other, tmp_path / f"{number}.safetensors")
            assert len(str(caught.value)) < 1000 and torch.equal(other[0].weight.qdata, before)


def test_transformers(tmp_path: Path) -> None:
    """Catches other files than those of save_pretrained, and a checkpoint that from_pretrained reads as another model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    how = transformers.TorchAoConfig(CONFIGS["int8"]())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert shardsave.save(model, tmp_path / "ours", max_shard_size="40KB", durable=False).shards > 1
    (tensors, metadata), (own_tensors, own_metadata) = in_files(tmp_path / "theirs"), in_files(tmp_path / "ours")
    assert own_metadata == metadata and own_tensors.keys() == tensors.keys()
    assert all(same(own_tensors[name], tensors[name]) for name in tensors)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert type(again.lm_head.weight) is type(model.lm_head.weight) and torch.equal(again(ids).logits, wanted)
        for folder in ("ours", "theirs"):
            for parameter in again.parameters():
                getattr(parameter, "qdata", parameter).zero_()
            shardsave.load_model(again, tmp_path / folder)
            assert torch.equal(again(ids).logits, wanted)
