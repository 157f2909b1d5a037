"""A directory of two users; see `neighbours`."""

from __future__ import annotations

from pathlib import Path

import pytest
from neighbours import save, saved_value

import shardsave
from support import let_everybody_in


@pytest.fixture(scope="module")
def everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Other users may not be allowed to read the packages."""
    folder = tmp_path_factory.mktemp("warm")
    save(folder)
    save(folder)
    saved_value(folder)
    shardsave.clean(folder)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A sticky directory to which everybody may write."""
    folder = tmp_path / "shared"
    folder.mkdir()
    let_everybody_in(tmp_path)
    folder.chmod(0o1777)
    return folder
