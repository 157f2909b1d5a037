"""Method: a checkpoint or a file is made accessible to fewer, or to others, than the umask says; then it is replaced. The new files have
exactly the permissions of those that they replace, and at no moment more.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardsave
from faults.savers import INDEX, generation_in
from faults.savers import save as save_generation
from training_state import save_with_training, training_directory

LONE = "model.safetensors"
ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"


@pytest.fixture(params=[0o022, 0o077, 0o000], ids=oct, autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def save(folder: Path, **options: Any) -> dict[str, int]:
    """Saves, and returns the modes of all entries that the staging directory had, and of the directory itself."""
    seen: dict[str, int] = {}

    def look(done: int, total: int) -> None:
        for path in folder.glob(".shardsave-*"):
            seen[""] = mode_of(path)
            seen.update({entry.name: mode_of(entry) for entry in path.iterdir()})

    shardsave.save({"x": torch.ones(3)}, folder, durable=False, progress=look, **options)
    return seen


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> set[int]:
    return {mode_of(path) for path in folder.iterdir()}


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access control list: (tag, permissions, user) of each entry (linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
#: The owner, user 54321, the group (nothing), the limit, everybody else (nothing).
FOR_ONE_USER = acl((1, 6, NOBODY), (2, 4, 54321), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY))


def set_acl(path: Path, kind: str, value: bytes) -> None:
    try:
        os.setxattr(path, kind, value)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_checkpoint_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    """Catches a checkpoint that more users may read after an overwrite, or fewer; also while it is written."""
    save_generation(1, tmp_path, kind="config")
    for path in tmp_path.iterdir():
        path.chmod(mode)
    for kind in ("config", "plain"):  # the second adds parts
        save_generation(2, tmp_path, kind=kind)
        assert modes(tmp_path) == {mode} and generation_in(tmp_path) == 2
    seen = save(tmp_path)
    staging = seen.pop("")
    assert set(seen.values()) == {mode} and not (staging & 0o077 and mode == 0o600)
    assert mode_of(tmp_path / INDEX) == mode


def test_a_first_save_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """Catches new files with other permissions than those of every other program."""
    save(tmp_path / "ckpt")
    assert mode_of(tmp_path / "ckpt") == 0o777 & ~umask
    assert {mode_of(path) for path in (tmp_path / "ckpt").glob("model-*")} == {0o666 & ~umask}
    assert mode_of(tmp_path / "ckpt" / INDEX) == (
        0o666 & ~umask if umask else 0o644
    )  # in a shared directory nobody else writes it


def test_files_with_different_modes(tmp_path: Path) -> None:
    """Catches weights that become readable because the index always was, and an index that becomes unreadable with them."""
    save_generation(1, tmp_path, kind="config")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    next(tmp_path.glob("model-00001*")).chmod(0o640)
    next(tmp_path.glob("model-00002*")).chmod(0o604)
    (tmp_path / "config.json").chmod(0o660)
    save_generation(2, tmp_path, kind="config")
    assert {mode_of(path) for path in tmp_path.glob("model-*")} == {0o600}
    assert (mode_of(tmp_path / INDEX), mode_of(tmp_path / "config.json")) == (0o644, 0o660)


@pytest.mark.parametrize("name", [LONE, "adapter_model.safetensors"])
def test_a_file_of_another_library(name: str, tmp_path: Path) -> None:
    """Catches weights of another library that become readable when a save replaces them."""
    save_file({"x": torch.zeros(3)}, tmp_path / name)
    (tmp_path / name).chmod(0o600)
    save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    assert modes(tmp_path) == {0o600}


def test_what_a_link_leads_to(tmp_path: Path) -> None:
    """Catches a private file behind a link that is replaced by one that everybody may read."""
    save_file({"x": torch.zeros(3)}, tmp_path / "blob")
    (tmp_path / "blob").chmod(0o600)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / LONE).symlink_to(tmp_path / "blob")
    save(tmp_path / "ckpt")
    assert modes(tmp_path / "ckpt") == {0o600}


@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_single_file_keeps_its_mode(mode: int, to: Any, tmp_path: Path) -> None:
    """Catches a conversion into one file that more users may read than the file that it replaces, or its files beside it."""
    shardsave.save({"x": torch.ones(100)}, tmp_path / "source", durable=False)
    target = tmp_path / "out" / f"model.{to}"
    target.parent.mkdir(mode=0o755)
    target.touch()
    target.chmod(mode)
    seen = []

    def look(done: int, total: int) -> None:
        seen.extend((path.name, mode_of(path)) for path in target.parent.iterdir() if path != target)

    shardsave.convert(tmp_path / "source", target, to=to, dtype="float64", progress=look)
    assert mode_of(target) == mode and os.listdir(target.parent) == [target.name]
    assert seen and {found for name, found in seen} <= {mode, 0o700}, seen


@pytest.mark.skipif(os.geteuid() != 0, reason="files of several groups are needed")
def test_groups(tmp_path: Path) -> None:
    """Catches a file that another group may read than before: with setgid, a new file has the directory's group."""
    tmp_path.chmod(0o2770)
    os.chown(tmp_path, -1, 54321)
    save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.stat().st_gid == 54321
        os.chown(path, -1, 54322)
        path.chmod(0o640)
    save(tmp_path)
    assert {(path.stat().st_gid, mode_of(path)) for path in tmp_path.iterdir()} == {(54322, 0o640)}


def test_an_access_control_list(tmp_path: Path) -> None:
    """Catches a list that is lost, so that the whole group may do what it allowed to one user."""
    save(tmp_path)
    for path in tmp_path.iterdir():
        set_acl(path, ACL, FOR_ONE_USER)
        assert mode_of(path) == 0o640
    save(tmp_path)
    assert {os.getxattr(path, ACL) for path in tmp_path.iterdir()} == {FOR_ONE_USER}


def test_different_access_control_lists(tmp_path: Path) -> None:
    """Catches a list of one shard that all shards get, and a group that may read because neither list is kept."""
    save_generation(1, tmp_path)
    first, second = sorted(tmp_path.glob("model-0*"))
    set_acl(first, ACL, FOR_ONE_USER)
    second.chmod(0o640)
    save_generation(2, tmp_path)
    for path in tmp_path.glob("model-*s"):
        assert mode_of(path) == 0o600 and ACL not in os.listxattr(path)


def test_a_default_access_control_list(tmp_path: Path) -> None:
    """Catches a replaced file that one more user may read, because the directory's default list names that user."""
    save(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o640)
    set_acl(tmp_path, DEFAULT_ACL, FOR_ONE_USER)
    save(tmp_path)
    for path in tmp_path.iterdir():
        assert mode_of(path) == 0o640 and ACL not in os.listxattr(path), path
    save(tmp_path / "first")
    assert all(ACL in os.listxattr(path) for path in (tmp_path / "first").iterdir())


def everything_in(folder: Path) -> list[Path]:
    """The directory of a training state, and its files."""
    return [training_directory(folder), *training_directory(folder).iterdir()]


def test_training_state_beside_weights_that_replace_some(tmp_path: Path, umask: int) -> None:
    """Catches a directory, or a file in it, that a default list opens to more people than those of the weights that it stands beside."""
    shardsave.save({"x": torch.ones(3)}, tmp_path, durable=False)
    for path in tmp_path.iterdir():
        path.chmod(0o640)
    set_acl(tmp_path, DEFAULT_ACL, FOR_ONE_USER)
    save_with_training({"x": torch.ones(3)}, tmp_path, durable=False)
    assert [mode_of(path) for path in everything_in(tmp_path)] == [0o750, *[0o640] * 4]
    assert not any(ACL in os.listxattr(path) for path in everything_in(tmp_path))


def test_training_state_with_a_list_is_replaced(tmp_path: Path, umask: int) -> None:
    """Catches a list that the directory of a training state, or a file in it, loses or gains when it is replaced."""
    save_with_training({"x": torch.ones(3)}, tmp_path, durable=False)
    for path in everything_in(tmp_path):
        set_acl(path, ACL, FOR_ONE_USER)
    save_with_training({"x": torch.ones(3)}, tmp_path, durable=False)
    assert {os.getxattr(path, ACL) for path in everything_in(tmp_path)} == {FOR_ONE_USER}
    assert not any(ACL in os.listxattr(path) for path in tmp_path.glob("model*"))
