"""transformers models with adapters of ``add_adapter``: from_pretrained opens model and adapter, load_model fills both in place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardsave
from support import same_bits, same_state
from transformers_models import tiny

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def lora(**options: Any) -> Callable[[], Any]:
    all_options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return lambda: peft.LoraConfig(**all_options)


def adapted(name: str, config: Callable[[], Any], seed: int = 0, adapter: str = "default") -> Any:
    model = tiny(name, seed)
    model.add_adapter(config(), adapter_name=adapter)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    next(iter(model.parameters())).requires_grad_(True)
    return model


def frozen_in(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


#: Architecture, and the adapter that is added.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA": ("Llama", lora()),
    "whole layer": ("Llama", lora(modules_to_save=["lm_head"])),
    "biases": ("Qwen2", lora(bias="all")),
    "embeddings": ("Llama, tied", lora(target_modules=["q_proj", "embed_tokens"])),
    "tokens": ("Llama", lora(trainable_token_indices=[1, 2])),
    "experts": ("Mixtral", lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "IA3": ("Llama", lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_model_and_its_adapter_come_back(kind: str, tmp_path: Path) -> None:
    """Catches a directory from which from_pretrained starts with random weights, because layers with adapters have other names in
    memory; an adapter that is not PEFT's; and values or flags that load_model loses."""
    model = adapted(*CASES[kind])
    report = shardsave.save(model, tmp_path / "own", max_shard_size="20KB")
    assert not report.notes and report.shards > 2
    loaded, loading_info = type(model).from_pretrained(tmp_path / "own", output_loading_info=True)
    assert same_state(loaded, model) and not any(loading_info.values())
    model.save_pretrained(tmp_path / "transformers")
    actual, expected = (load_file(tmp_path / writer / "adapter_model.safetensors") for writer in ("own", "transformers"))
    saved_by_size = {name for name in expected if name.endswith("embed_tokens.base_layer.weight")}  # a guess of PEFT's
    assert actual.keys() == expected.keys() - saved_by_size
    assert all(same_bits(actual[name], expected[name]) for name in actual)
    configs = [json.loads((tmp_path / writer / "adapter_config.json").read_text()) for writer in ("own", "transformers")]
    for config in configs:
        config.update({key: sorted(value) for key, value in config.items() if isinstance(value, list)})
    assert configs[0] == configs[1]
    separate = peft.PeftModel.from_pretrained(tiny(CASES[kind][0]), tmp_path / "own").base_model.model.state_dict()
    assert all(same_bits(separate[name], value) for name, value in model.state_dict().items() if "lora_" in name)
    info = shardsave.inspect(tmp_path / "own")
    assert info.frozen == frozen_in(model) and not info.notes and not shardsave.verify(tmp_path / "own").notes
    fresh = adapted(*CASES[kind], seed=1).requires_grad_(True)
    before = list(fresh.parameters())
    report = shardsave.load_model(fresh, tmp_path / "own")
    assert same_state(fresh, model) and frozen_in(fresh) == frozen_in(model)
    assert all(old is new for old, new in zip(before, fresh.parameters(), strict=True))
    assert not (report.missing or report.unexpected or report.notes)


def test_what_from_pretrained_does_not_read_is_noted(tmp_path: Path) -> None:
    """Catches an adapter that from_pretrained silently leaves out or fills with new values."""
    model = adapted("Llama", lora(), adapter="first")
    model.add_adapter(lora(r=3)(), adapter_name="second")
    assert shardsave.save(model, tmp_path).notes == (
        "from_pretrained reads one adapter, the active one; load_model also reads first",
    )
    fresh = adapted("Llama", lora(), seed=1, adapter="first")
    fresh.add_adapter(lora(r=3)(), adapter_name="second")
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model)
    model.set_adapter(["first", "second"])
    assert shardsave.save(model, tmp_path).notes == (
        "from_pretrained reads one adapter, the active one; load_model also reads first, second",
    )
    assert "adapter_config.json" not in os.listdir(tmp_path)
    fresh.set_adapter(["first", "second"])
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model)
    dora = adapted("Llama", lora(use_dora=True))
    (note,) = shardsave.save(dora, tmp_path).notes
    assert "does not know PEFT's name of model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight" in note
    _, loading_info = type(dora).from_pretrained(tmp_path, output_loading_info=True)
    assert len(loading_info["missing_keys"]) == 4  # what the note says
    fresh = adapted("Llama", lora(use_dora=True), seed=1)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, dora)


def shira(r: int, seed: int) -> Callable[[], Any]:
    return lambda: peft.ShiraConfig(r=r, target_modules=["q_proj"], random_seed=seed)


def indices(model: Any) -> list[torch.Tensor]:
    return [part.shira_indices["default"] for part in model.modules() if hasattr(part, "shira_indices")]


def test_tensors_outside_the_state_dict(tmp_path: Path) -> None:
    """Catches SHiRA's indices that are lost, so that values come back at other places, and indices of another number that are not
    refused before anything is changed."""
    model = adapted("Llama", shira(1, 1), seed=1)
    (note,) = shardsave.save(model, tmp_path).notes
    assert "does not know PEFT's name of base_model.model.model.layers.0.self_attn.q_proj.shira_indices" in note
    fresh = adapted("Llama", shira(1, 2), seed=2)
    assert not torch.equal(indices(fresh)[0], indices(model)[0])
    report = shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model) and all(map(torch.equal, indices(fresh), indices(model)))
    assert report.tensors == len(shardsave.inspect(tmp_path).tensors) and not report.notes
    other = adapted("Llama", shira(2, 2), seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"shira_indices' of shape \[2, 128\] was expected, it is \[2, 64\]"
    ):
        shardsave.load_model(other, tmp_path)
    assert all(same_bits(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_names_in_memory_with_an_adapter(tmp_path: Path) -> None:
    """Catches a model with an adapter that is not filled from names in memory, as an architecture and older versions have them."""
    model = adapted("Mixtral", lora())
    report = shardsave.save(model, tmp_path / "architecture", architecture=True)
    assert report.notes == ("from_pretrained does not know the names of layers with adapters, load_model does",)
    shardsave.save(model.state_dict(), tmp_path / "state")
    for folder in ("architecture", "state"):
        fresh = adapted("Mixtral", lora(), seed=1)
        shardsave.load_model(fresh, tmp_path / folder)
        assert same_state(fresh, model)


def test_a_model_without_the_adapter(tmp_path: Path) -> None:
    """Catches a base model that does not take the weights beside the adapter, or a missing adapter that is not reported."""
    model, base = adapted("Mixtral", lora()), tiny("Mixtral", seed=1)
    shardsave.save(model, tmp_path / "both")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"not in the module: base_model\.model\.model\.layers\.0"):
        shardsave.load_model(base, tmp_path / "both")
    report = shardsave.load_model(base, tmp_path / "both", strict=False)
    assert not report.missing and same_bits(
        base.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.base_layer.weight
    )
    shardsave.save(base, tmp_path / "base")
    fresh = adapted("Mixtral", lora(), seed=2)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"missing from the checkpoint: .*lora_A\.default\.weight"):
        shardsave.load_model(fresh, tmp_path / "base")
    report = shardsave.load_model(fresh, tmp_path / "base", strict=False)
    assert not report.unexpected and all("lora" in name for name in report.missing)
    assert same_bits(fresh.model.layers[1].mlp.experts.down_proj, base.model.layers[1].mlp.experts.down_proj)


@pytest.mark.parametrize("kind", CASES)
def test_flags_without_the_adapter(kind: str, tmp_path: Path) -> None:
    """Catches freeze flags that are lost where the model that is filled has no adapter, or has one on other layers."""
    model = adapted(*CASES[kind])
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    shardsave.save(model, tmp_path)
    peft_layers = re.compile(r"\.(base_layer|original_module)(?=\.)")
    plain = tiny(CASES[kind][0], seed=1)
    names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    for fresh in (plain, adapted(CASES[kind][0], lora(target_modules=["o_proj"]), seed=1)):
        fresh.requires_grad_(True)
        shardsave.load_model(fresh, tmp_path, strict=False)
        expected = {peft_layers.sub("", name) for name in frozen_in(model)} & names
        assert {peft_layers.sub("", name) for name in frozen_in(fresh)} & names == expected != set()


def test_a_model_without_adapter_replaces_one_with(tmp_path: Path) -> None:
    """Catches an adapter that stays beside the next weights, to which from_pretrained would add it."""
    shardsave.save(adapted("Llama", lora()), tmp_path)
    plain = tiny("Llama")
    shardsave.save(plain, tmp_path)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(os.listdir(tmp_path))
    assert same_state(type(plain).from_pretrained(tmp_path), plain)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_conversion_keeps_the_adapter(tmp_path: Path, dtype: str | None) -> None:
    """Catches a conversion after which from_pretrained opens the base without its adapter, or with another one."""
    model = adapted("Llama", lora())
    shardsave.save(model, tmp_path / "x", durable=False)
    shardsave.convert(tmp_path / "x", tmp_path / "y", dtype=dtype, max_shard_size="20kB", durable=False)
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    assert (tmp_path / "y" / config).read_bytes() == (tmp_path / "x" / config).read_bytes()
    expected = {n: t.to(getattr(torch, dtype)) if dtype else t for n, t in load_file(tmp_path / "x" / weights).items()}
    found = load_file(tmp_path / "y" / weights)
    assert found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)
    opened = type(model).from_pretrained(tmp_path / "y")
    assert same_state(opened, model.to(opened.dtype))
    assert shardsave.verify(tmp_path / "y").verified and not shardsave.inspect(tmp_path / "y").notes


def test_conversion_names_an_adapter_that_it_drops(tmp_path: Path) -> None:
    """Catches an adapter's files that a conversion leaves out without a note."""
    shardsave.save(adapted("Llama", lora()), tmp_path / "x", durable=False)
    plain = tiny("Llama")
    plain.save_pretrained(tmp_path / "z")
    (tmp_path / "z" / "adapter_config.json").write_text("{}")
    cases = (
        (tmp_path / "x", {"rename": [("^base", "m")], "drop": ["*norm*"]}, "PEFT's names have changed"),
        (tmp_path / "x", {"to": "safetensors"}, "a single file cannot hold them"),
        (tmp_path / "x" / "model.safetensors.index.json", {}, "no adapter_config.json was read beside them"),
        (tmp_path / "z", {}, "of an adapter that is not part of the checkpoint, was not read"),
    )
    for number, (source, options, reason) in enumerate(cases):
        report = shardsave.convert(source, tmp_path / str(number), durable=False, **options)
        assert any("adapter_config.json" in note and reason in note for note in report.notes)
        if (tmp_path / str(number)).is_dir():
            assert not {"adapter_config.json", "adapter_model.safetensors"} & set(os.listdir(tmp_path / str(number)))
