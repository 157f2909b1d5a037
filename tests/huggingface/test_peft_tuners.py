"""Every kind of adapter that PEFT has: the file is PEFT's, PEFT reads it, and load_model fills the adapter in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import shardsave
from support import draw_trainable, same_bits, same_state
from transformers_models import DECODER

transformers.logging.set_verbosity_error()
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LAYERS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
CPT_IDS = {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 1, 1], "task_type": "CAUSAL_LM"}

#: Kind of adapter → the options of its config, if they are not only LAYERS.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2, "init_lora_weights": False, **LAYERS},
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2, **LAYERS},
    "ADAMSS": {"r": 4, "num_subspaces": 2, **LAYERS},
    "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 2, "task_type": "CAUSAL_LM"},
    "BOFT": {"boft_block_size": 4, **LAYERS},
    "C3A": {"block_size": 4, **LAYERS},
    "CARTRIDGE": PROMPT,
    "CPT": CPT_IDS,
    "FOURIERFT": {"n_frequency": 5, **LAYERS},
    "GRALORA": {"r": 2, "gralora_k": 2, **LAYERS},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4, **LAYERS},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2, "num_ranks": 1, **PROMPT},
    "OFT": {"oft_block_size": 4, **LAYERS},
    "P_TUNING": {"encoder_hidden_size": 8, **PROMPT},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "PSOFT": {"r": 4, **LAYERS},
    "PVERA": {"r": 2, **LAYERS},
    "RANDLORA": {"r": 2, **LAYERS},
    "ROAD": {"group_size": 4, **LAYERS},
    "SHIRA": {"r": 1, **LAYERS},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 2, **LAYERS},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, **LAYERS},
    "VERA": {"r": 2, **LAYERS},
    "WAVEFT": {"n_frequency": 5, **LAYERS},
}

#: Kinds that need adapters which were saved before.
NOT_TRIED = {"XLORA"}

#: Kinds of which PEFT saves a tensor that it computes, so that load_model refuses them.
COMPUTED = {"CARTRIDGE", "CPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}

KINDS = [kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in NOT_TRIED]


def base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def adapted(kind: str, seed: int) -> Any:
    config_class = {key.value: value for key, value in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
    torch.manual_seed(7)  # some kinds draw what they do not save
    options = {"random_seed": seed} if kind == "SHIRA" else {}
    model = peft.get_peft_model(base(), config_class(**OPTIONS.get(kind, LAYERS), **options))
    return draw_trainable(model, seed)


def indices(model: Any) -> list[torch.Tensor]:
    return [part.shira_indices["default"] for part in model.modules() if hasattr(part, "shira_indices")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    """Catches names that PEFT writes and shardsave does not (tensors that layers share), and an adapter that is not filled in place
    although it could be: layers that load themselves, tensors in dicts of indices, names that are the same in memory."""
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    model = adapted(kind, 1)
    shardsave.save(model, tmp_path / "own", adapter_only=True, durable=False)
    model.save_pretrained(tmp_path / "peft")
    actual, expected = (load_file(tmp_path / writer / "adapter_model.safetensors") for writer in ("own", "peft"))
    same = torch.allclose if kind == "CPT" else same_bits  # PEFT rescales the prompts of CPT whenever it computes them
    assert actual.keys() == expected.keys() and all(same(actual[name], expected[name]) for name in expected)
    loaded = []
    for writer in ("own", "peft"):
        model_again = base()
        torch.manual_seed(3)
        loaded.append(peft.PeftModel.from_pretrained(model_again, tmp_path / writer))
        fresh = adapted(kind, 2)
        if kind in COMPUTED:
            with pytest.raises(shardsave.IncompatibleCheckpointError, match="PEFT computes prompt_embeddings for the file"):
                shardsave.load_model(fresh, tmp_path / writer)
            continue
        before = list(fresh.parameters())
        assert not any(map(torch.equal, indices(fresh), indices(model)))
        report = shardsave.load_model(fresh, tmp_path / writer)
        assert same_state(fresh, model) and not (report.missing or report.unexpected or report.notes)
        assert all(same_bits(a, b) for a, b in zip(indices(fresh), indices(model), strict=True))
        assert kind == "ADAMSS" or all(old is new for old, new in zip(before, fresh.parameters(), strict=True))
    assert kind == "CPT" or same_state(*loaded)


def test_the_table() -> None:
    """Catches options for a kind that PEFT no longer has."""
    assert OPTIONS.keys() <= set(KINDS) and set(KINDS) >= COMPUTED
