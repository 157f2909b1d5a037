"""Method: a save into a directory that an attacker has prepared. The save removes only files of the replaced checkpoint and of dead
saves, follows no symbolic link, hangs on nothing, and reports what it could not remove.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from file_cases import SPECIALS, link_to_itself
from tampering import INDEX, LONE, edit_index, saved

import shardsave
from shardsave._storage.staging import host_id

#: The name of a shard that no index names, as a dead saver would leave it.
ORPHAN = "model-deadbeef-00001-of-00009.safetensors"

#: Names that no save gives to its files. The last one ends in a letter that some regular expressions count among the digits.
KEPT = ("config.json", "model.bin", "optimizer.safetensors", "model-00001-of-0000١.safetensors")

Names = Callable[[Path], object]


def save(folder: Path) -> shardsave.SaveReport:
    return shardsave.save({"new": torch.ones(3)}, folder, durable=False)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """The staging directory of a dead saver of this host, beside foreign files of which one looks like a shard."""
    saved(tmp_path / "ckpt")
    for name in KEPT:
        (tmp_path / "ckpt" / name).write_text("keep")
    (tmp_path / ORPHAN).write_text("keep")
    (tmp_path / "ckpt" / ORPHAN).write_text("left by a dead save")
    folder = tmp_path / "ckpt" / f".shardsave-{host_id()}00000000"
    folder.mkdir()
    return folder


HOSTILE = [*KEPT, INDEX, LONE, "", ".", "..", f"../{ORPHAN}", "/etc/passwd",
           "a\0b", f"x/../{ORPHAN}", f"{ORPHAN}\n", ORPHAN.upper(), "\ud800", 5,
           None, [ORPHAN], {}]  # fmt: skip

LISTS: list[tuple[str, bool, Names]] = [
    ("foreign names", False, lambda names: names.write_text(json.dumps(HOSTILE))),
    ("foreign names and a shard", True, lambda names: names.write_text(json.dumps([*HOSTILE, ORPHAN]))),
    ("an object", False, lambda names: names.write_text(json.dumps({ORPHAN: ORPHAN}))),
    ("one name", False, lambda names: names.write_text(json.dumps(ORPHAN))),
    ("no JSON", False, lambda names: names.write_text("[" + json.dumps(ORPHAN))),
    ("deep JSON", False, lambda names: names.write_text("[" * 100_000)),
    ("a huge number", False, lambda names: names.write_text("[" + "9" * 10_000 + "]")),
    ("bad UTF-8", False, lambda names: names.write_bytes(b'["\xff"]')),
    ("a terabyte", False, lambda names: (names.touch(), os.truncate(names, 1 << 40))),
    ("a link to a list elsewhere", False, lambda names: linked_list(names)),
    *((f"{word}", False, put) for word, _, put in SPECIALS),
]


def linked_list(names: Path) -> None:
    elsewhere = names.parent.parent.parent / "list"
    elsewhere.write_text(json.dumps([ORPHAN]))
    names.symlink_to(elsewhere)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("removed, put", [case[1:] for case in LISTS], ids=[case[0] for case in LISTS])
def test_list_of_a_dead_saver(removed: bool, put: Names, staging: Path) -> None:
    """Catches cleaning that removes every file that a list names, or that hangs or fails on a bad list."""
    put(staging / "names")
    folder = staging.parent
    save(folder)
    assert shardsave.load(folder)["new"].tolist() == [1, 1, 1]
    assert all((folder / name).read_text() == "keep" for name in KEPT)
    assert (folder.parent / ORPHAN).read_text() == "keep" and (folder / ORPHAN).exists() != removed
    assert (folder / INDEX).exists()


@pytest.mark.parametrize("name", ["extra-0123abcd.safetensors", "extra-0123abcd.tensors"])
def test_names_of_every_version(name: str, staging: Path) -> None:
    """Catches a file that a dead saver of another version of the format has staged and given its final name, and that stays for ever."""
    folder = staging.parent
    (staging / "names").write_text(json.dumps([name]))
    (staging / name).write_text("left by a dead save")
    os.link(staging / name, folder / name)
    report = save(folder)
    assert report.leftovers == () and not staging.exists() and not (folder / name).exists() and name in report.removed


def test_list_that_names_the_new_checkpoint(staging: Path) -> None:
    """Catches cleaning that removes a file that the new index names."""
    folder = staging.parent
    named = sorted(name for name in os.listdir(folder) if name.startswith("model-0") and name not in KEPT)
    (staging / "names").write_text(json.dumps([*named, "model-00001-of-00001.safetensors"]))
    save(folder)
    assert shardsave.verify(folder).verified and not staging.exists()
    assert not any((folder / name).exists() for name in named)


def test_staging_directory_that_is_a_link(staging: Path) -> None:
    """Catches cleaning that follows a symbolic link into another directory."""
    folder, elsewhere = staging.parent, staging.parent.parent / "elsewhere"
    staging.rmdir()
    elsewhere.mkdir()
    (elsewhere / "names").write_text(json.dumps([ORPHAN]))
    (elsewhere / ORPHAN).write_text("keep")
    staging.symlink_to(elsewhere)
    report = save(folder)
    assert report.leftovers == (staging.name,) and staging.is_symlink()
    assert sorted(os.listdir(elsewhere)) == [ORPHAN, "names"] and (folder / ORPHAN).exists()


def test_staging_directory_with_foreign_files(staging: Path) -> None:
    """Catches cleaning that removes foreign files because of their directory's name, or follows symbolic links in it."""
    folder = staging.parent
    (staging / "notes.txt").write_text("keep")
    (staging / ORPHAN).symlink_to(folder / "config.json")
    report = save(folder)
    assert report.leftovers == (staging.name,)
    assert os.listdir(staging) == ["notes.txt"] and (folder / "config.json").read_text() == "keep"


def test_staging_directories_of_other_hosts(staging: Path) -> None:
    """Catches a save that removes what a living saver of another host may need, or keeps it silently; and a wrong command in the note."""
    folder = staging.parent
    others = [f".shardsave-{n:08x}00000000" for n in range(5)]
    for name in others:
        (folder / name).mkdir()
    report = save(folder)
    assert report.leftovers == () and not staging.exists() and all((folder / name).is_dir() for name in others)
    command = f"shardsave clean {folder} --other-hosts"
    assert report.notes == (
        f"5 leavings of saves on other hosts, which may still be at work, stay: {', '.join(others[:3])} and 2 more "
        f"(when they have ended: {command})",
    )
    assert str(report).endswith(report.notes[0])
    subprocess.run([sys.executable, "-m", *command.split(), "--yes"], check=True, capture_output=True)
    assert save(folder).notes == () and not list(folder.glob(".shardsave-*"))


def test_staging_directory_that_is_a_file(staging: Path) -> None:
    """Catches cleaning that removes a file because of its name."""
    staging.rmdir()
    staging.write_text("keep")
    assert save(staging.parent).leftovers == (staging.name,) and staging.read_text() == "keep"


def test_old_index_that_names_foreign_files(staging: Path) -> None:
    """Catches cleaning that removes a file that no save can have written, or what a symbolic link leads to, because the replaced index
    names it; and a link that stays."""
    folder, record = staging.parent, [8, 8, "0" * 16]
    (folder / "model-00007-of-00007.safetensors").symlink_to(folder / "model.bin")
    names = ["config.json", "model.bin", "optimizer.safetensors", "model-00007-of-00007.safetensors", ORPHAN]
    edit_index(folder, lambda index: index["shardsave"]["shards"].update(dict.fromkeys(names, record)))
    save(folder)
    assert all((folder / name).read_text() == "keep" for name in names[:3])
    assert not (folder / names[3]).is_symlink() and not (folder / ORPHAN).exists()


def test_superseded_file_that_is_a_link(staging: Path) -> None:
    """Catches cleaning that removes what the lone file leads to, where that is a symbolic link."""
    folder = staging.parent
    (folder / "model.bin").rename(folder.parent / "elsewhere")
    (folder / LONE).symlink_to(folder.parent / "elsewhere")
    found = (folder / LONE).stat()
    stale = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    edit_index(folder, lambda index: index["shardsave"].update(supersedes=stale))
    save(folder)
    assert not (folder / LONE).is_symlink() and (folder.parent / "elsewhere").read_text() == "keep"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
@pytest.mark.parametrize("put", [put for _, _, put in SPECIALS], ids=[word for word, _, _ in SPECIALS])
def test_index_that_is_no_file(put: Names, durable: bool, tmp_path: Path) -> None:
    """Catches a save that hangs on something else under the index's name, replaces it, or leaves a shard behind."""
    put(tmp_path / INDEX)
    with pytest.raises(shardsave.SaveNotCommittedError) as caught:
        shardsave.save({"new": torch.ones(3)}, tmp_path, durable=durable)
    kinds = {put: f"open: a regular file was expected, it is {found}" for _, found, put in SPECIALS}
    kinds[link_to_itself] = "stat: Too many levels of symbolic links"
    assert str(caught.value) == (
        f"cannot write {tmp_path / INDEX}: {kinds[put]}; nothing was written, existing files are unchanged"
    )
    assert os.listdir(tmp_path) == [INDEX]


def test_list_of_a_later_version(staging: Path) -> None:
    """Catches a staging directory whose list is removed though it names a directory, which this version does not remove: nobody would
    ever find that directory again. FORMAT.md reserves such names."""
    folder = staging.parent
    (staging / "names").write_text(json.dumps([ORPHAN, "training-0123abcd/"]))
    (staging / ORPHAN).write_text("staged")
    (folder / "training-0123abcd").mkdir()
    (folder / "training-0123abcd" / "index.json").write_text("{}")
    before = sorted(
        path.relative_to(folder) for path in folder.rglob("*") if staging.name in str(path) or "training" in str(path)
    )
    report = save(folder)
    assert report.leftovers == (staging.name,) and not any(staging.name in name for name in report.removed)
    cleaned = shardsave.clean(folder)
    assert cleaned.removed == () and cleaned.leftovers == (staging.name,) and cleaned.found[0].files == ()
    after = sorted(
        path.relative_to(folder) for path in folder.rglob("*") if staging.name in str(path) or "training" in str(path)
    )
    assert after == before and (folder / ORPHAN).exists()
