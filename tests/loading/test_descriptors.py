"""Checkpoints with more shards than files that can be open. Method: the real limit of this process is lowered during a load."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardsave
from support import holds_in_child

INDEX = "model.safetensors.index.json"
COUNT = 30

BEFORE = resource.getrlimit(resource.RLIMIT_NOFILE)


@contextlib.contextmanager
def descriptors_left(free: int) -> Iterator[None]:
    """Only ``free`` more descriptors can be opened."""
    in_use = len(os.listdir("/proc/self/fd")) - 1
    fill = [os.open("/dev/null", os.O_RDONLY) for _ in range(max(map(int, os.listdir("/proc/self/fd"))) + 1 - in_use)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + len(fill) + free, BEFORE[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, BEFORE)
        for number in fill:
            os.close(number)


def ours(folder: Path) -> None:
    shardsave.save({f"t{n:02}": torch.full((10,), float(n)) for n in range(COUNT)}, folder, max_shard_size=40)


def foreign(folder: Path) -> None:
    """As third parties write it; the index names the shards in reverse order."""
    for n in range(COUNT):
        save_file({f"t{n:02}": torch.full((10,), float(n))}, folder / f"s{n:02}.safetensors")
    weight_map = {f"t{n:02}": f"s{n:02}.safetensors" for n in reversed(range(COUNT))}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("free", [3, 7, COUNT, COUNT + 10])
@pytest.mark.parametrize("make", [ours, foreign])
def test_more_shards_than_descriptors(tmp_path: Path, make: Callable[[Path], None], free: int) -> None:
    """Catches a load that opens more files than it may, also if other code uses most of the limit or the names are reversed."""
    make(tmp_path)
    model = nn.ParameterDict({f"t{n:02}": torch.zeros(10) for n in range(COUNT)})
    with descriptors_left(free):
        loaded = shardsave.load(tmp_path)
        mapped = shardsave.load(tmp_path, mmap=True, names=["t03"])
        shardsave.load_model(model, tmp_path)
        assert shardsave.verify(tmp_path).tensors == COUNT
    assert all((loaded[f"t{n:02}"] == n).all() and (model[f"t{n:02}"] == n).all() for n in range(COUNT))
    assert (mapped["t03"] == 3).all()


@pytest.mark.parametrize("make", [ours, foreign])
def test_half_of_the_descriptors_stays_free(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Catches shards that stay open while others are read: with twice as many open, no descriptor would be left for other code."""
    make(tmp_path)
    opened: list[int] = []

    def count(done: int, total: int) -> None:
        fds = os.listdir("/proc/self/fd")
        opened.append(
            sum(os.path.islink(fd := f"/proc/self/fd/{n}") and os.readlink(fd).startswith(str(tmp_path)) for n in fds)
        )

    with descriptors_left(10):
        shardsave.load(tmp_path, progress=count)
    assert 4 <= max(opened) <= 5


def grown_name(folder: Path) -> None:
    """The same tensors at other offsets of their files."""
    for n in range(COUNT):
        path = folder / f"s{n:02}.safetensors"
        save_file({f"t{n:02}": torch.full((10,), float(n))}, path, metadata={"note": "x" * 64})


def next_save(folder: Path) -> None:
    shardsave.save({f"t{n:02}": torch.full((10,), -1.0) for n in range(COUNT)}, folder, max_shard_size=40)


@pytest.mark.parametrize(
    ("make", "replace"), [(ours, next_save), (foreign, grown_name)], ids=["by the next save", "with other offsets"]
)
def test_shards_replaced_between_two_groups(
    tmp_path: Path, make: Callable[[Path], None], replace: Callable[[Path], None]
) -> None:
    """Catches bytes read at the offsets of a file that was replaced, and an intact checkpoint that is called corrupt."""
    make(tmp_path)
    model = nn.ParameterDict({f"t{n:02}": torch.zeros(10) for n in range(COUNT)})
    verbs: list[Callable[..., object]] = [
        shardsave.load,
        lambda path, **options: shardsave.verify(path, keep_going=True, **options),
        lambda path, **options: shardsave.load_model(model, path, **options),
    ]
    for verb in verbs:
        replaced: list[int] = []

        def once(done: int, total: int, replaced: list[int] = replaced) -> None:
            if not replaced:
                replaced.append(done)
                resource.setrlimit(resource.RLIMIT_NOFILE, BEFORE)
                replace(tmp_path)

        with descriptors_left(8), pytest.raises(shardsave.DirectoryBusyError) as caught:
            verb(tmp_path, progress=once)
        assert f"of {COUNT} shards could be held open: load again, or raise the limit of open files (ulimit -n)" in str(
            caught.value
        )
        assert "it was replaced or removed during the load" in str(caught.value)
    assert str(caught.value).endswith(f" of {COUNT} tensors") and "; the module is partly loaded, " in str(caught.value)
    assert len(shardsave.load(tmp_path)) == COUNT


def test_a_shard_replaced_before_a_fork_opens_it_again(tmp_path: Path) -> None:
    """Catches an error in a forked child that blames damage or a limit, although the fork closed the descriptors."""
    ours(tmp_path)
    with shardsave.open(tmp_path) as ckpt:
        next_save(tmp_path)
        assert (ckpt["t03"] == 3).all()

        def refused() -> bool:
            try:
                ckpt["t04"]
            except shardsave.DirectoryBusyError as error:
                return str(error).endswith("; the descriptor was closed by a fork: open the checkpoint again")
            except BaseException:
                return False  # an error must not leave this function: the child is a copy of the test run
            return False

        assert holds_in_child(refused)
        assert (ckpt["t04"] == 4).all()
