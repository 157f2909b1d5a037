"""Directories as sources of a conversion: files in them that cannot be read, and files that are not read."""

from __future__ import annotations

import argparse
import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import shardsave
from shardsave._conversion import single_file

W = {"w": torch.arange(6.0).view(2, 3), "v": torch.ones(40_000)}


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin", "model.safetensors", "refs/main"])
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a PermissionError of Python in the place of one of our errors, which names the file and what was tried."""
    folder, secret = tmp_path / "x", tmp_path / "x" / name
    secret.parent.mkdir(parents=True)
    (folder / "snapshots").mkdir()
    torch.save(W, secret)

    def refusing(real: Any) -> Any:
        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and os.fspath(path) == str(secret):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return opened

    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(builtins, "open", refusing(open))
    for source in (secret, folder) if name not in ("x.pt", "refs/main") else (folder if name == "refs/main" else secret,):
        with pytest.raises(shardsave.ShardSaveError, match=f"cannot read {secret}: \\w+: Permission denied"):
            shardsave.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["shardsave", "safetensors", "torch", "distributed", "adapter"])
def test_other_files_are_named(tmp_path: Path, kind: str) -> None:
    """Catches weights in a directory that a conversion leaves out without a word, and a note of files that it did read."""
    folder = tmp_path / "x"
    folder.mkdir()
    if kind == "shardsave":
        shardsave.save(W, folder, max_shard_size=100, durable=False)
    elif kind == "distributed":
        dcp.save(W, checkpoint_id=str(folder), no_dist=True)
    elif kind == "torch":
        torch.save(W, folder / "pytorch_model.bin")
    else:
        save_file(W, folder / ("model.safetensors" if kind == "safetensors" else "adapter_model.safetensors"))
        (folder / "adapter_config.json").write_text("{}")
    for name in ("README.md", "config.json", "tokenizer.json", "vocab.txt"):
        (folder / name).write_text("{}")
    assert not any("not read" in note and "adapter_config" not in note for note in _notes(folder, tmp_path / "a"))
    torch.save(W, folder / "ema.pt")
    assert "ema.pt beside the checkpoint was not read" in _notes(folder, tmp_path / "b")
    save_file(W, folder / "model.fp16.safetensors")
    torch.save(W, folder / "last.ckpt")
    names = "ema.pt, last.ckpt, model.fp16.safetensors"
    assert f"{names} beside the checkpoint were not read" in _notes(folder, tmp_path / "c")


def _notes(folder: Path, destination: Path) -> tuple[str, ...]:
    return shardsave.convert(folder, destination, durable=False).notes


def test_an_interrupt_before_torchs_sink_notes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C at the beginning of a write that torch makes an error about positions in a file, after which a program goes on."""
    torch.save(W, tmp_path / "x.pt")
    write = single_file._Sink.write
    for last in range(1, 100):
        calls = iter(range(1, 1000))

        def interrupted(sink: Any, data: Any, calls: Any = calls, last: int = last) -> int:
            if next(calls) == last:
                raise KeyboardInterrupt
            return write(sink, data)

        monkeypatch.setattr(single_file._Sink, "write", interrupted)
        try:
            shardsave.convert(tmp_path / "x.pt", tmp_path / "new.pt", to="torch", durable=False)
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == ["x.pt"]
        else:
            break
    assert 2 < last < 99


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of git-lfs"),
        (b"<!DOCTYPE html>", "web page"),
        (b"Entry not found", "failed download"),
    ],
)
def test_a_table_that_was_not_downloaded(tmp_path: Path, content: bytes, words: str) -> None:
    """Catches a table of a distributed checkpoint that is called a broken pickle though it is something else."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(shardsave.CorruptCheckpointError, match=words):
        shardsave.convert(tmp_path, tmp_path / "out")


class Evil:
    """Pickles as a call, which an unrestricted unpickler runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    """Catches tensors in a value with a pickle of its own that are left out without a word, and code that such a value runs."""
    content = {"model": W, "args": argparse.Namespace(a=1), "evil": Evil(tmp_path / "canary"), "step": 3}
    dcp.save(content, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    (note,) = _notes(tmp_path / "x", tmp_path / "a")
    assert note == "left out, since not in 'model': 'args' (argparse.Namespace), 'evil' (posix.system), 'step' (int)"
    assert not (tmp_path / "canary").exists() and len(shardsave.inspect(tmp_path / "a").names) == 2
    content["ema"] = (torch.ones(7), torch.ones(5))
    dcp.save(content, checkpoint_id=str(tmp_path / "y"), no_dist=True)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"at its top 'ema.0', 'ema.1' \(2 tensors, 48 B\)"):
        shardsave.convert(tmp_path / "y", tmp_path / "b")
    assert any(
        "'ema' (list, 2 tensors, 48 B)" in n for n in shardsave.convert(tmp_path / "y", tmp_path / "b", key="model").notes
    )
