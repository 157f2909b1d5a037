"""Another user of a directory to which everybody may write: plants files there, and has actions done by either user.

Files are given to other users, and savers become other users, so this needs root.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tampering import INDEX

import shardsave
from shardsave._storage.staging import host_id

#: The marks of tests with two users.
TWO_USERS = [
    pytest.mark.skipif(os.geteuid() != 0, reason="files of several users are needed"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.usefixtures("everything_imported"),
]

#: Two users without a name: the one who saves, and the one who plants files.
SAVER, NEIGHBOUR = 54321, 54322

#: Shards that no index of ours names: work of the saver, which another index or another tool made.
WORK = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

STAGING = f".shardsave-{host_id()}00000000"


def give(path: Path, owner: int) -> Path:
    os.lchown(path, owner, owner)
    return path


def put(path: Path, content: str, owner: int) -> Path:
    path.write_text(content)
    return give(path, owner)


def plant_staging(folder: Path, names: object, owner: int = NEIGHBOUR) -> Path:
    """A staging directory, as a dead saver of this host leaves it, with a list of ``names``."""
    (folder / STAGING).mkdir(mode=0o755)
    put(folder / STAGING / "names", json.dumps(names), owner)
    return give(folder / STAGING, owner)


def plant_index(folder: Path, owner: int = NEIGHBOUR) -> Path:
    """An index that names the saver's files as its shards."""
    weight_map = {str(n): name for n, name in enumerate(WORK)}
    return put(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}), owner)


def by(user: int, action: Callable[[], object]) -> str:
    """What ``action`` returns, or the error that it raises, in a child process of ``user``."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            answer = str(action())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return answer


def save(folder: Path, value: int = 1, size: int = 3) -> shardsave.SaveReport:
    return shardsave.save({"new": torch.full((size,), float(value))}, folder, durable=False, progress=False)


def saved_value(folder: Path) -> float:
    return float(shardsave.load(folder)["new"][0])


def give_link(link: Path, target: Path) -> None:
    link.symlink_to(target)
    give(link, NEIGHBOUR)
