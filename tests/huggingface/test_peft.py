"""Adapters of PEFT: saved in PEFT's layout with the flags of the whole model, loaded by PEFT and by shardsave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import shardsave
from shardsave._format.crc64 import crc64
from support import draw_trainable, same_bits, same_state

transformers.logging.set_verbosity_error()

#: PEFT calls transformers by a deprecated name.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")]

FILES = {"adapter_config.json", "adapter_model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}


def base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def lora(**options: Any) -> peft.PeftConfig:
    all_options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(**all_options)


CONFIGS: dict[str, Any] = {
    "LoRA": lora,
    "LoRA with a whole layer": lambda: lora(modules_to_save=["lm_head"]),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(kind: str, seed: int = 0) -> Any:
    model = peft.get_peft_model(base(), CONFIGS[kind]())
    return draw_trainable(model, seed)


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_as_peft_does(kind: str, tmp_path: Path) -> None:
    """Catches a name, a value or a config that differs from PEFT's own, and base weights in the adapter."""
    model = adapted(kind)
    shardsave.save(model, tmp_path / "shardsave", adapter_only=True, durable=False)
    model.save_pretrained(tmp_path / "peft")
    assert names_in(tmp_path / "shardsave") == FILES
    actual, expected = (load_file(tmp_path / writer / "adapter_model.safetensors") for writer in ("shardsave", "peft"))
    assert actual.keys() == expected.keys() and all(same_bits(actual[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / writer / "adapter_config.json").read_text()) for writer in ("shardsave", "peft")]
    for config in configs:
        config.update({key: sorted(value) for key, value in config.items() if key.endswith("_modules") and value})
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_reads_it(kind: str, tmp_path: Path) -> None:
    """Catches a directory that PEFT cannot load, or loads as another adapter."""
    model = adapted(kind).eval()
    shardsave.save(model, tmp_path, adapter_only=True, durable=False)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_flags_of_the_whole_model(tmp_path: Path) -> None:
    """Catches flags of the base model that are lost because its weights are not saved."""
    model = adapted("LoRA")
    model.base_model.model.lm_head.weight.requires_grad_(True)
    next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    report = shardsave.save(model, tmp_path, adapter_only=True, durable=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    info = shardsave.inspect(tmp_path)
    assert info.frozen == frozen and len(info.parameters or ()) == len(list(model.named_parameters())) > report.tensors
    assert (
        not info.notes and report.shards == 1 and set(info.companions) == {"adapter_config.json", "adapter_model.safetensors"}
    )


def test_a_model_replaces_an_adapter(tmp_path: Path) -> None:
    """Catches an adapter that stays, and that transformers would add to the new weights; and a changed adapter that is removed."""
    shardsave.save(adapted("LoRA with a whole layer"), tmp_path, adapter_only=True, durable=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert shardsave.save(base(), tmp_path, durable=False).leftovers == ()
    assert not names_in(tmp_path) & {"adapter_config.json", "adapter_model.safetensors"} and "tokenizer.json" in names_in(
        tmp_path
    )
    shardsave.save(adapted("LoRA with a whole layer"), tmp_path, adapter_only=True, durable=False)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="adapter_config.json stays in"):
        shardsave.save(base(), tmp_path, durable=False)
    assert (tmp_path / "adapter_config.json").read_text() == "{}"


def test_an_adapter_of_peft_stays_loudly(tmp_path: Path) -> None:
    """Catches an adapter of another tool that stays beside new weights, to which from_pretrained adds it, without a note."""
    adapted("LoRA").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="from_pretrained adds that adapter"):
        report = shardsave.save(base(), tmp_path, durable=False)
    assert report.notes == (
        f"adapter_config.json and adapter_model.safetensors stay in {tmp_path}, though they are not of this save: from_pretrained "
        "adds that adapter to what it reads there; remove the adapter if it does not belong to these weights",
    )
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert any("lora" in name for name in model.state_dict())  # what the warning says


def test_an_adapter_replaces_an_adapter(tmp_path: Path) -> None:
    """Catches files of two saves side by side, leftovers, and a recorded checksum that is not that of the file."""
    for seed in (1, 2):
        model = adapted("LoRA with a whole layer", seed)
        shardsave.save(model, tmp_path, adapter_only=True)
        weights = (tmp_path / "adapter_model.safetensors").read_bytes()
        record = json.loads((tmp_path / "model.safetensors.index.json").read_text())["shardsave"]
        assert record["companions"]["adapter_model.safetensors"] == [len(weights), f"{crc64(weights):016x}"]
        assert weights == (tmp_path / shardsave.inspect(tmp_path).shards[0]).read_bytes()
        assert len(names_in(tmp_path)) == 4 and not shardsave.inspect(tmp_path).notes
        name = "base_model.model.lm_head.weight"
        assert same_bits(load_file(tmp_path / "adapter_model.safetensors")[name], shardsave.load(tmp_path)[name])


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "prompt"])
@pytest.mark.parametrize("writer", ["shardsave", "peft"])
def test_filled_in_place(kind: str, writer: str, tmp_path: Path) -> None:
    """Catches an adapter that is loaded into wrong tensors, a base model that is changed, and flags that are not restored."""
    model, other = adapted(kind, 1), adapted(kind, 2)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in other.named_parameters()}
    if writer == "shardsave":
        shardsave.save(model, tmp_path, adapter_only=True, durable=False)
        report = shardsave.load_model(other, tmp_path)
    else:
        model.save_pretrained(tmp_path)
        report = shardsave.load_model(other, tmp_path / "adapter_model.safetensors")
    assert not report.missing and not report.unexpected and not report.notes
    assert same_state(other, model) and all(id(parameter) == before[name][0] for name, parameter in other.named_parameters())
    assert other.base_model.model.model.norm.weight.requires_grad == (writer == "shardsave")
    changed = {name for name, parameter in other.named_parameters() if not same_bits(parameter, before[name][1])}
    assert len(changed) == report.tensors > 0


def test_a_directory_of_peft(tmp_path: Path) -> None:
    """Catches a directory that PEFT wrote and that is refused although its one file is readable; a base model's directory that is
    mistaken for an adapter; and files of a save that was interrupted before its commit."""
    folder = tmp_path / "adapter"
    adapted("LoRA").save_pretrained(folder)
    expected = load_file(folder / "adapter_model.safetensors")
    loaded = shardsave.load(folder)
    assert loaded.keys() == expected.keys() and all(same_bits(loaded[name], expected[name]) for name in expected)
    assert shardsave.inspect(folder).names == tuple(expected) and shardsave.verify(folder).tensors == len(expected)
    with shardsave.open(folder) as opened:
        assert opened.keys() == expected.keys()
    shardsave.convert(folder, tmp_path / "converted")
    assert shardsave.load(tmp_path / "converted").keys() == expected.keys()
    (folder / ".shardsave-0123456789abcdef").mkdir()
    with pytest.raises(shardsave.CheckpointNotFoundError):
        shardsave.load(folder)
    (folder / ".shardsave-0123456789abcdef").rmdir()
    base().save_pretrained(folder)  # the model and its adapter in one directory: the model
    assert "lm_head.weight" in shardsave.inspect(folder).names
    shardsave.save(adapted("LoRA"), tmp_path / "converted", adapter_only=True)
    assert shardsave.inspect(tmp_path / "converted").companions


def test_adapter_of_another_shape(tmp_path: Path) -> None:
    """Catches an adapter for other layers that is loaded in part, and an error that lists names of the base model."""
    shardsave.save(adapted("LoRA"), tmp_path, adapter_only=True, durable=False)
    other = peft.get_peft_model(base(), lora(target_modules=["q_proj", "k_proj"]))
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        shardsave.load_model(other, tmp_path)
    message = str(raised.value)
    layer = "base_model.model.model.layers.0.self_attn"
    assert f"there are 4 missing from the checkpoint: {layer}.k_proj.lora_A.default.weight" in message
    assert f"4 not in the module: {layer}.v_proj.lora_A.weight" in message and "embed" not in message
    report = shardsave.load_model(other, tmp_path, strict=False)
    assert (len(report.missing), len(report.unexpected), report.tensors) == (4, 4, 4)


def test_tensors_computed_for_the_file(tmp_path: Path) -> None:
    """Catches a prompt that is silently not loaded: PEFT computes the tensor that it saves for a prompt."""
    shardsave.save(adapted("prompt"), tmp_path, adapter_only=True, durable=False)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"PEFT computes prompt_embeddings for the file"):
        shardsave.load_model(adapted("prompt"), tmp_path)


def test_a_whole_model_with_its_adapter(tmp_path: Path) -> None:
    """Catches a whole model that is loaded as an adapter."""
    model, other = adapted("LoRA", 1), adapted("LoRA", 2)
    shardsave.save(model, tmp_path, durable=False)
    shardsave.load_model(other, tmp_path)
    assert same_state(other, model) and "adapter_config.json" not in names_in(tmp_path)


def test_weights_of_another_save_are_noticed(tmp_path: Path) -> None:
    """Catches a missing note when PEFT would load another adapter than shardsave does."""
    shardsave.save(adapted("LoRA", 1), tmp_path, adapter_only=True, durable=False)
    adapted("LoRA", 2).save_pretrained(tmp_path)
    notes = shardsave.verify(tmp_path).notes
    assert any(note.startswith("adapter_model.safetensors is not the one saved with these weights") for note in notes)


def test_only_verify_reads_an_adapter_to_its_end(tmp_path: Path) -> None:
    """Catches an inspect or a load that reads an adapter's weights a second time, to learn whether they are those of the save; and a
    verify that does not."""
    shardsave.save(adapted("LoRA"), tmp_path, adapter_only=True)
    weights = tmp_path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.unlink()  # a copy of the directory has two files, not one with two names
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not shardsave.inspect(tmp_path).notes and not shardsave.load_model(adapted("LoRA", 2), tmp_path).notes
    (note,) = shardsave.verify(tmp_path).notes
    assert note.startswith("adapter_model.safetensors is not the one saved with these weights")
    content[20] ^= 1  # in the header
    weights.write_bytes(content)
    assert [report.notes[0][:25] for report in (shardsave.inspect(tmp_path), shardsave.verify(tmp_path))] == [note[:25]] * 2
    weights.write_bytes(content[:-1])
    assert shardsave.inspect(tmp_path).notes


def test_wrong_models_for_adapter_only(tmp_path: Path) -> None:
    """Catches a whole model that is saved under the name of an adapter, and a silent choice between several adapters."""
    with pytest.raises(TypeError, match=r"adapter_only=True needs a PeftModel, not a LlamaForCausalLM"):
        shardsave.save(base(), tmp_path, adapter_only=True)
    model = adapted("LoRA")
    with pytest.raises(ValueError, match="adapter_only=True saves no architecture"):
        shardsave.save(model, tmp_path, adapter_only=True, architecture=True)
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one adapter is saved at a time, 2 are active \(default, other\)"):
        shardsave.save(model, tmp_path, adapter_only=True)
    assert not names_in(tmp_path)
    model.set_adapter("other")
    shardsave.save(model, tmp_path, adapter_only=True, durable=False)
    assert same_bits(
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["other"].weight,
    )
