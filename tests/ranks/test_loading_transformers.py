"""Models of transformers and PEFT on several ranks: plain files of Hugging Face, fused experts, tied embeddings, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharded import RANKS, check_equal
from test_loading import set_thresholds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardsave
from jobs import run_ranks
from support import draw_trainable
from transformers_models import tiny

pytestmark = pytest.mark.slow


def shard(model: Any, dim: int) -> None:
    """Each layer by itself, then the rest; ``dim``: in which dimension, where that divides evenly."""
    mesh = init_device_mesh("cpu", (RANKS,))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dim if parameter.dim() > dim and parameter.shape[dim] % RANKS == 0 else 0)

    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)


def load_transformer(rank: int, folder: str, name: str) -> None:
    set_thresholds(small=True)
    expected = tiny(name)
    for path in ("plain", "ours"):
        for dim in (0, 1, 2):
            model = tiny(name, seed=1)
            shard(model, dim)
            report = shardsave.load_model(model, f"{folder}/{path}")
            stored = shardsave.inspect(f"{folder}/{path}").bytes
            assert report.verified is (True if path == "ours" else None) and report.bytes == stored
            check_equal(model, expected, f"{name}, {path}, {dim}")


@pytest.mark.parametrize("name", ["Mixtral", "Llama, tied", "GPT-OSS"])
def test_transformers(name: str, tmp_path: Path) -> None:
    """Catches experts that are stored one by one and do not reach the parts of the fused tensor, and ties that are lost."""
    model = tiny(name)
    model.save_pretrained(tmp_path / "plain", max_shard_size="50KB")
    shardsave.save(model, tmp_path / "ours", durable=False)
    run_ranks(RANKS, load_transformer, str(tmp_path), name, libraries=True)


def adapted(seed: int) -> Any:
    import peft

    model = peft.get_peft_model(tiny("Llama", seed=0), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return draw_trainable(model, seed)


def load_adapter(rank: int, folder: str) -> None:
    for path in ("whole", "adapter"):
        model = adapted(seed=1)
        shard(model.get_base_model(), 0)
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
        shardsave.load_model(model, f"{folder}/{path}")
        check_equal(model, adapted(seed=0), path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_adapters(tmp_path: Path) -> None:
    """Catches an adapter that does not reach a sharded PEFT model, and frozen parameters that thaw."""
    shardsave.save(adapted(seed=0), tmp_path / "whole", durable=False)
    shardsave.save(adapted(seed=0), tmp_path / "adapter", adapter_only=True, durable=False)
    run_ranks(RANKS, load_adapter, str(tmp_path), libraries=True)
