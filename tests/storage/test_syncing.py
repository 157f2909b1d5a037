"""What a save waits for: each fsync waits for the disk, so those without an order among them are made at the same time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import shardsave
from shardsave._common import os_calls
from shardsave._common.backend import native

needs_native = pytest.mark.skipif(native is None, reason="the portable engine syncs one file after the other")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The paths that are synced, those that are synced at the same time in one list."""
    made: list[list[str]] = []

    def noting(call: Callable[[object], object], of: Callable[[object], Sequence[int]]) -> Callable[[object], object]:
        def note(argument: object) -> object:
            made.append(sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in of(argument)))
            return call(argument)

        return note

    assert native is not None
    monkeypatch.setattr(native, "sync_files", noting(native.sync_files, lambda fds: fds))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(os, "fsync", noting(os.fsync, lambda fd: [fd]))  # type: ignore[arg-type, list-item]
    return made


@needs_native
def test_a_save_into_a_new_directory_waits_five_times(tmp_path: Path, waits: list[list[str]]) -> None:
    """Catches a save that waits for the disk more often than the order of its steps needs, and files that are synced one by one."""
    target = tmp_path / "runs" / "step"
    state = {f"t{n}": torch.full((1000,), float(n)) for n in range(3)}
    shardsave.save(state, target, max_shard_size=4000, progress=False)
    above, shards, staged, moved, renamed = waits
    assert {str(tmp_path), str(tmp_path / "runs")} <= {*above} and str(target) not in above
    assert len(shards) == 3 and all(path.endswith(".safetensors") for path in shards)
    directories = [path for path in staged if os.path.basename(path).startswith(".shardsave-")]
    assert staged == sorted([str(target), *directories, *(f"{directories[0]}/{name}" for name in ("index", "names"))])
    assert moved == renamed == [str(target)]


@needs_native
def test_a_save_in_the_place_of_another_makes_that_durable_first(tmp_path: Path, waits: list[list[str]]) -> None:
    """Catches a save that relies on a checkpoint, or removes its files, before that checkpoint or its own is durable."""
    state = {"t": torch.ones(1000)}
    shardsave.save(state, tmp_path, durable=False, progress=False)
    assert not waits
    shardsave.save(state, tmp_path, reuse=False, progress=False)
    _, visible, _, _, moved, renamed, removed = waits
    assert visible == sorted([str(tmp_path), str(tmp_path / "model.safetensors.index.json")])
    assert moved == renamed == removed == [str(tmp_path)]


@pytest.mark.parametrize("engine", [native, None], ids=["native", "portable"])
def test_each_failure_is_that_of_its_file(tmp_path: Path, engine: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed fsync that is taken for another's, or that keeps others from being made."""
    monkeypatch.setattr(os_calls, "native", engine)
    reader, writer = os.pipe()
    with open(tmp_path / "a", "w") as first, open(tmp_path / "b", "w") as last:
        files = [(first.fileno(), "a"), (writer, "pipe"), (last.fileno(), "b")] * 12
        failures = os_calls.sync_all(files)
    os.close(reader)
    os.close(writer)
    assert [failure and (failure.call, failure.path, failure.errno) for failure in failures] == [
        None,
        ("fsync", "pipe", errno.EINVAL),
        None,
    ] * 12
    assert os_calls.sync_all([]) == []
