"""Fine-tunes the upper half of a trained BERT, is stopped by SIGTERM, goes on in a new process, and compares the losses with a training
that was never stopped.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from demo import SENTENCES, embed, trained_bert
from transformers import AutoTokenizer, BertConfig, BertModel, get_linear_schedule_with_warmup

import shardsave

OUT = Path("demo-out/finetune")
STEPS = 8
STOPPED_IN = 5


def frozen_bert() -> BertModel:
    """The trained model; only the upper three of its layers are to be trained."""
    source = trained_bert()
    model = BertModel(BertConfig.from_pretrained(source))
    shardsave.load_model(model, source, strict=False)
    for module in (model.embeddings, *model.encoder.layer[:3], model.pooler):
        module.requires_grad_(False)
    return model


def bert_of(path: str) -> BertModel:
    """A model whose parameters are frozen as those in ``path`` are; `resume` fills it."""
    model = BertModel(BertConfig.from_pretrained(path))
    print(shardsave.restore_flags(model, path))
    return model


def train(run: Path, stopped_in: int = 0) -> dict[int, float]:
    """Trains to the last step, from where ``run`` ended, or until SIGTERM comes in step ``stopped_in``. Returns the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses: dict[int, float] = {}
    with shardsave.CheckpointManager(run, save_every=3, keep_last=2, rng=True) as manager:
        manager.save_on_signal(signal.SIGTERM)
        latest = manager.latest()
        torch.manual_seed(0)
        model = (bert_of(latest.path) if latest else frozen_bert()).to(device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=STEPS)
        sampler = torch.Generator().manual_seed(1)  # chooses the sentences of each step
        training = {"optimizer": optimizer, "scheduler": scheduler, "sampler": shardsave.PerRank(sampler)}
        if resumed := manager.resume(model, training=training):
            print(resumed)
        tokens = AutoTokenizer.from_pretrained(trained_bert())(SENTENCES, padding=True, return_tensors="pt").to(device)
        for step in range(resumed.next_step if resumed else 1, STEPS + 1):
            batch = torch.randperm(len(SENTENCES), generator=sampler)[:3]
            chosen = {name: tensor[batch] for name, tensor in tokens.items()}
            # Dropout makes the two embeddings of a sentence different: they should be alike, and unlike those of the others.
            first, second = (torch.nn.functional.normalize(embed(model, chosen)) for _ in range(2))
            loss = (first @ second.T - torch.eye(len(batch), device=device)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses[step] = loss.item()
            print(f"step {step}: loss {losses[step]:.6f}")
            if step == stopped_in:
                os.kill(os.getpid(), signal.SIGTERM)  # as a cluster does that takes its machine back
            manager.step(step, model, training=training, metrics={"loss": losses[step]})
            if manager.preempted:
                print(f"SIGTERM: stopped after step {step}, which is saved")
                break
    return losses


def compare() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    print("A training that is not stopped:")
    straight = train(OUT / "straight")
    print("\nThe same training, stopped:")
    stopped = train(OUT / "run", stopped_in=STOPPED_IN)
    print("\nIt goes on in a new process:")
    subprocess.run([sys.executable, __file__, "--resume"], check=True)
    resumed = {int(step): loss for step, loss in json.loads((OUT / "resumed.json").read_text()).items()}
    agree = {**stopped, **resumed} == straight and min(resumed) == STOPPED_IN + 1
    print(f"\nthe losses of all {STEPS} steps agree, bit for bit: {agree}")
    if not agree:
        raise SystemExit("the resumed training is another one")
    print(f"What to try next: {os.path.relpath(sys.executable)} -m shardsave list {OUT}/run")


if __name__ == "__main__":
    # Piped output is buffered in blocks by default, so the lines of the child process would appear before those of this one.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if "--resume" in sys.argv:
        (OUT / "resumed.json").write_text(json.dumps(train(OUT / "run")))
    else:
        compare()
