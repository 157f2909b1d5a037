"""The commit protocol under loss of power at any moment, judged by the model of ``faults/power.py``.

Method: real saves are recorded beneath libc, then replayed up to every call. On each disk that a loss of power may leave there, the
directory must load as the old or the new checkpoint, whole, and the next save must leave no litter. To show that the model would
notice a mistake, steps of the protocol are removed from the recording, one at a time, and each time the model must find a violation.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pytest

import shardsave
from faults.beneath import Recorded, read_record
from faults.power import Disk, Tree, lay_out
from faults.running import ENGINES, run_beneath
from faults.savers import CONFIG, litter_in, save, with_companions_in

pytestmark = pytest.mark.slow

SAMPLES = int(os.environ.get("SHARDSAVE_POWER_SAMPLES", "12"))

Phases = list[list[Recorded]]


class Judge:
    """Replays recordings, and remembers the result for each disk."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._known: dict[bytes, tuple[object, str]] = {}
        self.disks = 0

    def violations(
        self, root: Path, phases: Phases, allowed: Sequence[Collection[object]], end: Collection[object]
    ) -> list[str]:
        """Replays ``phases`` and cuts the power before each call. ``allowed``: the generations during each phase; ``end``: after all."""
        return [one for found in self._look_at_each(root, phases, allowed, end) for one in found]

    def notices(self, root: Path, phases: Phases, allowed: Sequence[Collection[object]], end: Collection[object]) -> bool:
        """Whether there are `violations`; looks no further than the first."""
        return any(self._look_at_each(root, phases, allowed, end))

    def _look_at_each(
        self, root: Path, phases: Phases, allowed: Sequence[Collection[object]], end: Collection[object]
    ) -> Iterator[list[str]]:
        disk = Disk(root)
        chance = random.Random(1)
        for phase, permitted in zip(phases, allowed):
            for call in phase:
                yield self._look(disk, chance, permitted, f"before {call.call} of {call.path.relative_to(root)}")
                disk.apply(call)
        yield self._look(disk, chance, end, "after the end")

    def _look(self, disk: Disk, chance: random.Random, permitted: Collection[object], when: str) -> list[str]:
        wrong = []
        for tree in disk.after_power_loss(chance, SAMPLES) if permitted else ():
            found, litter = self._found(tree)
            if found not in permitted:
                wrong.append(f"{when}: {found}, {sorted(map(str, tree))}")
            if litter:
                wrong.append(f"{when}: the next save leaves {litter}")
        return wrong

    def _found(self, tree: Tree) -> tuple[object, str]:
        digest = hashlib.sha256(repr(sorted((str(path), content) for path, content in tree.items())).encode()).digest()
        self.disks += 1
        if digest not in self._known:
            folder = self._scratch / "disk"
            lay_out(tree, folder)
            self._known[digest] = _judge(folder / "runs" / "ckpt")
            shutil.rmtree(folder)
        return self._known[digest]


def _judge(target: Path) -> tuple[object, str]:
    """The generation that ``target`` holds, or the error that reading it raises; and the litter that the next save leaves behind."""
    try:
        found: object = with_companions_in(target)
    except (shardsave.ShardSaveError, AssertionError) as error:
        return str(error)[:200], ""
    save(9, target, durable=False, kind="config" if any(target.rglob(CONFIG)) else "plain")
    litter = litter_in(target) - {"model.safetensors"} if found is None else litter_in(target)
    return found, ", ".join(sorted(litter))


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Lays disks out in memory where there is a place for it."""
    shm = Path("/dev/shm")
    scratch = (shm if os.access(shm, os.W_OK) else Path("/tmp")) / f"shardsave-power-{os.getpid()}"
    scratch.mkdir()
    yield Judge(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


Record = Callable[..., Path]


@pytest.fixture(scope="module", params=ENGINES)
def record(beneath: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Record:
    """``record(name)`` makes a recording of ``faults.recordings``, once for each variant, and returns its folder."""
    recordings: dict[tuple[str, str, str], Path] = {}

    def make(name: str, kind: str = "plain", variant: str = "") -> Path:
        if (name, kind, variant) not in recordings:
            folder = tmp_path_factory.mktemp(f"{name}-{request.param}")
            arguments = ["-m", "faults.recordings", name, str(folder)]
            run_beneath(beneath, request.param, arguments, kind=kind)
            recordings[name, kind, variant] = folder / "recording"
        return recordings[name, kind, variant]

    return make


def phases_of(recording: Path) -> Phases:
    return [read_record(path) for path in sorted(recording.glob("phase-?"))]


#: The commit is the same whatever the engine.
one_engine = pytest.mark.parametrize("record", ENGINES[:1], indirect=True)

#: Of these, `make soak` tries both engines: they differ in how a shard is written, which other tests see.
one_in_short = pytest.mark.parametrize("record", ENGINES[: 2 if SAMPLES > 12 else 1], indirect=True)


def test_first_save(record: Record, judge: Judge) -> None:
    """Catches a first save that a loss of power leaves half done, or that is not durable once it has returned."""
    recording = record("first")
    assert not judge.violations(recording / "watched", phases_of(recording), [{None, 1}], {1})


def test_overwrite(record: Record, judge: Judge) -> None:
    """Catches an overwrite in which a loss of power destroys the old checkpoint before the new one is durable."""
    recording = record("overwrite")
    before = judge.disks
    assert not judge.violations(recording / "watched", phases_of(recording), [(), {1, 2}], {2})
    assert judge.disks > before + 100


@one_in_short
def test_first_save_with_a_config(record: Record, judge: Judge) -> None:
    """Catches a first save that is in place without its config."""
    recording = record("first", kind="config")
    assert not judge.violations(recording / "watched", phases_of(recording), [{None, 1}], {1})


@one_in_short
def test_overwrite_with_another_config(record: Record, judge: Judge) -> None:
    """Catches the old weights beside the new config; half a config; and weights and config of two saves that no note reports."""
    recording = record("overwrite", kind="config")
    during = {1, 2, "2 with config.json of 1"}
    assert not judge.violations(recording / "watched", phases_of(recording), [(), during], {2})


@one_engine
def test_first_save_with_a_training_state(record: Record, judge: Judge) -> None:
    """Catches a first save that is in place without its training state, or with half of it."""
    recording = record("first", kind="training")
    assert not judge.violations(recording / "watched", phases_of(recording), [{None, 1}], {1})


@one_engine
def test_overwrite_that_takes_over_a_shard(record: Record, judge: Judge) -> None:
    """Catches a shard that both checkpoints have, and that a loss of power takes from one of them."""
    recording = record("overwrite", kind="reuse")
    old, new = phases_of(recording)
    assert len(places(new, "linkat", lambda call: is_shard(call) and call.path.parent.name == "ckpt")) == 1
    assert not judge.violations(recording / "watched", [old, new], [(), {1, 2}], {2})


@one_engine
@pytest.mark.parametrize("clones", ["", "1"])
def test_a_shard_of_a_checkpoint_beside_it(record: Record, judge: Judge, clones: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint that a loss of power damages once that one is removed from which it took a shard; with links and with clones."""
    if clones:
        monkeypatch.setenv("SHARDSAVE_FAULTS_CLONES", clones)
    recording = record("next_step", "reuse-step", clones)
    earlier, new, removal = phases_of(recording)
    taken = places(new, "ioctl", is_shard) if clones else places(new, "linkat", lambda call: call.path.parent.name == "earlier")
    assert len(taken) == 1 and new[taken[0]].result == 0
    assert not judge.violations(recording / "watched", [earlier, new, removal], [(), {None, 2}, {2}], {2})


@one_engine
@pytest.mark.parametrize("kind", ["training", "training-new", "training-gone"])
def test_overwrite_with_and_without_a_training_state(record: Record, judge: Judge, kind: str) -> None:
    """Catches a model and a training state of two saves, and a directory that stays for good."""
    recording = record("overwrite", kind=kind)
    assert not judge.violations(recording / "watched", phases_of(recording), [(), {1, 2}], {2})


@one_in_short
def test_config_of_a_killed_saver(record: Record, judge: Judge) -> None:
    """Catches a dead saver's config that the next save loses before that config, or its own, is in place."""
    recordings = [r for r in sorted(record("killed_before_the_config", kind="config").iterdir()) if r.name != "trial"]
    assert len(recordings) >= 6
    for recording in recordings:
        if recording.name.endswith("saved"):
            allowed: set[object] = {1, 2, 3, "2 with config.json of 1", "3 with config.json of 2"}
            end = {3}
        else:
            allowed, end = {1, 2, "2 with config.json of 1"}, {2}
        assert not judge.violations(recording / "watched", phases_of(recording), [(), (), allowed], end), recording.name


@one_in_short
def test_in_place_of_a_lone_file(record: Record, judge: Judge) -> None:
    """Catches a lone file that is removed before the commit that replaces it is durable."""
    recording = record("lone")
    assert not judge.violations(recording / "watched", phases_of(recording), [(), {1, 2}], {2})


@one_in_short
def test_in_a_directory_that_someone_else_made(record: Record, judge: Judge) -> None:
    """Catches a durable checkpoint in a directory whose own name is not durable."""
    recording = record("made_by_others")
    assert not judge.violations(recording / "watched", phases_of(recording), [(), (), ()], {2})


@one_in_short
def test_what_was_visible_is_intact(record: Record, judge: Judge) -> None:
    """Catches a save that says "the previous checkpoint is intact" although a loss of power may still undo that one."""
    recording = record("killed_then_no_room")
    assert not judge.violations(recording / "watched", phases_of(recording), [(), {1, 2}, {1, 2}], {2})


@one_in_short
def test_after_a_killed_saver(record: Record, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that relies on, or cleans up, files that a dead saver had not made durable."""
    monkeypatch.setenv("SHARDSAVE_POWER_STEP", os.environ.get("SHARDSAVE_POWER_STEP", "29"))
    for recording in sorted(record("killed_then_saved").iterdir()):
        assert not judge.violations(recording / "watched", phases_of(recording), [(), (), {1, 2, 3}], {3}), recording.name


def test_each_fsync_fails(record: Record, judge: Judge) -> None:
    """Catches a failed fsync that is reported as success, or after which something is removed."""
    outcomes = set()
    for recording in record("failed_fsyncs").iterdir():
        if recording.name == "trial":
            continue
        outcome = (recording / "outcome").read_text()
        outcomes.add(outcome)
        end = {2} if outcome == "success" else {1, 2}
        assert not judge.violations(recording / "watched", phases_of(recording), [(), {1, 2}], end), recording.name
    # Before the rename; after it; while cleaning up.
    assert outcomes == {"SaveNotCommittedError", "DurabilityUncertainError", "success"}


def is_shard(call: Recorded) -> bool:
    return call.path.name.endswith(".safetensors")


def is_target(call: Recorded) -> bool:
    return call.path.name == "ckpt"


def is_staging(call: Recorded) -> bool:
    return call.path.name.startswith(".shardsave-")


def places(phase: list[Recorded], call: str, which: Callable[[Recorded], bool]) -> list[int]:
    return [n for n, recorded in enumerate(phase) if recorded.call == call and which(recorded)]


def without(phase: list[Recorded], left_out: Collection[int]) -> list[Recorded]:
    assert left_out, "the step to remove is not there"
    return [call for n, call in enumerate(phase) if n not in set(left_out)]


def index_rename(phase: list[Recorded]) -> int:
    return places(phase, "renameat", lambda call: call.other.name.endswith(".index.json"))[0]


def target_syncs(phase: list[Recorded]) -> dict[str, int]:
    """The fsyncs of the checkpoint's directory, by the change that they make durable."""
    staging = places(phase, "mkdirat", is_staging)[0]
    first_move = places(phase, "linkat", is_shard)[0]
    syncs = places(phase, "fsync", is_target)
    return {
        "staging's name": min(n for n in syncs if n > staging),
        "moved shards": min(n for n in syncs if n > first_move),
        "renamed index": min(n for n in syncs if n > index_rename(phase)),
    }


def fsync_before_ftruncate(phase: list[Recorded]) -> list[Recorded]:
    calls = list(phase)
    for truncate in reversed(places(phase, "ftruncate", is_shard)):
        sync = next(n for n in places(phase, "fsync", is_shard) if n > truncate)
        calls.insert(sync, calls.pop(truncate))
    return calls


def index_before_shards(phase: list[Recorded]) -> list[Recorded]:
    """The index renamed, and the directory fsynced, before the shards are moved."""
    move, rename = places(phase, "linkat", is_shard)[0], index_rename(phase)
    sync = target_syncs(phase)["renamed index"]
    return [*phase[:move], *phase[rename : sync + 1], *phase[move:rename], *phase[sync + 1 :]]


def shards_before_list(phase: list[Recorded]) -> list[Recorded]:
    """The shards moved before what is staged is durable: the list of their names, and the staging directory."""
    moves = places(phase, "linkat", is_shard)
    staged = places(phase, "openat", lambda call: call.path.name == "names")[0]
    return [*phase[:staged], *phase[moves[0] : moves[-1] + 1], *phase[staged : moves[0]], *phase[moves[-1] + 1 :]]


REMOVALS: dict[str, Callable[[list[Recorded]], list[Recorded]]] = {
    "shard fsync": lambda phase: without(phase, places(phase, "fsync", is_shard)),
    "fsync of the list of names": lambda phase: without(phase, places(phase, "fsync", lambda call: call.path.name == "names")),
    "fsync of the staging directory": lambda phase: without(phase, places(phase, "fsync", is_staging)),
    "fsync after making the staging directory": lambda phase: without(phase, [target_syncs(phase)["staging's name"]]),
    "fsync after moving the shards": lambda phase: without(phase, [target_syncs(phase)["moved shards"]]),
    "fsync of the index": lambda phase: without(phase, places(phase, "fsync", lambda call: call.path.name == "index")),
    "no cleaning after a failed fsync": lambda phase: without(phase, [target_syncs(phase)["renamed index"]]),
    "ftruncate before fsync": fsync_before_ftruncate,
    "shards before index": index_before_shards,
    "list before shards": shards_before_list,
}


def places_of_config(phase: list[Recorded], call: str) -> list[int]:
    return places(phase, call, lambda recorded: CONFIG in (recorded.path.name, recorded.other.name))


CONFIG_REMOVALS: dict[str, Callable[[list[Recorded]], list[Recorded]]] = {
    "fsync of the staged config": lambda phase: without(phase, places_of_config(phase, "fsync")),
    "fsync between the renames of index and config": lambda phase: without(phase, [target_syncs(phase)["renamed index"]]),
    "fsyncs after the rename of the config": lambda phase: without(
        phase, [n for n in places(phase, "fsync", is_target) if n > places_of_config(phase, "renameat")[0]]
    ),
}


def is_in_training(call: Recorded) -> bool:
    return call.path.parent.name.startswith("training-")


def is_training(call: Recorded) -> bool:
    return call.path.name.startswith("training-")


TRAINING_REMOVALS: dict[str, Callable[[list[Recorded]], list[Recorded]]] = {
    "fsync of the tensors": lambda phase: without(
        phase, [n for n in places(phase, "fsync", is_in_training) if phase[n].path.suffix == ".tensors"]
    ),
    "fsync of the documents": lambda phase: without(
        phase, [n for n in places(phase, "fsync", is_in_training) if phase[n].path.suffix == ".json"]
    ),
    "fsync of the directory": lambda phase: without(phase, places(phase, "fsync", is_training)),
    "fsync after moving the directory": lambda phase: without(phase, [target_syncs(phase)["moved shards"]]),
}


def is_taken(call: Recorded, phase: list[Recorded]) -> bool:
    """Whether this is an fsync of the shard that was taken over: the only one that is synced and was not written."""
    written = {other.path for other in phase if other.call == "pwrite"}
    return call.call == "fsync" and is_shard(call) and call.path not in written


REUSE_REMOVALS: dict[str, Callable[[list[Recorded]], list[Recorded]]] = {
    "fsync after moving the shards": lambda phase: without(phase, [target_syncs(phase)["moved shards"]]),
    "fsync of the staging directory": lambda phase: without(phase, places(phase, "fsync", is_staging)),
}


@one_engine
@pytest.mark.parametrize("step", REUSE_REMOVALS)
def test_a_missing_step_for_a_link_is_noticed(record: Record, judge: Judge, step: str) -> None:
    """Catches a model that overlooks the lost name of a shard that was taken over."""
    recording = record("overwrite", kind="reuse")
    old, new = phases_of(recording)
    assert judge.notices(recording / "watched", [old, REUSE_REMOVALS[step](new)], [(), {1, 2}], {2})


@one_engine
def test_a_missing_fsync_of_a_shard_that_was_taken_over_is_noticed(
    record: Record, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that overlooks a clone whose bytes are lost, and a link to a file that nobody has made durable."""
    monkeypatch.setenv("SHARDSAVE_FAULTS_CLONES", "1")
    recording = record("next_step", "reuse-step", "1")
    earlier, new, removal = phases_of(recording)
    torn = without(new, [n for n, call in enumerate(new) if is_taken(call, new)])
    assert judge.notices(recording / "watched", [earlier, torn, removal], [(), {None, 2}, {2}], {2})


@one_engine
@pytest.mark.parametrize("step", TRAINING_REMOVALS)
def test_a_missing_step_for_the_training_state_is_noticed(record: Record, judge: Judge, step: str) -> None:
    """Catches a model that overlooks a torn training state, or one whose files or directory lose their names."""
    recording = record("overwrite", kind="training")
    old, new = phases_of(recording)
    assert judge.notices(recording / "watched", [old, TRAINING_REMOVALS[step](new)], [(), {1, 2}], {2})


@one_in_short
@pytest.mark.parametrize("step", CONFIG_REMOVALS)
def test_a_missing_step_for_the_config_is_noticed(record: Record, judge: Judge, step: str) -> None:
    """Catches a model that overlooks a torn config, the new config beside the old weights, or the old one that stays for good."""
    recording = record("overwrite", kind="config")
    old, new = phases_of(recording)
    during = {1, 2, "2 with config.json of 1"}
    assert judge.notices(recording / "watched", [old, CONFIG_REMOVALS[step](new)], [(), during], {2})


@pytest.mark.parametrize("step", REMOVALS)
def test_a_missing_step_is_noticed(record: Record, judge: Judge, step: str) -> None:
    """Catches a model that overlooks mistakes: without any one step of the protocol it must find a lost or torn checkpoint, or litter."""
    recording = record("overwrite")
    old, new = phases_of(recording)
    assert judge.notices(recording / "watched", [old, REMOVALS[step](new)], [(), {1, 2}], {2})


@one_in_short
def test_a_missing_fsync_of_the_parent_directory_is_noticed(record: Record, judge: Judge) -> None:
    """Catches a model that overlooks created directories whose names were never made durable in their parents."""
    recording = record("first")
    (phase,) = phases_of(recording)
    above = places(phase, "fsync", lambda call: call.path.name in ("runs", "watched"))
    assert len(above) == 2
    for left_out in above:
        assert judge.notices(recording / "watched", [without(phase, [left_out])], [{None, 1}], {1})


@one_in_short
def test_a_missing_fsync_at_the_lock_is_noticed(record: Record, judge: Judge) -> None:
    """Catches a model that overlooks a checkpoint called intact that is visible but not durable."""
    recording = record("killed_then_no_room")
    old, killed, no_room = phases_of(recording)
    without_sync = without(no_room, places(no_room, "fsync", is_target))
    assert judge.notices(recording / "watched", [old, killed, without_sync], [(), {1, 2}, {1, 2}], {2})
