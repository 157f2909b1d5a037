"""``shardsave diff``: the differences between two checkpoints as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from cli.commands import lines, run
from support import SmallModel


def test_diff(ckpt: Path, tmp_path: Path) -> None:
    """Catches a difference that is not shown, or that does not change the exit code."""
    assert lines(run("diff", ckpt, ckpt))[0].startswith(f"{ckpt} and {ckpt}: 14 equal, 0 changed")
    other = SmallModel()
    other.narrow.requires_grad_(False)
    with torch.no_grad():
        other.encoder[0].weight[0, 0] += 0.25
        other.encoder[0].bias[:2] = float("nan")
    other.encoder[2] = nn.Linear(16, 16)
    other.extra, other.steps = nn.Parameter(torch.ones(2)), torch.arange(3)
    del other.head
    shardsave.save(other, tmp_path / "b")
    shown = lines(run("diff", ckpt, tmp_path / "b"), 1)
    report = shardsave.diff(ckpt, tmp_path / "b")
    bias = report.changed["encoder.2.bias"]
    assert shown[:-1] == [
        "   changed           shape          dtype    differing  max |a-b|  max relative  NaN",
        "~  steps             5 → 3          int64",
        "~  encoder.0.weight  32×16          float32          1       0.25         0.692",
        "~  encoder.0.bias    32             float32          2          0             0    2",
        "~  encoder.2.weight  16×32 → 16×16  float32",
        f"~  encoder.2.bias    16             float32         16  {bias.max_absolute:9.3g}  {bias.max_relative:12.3g}",
        "+ extra",
        "- head.weight",
        "* encoder.2.weight: frozen → trainable",
        "* encoder.2.bias: frozen → trainable",
        "* narrow.weight: trainable → frozen",
        "* narrow.bias: trainable → frozen",
        "metadata step: 7 → nothing",
    ]
    assert shown[-1].startswith(
        f"{ckpt} and {tmp_path}/b: 8 equal, 5 changed (steps, encoder.0.weight, encoder.0.bias and 2 more), "
    )
    parsed = json.loads(run("diff", ckpt, tmp_path / "b", "--json").stdout)
    assert parsed["same"] is False and tuple(parsed["equal"]) == report.equal and parsed["removed"] == ["head.weight"]
    assert parsed["changed"]["encoder.0.weight"]["max_absolute"] == 0.25 and parsed["changed"]["steps"]["elements"] is None
    assert parsed["flags"]["narrow.bias"] == [False, True]


def test_diff_of_ties_and_metadata(tmp_path: Path) -> None:
    """Catches ties or metadata that are not shown, and an exit code of 1 if only metadata differs."""
    weight = torch.ones(2)
    shardsave.save({"a": weight, "b": weight}, tmp_path / "a", metadata={"run": 7})
    shardsave.save({"a": weight, "b": weight.clone()}, tmp_path / "b", metadata={"note": "é" * 100})
    shardsave.save({"a": weight, "b": weight}, tmp_path / "c", metadata={"run": 8})
    ties, run_line, note, _ = lines(run("diff", tmp_path / "a", tmp_path / "b"), 1)
    assert (ties, run_line) == ("= b: shares a → its own", "metadata run: 7 → nothing")
    assert note == f'metadata note: nothing → "{"é" * 58}…'
    assert lines(run("diff", tmp_path / "a", tmp_path / "c"))[0] == "metadata run: 7 → 8"
    report = json.loads(run("diff", tmp_path / "a", tmp_path / "c", "--json").stdout)
    assert report["metadata"] == {"run": [7, 8]} and report["ties"] == {} and report["same"] is True


def test_diff_in_json_has_no_infinity(tmp_path: Path) -> None:
    """Catches a word that a strict JSON reader refuses."""
    for name, value in (("a", 1.0), ("b", float("inf"))):
        shardsave.save({"x": torch.tensor([value])}, tmp_path / name)
    text = run("diff", tmp_path / "a", tmp_path / "b", "--json").stdout
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))["changed"]["x"]["max_absolute"] == "inf"
