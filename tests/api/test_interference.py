"""Other code changes the model, the directory or the process while a save or a load runs."""

from __future__ import annotations

import gc
import io
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from faults.savers import generation_in, save, state
from shardsave._common.descriptors import Descriptor
from shardsave._common.gc_pause import gc_paused
from support import holds_in_child


def test_tensors_that_change_meanwhile(tmp_path: Path) -> None:
    """Catches a checksum of other bytes than those written: a load would refuse that checkpoint."""
    big = torch.zeros(200_000)
    parts = {str(n): big[n * 100 : n * 100 + 48] for n in range(2000)}
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            big.add_(1.0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            shardsave.save(parts, tmp_path, durable=False)
            shardsave.verify(tmp_path)
    finally:
        ended.set()
        thread.join()


def test_parameters_that_get_other_data_meanwhile(tmp_path: Path) -> None:
    """Catches memory that is freed while the workers read it, and values that were assigned after the save began."""
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def replace(done: int, total: int) -> None:
        for parameter in model.parameters():
            parameter.data = torch.zeros(1)

    shardsave.save(model, tmp_path, progress=replace)
    loaded = shardsave.load(tmp_path)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_memory_that_was_freed(tmp_path: Path) -> None:
    """Catches a read or a write beyond the end of a storage."""
    tensor = torch.ones(1000)
    shardsave.save({"x": tensor}, tmp_path)
    model = nn.Module()
    model.register_buffer("x", torch.zeros(1000))
    for shrunk in (tensor, model.x):
        shrunk.untyped_storage().resize_(64)
    with pytest.raises(
        shardsave.UnsupportedTensorError, match="cannot save 'x': memory for all its elements was expected, its"
    ):
        shardsave.save({"x": tensor}, tmp_path)
    with pytest.raises(
        shardsave.UnsupportedTensorError, match="cannot fill 'x' .*memory for all its elements was expected, its"
    ):
        shardsave.load_model(model, tmp_path)


@pytest.mark.parametrize("replaced", [False, True], ids=["moved", "replaced"])
def test_the_directory_is_moved(tmp_path: Path, replaced: bool) -> None:
    """Catches a save that succeeds although its checkpoint is not at the requested path."""
    save(1, tmp_path / "ckpt")

    def move(done: int, total: int) -> None:
        if (tmp_path / "old").exists():
            return
        (tmp_path / "ckpt").rename(tmp_path / "old")
        if replaced:
            (tmp_path / "ckpt").mkdir()

    with pytest.raises(shardsave.SaveNotCommittedError, match="it was moved, replaced or removed during the save; nothing was"):
        shardsave.save(state(2), tmp_path / "ckpt", progress=move)
    assert generation_in(tmp_path / "old") == 1


def test_a_path_through_a_link(tmp_path: Path) -> None:
    """Catches `..` after a symbolic link that is resolved by the text of the path, not by following the link as `load` does."""
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    save(1, tmp_path / "link" / ".." / "ckpt")
    assert generation_in(tmp_path / "link" / ".." / "ckpt") == 1 and (tmp_path / "far" / "ckpt").is_dir()


class Broken(io.StringIO):
    """A stream that accepts no text and raises when asked whether it is a terminal."""

    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("progress", [None, True])
@pytest.mark.parametrize("stream", [None, object(), Broken()], ids=["none", "no stream", "broken"])
def test_stderr_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: object, progress: bool | None) -> None:
    """Catches a save that fails because its progress could not be shown."""
    monkeypatch.setattr(sys, "stderr", stream)
    shardsave.save({"x": torch.ones(3)}, tmp_path, progress=progress)
    assert shardsave.load(tmp_path, progress=progress)["x"].sum() == 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_meanwhile(tmp_path: Path) -> None:
    """Catches a child (of a DataLoader, say) that inherits open files, or a garbage collector that is off for good."""
    (tmp_path / "file").write_bytes(b"x")
    with Descriptor() as file, gc_paused():
        file.open(str(tmp_path / "file"), os.O_RDONLY)
        number = file.fd
        assert holds_in_child(lambda: gc.isenabled() and not os.path.exists(f"/proc/self/fd/{number}"))
        assert file.fd == number and not gc.isenabled()
    assert gc.isenabled()


def test_another_default_device(tmp_path: Path) -> None:
    """Catches tensors that are created on the default device of torch."""
    shardsave.save({"x": torch.ones(3), "empty": torch.ones(0)}, tmp_path)
    torch.set_default_device("meta")
    try:
        assert not any(tensor.is_meta for tensor in shardsave.load(tmp_path, mmap=True).values())
        assert not shardsave.load(tmp_path)["x"].is_meta
    finally:
        torch.set_default_device(None)
