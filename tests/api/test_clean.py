"""`clean`. Method: savers are really killed at the places where they leave the most behind, then the reports and the files are checked."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import shardsave
from faults.dying import die_after_the_commit, die_before_the_commit, die_while_writing, killed
from faults.savers import INDEX, generation_in, litter_in, save
from shardsave._storage.staging import host_id
from shardsave._storage.transaction import Transaction

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

ORPHAN = "model-deadbeef-00001-of-00009.safetensors"


@pytest.mark.parametrize(
    ("dying", "first", "generation"),
    [
        (die_while_writing, False, 1),
        (die_before_the_commit, False, 1),
        (die_after_the_commit, False, 2),
        (die_while_writing, True, None),
        (die_before_the_commit, True, None),
        (die_after_the_commit, True, 2),
    ],
)
def test_leavings_of_a_killed_save(tmp_path: Path, dying: Callable[[Path], None], first: bool, generation: int | None) -> None:
    """Catches leavings that are not found, are confused with the checkpoint, or are not removed completely."""
    if not first:
        save(1, tmp_path)
    kept = set(os.listdir(tmp_path))
    killed(tmp_path, dying)
    before = sorted(os.listdir(tmp_path))
    listed = shardsave.clean(tmp_path, remove=False)
    assert sorted(os.listdir(tmp_path)) == before and listed.removed == () and listed.left == listed.found
    (leaving,) = listed.found
    assert leaving.name.startswith(f".shardsave-{host_id()}") and leaving.dead
    assert all((tmp_path / name).is_file() for name in leaving.files)
    used = sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_nlink == 1)
    report = shardsave.clean(tmp_path)
    assert report.found == listed.found and report.removed == (leaving.name,) and not report.left and not report.leftovers
    assert generation_in(tmp_path) == generation
    assert not litter_in(tmp_path) if generation is not None else not os.listdir(tmp_path)
    if dying is not die_after_the_commit:
        assert set(os.listdir(tmp_path)) == kept
        freed = used - sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*") if f.is_file())
        assert dying is die_before_the_commit or leaving.bytes == freed > 0
    assert str(report) == f"{tmp_path}: 1 leaving of crashed saves, {_size(leaving.bytes)}; 1 removed"
    assert str(shardsave.clean(tmp_path)) == f"{tmp_path}: nothing was left behind"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.removed = ()  # type: ignore[misc]


def _size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB"


def test_bytes_that_removal_frees(tmp_path: Path) -> None:
    """Catches a shard that is counted twice because it was moved by a link, or that is counted although the checkpoint has it."""
    save(1, tmp_path)
    shards = [path for path in tmp_path.iterdir() if path.name != INDEX]
    old = sum(path.stat().st_blocks * 512 for path in shards)
    killed(tmp_path, die_after_the_commit)
    (leaving,) = shardsave.clean(tmp_path, remove=False).found
    lists = sum((tmp_path / name).stat().st_blocks * 512 for name in leaving.files if name.endswith("/names"))
    assert leaving.bytes == old + lists
    assert {path.name for path in shards} <= set(leaving.files)
    assert set(leaving.files).isdisjoint(shardsave.inspect(tmp_path).shards)


def test_leavings_of_another_host(tmp_path: Path) -> None:
    """Catches the removal of files that a living saver of another host may need, and leavings that cannot be removed at all."""
    save(1, tmp_path)
    killed(tmp_path, die_before_the_commit)
    (own,) = tmp_path.glob(".shardsave-*")
    other = tmp_path / ".shardsave-0123456789abcdef"
    own.rename(other)
    for report in (shardsave.clean(tmp_path), shardsave.clean(tmp_path, remove=False, other_hosts=True)):
        assert [leaving.name for leaving in report.left] == [other.name] and not report.found[0].dead and report.removed == ()
        assert str(report).endswith(f"; 0 removed; kept, since their owners may be alive: {other.name}")
    assert shardsave.clean(tmp_path, other_hosts=True).removed == (other.name,)
    assert generation_in(tmp_path) == 1 and not litter_in(tmp_path)


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the removal of files of a living save, where no lock shows that it is alive."""
    killed(tmp_path, die_while_writing)

    def no_locks(*ignored: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    report = shardsave.clean(tmp_path)
    assert [leaving.dead for leaving in report.left] == [False]
    assert shardsave.clean(tmp_path, other_hosts=True).removed and not os.listdir(tmp_path)


def test_a_save_at_work(tmp_path: Path) -> None:
    """Catches the removal of files of a living save: `clean` waits for the lock, then gives up."""
    save(1, tmp_path)
    with Transaction(tmp_path, durable=False, lock_timeout=1) as transaction, ThreadPoolExecutor(1) as other:
        transaction.create(transaction.shard_names(1)[0], 4096)
        with pytest.raises(
            shardsave.DirectoryBusyError, match="cannot clean .* this same thread holds it.*; nothing was removed"
        ):
            shardsave.clean(tmp_path)
        started = time.monotonic()
        with pytest.raises(shardsave.DirectoryBusyError) as caught:
            other.submit(shardsave.clean, tmp_path, lock_timeout=0.2).result()
        assert 0.2 <= time.monotonic() - started < 20
        assert str(caught.value).replace(" (this process)", "") == (  # some file systems do not let it know the holder
            f"cannot clean {tmp_path}: its lock was expected within 0.2 s, another save holds it; nothing was removed"
        )
        assert list(tmp_path.glob(".shardsave-*"))


def test_the_lone_file_that_was_replaced(tmp_path: Path) -> None:
    """Catches a replaced file that stays for ever, and the removal of a newer one."""
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1000)}, tmp_path / "model.safetensors")
    killed(tmp_path, die_after_the_commit)
    report = shardsave.clean(tmp_path, remove=False)
    assert [leaving.name for leaving in report.found][1:] == ["model.safetensors"] and report.found[1].bytes >= 4000
    assert len(shardsave.clean(tmp_path).removed) == 2 and not litter_in(tmp_path)
    save_file({"x": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert not shardsave.clean(tmp_path).found and (tmp_path / "model.safetensors").exists()


def test_foreign_files_stay(tmp_path: Path) -> None:
    """Catches the removal of a foreign file because a list names it, and a failed removal that is not reported."""
    save(1, tmp_path)
    killed(tmp_path, die_while_writing)
    (staging,) = tmp_path.glob(".shardsave-*")
    (staging / "notes.txt").write_text("keep")
    (staging / "names").write_text(f'["config.json", "../{ORPHAN}", "{ORPHAN}"]')
    for name in ("config.json", ORPHAN, "model.bin"):
        (tmp_path / name).write_text("keep")
    (tmp_path / f".shardsave-{host_id()}00000000").write_text("a file")
    report = shardsave.clean(tmp_path)
    assert [leaving.name for leaving in report.left] == list(report.leftovers) and len(report.leftovers) == 2
    assert report.removed == () and not (tmp_path / ORPHAN).exists() and os.listdir(staging) == ["notes.txt"]
    assert (tmp_path / "config.json").exists() and generation_in(tmp_path) == 1
    assert "; 0 removed; could not remove .shardsave-" in str(report)


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    """Catches a removal although the files of the checkpoint are not known."""
    save(1, tmp_path)
    killed(tmp_path, die_before_the_commit)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"durable", b"durabel"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(
        shardsave.CorruptCheckpointError, match=r"cannot clean .*: an index that .*\(corrupt index.*\); nothing was"
    ):
        shardsave.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_nothing_goes_before_the_index_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the removal of replaced shards while a loss of power could still bring back the index that names them."""
    save(1, tmp_path)
    killed(tmp_path, die_after_the_commit)

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(shardsave.ShardSaveError, match=r"cannot clean .*: failing: Input/output error; nothing was removed"):
        shardsave.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before and shardsave.clean(tmp_path, remove=False).found


def test_an_index_that_cannot_be_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the removal of a checkpoint because its index, once opened, counts as missing."""
    save(1, tmp_path)
    killed(tmp_path, die_before_the_commit)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        if stat.S_ISREG(real(fd).st_mode):
            raise OSError(errno.ENOENT, "No such file or directory")
        return real(fd)

    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patched, pytest.raises(shardsave.ShardSaveError) as caught:
        patched.setattr(os, "fstat", fstat)
        shardsave.clean(tmp_path)
    assert str(caught.value) == f"cannot clean {tmp_path}: fstat: No such file or directory; nothing was removed"
    assert sorted(os.listdir(tmp_path)) == before


def test_wrong_arguments(tmp_path: Path) -> None:
    """Catches a `clean` that creates the directory, and arguments of wrong types."""
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(shardsave.CheckpointNotFoundError, match=r"cannot clean .*: open: N\w+ .*; nothing was removed"):
            shardsave.clean(path)
    assert not (tmp_path / "none").exists()
    for wrong in ({"remove": 1}, {"other_hosts": "yes"}, {"lock_timeout": "1"}):
        with pytest.raises(TypeError):
            shardsave.clean(tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        shardsave.clean(tmp_path, lock_timeout=-1)
