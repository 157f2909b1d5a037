"""``shardsave convert``: every option reaches the conversion; an error is one line and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

import shardsave
from cli.commands import error, lines, run


def old(folder: Path) -> Path:
    """Writes a file of torch.save with two states; returns its path."""
    state = {"module.a": torch.ones(1000), "module.b": torch.ones(1000), "junk.x": torch.ones(1)}
    torch.save({"model": state, "ema": {"e": torch.zeros(1)}}, folder / "old.pt")
    return folder / "old.pt"


def test_options(tmp_path: Path) -> None:
    """Catches an option that is ignored."""
    options = ["--key", "model", "--drop", "junk.*", "--dtype", "float16"]
    options += ["--rename", r"^module\.", "", "--rename", "(a)", r"\1\1"]
    (line,) = lines(run("convert", old(tmp_path), tmp_path / "ckpt", *options, "--max-shard-size", "2kB", "--not-durable"))
    assert line.startswith(
        f"converted {tmp_path}/old.pt (torch) to {tmp_path}/ckpt (shardsave): 4.0 kB, 2 tensors in 2 shards, "
    )
    assert "not durable" in line and line.endswith(
        "1 dropped, 2 renamed, 2 cast; left out, since not in 'model': 'ema' (dict, 1 tensor, 4 B)"
    )
    info = shardsave.inspect(tmp_path / "ckpt")
    assert info.names == ("aa", "b") and info.tensors["b"].dtype == torch.float16 and info.durable is False
    to_file = ["convert", tmp_path / "ckpt", tmp_path / "m.safetensors", "--to", "safetensors", "--no-verify", "--json"]
    report = json.loads(run(*to_file).stdout)
    assert report["verified"] is False and report["to"] == "safetensors" and report["bytes"] == 4000
    lines(run("convert", tmp_path / "ckpt", tmp_path / "m.bin", "--to", "torch"))
    assert torch.load(tmp_path / "m.bin", weights_only=True).keys() == {"aa", "b"}


def test_errors(tmp_path: Path) -> None:
    """Catches a traceback, a message of several lines, or an exit code that says success."""
    path = old(tmp_path)
    message = error(run("convert", path, tmp_path / "ckpt"), 3)
    assert (
        message.startswith(f"shardsave: cannot convert {path}: ")
        and "'model' (3 tensors, 8.0 kB), 'ema' (1 tensor, 4 B)" in message
    )
    assert "; choose one with --key 'model', or leave out what is not wanted with --drop 'ema'; " in message
    torch.save({"w": torch.ones(2), "step": 3}, mixed := tmp_path / "mixed.pt")
    assert "left out with --drop 'step'" in error(run("convert", mixed, tmp_path / "ckpt"), 3)
    result = run("convert", mixed, tmp_path / "converted", "--drop", "step", "--drop", "w2", "--rename", "x", "y")
    assert lines(result)[0].endswith("; --drop 'w2' matched no name; --rename 'x' matched no name")
    mixed.unlink()
    shutil.rmtree(tmp_path / "converted")
    assert ": --max-shard-size must be like" in error(run("convert", path, tmp_path / "ckpt", "--max-shard-size", "x"), 2)
    assert ": --rename must have" in error(run("convert", path, tmp_path / "ckpt", "--rename", "(", ""), 2)
    assert ": --dtype must be one of" in error(run("convert", path, tmp_path / "ckpt", "--key", "model", "--dtype", "int8"), 2)
    assert "they are the same" in error(run("convert", path, path, "--to", "torch", "--key", "model"), 2)
    assert "No such file" in error(run("convert", tmp_path / "none", tmp_path / "ckpt"), 3)
    assert "Missing argument 'DST'" in error(run("convert", path), 2)
    assert os.listdir(tmp_path) == ["old.pt"]


def test_a_directory_with_the_name_of_a_file(tmp_path: Path) -> None:
    """Catches a directory called ``m.safetensors`` or ``m.pt``, which other readers expect to be a file."""
    source = old(tmp_path)
    for name, form in (("m.safetensors", "safetensors"), ("m.pt", "torch")):
        message = error(run("convert", source, tmp_path / name, "--key", "model"), 2)
        assert message.startswith(
            f"shardsave convert: cannot convert to {tmp_path / name}: a directory was expected, this is the name of a"
        )
        assert f"pass --to '{form}' to write one; nothing was written" in message
        assert not (tmp_path / name).exists()


def test_names_that_are_allowed(tmp_path: Path) -> None:
    """Catches an advice that is no option, and an option that is ignored."""
    torch.save({"model": {"a": torch.ones(2)}, "call": Reduced()}, path := tmp_path / "x.pt")
    message = error(run("convert", path, tmp_path / "ckpt"), 3)
    assert "its pickle asks for posix.getpid; nothing of it was run, and --allow 'posix.getpid' reads such an object" in message
    (line,) = lines(run("convert", path, tmp_path / "ckpt", "--allow", "posix.getpid"))
    assert line.endswith("left out, since not in 'model': 'call' (posix.getpid)")
    (line,) = lines(run("convert", path, tmp_path / "ckpt", "--allow", "posix.getpid", "--allow", "posix.x"))
    assert line.endswith("; --allow 'posix.x' matched no name")
    torch.save({"model": {"a": torch.ones(2)}, "call": Reduced(), "more": json.JSONDecoder}, path)
    message = error(run("convert", path, tmp_path / "ckpt"), 3)
    assert "and --allow 'posix.getpid' --allow 'json.decoder.JSONDecoder' reads such objects" in message


class Reduced:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return os.getpid, ()
