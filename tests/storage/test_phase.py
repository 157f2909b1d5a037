"""The phases of a transaction: their order, and what a transaction that ends in one of them may remove."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import shardsave
from faults.savers import INDEX, generation_in, litter_in, next_save_works, save
from shardsave._common.os_calls import CallFailed
from shardsave._storage.directory import Directory
from shardsave._storage.phase import Phase

ORDER = {
    (Phase.UNREAD, Phase.STAGING),
    (Phase.STAGING, Phase.RENAMING),
    (Phase.RENAMING, Phase.NOT_COMMITTED),
    (Phase.RENAMING, Phase.COMMITTED),
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("later", Phase)
def test_phases_follow_in_one_order(phase: Phase, later: Phase) -> None:
    """Catches a phase that is skipped, repeated, or left for an earlier one."""
    if (phase, later) in ORDER:
        assert phase.then(later) is later
    else:
        with pytest.raises(AssertionError):
            phase.then(later)


@pytest.mark.parametrize("renamed", [True, False])
def test_interrupted_twice_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    """Catches a transaction that removes files although it does not know whether its index is in place."""
    save(1, tmp_path)
    rename = Directory.rename

    def interrupted(*ignored: object, **also_ignored: object) -> None:
        raise KeyboardInterrupt

    def interrupted_rename(folder: Directory, name: str, into: Directory, new_name: str) -> None:
        assert new_name == INDEX
        if renamed:
            rename(folder, name, into, new_name)
        monkeypatch.setattr(Directory, "read_all", interrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "rename", interrupted_rename)
    before = set(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        save(2, tmp_path)
    monkeypatch.undo()
    assert before <= set(os.listdir(tmp_path)) and list(tmp_path.glob(".shardsave-*"))
    assert generation_in(tmp_path) == (2 if renamed else 1)
    next_save_works(tmp_path)


def test_interrupted_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a transaction that leaves files behind although it has certainly not committed."""
    save(1, tmp_path)

    def interrupted_rename(*ignored: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt):
        save(2, tmp_path)
    monkeypatch.undo()
    assert generation_in(tmp_path) == 1 and not litter_in(tmp_path)


@pytest.mark.slow
def test_a_companion_that_fails_and_an_index_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that says "cannot tell" although the commit is known: only a config could not be put in place after it."""
    save(1, tmp_path, kind="config")
    rename = Directory.rename

    def fails(*ignored: object, **also_ignored: object) -> None:
        raise CallFailed("open", INDEX, errno.EIO, "Input/output error")

    def refused_rename(folder: Directory, name: str, into: Directory, new_name: str) -> None:
        if new_name == INDEX:
            return rename(folder, name, into, new_name)
        monkeypatch.setattr(Directory, "read_all", fails)
        raise CallFailed("rename", new_name, errno.EIO, "Input/output error")

    monkeypatch.setattr(Directory, "rename", refused_rename)
    with pytest.raises(shardsave.DurabilityUncertainError) as caught:
        save(2, tmp_path, kind="config")
    monkeypatch.undo()
    assert str(caught.value) == (
        f"saved, but config.json may still belong to the previous checkpoint: {tmp_path}: rename of config.json: Input/output error, "
        "after the new weights were committed; the next save completes this, until then reports name the difference"
    )
    assert generation_in(tmp_path) == 2
    save(3, tmp_path, kind="config")
    assert generation_in(tmp_path) == 3 and not litter_in(tmp_path)
