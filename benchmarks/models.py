"""Saves models with ``architecture=True``, builds them again, and compares. Writes docs/models.md.

    python benchmarks/models.py --to docs/models.md

Tries torch.nn and, if they are installed, transformers, torchvision (every classification model) and timm (one model of each family).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import shardsave

#: Larger models are left out, so that three copies of each model fit into memory.
MOST_PARAMETERS = 700_000_000

#: The name of a model, a function that creates it, and a function that creates its inputs.
Try = tuple[str, Callable[[], nn.Module], Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]]]


def differences(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """Names what differs in the model that is built with the trust in the report of the save; empty if it is equal."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        report = shardsave.save(model, folder, architecture=True, durable=False, progress=False)
        built = shardsave.build_model(folder, trust=report.trust, progress=False)
    differing = []
    if repr(model) != repr(built):
        differing.append("repr")
    before, after = model.state_dict(), built.state_dict()
    if before.keys() != after.keys() or not all(_same(before[name], after[name]) for name in before):
        differing.append("state_dict")
    if [p.requires_grad for p in model.parameters()] != [p.requires_grad for p in built.parameters()]:
        differing.append("flags")
    arguments, keywords = inputs
    results = []
    for candidate in (model, built):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(candidate(*arguments, **keywords))
    if not _same(*results):
        differing.append("outputs")
    return ", ".join(differing)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if hasattr(left, "keys"):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return type(left) is type(right)


def of_torch() -> Iterator[Try]:
    x = torch.randn(2, 5, 16)

    def pruned() -> nn.Module:
        layer = nn.Linear(16, 4)
        prune.l1_unstructured(layer, "weight", 0.5)
        return layer

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        model[0].requires_grad_(False)
        return model

    makers: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "LSTM": (lambda: nn.LSTM(16, 8, 2, bidirectional=True), 1),
        "GRU": (lambda: nn.GRU(16, 8), 1),
        "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 4), 3),
        "Transformer": (lambda: nn.Transformer(16, 4, 2, 2, 32, batch_first=True), 2),
        "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 4)), 1),
        "weight norm by hooks": (lambda: torch.nn.utils.weight_norm(nn.Linear(16, 4)), 1),
        "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 4)), 1),
        "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), 1),
        "pruned": (pruned, 1),
        "tied weights, a part frozen": (tied, 1),
    }
    for name, (make, count) in makers.items():
        yield name, make, lambda model, count=count: ((x,) * count, {})  # type: ignore[misc]


def of_torchvision() -> Iterator[Try]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        size = 299 if "inception" in name else 224
        yield (
            name,
            lambda name=name: torchvision.models.get_model(name, weights=None),  # type: ignore[misc]
            lambda model, size=size: ((torch.randn(1, 3, size, size),), {}),  # type: ignore[misc]
        )


def of_timm() -> Iterator[Try]:
    import timm

    families: dict[str, str] = {}
    for name in timm.list_models():
        families.setdefault(timm.models.model_entrypoint(name).__module__, name)
    for name in families.values():
        yield (
            name,
            lambda name=name: timm.create_model(name),  # type: ignore[misc]
            lambda model: ((torch.randn(1, *model.pretrained_cfg.get("input_size", (3, 224, 224))),), {}),
        )


def of_transformers() -> Iterator[Try]:
    import transformers as t

    ids = torch.arange(1, 9)[None]
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
    image = {key: size for key, size in text.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    pair = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, **heads}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    grouped = text | {"num_key_value_heads": 2}
    picture, sound = torch.randn(1, 3, 32, 32), torch.randn(1, 8, 100)
    shared = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    routed = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    models: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
        "BertModel": (text, (ids,), {}),
        "RobertaModel": (text, (ids,), {}),
        "DistilBertModel": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100}, (ids,), {}),
        "DebertaV2Model": (text, (ids,), {}),
        "LlamaForCausalLM": (grouped, (ids,), {}),
        "Gemma2ForCausalLM": (grouped | {"head_dim": 8}, (ids,), {}),
        "Qwen3ForCausalLM": (grouped | {"head_dim": 8}, (ids,), {}),
        "Phi3ForCausalLM": (grouped | {"pad_token_id": 0}, (ids,), {}),
        "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}, (ids,), {}),
        "OPTForCausalLM": (
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
            | {"vocab_size": 100},
            (ids,),
            {},
        ),
        "MambaForCausalLM": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}, (ids,), {}),
        "MixtralForCausalLM": (grouped | {"num_local_experts": 4}, (ids,), {}),
        "Qwen2MoeForCausalLM": (grouped | shared, (ids,), {}),
        "DeepseekV3ForCausalLM": (text | latent | routed | {"num_key_value_heads": 4, "moe_intermediate_size": 32}, (ids,), {}),
        "T5ForConditionalGeneration": (
            {
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 100,
                "decoder_start_token_id": 0,
            },
            (),
            {"input_ids": ids, "decoder_input_ids": ids},
        ),
        "BartForConditionalGeneration": (pair, (ids,), {}),
        "ViTForImageClassification": (image, (picture,), {}),
        "CLIPModel": ({"text_config": text, "vision_config": image}, (), {"input_ids": ids, "pixel_values": picture}),
        "WhisperForConditionalGeneration": (
            pair | ends | {"decoder_start_token_id": 1, "max_source_positions": 50, "num_mel_bins": 8},
            (sound,),
            {"decoder_input_ids": ids},
        ),
    }
    for name, (config, arguments, keywords) in models.items():
        kind = getattr(t, name)
        yield (
            name,
            lambda kind=kind, config=config: kind(kind.config_class(**config)),  # type: ignore[misc]
            lambda model, arguments=arguments, keywords=keywords: (arguments, keywords),  # type: ignore[misc]
        )


GROUPS: dict[str, Callable[[], Iterator[Try]]] = {
    "torch": of_torch,
    "transformers": of_transformers,
    "torchvision": of_torchvision,
    "timm": of_timm,
}


def outcome(attempt: Try) -> str:
    """``"✓"`` if the built model is equal; otherwise the reason why not."""
    _, make, inputs = attempt
    try:
        model = make()
    except Exception as error:
        return f"does not construct: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        return f"not tried: {count / 1e6:.0f} million parameters"
    try:
        differing = differences(model, inputs(model))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"differs in {differing}" if differing else "✓"


def section(results: dict[str, str]) -> list[str]:
    """The lines about one library, from the result of each model."""
    equal = [name for name, result in results.items() if result == "✓"]
    names = textwrap.wrap(", ".join(equal) + ".", 120, break_on_hyphens=False)
    failures = [f"- {name}: {result}" for name, result in results.items() if result != "✓"]
    return [f"{len(equal)} of {len(results)} are equal.", "", *([*failures, ""] if failures else []), *names]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--only", choices=GROUPS, action="append")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        "# Whole models that come back",
        "",
        "`python benchmarks/models.py` writes this page. It makes each model with random weights, saves it with",
        "`architecture=True`, and builds it again with `build_model` and the trust that the report of the save names. Then it",
        "compares `repr`, `state_dict`, `requires_grad` and outputs, bit for bit.",
    ]
    for group, attempts in GROUPS.items():
        if options.only and group not in options.only:
            continue
        try:
            importlib.import_module(group)
        except ImportError:
            print(f"{group} is not installed")
            continue
        results: dict[str, str] = {}
        for attempt in attempts():
            results[attempt[0]] = outcome(attempt)
            print(f"{group}: {attempt[0]}: {results[attempt[0]]}", flush=True)
        lines += ["", f"## {group} {importlib.metadata.version(group)}", "", *section(results)]
    options.to.parent.mkdir(exist_ok=True)
    options.to.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
