"""The picture of a checkpoint: it is to scale, its colours differ in grey, and an error is one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import shardsave
from cli.commands import error, lines, run


def grey_of(path: Path) -> np.ndarray:
    """The picture below its legend, in grey as a printer without colour prints it: 0 is black, 255 white."""
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"))
    return grey[100:-66]


def test_areas_of_frozen_and_trainable_tensors_in_grey(tmp_path: Path) -> None:
    """Catches colours that look the same in grey, and areas out of scale: here 3 of 4 bytes are frozen."""
    model = nn.ParameterDict({"a": torch.ones(30_000), "b": torch.ones(10_000)})
    model["a"].requires_grad_(False)
    shardsave.save(model, tmp_path / "ckpt", max_shard_size="120kB", durable=False)
    (line,) = lines(run("plot", tmp_path / "ckpt", "-o", tmp_path / "map.png"))
    assert re.fullmatch(rf"{tmp_path}/map.png: [\d.]+ kB", line)
    grey = grey_of(tmp_path / "map.png")
    dark, light = np.abs(grey.astype(int) - 71) < 25, np.abs(grey.astype(int) - 188) < 12
    assert dark.sum() / light.sum() == pytest.approx(3, rel=0.1)


def test_labels(tmp_path: Path) -> None:
    """Catches a shard, a tensor's name or a kind of tensor without a label."""
    model = nn.Sequential(nn.Linear(100, 100).requires_grad_(False), nn.BatchNorm1d(5000), nn.Linear(5000, 3))
    shardsave.save(model, tmp_path / "ckpt", max_shard_size="60kB", durable=False)
    shards = shardsave.inspect(tmp_path / "ckpt").shards
    lines(run("plot", tmp_path / "ckpt", "-o", tmp_path / "map.svg"))
    text = (tmp_path / "map.svg").read_text()
    labels = re.findall(r"<!-- (.*?) -->", text)
    assert {f"ckpt: 180.4 kB, 9 tensors in {len(shards)} shards", "0.weight", "2.weight", *shards} <= set(labels)
    assert {"frozen, 40.4 kB (22%)", "trainable, 100.0 kB (55%)", "no parameter, 40.0 kB (22%)"} <= set(labels)
    assert all(text.lower().count(colour) > 1 for colour in ("#1d4e79", "#f5b54a", "#c9ced6"))


def test_third_party_files(tmp_path: Path) -> None:
    """Catches flags that are drawn although they are unknown, and names that matplotlib parses as formulas."""
    from safetensors.torch import save_file

    save_file({r"$\frac$.x": torch.ones(100)}, tmp_path / r"$\frac$.safetensors")
    lines(run("plot", tmp_path / r"$\frac$.safetensors", "-o", tmp_path / "map.svg"))
    text = (tmp_path / "map.svg").read_text()
    assert "freeze flags unknown, 400 B (100%)" in text and "#1d4e79" not in text and "#f5b54a" not in text


@pytest.mark.parametrize("tensors", [0, 1, 300])
def test_any_number_of_shards(tmp_path: Path, tensors: int) -> None:
    """Catches a division by zero for an empty checkpoint, and a picture whose height grows without limit."""
    shardsave.save({f"$t_{n}\n": torch.ones(3) for n in range(tensors)}, tmp_path / "ckpt", max_shard_size=12, durable=False)
    lines(run("plot", tmp_path / "ckpt", "-o", tmp_path / "map.png", "--width", 8))
    with Image.open(tmp_path / "map.png") as picture:
        width, height = picture.size
    assert width == 960 and height <= 120 * 32


def test_errors(tmp_path: Path) -> None:
    """Catches a traceback, or an error that does not say what is missing."""
    shardsave.save({"x": torch.ones(3)}, tmp_path / "ckpt")
    unknown = error(run("plot", tmp_path / "ckpt", "-o", tmp_path / "map.docx"), 2)
    assert unknown.startswith("shardsave plot: the picture's format must be one of ") and "png" in unknown
    missing = error(run("plot", tmp_path / "ckpt", "-o", tmp_path / "none" / "map.png"), 3)
    assert missing == f"shardsave: {tmp_path}/none/map.png: No such file or directory"
    program = "import sys; sys.modules['matplotlib'] = None; from shardsave._cli.main import cli; cli(sys.argv[1:])"
    command = [sys.executable, "-c", program, "plot", str(tmp_path / "ckpt"), "-o", str(tmp_path / "map.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "") and re.fullmatch(
        r"shardsave: matplotlib is needed, it cannot be imported \(.*\); pip install 'shardsave\[plot\]'\n", done.stderr
    )
