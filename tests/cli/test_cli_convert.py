"""``shardsave convert``: every option reaches the conversion, and what goes wrong is one line and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from test_cli import error, lines, run

import shardsave


def old(folder: Path) -> Path:
    state = {"module.a": torch.ones(1000), "module.b": torch.ones(1000), "junk.x": torch.ones(1)}
    torch.save({"model": state, "ema": {"e": torch.zeros(1)}}, folder / "old.pt")
    return folder / "old.pt"


def test_options(tmp_path: Path) -> None:
    """Catches an option that does not arrive."""
    options = [
        "--key",
        "model",
        "--drop",
        "junk.*",
        "--rename",
        r"^module\.",
        "",
        "--rename",
        "(a)",
        r"\1\1",
        "--dtype",
        "float16",
    ]
    (line,) = lines(run("convert", old(tmp_path), tmp_path / "ckpt", *options, "--max-shard-size", "2kB", "--not-durable"))
    assert line.startswith(
        f"converted {tmp_path}/old.pt (torch) to {tmp_path}/ckpt (shardsave): 4.0 kB, 2 tensors in 2 shards, "
    )
    assert "not durable" in line and line.endswith(
        "1 dropped, 2 renamed, 2 cast; left out, as it lies beside 'model': 'ema' (dict)"
    )
    info = shardsave.inspect(tmp_path / "ckpt")
    assert info.names == ("aa", "b") and info.tensors["b"].dtype == torch.float16 and info.durable is False
    (told,) = lines(
        run("convert", tmp_path / "ckpt", tmp_path / "m.safetensors", "--to", "safetensors", "--no-verify", "--json")
    )
    told = json.loads(told)
    assert told["verified"] is False and told["to"] == "safetensors" and told["bytes"] == 4000
    lines(run("convert", tmp_path / "ckpt", tmp_path / "m.bin", "--to", "torch"))
    assert torch.load(tmp_path / "m.bin", weights_only=True).keys() == {"aa", "b"}


def test_what_goes_wrong(tmp_path: Path) -> None:
    """Catches a traceback, a message of several lines, or an exit code that says success."""
    path = old(tmp_path)
    said = error(run("convert", path, tmp_path / "ckpt"), 3)
    assert said.startswith(f"shardsave: cannot convert {path}: ") and "'model' (3 tensors), 'ema' (1 tensors)" in said
    assert "; choose one with --key 'model'; " in said
    torch.save({"w": torch.ones(2), "step": 3}, mixed := tmp_path / "mixed.pt")
    assert "left out with --drop 'step'" in error(run("convert", mixed, tmp_path / "ckpt"), 3)
    done = run("convert", mixed, tmp_path / "made", "--drop", "step", "--drop", "w2", "--rename", "x", "y")
    assert lines(done)[0].endswith("; --drop 'w2' matched no name; --rename 'x' matched no name")
    mixed.unlink()
    shutil.rmtree(tmp_path / "made")
    assert ": --max-shard-size must be like" in error(run("convert", path, tmp_path / "ckpt", "--max-shard-size", "x"), 2)
    assert ": --rename must have" in error(run("convert", path, tmp_path / "ckpt", "--rename", "(", ""), 2)
    assert ": --dtype must be one of" in error(run("convert", path, tmp_path / "ckpt", "--key", "model", "--dtype", "int8"), 2)
    assert "they are one" in error(run("convert", path, path, "--to", "torch", "--key", "model"), 2)
    assert "No such file" in error(run("convert", tmp_path / "none", tmp_path / "ckpt"), 3)
    assert "Missing argument 'DST'" in error(run("convert", path), 2)
    assert os.listdir(tmp_path) == ["old.pt"]


def test_a_name_of_a_file_for_a_directory(tmp_path: Path) -> None:
    """Catches a directory of the name that a file was meant to have, which no other reader opens."""
    source = old(tmp_path)
    for name, form in (("m.safetensors", "safetensors"), ("m.pt", "torch")):
        said = error(run("convert", source, tmp_path / name, "--key", "model"), 2)
        assert said.startswith(
            f"shardsave convert: cannot convert to {tmp_path / name}: a directory was expected, that is the name of a"
        )
        assert f"say --to '{form}' for one; nothing was written" in said
        assert not (tmp_path / name).exists()
