"""Method: a directory to which everybody may write, in which another user has planted links to directories. No writer follows them, but
it follows those of its own user.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from neighbours import (
    NEIGHBOUR,
    SAVER,
    TWO_USERS,
    by,
    give,
    give_link,
    save,
    saved_value,
)

import shardsave
from support import let_everybody_in

pytestmark = TWO_USERS


def writers(destination: Path, source: Path) -> list[Callable[[], object]]:
    """A save, a listing, a conversion to a directory, and one to a file in it."""
    file = destination / "out.safetensors"
    return [
        lambda: save(destination),
        lambda: shardsave.clean(destination),
        lambda: shardsave.convert(source, destination, progress=False),
        lambda: shardsave.convert(source, file, to="safetensors", progress=False),
    ]


@pytest.mark.parametrize("mode", [0o777, 0o1777])
@pytest.mark.parametrize("below", ["", "below", "new/below"])
def test_a_planted_link_to_a_directory(below: str, mode: int, shared: Path, tmp_path: Path) -> None:
    """Catches a writer that another user's symbolic link leads into a private directory of the saver, at the end of the path or above,
    directly or by a link of the saver's own."""
    shared.chmod(mode)
    private, source = tmp_path / "private", tmp_path / "source"
    save(source)
    let_everybody_in(source)
    for folder in (private, private / "below"):
        save(folder, 7)
        for path in (folder, *folder.iterdir()):
            give(path, SAVER)
    give_link(shared / "ckpt", private)
    (tmp_path / "own").symlink_to(shared / "ckpt")
    give(tmp_path / "own", SAVER)
    expected = (
        f"open: a path without symbolic links of other users was expected, since everybody may write there; ckpt is a link of user "
        f"{NEIGHBOUR}"
    )
    before = sorted((str(path), path.stat().st_mtime_ns) for path in private.rglob("*"))
    for link in (shared / "ckpt", tmp_path / "own"):
        for write in writers(link / below, source):
            answer = by(SAVER, write)
            assert (
                answer.startswith(("SaveNotCommittedError", "ShardSaveError")) and expected.replace("open: ", "") in answer
            ), answer
    assert sorted((str(path), path.stat().st_mtime_ns) for path in private.rglob("*")) == before


@pytest.mark.parametrize("owner", ["saver", "owner of the directory"])
def test_an_honest_link_to_a_directory(owner: str, shared: Path, tmp_path: Path) -> None:
    """Catches a writer that refuses the saver's own link, or one of whoever owns the shared directory."""
    private, source = tmp_path / "private", tmp_path / "source"
    save(source)
    let_everybody_in(source)
    private.mkdir()
    give(private, SAVER)
    (shared / "latest").symlink_to(private)
    give(shared / "latest", SAVER if owner == "saver" else 0)
    for write in writers(shared / "latest", source):
        answer = by(SAVER, write)
        assert "Error" not in answer, answer
    assert saved_value(private) == 1
