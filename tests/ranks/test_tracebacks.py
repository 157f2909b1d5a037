"""What a user sees of an error on ranks: the line of the call, one line of ours, the message, and a cause only where it tells more."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import shardsave
from jobs import run_ranks
from shardsave._storage import staging

RANKS = 3
PACKAGE = os.path.dirname(shardsave.__file__)


class Shown(NamedTuple):
    """A traceback as Python prints it: the errors in it, from the first cause on, and where each was raised."""

    errors: tuple[str, ...]
    places: tuple[tuple[str, ...], ...]
    text: str


def shown(call: Callable[[], object]) -> Shown:
    try:
        call()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        chain = text.split("\n\nThe above exception was the direct cause of the following exception:\n\n")
        assert not any("During handling" in part for part in chain), text
        places = [[line.split('"')[1] for line in part.splitlines() if line.startswith('  File "')] for part in chain]
        return Shown(tuple(part.strip().splitlines()[-1] for part in chain), tuple(map(tuple, places)), text)
    raise AssertionError("no error")


class Odd(RuntimeError):
    """A class of the user."""


class Hooked(nn.Linear):
    """Raises an error of Python in a hook of the user, on the rank that is ``struck``."""

    struck: type[Exception] | None = None

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if self.struck is not None:
            raise self.struck("a hook of the user")
        super()._save_to_state_dict(*arguments)


def full(fd: int, path: str, length: int) -> None:
    """A disk on which there is no room."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    except OSError as error:
        raise staging.CallFailed("fallocate", path, errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def refuse(done: int, total: int) -> None:
    raise ValueError("progress of the user")


def refuse_oddly(done: int, total: int) -> None:
    raise Odd("progress of the user")


def fail(rank: int, folder: Path) -> dict[str, Shown]:
    """Rank 1 fails, in one way after the other."""
    group, struck, model = dist.group.WORLD, rank == 1, nn.Linear(8, 8)
    path = folder / "ckpt"
    hooked, odd = Hooked(8, 8), Hooked(8, 8)
    hooked.struck, odd.struck = (ValueError, Odd) if struck else (None, None)
    tensors = {name: torch.ones(64) for name in "abcd"}
    shards: dict[str, Any] = {"process_group": group, "max_shard_size": "256B", "durable": False}
    full_here = mock.patch.object(staging, "allocate", full if struck else staging.allocate)
    ends = {
        "argument": shown(lambda: shardsave.save(model, path, process_group=group, max_shard_size=-1 if struck else 100)),
        "difference": shown(lambda: shardsave.save(model, path, process_group=group, step=rank)),
        "hook": shown(lambda: shardsave.save(hooked, path, process_group=group)),
        "hook with a class of its own": shown(lambda: shardsave.save(odd, path, process_group=group)),
        "nothing to load": shown(lambda: shardsave.load_model(model, path, process_group=group)),
        "nothing to verify": shown(lambda: shardsave.verify(path, process_group=group)),
        "in the background": shown(lambda: shardsave.save_async(model, path, process_group=group, step=rank).wait()),
        "callback in the background": shown(
            lambda: shardsave.save_async(tensors, path, **shards, progress=refuse if struck else None).wait()
        ),
        "odd callback in the background": shown(
            lambda: shardsave.save_async(tensors, path, **shards, progress=refuse_oddly if struck else None).wait()
        ),
        "alone": shown(lambda: shardsave.save(model, folder / str(rank), process_group=group)),
    }
    with full_here:
        ends["full disk"] = shown(lambda: shardsave.save(tensors, path, **shards))
        ends["full disk in the background"] = shown(lambda: shardsave.save_async(tensors, path, **shards).wait())
        with shardsave.CheckpointManager(folder / "run", save_every=1, **shards) as manager:
            ends["full disk in a run"] = shown(lambda: manager.step(1, tensors))
            ends["argument in a run"] = shown(lambda: manager.save(1, tensors, metadata={"rank": rank}))
    return ends


#: Cases whose error has a cause on rank 1, and what it ends with; the next ones have it on all ranks.
CAUSES = {
    "hook": "ValueError: a hook of the user",
    "callback in the background": "ValueError: progress of the user",
    "odd callback in the background": "Odd: progress of the user",
    "full disk": "OSError: [Errno 28] No space left on device: 'model-00002-of-00004.safetensors'",
    "full disk in the background": "OSError: [Errno 28] No space left on device: 'model-00002-of-00004.safetensors'",
    "full disk in a run": "OSError: [Errno 28] No space left on device: 'model-00002-of-00004.safetensors'",
}
NOTHING = ("nothing to load", "nothing to verify")


def test_the_traceback_of_each_rank(tmp_path: Path) -> None:
    """Catches tracebacks of forty lines, in which the message and the user's own line are hard to find, a chain of errors that say the
    same, and an error of the system or of the user's code that is not shown where it was raised."""
    of_ranks = run_ranks(RANKS, fail, tmp_path)
    for rank, ends in enumerate(of_ranks):
        for case, (errors, places, text) in ends.items():
            cause = "ckpt'" if case in NOTHING else CAUSES.get(case) if rank == 1 else None
            assert len(errors) == (1 if cause is None else 2), (case, rank, text)
            assert cause is None or errors[0].endswith(cause), (case, text)
            ours = [place for place in places[-1] if place.startswith(PACKAGE)]
            assert len(ours) <= 1 and len(text.splitlines()) <= 20, (case, rank, text)
            is_own = case == "hook with a class of its own" and rank == 1
            assert is_own == errors[-1].endswith("Odd: a hook of the user") and is_own == (places[-1][-1] == __file__), (
                case,
                text,
            )
            assert places[-1][:1] == (__file__,) and (is_own or len(places[-1]) <= 4), (case, rank, text)
            assert not any(place.startswith(PACKAGE) for part in places[:-1] for place in part), (case, text)
    assert (
        "in _save_to_state_dict" in of_ranks[1]["hook"].text and "in refuse" in of_ranks[1]["callback in the background"].text
    )


def handle_and_save(rank: int, folder: Path) -> str:
    """The caller was handling an error of its own, from which the call did not follow."""
    try:
        try:
            raise KeyError("the caller's own")
        except KeyError:
            shardsave.save(nn.Linear(2, 2), folder / "ckpt", process_group=dist.group.WORLD, step=rank)
    except ValueError as error:
        return "".join(traceback.format_exception(error))
    return ""


def test_what_the_caller_was_handling(tmp_path: Path) -> None:
    """Catches a traceback that hides the error that the caller was handling."""
    for text in run_ranks(2, handle_and_save, tmp_path):
        first, second = text.split("\n\nDuring handling of the above exception, another exception occurred:\n\n")
        assert first.endswith('KeyError: "the caller\'s own"') and "the same step was expected" in second
