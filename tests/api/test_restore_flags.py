"""`restore_flags`: freeze flags from the index alone, for every module that `load_model` would fill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import SmallModel, same_state


def flags(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


def frozen_every_second(module: nn.Module) -> nn.Module:
    for at, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(at % 2 == 0)
    return module


def test_only_flags_and_only_the_index(tmp_path: Path) -> None:
    """Catches a shard that is opened, a value that changes, and a flag that is not that of the checkpoint."""
    source = SmallModel(seed=1)
    shardsave.save(source, tmp_path, durable=False)
    for name in os.listdir(tmp_path):
        if name.endswith(".safetensors"):
            (tmp_path / name).unlink()
    module, same = SmallModel(seed=2).requires_grad_(True), SmallModel(seed=2)
    report = shardsave.restore_flags(module, tmp_path)
    assert flags(module) == flags(source) and same_state(module, same)
    assert report == shardsave.FlagsReport(str(tmp_path), frozen=6, changed=6)
    assert str(report) == f"flags of {tmp_path}: 6 frozen (6 flags changed)"
    assert shardsave.restore_flags(module, tmp_path / "model.safetensors.index.json").changed == 0


def test_on_meta_and_with_wrappers(tmp_path: Path) -> None:
    """Catches flags that a module without memory, or one within wrappers, does not get; and wrappers' names in a checkpoint."""
    shardsave.save(frozen_every_second(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), tmp_path / "plain", durable=False)
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = torch.compile(nn.DataParallel(module), backend="eager")
    report = shardsave.restore_flags(optimizers, tmp_path / "plain")
    assert report.frozen == 2 and flags(module) == [True, False] * 2 and all(p.is_meta for p in module.parameters())
    compiled = {f"_orig_mod.{name}": p for name, p in module.to_empty(device="cpu").named_parameters()}
    shardsave.save(compiled, tmp_path / "names of wrappers", durable=False)
    wrapped = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), backend="eager")
    assert shardsave.restore_flags(wrapped, tmp_path / "names of wrappers").frozen == 2


def test_what_has_no_flag(tmp_path: Path) -> None:
    """Catches a report that hides parameters without a flag, flags without a parameter, or a checkpoint without flags."""
    shardsave.save(
        nn.ModuleDict({"a": nn.Linear(2, 2).requires_grad_(False), "b": nn.Linear(1, 1)}), tmp_path / "a", durable=False
    )
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(3, 3)})
    report = shardsave.restore_flags(module, tmp_path / "a")
    assert (report.frozen, report.changed, report.missing) == (2, 2, ("c.bias", "c.weight"))
    assert report.unexpected == ("b.bias", "b.weight")
    assert str(report).endswith("2 frozen (2 flags changed); no flag for c.bias, c.weight; not in the module: b.bias, b.weight")
    shardsave.save(module.state_dict(), tmp_path / "none", durable=False)
    before = flags(module)
    report = shardsave.restore_flags(module, tmp_path / "none")
    assert report.frozen is None and flags(module) == before and "records no flags" in str(report)
    with pytest.raises(shardsave.CheckpointNotFoundError):
        shardsave.restore_flags(module, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="model must be an nn.Module, not dict"):
        shardsave.restore_flags({}, tmp_path / "a")  # type: ignore[arg-type]


def test_modules_that_load_themselves(tmp_path: Path) -> None:
    """Catches flags of a sub-module with hooks or a routine of its own that are not found."""

    class Own(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            raise AssertionError("nothing is loaded")

    source = nn.Sequential(Own(2, 2).requires_grad_(False), nn.Linear(2, 2))
    shardsave.save(source, tmp_path, durable=False)
    module = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    assert shardsave.restore_flags(module, tmp_path).frozen == 2 and flags(module) == flags(source)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_names_of_transformers_and_peft(tmp_path: Path) -> None:
    """Catches other flags than `load_model` restores, for names that transformers or PEFT changes."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}

    def dense() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    def mixture() -> Any:
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))

    def adapted() -> Any:
        return peft.get_peft_model(dense(), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (dense, {}),
        "mixture": (mixture, {}),
        "adapted": (adapted, {}),
        "adapter": (adapted, {"adapter_only": True}),
    }
    for name, (make, options) in kinds.items():
        source = frozen_every_second(make())
        shardsave.save(source, tmp_path / name, durable=False, **options)
        expected, module = make(), make()
        loaded = shardsave.load_model(expected, tmp_path / name)
        report = shardsave.restore_flags(module, tmp_path / name)
        assert flags(module) == flags(expected) == flags(source), name
        assert (report.frozen, report.changed, report.unexpected) == (loaded.frozen, loaded.changed_flags, ()), name
    # The names on disk alone, without those in the module: as when a mapping of parameters was saved.
    on_disk = shardsave.load(tmp_path / "mixture")
    named = {name: nn.Parameter(tensor, requires_grad=".experts." not in name) for name, tensor in on_disk.items()}
    shardsave.save(named, tmp_path / "on disk", durable=False)
    expected, module = mixture(), mixture()
    shardsave.load_model(expected, tmp_path / "on disk")
    shardsave.restore_flags(module, tmp_path / "on disk")
    assert flags(module) == flags(expected) and not all(flags(module)) and any(flags(module))
