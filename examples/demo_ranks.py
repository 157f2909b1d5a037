"""Saves a sharded BERT from four processes, loads it in two, and opens it with transformers in one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from demo import SENTENCES, embed, trained_bert
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, BertConfig, BertModel

import shardsave

OUT = Path("demo-out") / "ranks"


def sharded_bert() -> BertModel:
    """A BERT of random values, which all ranks share."""
    model = BertModel(BertConfig.from_pretrained(trained_bert()))
    model.embeddings.requires_grad_(False)
    for layer in model.encoder.layer[:3]:
        layer.requires_grad_(False)
    for layer in model.encoder.layer:
        fully_shard(layer)
    return fully_shard(model).eval()


def tokens() -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(trained_bert())(SENTENCES, padding=True, return_tensors="pt"))


def tell(text: object) -> None:
    """Prints once, though every rank calls it."""
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: {text}", flush=True)


def train_and_save() -> None:
    """Fills the sharded model from files that transformers wrote, trains it a little, and saves it from all ranks."""
    model = sharded_bert()
    tell(shardsave.load_model(model, trained_bert(), strict=False, restore_frozen=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = tokens()
    for step in range(3):
        similarity = torch.nn.functional.normalize(embed(model, inputs)) @ torch.nn.functional.normalize(embed(model, inputs)).T
        loss = (similarity - torch.eye(len(SENTENCES))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tell(f"step {step}: loss {loss.item():.4f}")
    tell(shardsave.save(model, OUT / "ckpt", max_shard_size="30MB", metadata={"ranks": dist.get_world_size()}))
    with torch.no_grad():
        output = embed(model, inputs)  # all ranks take part
    if dist.get_rank() == 0:
        torch.save(output, OUT / "expected.pt")


def load_and_compare() -> None:
    """Loads the checkpoint on another number of ranks, and compares what the model computes."""
    model = sharded_bert().requires_grad_(True)
    tell(shardsave.load_model(model, OUT / "ckpt"))
    with torch.no_grad():
        output = embed(model, tokens())
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    tell(f"outputs equal: {torch.equal(output, torch.load(OUT / 'expected.pt'))}; {frozen} parameters are frozen again")


def open_in_one_process() -> None:
    print(shardsave.verify(OUT / "ckpt"))
    model = BertModel.from_pretrained(OUT / "ckpt").eval()
    with torch.no_grad():
        equal = torch.equal(embed(model, tokens()), torch.load(OUT / "expected.pt"))
    print(f"one process, from_pretrained: outputs equal: {equal}", flush=True)
    if not equal:
        raise SystemExit("the model that from_pretrained opens differs")


def on_ranks(number: int, what: str) -> None:
    """Runs this program again on ``number`` ranks, as ``torchrun --nproc-per-node NUMBER examples/demo_ranks.py WHAT`` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), __file__, what]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        on_ranks(4, "save")
        on_ranks(2, "load")
        open_in_one_process()
    else:
        dist.init_process_group("gloo")
        train_and_save() if sys.argv[1] == "save" else load_and_compare()
        dist.destroy_process_group()
