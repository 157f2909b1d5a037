"""``shardsave verify``: what it prints of sound and damaged checkpoints, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli.commands import error, flip, lines, run


def test_verify(ckpt: Path) -> None:
    """Catches damaged or intact tensors that are not named, and an exit code that does not report damage."""
    shards = [f"model-0000{n}-of-00004.safetensors" for n in range(5)]
    shown = lines(run("verify", ckpt))
    assert shown[:4] == [f"intact   {shards[n]}  {count} tensors" for n, count in ((1, 4), (2, 2), (3, 2), (4, 5))]
    assert shown[4].startswith(f"verified {ckpt}: 8.6 kB, 13 tensors in 4 shards") and len(shown) == 5
    assert run("verify", ckpt, "--quiet").output == ""
    flip(ckpt / shards[1])
    flip(ckpt / shards[2], 100)
    shown = lines(run("verify", ckpt), 1)
    assert [re.sub(" [0-9a-f]{16}", " …", line) for line in shown[:-1]] == [
        f"DAMAGED  {shards[1]}  1 of 4 tensors damaged",
        f"         corrupt shard {shards[1]}: tensor 'encoder.1.bias' has checksum …, its header says …; "
        f"the file was changed after it was saved",
        "         damaged  encoder.1.bias",
        "         intact   encoder.0.weight",
        "         intact   encoder.0.bias",
        "         intact   encoder.1.weight",
        f"DAMAGED  {shards[2]}  2 of 2 tensors damaged",
        f"         corrupt shard {shards[2]}: the index says a header with checksum …, the file has …; "
        f"the file was changed after it was saved, or belongs to another save",
        "         damaged  encoder.2.weight",
        "         damaged  encoder.2.bias",
        f"intact   {shards[3]}  2 tensors",
        f"intact   {shards[4]}  5 tensors",
    ]
    assert shown[-1].startswith(f"damaged {ckpt}: encoder.2.weight, encoder.2.bias, encoder.1.bias; 10 tensors intact, ")
    quiet = lines(run("verify", ckpt, "-q"), 1)
    assert len(quiet) == 7 and not any("intact" in line for line in quiet)
    report = json.loads(run("verify", ckpt, "--json").stdout)
    assert report["verified"] is False and sum(map(len, report["intact"].values())) == 10
    assert [d["tensors"] for d in report["damaged"]] == [["encoder.2.weight", "encoder.2.bias"], ["encoder.1.bias"]]


def test_verify_without_checksums(tmp_path: Path) -> None:
    """Catches a file that is called intact although only its length and header were checked."""
    save_file({"x": torch.ones(2)}, tmp_path / "m.safetensors")
    first, last = lines(run("verify", tmp_path / "m.safetensors"))
    assert first.startswith("unchecked  m.safetensors  1 tensor") and last.startswith("checked ")


def test_verify_with_a_broken_index(ckpt: Path) -> None:
    """Catches a damaged index that is reported with the exit code of wrong usage or of a failure."""
    flip(ckpt / "model.safetensors.index.json", 20)
    assert error(run("verify", ckpt), 1).startswith("shardsave: corrupt index model.safetensors.index.json: ")
    assert error(run("inspect", ckpt), 3).startswith("shardsave: corrupt index model.safetensors.index.json: ")


def test_a_quiet_verification_without_checksums(tmp_path: Path) -> None:
    """Catches silence about files that have no checksums, which reads as if every byte had been verified."""
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    done = run("verify", tmp_path, "--quiet")
    assert done.stdout == ""
    assert done.stderr == f"shardsave verify: {tmp_path}: only lengths and headers were checked, no checksums stored\n"
