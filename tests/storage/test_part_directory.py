"""The directory of a training state: written, committed, read, replaced and cleaned as one part of its checkpoint."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

import shardsave
from faults.dying import killed
from faults.running import run_beneath
from faults.savers import litter_in, state
from shardsave._common.progress import Progress
from shardsave._loading.read import TensorReader
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave._storage.second_opinion import SecondOpinion
from shardsave._storage.transaction import Transaction
from support import forked
from training_state import (
    INDEX,
    names_of_training,
    save_with_training,
    training_directory,
    training_generation,
    training_tensors,
)

FILES = ["index.json", "rank-00000-00001.tensors", "rank-00000-00002.tensors", "rank-00000.json"]


def save_without(folder: Path) -> shardsave.SaveReport:
    return shardsave.save(state(5), folder, durable=False)


def die_with_a_directory_in_place(folder: Path) -> None:
    """Dies when the directory has its final name, and the index does not name it yet."""
    Transaction._publish = lambda *ignored: os.kill(os.getpid(), 9)  # type: ignore[method-assign]
    save_with_training(state(2), folder, 2, durable=False)


def die_while_writing(folder: Path) -> None:
    Transaction._move_all = lambda *ignored: os.kill(os.getpid(), 9)  # type: ignore[method-assign]
    save_with_training(state(2), folder, 2, durable=False)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Catches a tensor, a document or a file that is lost or changed on the way, and a directory that no other reader may meet."""
    report = save_with_training(state(1), tmp_path, 1)
    assert report.removed == () and report.leftovers == () and report.tensors == 4
    assert sorted(os.listdir(training_directory(tmp_path))) == FILES and training_generation(tmp_path) == 1
    assert not litter_in(tmp_path)
    record = json.loads((tmp_path / INDEX).read_bytes())["shardsave"]
    assert record["requires"] == ["part directories"] and record["version"] == 2
    assert all(name.startswith("model-") for name in record["shards"])
    with open_checkpoint(tmp_path, parts=["training state"]) as checkpoint:
        assert checkpoint.training is not None
        document = json.loads(next(tmp_path.glob("training-*/index.json")).read_bytes())
        assert [document[name] for name in ("format", "version", "requires", "ranks")] == ["shardsave-training", 1, [], 1]
        assert document["files"].keys() == {*FILES[1:]}
        assert document["shared"] == {"dict": {"generation": 1, "nan": {"float": "nan"}}}
        assert set(checkpoint.training.tensors) == set(training_tensors(1))
    assert all(torch.equal(tensor, state(1)[name]) for name, tensor in shardsave.load(tmp_path).items())


def test_an_overwrite_takes_the_old_directory_away(tmp_path: Path) -> None:
    """Catches a directory that outlives its checkpoint, or a file of it that the report does not name."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    old = training_directory(tmp_path)
    report = save_with_training(state(2), tmp_path, 2, durable=False)
    assert not old.exists() and training_generation(tmp_path) == 2 and not litter_in(tmp_path)
    assert {name for name in report.removed if "/" in name} == {f"{old.name}/{name}" for name in FILES}
    report = save_without(tmp_path)
    assert report.leftovers == () and training_generation(tmp_path) is None and not litter_in(tmp_path)
    assert json.loads((tmp_path / INDEX).read_bytes())["shardsave"]["requires"] == []
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


READS = """
import sys, shardsave
from pathlib import Path
from faults.beneath import read_record, recorded
from faults.savers import state
from shardsave._common.progress import Progress
from shardsave._loading.read import TensorReader
from shardsave._storage.open_checkpoint import open_checkpoint
from training_state import save_with_training

folder = Path(sys.argv[1])
model = {name: tensor.clone() for name, tensor in state(1).items()}
save_with_training(state(1), folder / "ckpt", 1, durable=False)
shardsave.load(folder / "ckpt")

def calls(action, name):
    with recorded(folder / "ckpt", folder / name):
        action()
    return [one.path.name for one in read_record(folder / name) if "training-" in str(one.path)]

assert not calls(lambda: shardsave.load(folder / "ckpt"), "load")
assert not calls(lambda: shardsave.load(folder / "ckpt", mmap=True), "mapped")
assert not calls(lambda: shardsave.load(folder / "ckpt", names=["t1"], verify=False), "one")
assert not calls(lambda: shardsave.open(folder / "ckpt").close(), "open")
assert calls(lambda: open_checkpoint(folder / "ckpt", parts=["training state"]).close(), "training")
"""


@pytest.mark.slow
def test_a_load_of_the_model_reads_no_training_state(beneath: Path, tmp_path: Path) -> None:
    """Catches a load of weights alone that opens, reads or asks about a file of the training state."""
    run_beneath(beneath, "native", ["-c", READS, str(tmp_path)])


@pytest.mark.parametrize("dying", [die_while_writing, die_with_a_directory_in_place])
@pytest.mark.parametrize("is_first", [True, False])
def test_after_a_killed_saver(tmp_path: Path, dying: object, is_first: bool) -> None:
    """Catches a directory that a dead saver left, staged or in place, and that the next save, or `clean`, does not remove or list."""
    if not is_first:
        save_with_training(state(1), tmp_path, 1, durable=False)
    killed(tmp_path, dying)  # type: ignore[arg-type]
    (leaving,) = shardsave.clean(tmp_path, remove=False).found
    assert {Path(file).name for file in leaving.files} >= {*FILES} and leaving.bytes >= 14_000
    before = {file: (tmp_path / file).exists() for file in leaving.files}
    assert all(before.values()), before
    report = shardsave.clean(tmp_path)
    assert report.removed == (leaving.name,) and not any((tmp_path / file).exists() for file in leaving.files)
    assert os.listdir(tmp_path) == [] if is_first else not litter_in(tmp_path)
    killed(tmp_path, dying)  # type: ignore[arg-type]
    after = save_with_training(state(3), tmp_path, 3, durable=False)
    assert after.leftovers == () and training_generation(tmp_path) == 3 and not litter_in(tmp_path)
    assert not is_first or any(name.count("/") == 2 or name.startswith("training-") for name in after.removed)


def test_foreign_files_in_the_directory_stay_and_are_named(tmp_path: Path) -> None:
    """Catches a removal of what no save made, one that follows a link, and one for which a staging directory stays for good."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    folder = training_directory(tmp_path)
    (folder / "notes.txt").write_text("keep")
    (folder / "rank-00007.json").symlink_to(folder / "notes.txt")
    (folder / "rank-00008.json").mkdir()
    report = save_without(tmp_path)
    assert sorted(report.leftovers) == [f"{folder.name}/notes.txt", f"{folder.name}/rank-00008.json"]
    assert sorted(os.listdir(folder)) == ["notes.txt", "rank-00008.json"] and (folder / "notes.txt").read_text() == "keep"
    assert f"could not remove {folder.name}/notes.txt" in str(report)
    assert not list(tmp_path.glob(".shardsave-*"))
    assert save_without(tmp_path).leftovers == () and (folder / "notes.txt").exists()


def test_a_link_in_the_place_of_the_directory(tmp_path: Path) -> None:
    """Catches a link that is not followed for reading, and one that is followed for removal."""
    folder, elsewhere = tmp_path / "ckpt", tmp_path / "elsewhere"
    save_with_training(state(1), folder, 1, durable=False)
    training = training_directory(folder)
    training.rename(elsewhere)
    training.symlink_to(elsewhere)
    assert training_generation(folder) == 1 and shardsave.verify(folder).verified
    report = save_without(folder)
    assert not training.is_symlink() and sorted(os.listdir(elsewhere)) == FILES and report.leftovers == ()
    assert training.name in report.removed and "symbolic links were removed or replaced" in str(report)


def test_links_in_the_place_of_files(tmp_path: Path) -> None:
    """Catches a link in the directory that is not followed for reading, or whose target is removed."""
    folder, elsewhere = tmp_path / "ckpt", tmp_path / "elsewhere"
    save_with_training(state(1), folder, 1, durable=False)
    elsewhere.mkdir()
    for path in training_directory(folder).iterdir():
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    assert training_generation(folder) == 1
    assert save_without(folder).leftovers == () and sorted(os.listdir(elsewhere)) == FILES and not litter_in(folder)


@pytest.mark.parametrize("name", ["training-0123ABCD", "training-0123abcde", "optimizer-0123abcd", "training-0123abcd\n"])
def test_only_names_of_ours_are_removed(tmp_path: Path, name: str) -> None:
    """Catches a directory that is removed because a dead saver's list names it, although no save gives such a name."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    killed(tmp_path, die_with_a_directory_in_place)
    (staging,) = tmp_path.glob(".shardsave-*")
    listed = json.loads((staging / "names").read_text())
    assert (
        sum(name.endswith("/") and name.startswith("training-") for name in listed) == 2
    )  # as FORMAT.md says: the old and the new one
    (staging / "names").write_text(json.dumps([*listed, name]))
    (tmp_path / name).mkdir()
    (tmp_path / name / "index.json").write_text("keep")
    report = save_without(tmp_path)
    assert (tmp_path / name / "index.json").read_text() == "keep" and report.leftovers == ()


def test_a_file_in_the_place_of_a_directory_stays(tmp_path: Path) -> None:
    """Catches the removal of a file that no save can have made under the name of a directory."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    folder = training_directory(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("keep")
    save_without(tmp_path)
    assert folder.read_text() == "keep"


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    """Catches a rename that replaces an empty directory which someone else made during the save."""
    made: list[Path] = []
    move = Transaction._move_all

    def meanwhile(self: Transaction) -> None:
        made.extend(tmp_path / name for name in self._names.chosen if name.startswith("training-"))
        made[0].mkdir()
        move(self)

    Transaction._move_all = meanwhile  # type: ignore[method-assign]
    try:
        with pytest.raises(shardsave.DirectoryBusyError, match=r"training-\w{8} was expected to be free"):
            save_with_training(state(1), tmp_path, 1, durable=False)
    finally:
        Transaction._move_all = move  # type: ignore[method-assign]
    assert os.listdir(tmp_path) == [made[0].name] and os.listdir(made[0]) == []


def test_space_for_the_training_state_is_counted(tmp_path: Path) -> None:
    """Catches a save that starts although the training state cannot fit: it claims a size that no disk has, and holds one element."""
    huge = {"m": torch.zeros(1).expand(1 << 45)}
    with pytest.raises(shardsave.OutOfSpaceError, match=r"needs 140\.7 TB, .* free; nothing was committed"):
        save_with_training(state(1), tmp_path, 1, tensors=huge)
    assert os.listdir(tmp_path) == []


def test_space_is_freed_behind_the_return(tmp_path: Path) -> None:
    """Catches a save that waits until the files of the replaced training state are freed."""
    from shardsave._storage import freeing

    save_with_training(state(1), tmp_path, 1, durable=False)
    held: list[int] = []
    free = freeing._free
    try:
        freeing._free = lambda files: (held.append(len(files)), free(files))  # type: ignore[assignment]
        save_without(tmp_path).wait_cleaned(10)
    finally:
        freeing._free = free
    assert held == [len(FILES) + 2]


def test_documents_that_nobody_could_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training state that is written although its document is longer than a reader accepts."""
    monkeypatch.setattr("shardsave._saving.contents.MAX_HEADER_BYTES", 300)
    message = "cannot save the training state: at most 300 bytes were expected, since no more can be loaded, it has .*; nothing was written"
    with pytest.raises(shardsave.UnsupportedModuleError, match=message):
        save_with_training(state(1), tmp_path / "ckpt", 1)
    assert not (tmp_path / "ckpt").exists()


def test_verify_asks_for_a_second_opinion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a header of a training state that safetensors' own parser is not asked about."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    asked: list[str] = []
    monkeypatch.setattr(SecondOpinion, "check", lambda self, raw, length, header, file: asked.append(file))
    shardsave.verify(tmp_path)
    assert {f"{training_directory(tmp_path).name}/{name}" for name in FILES if name.endswith(".tensors")} < {*asked}


def modes(folder: Path) -> tuple[int, set[int]]:
    files = {stat.S_IMODE(path.stat().st_mode) for path in training_directory(folder).iterdir()}
    return stat.S_IMODE(training_directory(folder).stat().st_mode), files


def test_permissions(tmp_path: Path) -> None:
    """Catches a training state that more people may read than the weights, or the training state, that it replaces."""
    before = os.umask(0o022)
    try:
        save_with_training(state(1), tmp_path, 1, durable=False)
        assert modes(tmp_path) == (0o755, {0o644})
        for path in training_directory(tmp_path).iterdir():
            path.chmod(0o600)
        training_directory(tmp_path).chmod(0o700)
        save_with_training(state(2), tmp_path, 2, durable=False)
        assert modes(tmp_path) == (0o700, {0o600})
        save_without(tmp_path)
        for path in tmp_path.glob("model*"):
            path.chmod(0o640)
        save_with_training(state(3), tmp_path, 3, durable=False)
        assert modes(tmp_path) == (0o750, {0o640})
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_in_a_directory_to_which_everybody_may_write(tmp_path: Path, mode: int) -> None:
    """Catches a training state that others may change, one that stays although it is ours, and one that goes although it is not."""
    tmp_path.chmod(mode)
    before = os.umask(0)
    try:
        save_with_training(state(1), tmp_path, 1, durable=False)
        assert modes(tmp_path)[0] == 0o755
        save_with_training(state(2), tmp_path, 2, durable=False)
        assert training_generation(tmp_path) == 2 and not litter_in(tmp_path)
    finally:
        os.umask(before)
    killed(tmp_path, die_with_a_directory_in_place)
    assert save_without(tmp_path).leftovers == () and not litter_in(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
def test_files_of_another_user_in_a_shared_directory(tmp_path: Path) -> None:
    """Catches a save that removes what another user put into the directory of a training state, or that user's own directory."""
    tmp_path.chmod(0o777)
    save_with_training(state(1), tmp_path, 1, durable=False)
    folder = training_directory(tmp_path)
    os.chown(folder / "rank-00000.json", 4321, -1)
    report = save_with_training(state(2), tmp_path, 2, durable=False)
    assert report.leftovers == (f"{folder.name}/rank-00000.json",) and os.listdir(folder) == ["rank-00000.json"]
    folder = training_directory(tmp_path)
    os.chown(folder, 4321, -1)
    report = save_without(tmp_path)
    assert sorted(os.listdir(folder)) == FILES and any(folder.name in note for note in report.notes)


def test_files_of_a_training_state_are_listed_by_nobody_else(tmp_path: Path) -> None:
    """Catches a checkpoint that counts files of its training state among the shards, where other libraries would read them."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    assert not any("training" in shard for shard in shardsave.inspect(tmp_path).shards)
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.glob("*.safetensors"))
    assert len(names_of_training(tmp_path)) == len(FILES)


@pytest.mark.parametrize("allowance", [1, 2])
def test_more_files_than_may_be_open(tmp_path: Path, allowance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files of a training state that are all kept open, however many they are."""
    save_with_training(state(1), tmp_path, 1, durable=False)
    monkeypatch.setattr("shardsave._storage.shard_files.descriptor_allowance", lambda: allowance)
    assert training_generation(tmp_path) == 1 and shardsave.verify(tmp_path).verified
    before = len(os.listdir("/proc/self/fd"))
    assert os.waitpid(forked(lambda: shardsave.verify(tmp_path)), 0)[1] == 0
    assert len(os.listdir("/proc/self/fd")) == before


def generations(folder: Path) -> tuple[int, int | None]:
    """The generations of the weights and of the training state, from one look at the checkpoint."""
    with open_checkpoint(folder, parts=["training state"]) as checkpoint:
        training = checkpoint.training
        located = [checkpoint.tensors["t0"], *(training.tensors.values() if training is not None else ())]
        loaded = [torch.empty(t.shape) for t in located]
        with Progress(False, "loading", 0) as progress:
            TensorReader(checkpoint, verify=True, progress=progress).read([*zip(located, loaded)])
        values = {float(value) for tensor in loaded[1:] for value in tensor}
        assert len(values) == (training is not None)
        if training is not None:
            assert training.shared["dict"]["generation"] == min(values)
    return int(loaded[0][0]), int(min(values)) if values else None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_savers_and_readers_at_once(tmp_path: Path) -> None:
    """Catches a reader that gets the model of one save with the training state of another, or an error because a save came between."""

    def save_some(number: int) -> None:
        for generation in range(10 * number, 10 * number + 6):
            if generation % 3:
                save_with_training(state(generation), tmp_path, generation, durable=False)
            else:
                shardsave.save(state(generation), tmp_path, durable=False)

    save_some(9)
    children = {forked(lambda number=number: save_some(number)) for number in (1, 2, 3)}  # type: ignore[misc]
    alive, seen = set(children), set()
    while alive:
        weights, trained = generations(tmp_path)
        assert trained == (weights if weights % 3 else None)
        seen.add(weights)
        alive -= {child for child in alive if os.waitpid(child, os.WNOHANG)[0]}
    assert len(seen) > 2 and not litter_in(tmp_path)
