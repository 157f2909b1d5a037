"""Models of transformers, saved through torch.distributed.checkpoint: `from_pretrained` reads the directory as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import shardsave
from shardsave.integrations.dcp import StorageReader, StorageWriter
from support import same_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning"),
]


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained(tied: bool, tmp_path: Path) -> None:
    """Catches a missing config, names that transformers does not know, a head that is new because it was tied, and lost flags."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    state = {"model": model.state_dict(), "optimizer": {"exp_avg": torch.ones(3)}, "step": 4}
    dcp.save(state, storage_writer=StorageWriter(tmp_path, model), no_dist=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert same_state(loaded, model) and (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert shardsave.inspect(tmp_path).ties == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    fresh = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model) and not fresh.model.layers[0].mlp.up_proj.weight.requires_grad
    model.save_pretrained(tmp_path / "theirs")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    if not tied:  # transformers leaves out what is tied, which only its model knows
        dcp.load(state, storage_reader=StorageReader(tmp_path / "theirs", prefix="model."), no_dist=True)
        assert all(torch.equal(state["model"][name], tensor) for name, tensor in model.state_dict().items())
