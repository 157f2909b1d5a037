"""Method: the N-th OS call of a save (or a load) on its directory meets a fate, for N = 1, 2, … until there are no more calls. Each
time, whatever happens, the directory holds the old or the new checkpoint, whole, and the next save leaves no litter.

``python -m faults.scenarios SCENARIO,… first|overwrite FOLDER``, with the library of ``beneath.c`` preloaded. Each scenario prints its
number of trials.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

import shardsave
from faults.beneath import Fate, Met, arm, disarm
from faults.dying import die_after_the_commit
from faults.savers import CONFIG, EARLIER, Bench, companion_generation, generation_in, litter_in, next_save_works, save, state
from shardsave._format import crc64
from shardsave._format.file_names import OWN_PATTERN, is_in_directory

FAILURES = [
    *(
        (Fate.FAIL, number)
        for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EROFS, errno.EMFILE, errno.EPERM)
    ),
    (Fate.FAIL_AFTER, errno.EIO),
    (Fate.SHORTEN, 0),
]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

#: What the kernel adds to the name of an open file that has been removed (proc(5)).
DELETED = " (deleted)"

#: The library's name of a call → its name in messages, where they differ.
SAYS = {
    "openat": "open",
    "mkdirat": "mkdir",
    "renameat": "rename",
    "linkat": "link",
    "unlinkat": "unlink",
    "fstatat": "stat",
    "opendir": "listdir",
    "fdopendir": "listdir",
    "readdir": "listdir",
    "fgetxattr": "getxattr",
    "preadv": "pread",
    "preadv2": "pread",
}


def held() -> tuple[int, int]:
    """The numbers of descriptors and of threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def nothing_leaked(before: tuple[int, int]) -> bool:
    """Whether there are as many descriptors as ``before``, and no more threads.

    A joined thread may be listed for a moment longer: after the save, or in ``before``, if it belongs to an earlier one.
    """

    def as_before() -> bool:
        descriptors, threads = held()
        return descriptors == before[0] and threads <= before[1]

    deadline = time.monotonic() + 5
    while not as_before() and time.monotonic() < deadline:
        time.sleep(0.001)
    return as_before()


def is_unlocked(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def is_own(name: str) -> bool:
    """Whether a save gives this name to a file whose removal can be finished after the return."""
    return OWN_PATTERN.fullmatch(name) is not None or is_in_directory(name)


def is_of_earlier(path: Path) -> bool:
    """Whether this is a shard of a checkpoint from which a save may take it over."""
    return OWN_PATTERN.fullmatch(path.name) is not None and path.parent.name in ("ckpt", EARLIER)


def may_pass(met: Met, fate: Fate, number: int, report: shardsave.SaveReport) -> bool:
    """Whether a save may succeed although the call ``met`` failed."""
    if fate is Fate.SHORTEN or number == errno.EINTR or report.leftovers:
        return True  # continued or repeated; or reported
    if met.path.name.endswith(DELETED) or (met.call == "openat" and is_own(met.path.name)):
        return True  # a removed file that is kept open until its space is free
    if met.call in ("close", "closedir"):
        return not met.path.parent.name.startswith(".shardsave-")  # a file that was only read
    if met.call in ("statx", "fcntl", "sync_file_range"):
        return True  # direct I/O or early writeback, which a save can do without
    if met.call == "linkat" and number == errno.EPERM:
        return True  # a file system without links
    if any("was taken over: " in note for note in report.notes):
        return True  # an earlier checkpoint that cannot be read
    if is_of_earlier(met.path) and met.call not in ("fsync", "unlinkat"):
        return True  # what cannot be taken over is written
    if met.call == "ioctl":
        return True  # a file system without clones
    if number in (errno.EROFS, errno.EPERM) and met.path.name in ("runs", "watched"):
        return True  # directories above, which may belong to someone else
    return fate is Fate.FAIL_AFTER and met.call in (
        "mkdir",
        "stat",
        "fstatat",
        "openat",
    )  # taken for "nothing there", or repeated


def check_message(text: str, met: Met, number: int) -> None:
    """The message names the file, the call and the reason."""
    assert os.strerror(number) in text, text
    assert str(met.path).split("/.shardsave-")[0] in text, text
    call = SAYS.get(met.call, met.call)
    assert f"{call}:" in text or f"{call} of " in text or (met.call == "fcntl" and ("listdir:" in text or "mmap:" in text)), (
        text
    )


class Attempt(NamedTuple):
    """A save one of whose calls may have met its fate; one of ``error`` and ``report`` is None."""

    met: Met | None
    error: shardsave.ShardSaveError | None
    report: shardsave.SaveReport | None


def attempt_save(bench: Bench, nth: int, fate: Fate, number: int) -> Attempt:
    """Saves generation 2 with a fate for the ``nth`` call. Nothing may leak, whatever the result."""
    bench.reset()
    before = held()
    error, report = None, None
    arm(bench.watched, nth, fate, number)
    try:
        report = save(2, bench.target)
    except shardsave.ShardSaveError as caught:
        error = caught
    met = disarm()
    assert nothing_leaked(before), (met, "leaked", before, held())
    assert not bench.target.exists() or is_unlocked(bench.target), met
    return Attempt(met, error, report)


def save_fails(bench: Bench, fate: Fate, number: int) -> int:
    """Each call of a save fails in one way; one error reports it."""
    for nth in count(1):
        met, error, report = attempt_save(bench, nth, fate, number)
        if met is None:
            assert report is not None and not report.leftovers
        elif report is not None:
            assert bench.found() == 2
            assert may_pass(met, fate, number, report), (met, "was swallowed")
        else:
            check_message(str(error), met, number)
            if isinstance(error, shardsave.DurabilityUncertainError):
                assert bench.found() == 2
            else:
                assert isinstance(error, shardsave.SaveNotCommittedError)
                assert isinstance(error, shardsave.OutOfSpaceError) == (number in NO_ROOM), error
                assert "nothing was" in str(error), error
                assert bench.found() == bench.old, (met, error)
        next_save_works(bench.target)
        if met is None:
            return nth
    raise AssertionError


def save_loses_its_disk(bench: Bench, fate: Fate, number: int) -> int:
    """From the N-th call on every call fails, and after the save the disk is back: the save has reported the truth."""
    for nth in count(1):
        met, error, report = attempt_save(bench, nth, fate, number)
        found = bench.found()
        if report is not None:
            assert found == 2
            assert met is None or report.leftovers or met.call == "close", met
        elif isinstance(error, shardsave.DurabilityUncertainError):
            assert found == 2 or (found == bench.old and "cannot tell whether the save was committed" in str(error)), error
        else:
            assert found == bench.old and "nothing was" in str(error), error
        next_save_works(bench.target)
        if met is None:
            return nth
    raise AssertionError


def status_of_a_save_that_ends(bench: Bench, nth: int, fate: Fate) -> int:
    """Saves generation 2 in a process that ends at its ``nth`` call. Returns what waitpid says of it; 0 if it made fewer calls."""
    bench.reset()
    child = os.fork()
    if child == 0:
        arm(bench.watched, nth, fate)
        save(2, bench.target)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def save_is_killed(bench: Bench, fate: Fate, number: int) -> int:
    """The process ends at each call of a save, before it and in the middle of it or after it."""
    for nth in count(1):
        status = status_of_a_save_that_ends(bench, nth, fate)
        found = bench.found()
        assert found in (bench.old, 2)
        next_save_works(bench.target)
        if status == 0:
            assert found == 2
            return nth
        assert os.WIFSIGNALED(status)
    raise AssertionError


def config_outlives_its_save(bench: Bench, fate: Fate, number: int) -> int:
    """The process ends at each of the later calls of a save with a config; then a save without one ends right after its commit, and
    another one does not. A config that was committed stays, and no other one does."""
    for nth in count(41):
        status = status_of_a_save_that_ends(bench, nth, fate)
        committed = bench.found()
        assert committed in (bench.old, 2)
        child = os.fork()
        if child == 0:
            die_after_the_commit(bench.target, kind="plain")
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        save(9, bench.target, durable=False, kind="plain")
        assert companion_generation(bench.target / CONFIG) == committed, (nth, committed)
        assert not litter_in(bench.target) - {CONFIG}
        if status == 0:
            return nth
    raise AssertionError


def save_is_killed_at_random(bench: Bench, fate: Fate, number: int) -> int:
    """``SHARDSAVE_KILLS`` savers get a SIGKILL at random moments, whatever their threads are doing."""
    chance = random.Random(1)
    kills = int(os.environ.get("SHARDSAVE_KILLS", "100"))
    window = 0.02  # seconds; adapts to the disk, so that about half of the kills come too late
    outcomes = set()
    for _ in range(kills):
        bench.reset()
        child = os.fork()
        if child == 0:
            save(2, bench.target)
            os._exit(0)
        time.sleep(chance.random() * window)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = bench.found()
        assert found in (bench.old, 2)
        outcomes.add(found)
        window *= 0.8 if found == 2 else 1.25
        next_save_works(bench.target)
    assert len(outcomes) == 2 or kills < 50, outcomes
    return kills


def save_is_killed_beside_a_live_child(bench: Bench, fate: Fate, number: int) -> int:
    """A saver forks while its engine works, goes on, and is killed. The child lives on, and must not keep lock or litter alive."""
    for nth in range(1, 11):
        bench.reset()
        read_end, write_end = os.pipe()
        saver = os.fork()
        if saver == 0:

            def fork_once(done: int, total: int, forked: list[int] = []) -> None:  # noqa: B006
                if not forked:
                    forked.append(os.fork())
                    if forked == [0]:
                        os.write(write_end, os.getpid().to_bytes(4, "little"))
                        signal.pause()

            shardsave.save(state(2), bench.target, max_shard_size=5000, progress=fork_once)
            os._exit(0)
        child = int.from_bytes(os.read(read_end, 4), "little")
        time.sleep(0.002 * nth)
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        try:
            assert bench.found() in (bench.old, 2)
            assert is_unlocked(bench.target)
            next_save_works(bench.target)
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(read_end)
            os.close(write_end)
    return nth


def save_is_interrupted(bench: Bench, fate: Fate, number: int) -> int:
    """Ctrl-C at each call of a save, before it and after it."""
    for nth in count(1):
        bench.reset()
        before = held()
        arm(bench.watched, nth, fate)
        interrupted = False
        try:
            save(2, bench.target)
            for _ in range(10):  # the signal of the last call may be handled only here
                pass
        except KeyboardInterrupt:
            interrupted = True
        met = disarm()
        found = bench.found()
        assert interrupted == (met is not None), met
        assert found in (bench.old, 2), (met, found)
        assert nothing_leaked(before), (met, "leaked", before, held())
        if bench.target.exists():
            assert is_unlocked(bench.target), met
        next_save_works(bench.target)
        if met is None:
            assert found == 2
            return nth
    raise AssertionError


def loads(bench: Bench) -> list[Callable[[], object]]:
    """Loads of everything, of a part and of a mapping, and an `inspect`. Each returns whether its result is right."""
    return [
        lambda: generation_in(bench.target) == 1,
        lambda: shardsave.load(bench.target, names=["t1"])["t1"].equal(state(1)["t1"]),
        lambda: shardsave.load(bench.target, mmap=True)["t1"].equal(state(1)["t1"]),
        lambda: len(shardsave.inspect(bench.target).names) == 4,
    ]


def load_fails(bench: Bench, fate: Fate, number: int) -> int:
    """Each call of a load fails in one way; one error reports it, no wrong value is returned, nothing leaks."""
    bench.reset()
    tried = 0
    for action in loads(bench):
        for nth in count(1):
            tried += 1
            before = held()
            arm(bench.watched, nth, fate, number)
            error: str | None = None
            try:
                right = action()
            except shardsave.CheckpointNotFoundError:
                raise
            except shardsave.ShardSaveError as caught:
                error = str(caught)
            met = disarm()
            assert nothing_leaked(before), (met, "leaked", before, held())
            if error is None:
                assert right, met
            else:
                assert met is not None
                check_message(error, met, number)
            if met is None:
                break
    return tried


def load_is_interrupted(bench: Bench, fate: Fate, number: int) -> int:
    """Ctrl-C at each call of a load."""
    bench.reset()
    tried = 0
    for action in loads(bench):
        for nth in count(1):
            tried += 1
            before = held()
            arm(bench.watched, nth, fate)
            interrupted = False
            try:
                action()
                for _ in range(10):  # the signal of the last call may be handled only here
                    pass
            except KeyboardInterrupt:
                interrupted = True
            met = disarm()
            assert interrupted == (met is not None), met
            assert nothing_leaked(before), (met, "leaked", before, held())
            if met is None:
                break
    return tried


#: Name → the function that tries each call, and the fates that the calls meet.
Scenarios = dict[str, tuple[Callable[[Bench, Fate, int], int], list[tuple[Fate, int]]]]

SCENARIOS: Scenarios = {
    "save_fails": (save_fails, FAILURES),
    "slice_fails": (save_fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL, errno.ENOSPC), (Fate.FAIL_AFTER, errno.EIO)]),
    "direct_save_fails": (save_fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL_AFTER, errno.EIO), (Fate.SHORTEN, 0)]),
    "save_loses_its_disk": (save_loses_its_disk, [(Fate.FAIL_FROM_HERE, errno.EIO), (Fate.FAIL_FROM_HERE, errno.EROFS)]),
    "save_is_killed": (save_is_killed, [(Fate.KILL, 0), (Fate.KILL_AFTER, 0)]),
    "killed_after_each_call": (save_is_killed, [(Fate.KILL_AFTER, 0)]),
    "killed_at_each_call": (save_is_killed, [(Fate.KILL, 0)]),
    "training_fails": (save_fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL_AFTER, errno.EIO)]),
    "training_is_interrupted": (save_is_interrupted, [(Fate.INTERRUPT_AFTER, 0)]),
    "config_outlives_its_save": (config_outlives_its_save, [(Fate.KILL_AFTER, 0)]),
    "save_is_killed_at_random": (save_is_killed_at_random, [(Fate.KILL, 0)]),
    "save_is_killed_beside_a_live_child": (save_is_killed_beside_a_live_child, [(Fate.KILL, 0)]),
    "save_is_interrupted": (save_is_interrupted, [(Fate.INTERRUPT, 0), (Fate.INTERRUPT_AFTER, 0)]),
    "load_fails": (load_fails, FAILURES),
    "load_is_interrupted": (load_is_interrupted, [(Fate.INTERRUPT, 0), (Fate.INTERRUPT_AFTER, 0)]),
}


def remember_sums() -> None:
    """Caches checksums: the portable engine computes those of the same few small files in each trial, byte by byte in Python."""
    serial = crc64._raw_serial
    known = cache(lambda content: serial(np.frombuffer(content, np.uint8)))
    crc64._raw_serial = lambda data: known(data.tobytes())


def run_scenarios(scenarios: Scenarios, names: str, first: str, folder: str) -> None:
    """Runs the scenarios ``names``, which are separated by commas, one after the other."""
    remember_sums()
    bench = Bench(Path(folder), first == "first")
    save(0, Path(folder) / "warm")  # the ring and imports are made once, and are no leak
    generation_in(Path(folder) / "warm")
    gc.freeze()  # all of torch: no collection has to visit it
    failed = 0
    for name in names.split(","):
        scenario, fates = scenarios[name]
        for fate, number in fates:
            try:
                result = f"{scenario(bench, fate, number)} trials"
            except Exception:
                failed += 1
                disarm()
                result = f"FAILED\n{traceback.format_exc()}"
            print(f"{name}, {fate.name} {errno.errorcode.get(number, '')}: {result}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_scenarios(SCENARIOS, *sys.argv[1:])
