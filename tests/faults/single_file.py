"""Method: the N-th OS call of a conversion into one file on its directory meets a fate, for N = 1, 2, …. Each time, whatever happens,
the file is the old or the new one, whole, and the next conversion leaves nothing beside it. The same for `clean`: the checkpoint stays
as it is, and the next `clean` removes everything that a dead save left.

``python -m faults.single_file SCENARIO first|overwrite FOLDER``, with the library of ``beneath.c`` preloaded.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sys
from itertools import count

import torch
from safetensors.torch import load_file

import shardsave
from faults.beneath import Fate, arm, disarm
from faults.dying import die_before_the_commit, killed
from faults.savers import Bench, generation_in, litter_in, save, state
from faults.scenarios import DELETED, FAILURES, NO_ROOM, Scenarios, held, nothing_leaked, run_scenarios
from shardsave._api.convert import Form

#: Calls without which a conversion goes on: comparing paths, closing files that are no longer needed, locks, early writeback, removing
#: files that the next conversion removes, and a second name of the old file.
_SPARED = {
    "lstat",
    "stat",
    "statx",
    "close",
    "closedir",
    "flock",
    "fcntl",
    "sync_file_range",
    "unlinkat",
    "unlink",
    "rmdir",
    "linkat",
}


class File:
    """A file that is reset for each trial: of generation 1, or missing (``first``)."""

    def __init__(self, bench: Bench, to: Form) -> None:
        self.to = to
        self.watched = bench.watched
        self.target = bench.watched / "runs" / f"model.{to}"
        self.old = bench.old
        self._sources = bench.watched.parent / "sources"
        for generation in (1, 2, 9):
            save(generation, self._sources / str(generation))
        self._template: bytes | None = None
        if self.old is not None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.convert(self.old)
            self._template = self.target.read_bytes()

    def reset(self) -> None:
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self._template is not None:
            self.target.parent.mkdir()
            self.target.write_bytes(self._template)

    def convert(self, generation: int) -> shardsave.ConvertReport:
        """With a cast, so that a conversion for torch makes a directory beside the file first.

        Waits until the old file is freed, so that the calls of the thread that frees it are among those of the conversion.
        """
        source = self._sources / str(generation)
        report = shardsave.convert(source, self.target, to=self.to, dtype="float64", progress=False)
        assert report.wait_cleaned(60)
        return report

    def found(self) -> int | None:
        """The generation of the file, which is whole; None where there is none."""
        if not self.target.exists():
            return None
        loaded = load_file(self.target) if self.to == "safetensors" else torch.load(self.target, weights_only=True)
        generation = int(loaded["t0"][0])
        expected = state(generation)
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name].double()) for name in loaded)
        return generation

    def next_works(self) -> None:
        self.convert(9)
        assert self.found() == 9
        assert os.listdir(self.target.parent) == [self.target.name], os.listdir(self.target.parent)


def _each(file: File, fate: Fate, number: int) -> int:
    """Repeats the conversion and lets the fate come one call later each time, until there are no more calls."""
    for nth in count(1):
        file.reset()
        before = held()
        error: str | None = None
        interrupted = False
        arm(file.watched, nth, fate, number)
        try:
            file.convert(2)
            for _ in range(10):  # the signal of the last call may be handled only here
                pass
        except shardsave.ShardSaveError as caught:
            error = str(caught)
            assert number in NO_ROOM or not isinstance(caught, shardsave.OutOfSpaceError), caught
        except KeyboardInterrupt:
            interrupted = True
        met = disarm()
        gc.collect()  # an interrupt's traceback may keep the mapped source until then
        assert nothing_leaked(before), (met, "leaked", before, held())
        if met is None:
            assert error is None and file.found() == 2
            return nth
        if fate in (Fate.INTERRUPT, Fate.INTERRUPT_AFTER):
            assert interrupted and file.found() in (file.old, 2), met
        elif error is None:
            assert file.found() == 2, met
            passes = fate is not Fate.FAIL or met.call in _SPARED or ".part.d" in str(met.path)
            kept_open = met.call == "openat" and met.path.suffix == ".part"  # the old file, until its space is free
            passes |= kept_open or met.path.name.endswith(DELETED)
            passes |= (
                met.path.name in ("watched", "runs") and number == errno.EROFS
            )  # directories above may belong to someone else
            assert passes or number in (errno.EINTR, errno.EPERM), (met, "was swallowed")  # repeated; links are not needed
        else:
            assert os.strerror(number) in error and str(file.target.parent) in error, (met, error)
            assert file.found() == (2 if error.startswith("written, but not known to be durable") else file.old), (met, error)
        file.next_works()
    raise AssertionError


def file_fails(bench: Bench, fate: Fate, number: int) -> int:
    """Each call fails in one way; one error reports it."""
    return sum(_each(File(bench, to), fate, number) for to in ("safetensors", "torch"))


def file_is_interrupted(bench: Bench, fate: Fate, number: int) -> int:
    """Ctrl-C at each call. Not for torch: shutil removes the directory then, and may leak a descriptor when it is interrupted."""
    return _each(File(bench, "safetensors"), fate, number)


def file_is_killed(bench: Bench, fate: Fate, number: int) -> int:
    """The process ends at each call."""
    tried = 0
    for to in ("safetensors", "torch"):
        file = File(bench, to)
        for nth in count(1):
            tried += 1
            file.reset()
            child = os.fork()
            if child == 0:
                arm(file.watched, nth, fate)
                file.convert(2)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert file.found() in (file.old, 2)
            file.next_works()
            if status == 0:
                break
            assert os.WIFSIGNALED(status)
    return tried


def _with_litter(bench: Bench) -> None:
    """Makes the old checkpoint, and the leavings of a save that was killed when its shards had their final names."""
    bench.reset()
    killed(bench.target, die_before_the_commit)
    assert litter_in(bench.target) and len(list(bench.target.glob("*.safetensors"))) == 4


def clean_meets(bench: Bench, fate: Fate, number: int) -> int:
    """Each call of `clean` fails, is interrupted, or is its process's last."""
    for nth in count(1):
        _with_litter(bench)
        before = held()
        child = os.fork() if fate in (Fate.KILL, Fate.KILL_AFTER) else -1
        if child > 0:
            met = None if os.waitpid(child, 0)[1] == 0 else "killed"
        else:
            arm(bench.watched, nth, fate, number)
            try:
                shardsave.clean(bench.target)
                for _ in range(10):
                    pass
            except (shardsave.ShardSaveError, KeyboardInterrupt):
                pass
            if child == 0:
                os._exit(0)
            met = disarm()
            assert nothing_leaked(before), (met, "leaked", before, held())
        assert generation_in(bench.target) == 1, met
        shardsave.clean(bench.target)
        assert not litter_in(bench.target), met
        if met is None:
            return nth
    raise AssertionError


_INTERRUPTS = [(Fate.INTERRUPT, 0), (Fate.INTERRUPT_AFTER, 0)]
_FAILURES = [
    *((Fate.FAIL, number) for number in (errno.EIO, errno.ENOSPC, errno.EROFS)),
    (Fate.FAIL_AFTER, errno.EIO),
    (Fate.SHORTEN, 0),
]
_KILLS = [(Fate.KILL, 0), (Fate.KILL_AFTER, 0)]

SCENARIOS: Scenarios = {
    "file_fails": (file_fails, _FAILURES),
    "file_slice_fails": (file_fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL_AFTER, errno.EIO)]),
    "file_is_interrupted": (file_is_interrupted, _INTERRUPTS),
    "file_is_killed": (file_is_killed, _KILLS),
    "file_killed_at_each_call": (file_is_killed, _KILLS[:1]),
    "clean_meets_training": (clean_meets, [(Fate.FAIL, errno.EIO), (Fate.INTERRUPT_AFTER, 0), (Fate.KILL_AFTER, 0)]),
    "clean_meets": (clean_meets, [*FAILURES, *_INTERRUPTS, *_KILLS]),
    "clean_meets_some": (clean_meets, [(Fate.FAIL, errno.EIO), (Fate.FAIL, errno.EROFS), _INTERRUPTS[1], _KILLS[0]]),
}

if __name__ == "__main__":
    run_scenarios(SCENARIOS, *sys.argv[1:])
