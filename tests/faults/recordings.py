"""Records saves for the power-loss model: ``python -m faults.recordings NAME FOLDER``, with the library of ``beneath.c`` preloaded.

Each phase of a recording is a file ``phase-N`` in FOLDER; the folder that is watched is FOLDER/watched.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

import shardsave
from faults import savers
from faults.beneath import Fate, arm, disarm, read_record, recorded
from faults.power import MTIME
from faults.savers import state

STEP = int(os.environ.get("SHARDSAVE_POWER_STEP", "17"))


def save(generation: int, folder: Path, durable: bool = True) -> None:
    """Saves with random names that follow from the generation, so that different recordings and engines lead to equal disks."""
    numbers = count()
    secrets.token_hex = lambda size: f"{generation:x}{next(numbers):0{2 * size - 1}x}"
    savers.save(generation, folder, durable)


class Recording:
    """Phases, one after the other, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watched = folder / "watched"
        self.target = self.watched / "runs" / "ckpt"
        self._phases = count()
        self.watched.mkdir(parents=True)

    def phase(self, action: Callable[[], object], number: int = 0, fate: Fate = Fate.PASS) -> Path:
        record = self.folder / f"phase-{next(self._phases)}"
        with recorded(self.watched, record, number, fate):
            action()
        disarm()
        return record

    def phase_in_child(self, action: Callable[[], object], number: int, fate: Fate) -> Path:
        child = os.fork()
        record = self.folder / f"phase-{next(self._phases)}"
        if child == 0:
            with recorded(self.watched, record, number, fate):
                action()
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        return record


def number_of(record: Path, call: str, name: str) -> int:
    """The number (from 1) of the last ``call`` with a path, or a new path, named ``name``."""
    calls = read_record(record)
    matches = (n for n, one in enumerate(calls, 1) if one.call == call and name in (one.path.name, one.other.name))
    return max(matches)


def first(folder: Path) -> None:
    recording = Recording(folder)
    recording.phase(lambda: save(1, recording.target))


def made_by_others(folder: Path) -> None:
    """The directory exists already: someone made it without any fsync, and saved into it without durability."""
    recording = Recording(folder)
    recording.phase(lambda: recording.target.mkdir(parents=True))
    recording.phase(lambda: save(1, recording.target, durable=False))
    recording.phase(lambda: save(2, recording.target))


def overwrite(folder: Path) -> None:
    recording = Recording(folder)
    recording.phase(lambda: save(1, recording.target))
    recording.phase(lambda: save(2, recording.target))


def next_step(folder: Path) -> None:
    """A save into an empty directory that takes a shard over from a checkpoint beside it; then that checkpoint goes, file by file."""
    recording = Recording(folder)
    earlier = recording.target.parent / savers.EARLIER
    recording.phase(lambda: save(1, earlier))
    recording.phase(lambda: save(2, recording.target))

    def remove() -> None:
        for name in sorted(os.listdir(earlier)):
            os.unlink(earlier / name)

    recording.phase(remove)


def lone(folder: Path) -> None:
    """A save in place of a lone file."""
    from safetensors.torch import save_file

    recording = Recording(folder)

    def write_lone() -> None:
        recording.target.mkdir(parents=True)
        save_file(state(1), folder / "model.safetensors")
        content = (folder / "model.safetensors").read_bytes()
        fd = os.open(recording.target / "model.safetensors", os.O_WRONLY | os.O_CREAT)
        os.write(fd, content)
        os.utime(fd, ns=(MTIME, MTIME))
        os.fsync(fd)
        os.close(fd)
        for path in (recording.target, recording.target.parent, recording.watched):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    recording.phase(write_lone)
    recording.phase(lambda: save(2, recording.target))


def killed_then_no_room(folder: Path) -> None:
    """A saver dies right after its rename; the next one finds no space, and says that the visible checkpoint is intact."""
    trial = Recording(folder / "trial")
    trial.phase(lambda: save(1, trial.target))
    number = number_of(trial.phase(lambda: save(2, trial.target)), "renameat", "model.safetensors.index.json")
    recording = Recording(folder)
    recording.phase(lambda: save(1, recording.target))
    recording.phase_in_child(lambda: save(2, recording.target), number, Fate.KILL_AFTER)
    recording.phase(lambda: _find_no_room(recording.target))


def _find_no_room(target: Path) -> None:
    try:
        shardsave.save({"x": torch.zeros(1).expand(1 << 45)}, target)
    except shardsave.OutOfSpaceError as error:
        assert "the previous checkpoint is intact" in str(error)
    else:
        raise AssertionError


def killed_before_the_config(folder: Path) -> None:
    """A saver is killed at each call from its rename of the index to that of the config; then another one saves, or finds no space."""
    trial = Recording(folder / "trial")
    trial.phase(lambda: save(1, trial.target))
    record = trial.phase(lambda: save(2, trial.target))
    first, last = (number_of(record, "renameat", name) for name in ("model.safetensors.index.json", "config.json"))
    for nth in range(first, last + 1):
        for name, third in (("saved", lambda target: save(3, target)), ("no-room", _find_no_room)):
            recording = Recording(folder / f"{nth}-{name}")
            recording.phase(lambda recording=recording: save(1, recording.target))  # type: ignore[misc]
            recording.phase_in_child(lambda recording=recording: save(2, recording.target), nth, Fate.KILL_AFTER)  # type: ignore[misc]
            recording.phase(lambda recording=recording, third=third: third(recording.target))  # type: ignore[misc]


def killed_then_saved(folder: Path) -> None:
    """A saver is killed at every `STEP`-th call, and another one saves: one recording each."""
    for nth in count(1, STEP):
        recording = Recording(folder / str(nth))
        recording.phase(lambda recording=recording: save(1, recording.target))  # type: ignore[misc]
        child = os.fork()
        if child == 0:
            with recorded(recording.watched, recording.folder / "phase-1", nth, Fate.KILL_AFTER):
                save(2, recording.target)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        next(recording._phases)
        recording.phase(lambda recording=recording: save(3, recording.target))  # type: ignore[misc]
        if ended:
            return


def failed_fsyncs(folder: Path) -> None:
    """Each fsync of an overwrite fails, one recording each; its file ``outcome`` has the result of the save."""
    trial = Recording(folder / "trial")
    trial.phase(lambda: save(1, trial.target))
    calls = read_record(trial.phase(lambda: save(2, trial.target)))
    for nth in (n for n, one in enumerate(calls, 1) if one.call == "fsync"):
        recording = Recording(folder / str(nth))
        recording.phase(lambda recording=recording: save(1, recording.target))  # type: ignore[misc]
        outcome = "success"

        def attempt(recording: Recording = recording) -> None:
            nonlocal outcome
            try:
                save(2, recording.target)
            except shardsave.ShardSaveError as error:
                outcome = type(error).__name__

        recording.phase(attempt, nth, Fate.FAIL)
        (recording.folder / "outcome").write_text(outcome)


if __name__ == "__main__":
    save(0, Path(sys.argv[2]) / "warm")
    arm(Path("/nowhere"), 0, Fate.PASS)
    disarm()
    globals()[sys.argv[1]](Path(sys.argv[2]) / "recording")
