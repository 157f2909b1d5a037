"""Frozen weights are written once: which shards a save takes over from an earlier checkpoint, and what both checkpoints are afterwards.

Method: layers of one shard each are saved, some are changed, and the next checkpoint is compared: its bytes with the model, its files
with those of the earlier one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from faults.savers import litter_in
from shardsave._saving import reuse, write
from shardsave._storage.directory import Directory
from shardsave._storage.transaction import Transaction
from support import same_state

INDEX = "model.safetensors.index.json"

#: The bytes of tensors in a layer of `layers`, which has a shard of its own.
LAYER = 4 * (40 * 40 + 40)


def layers(count: int = 5, trainable: int = 1) -> nn.Sequential:
    """Equal layers, of which only the last ``trainable`` are not frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(count)))
    for layer in model[: count - trainable]:
        layer.requires_grad_(False)
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> shardsave.SaveReport:
    return shardsave.save(model, folder, progress=False, **{"max_shard_size": LAYER, **options})


@torch.no_grad()
def change(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.add_(1)


def shards(folder: Path) -> dict[str, Path]:
    """The first name in each shard → the shard."""
    info = shardsave.inspect(folder)
    return {info.tensors[name].shard: folder / info.tensors[name].shard for name in info.tensors}


def inodes(folder: Path) -> dict[str, int]:
    """Name of a tensor → the inode that holds it."""
    info = shardsave.inspect(folder)
    return {name: (folder / tensor.shard).stat().st_ino for name, tensor in info.tensors.items()}


def is_saved(model: nn.Sequential, folder: Path) -> bool:
    """Whether ``folder`` has the model bit for bit, with its flags, and no other file."""
    loaded = layers(len(model))
    shardsave.load_model(loaded, folder)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert not litter_in(folder) and shardsave.verify(folder).verified
    return same_state(model, loaded) and [parameter.requires_grad for parameter in loaded.parameters()] == flags


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[nn.Sequential, Path]:
    """A model, and the directory in which it was saved."""
    model = layers()
    save(model, tmp_path / "earlier")
    return model, tmp_path / "earlier"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_a_changed_shard_is_written(earlier: tuple[nn.Sequential, Path], tmp_path: Path, elsewhere: bool) -> None:
    """Catches frozen shards that are written again, a changed one that is not, and an earlier checkpoint that is not what it was."""
    model, folder = earlier
    before, old = inodes(folder), {path.name: path.read_bytes() for path in folder.iterdir()}
    change(model[4])
    target = tmp_path / "next" if elsewhere else folder
    report = save(model, target, **({"reuse": folder} if elsewhere else {}))
    assert (report.bytes_written, report.bytes_reused, len(report.reused)) == (LAYER, 4 * LAYER, 4)
    assert "6.6 kB written, 26.2 kB in 4 unchanged shards taken over from disk" in str(report)
    after = inodes(target)
    assert [name for name in before if before[name] != after[name]] == ["4.weight", "4.bias"]
    assert is_saved(model, target) and set(report.reused) == set(shardsave.inspect(target).shared)
    if elsewhere:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
        for path in folder.iterdir():
            path.unlink()
        assert is_saved(model, target)


def test_what_is_written_is_what_a_whole_save_writes(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches a shard that was taken over and differs from the one that would have been written."""
    model, folder = earlier
    save(model, tmp_path / "taken", reuse=folder)
    save(model, tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "taken" / path.name).read_bytes() == path.read_bytes()


def test_without_reuse(earlier: tuple[nn.Sequential, Path]) -> None:
    """Catches reuse=False that takes something over, and an index that says so."""
    model, folder = earlier
    before = inodes(folder)
    report = save(model, folder, reuse=False)
    assert (report.bytes_written, report.bytes_reused, report.reused) == (5 * LAYER, 0, ())
    assert not set(before.values()) & set(inodes(folder).values()) and b'"shared"' not in (folder / INDEX).read_bytes()


def test_a_flag_rewrites_nothing(earlier: tuple[nn.Sequential, Path]) -> None:
    """Catches a shard that is written again because a flag changed, and a flag that is not saved because its shard was not."""
    model, folder = earlier
    model[0].requires_grad_(True)
    model[4].bias.requires_grad_(False)
    report = save(model, folder)
    assert report.bytes_written == 0 and is_saved(model, folder)


def test_thawed_layers_of_one_shard(tmp_path: Path) -> None:
    """Catches a thawed layer whose neighbours in its shard are written with every save from then on."""
    model = layers(6, trainable=0)
    save(model, tmp_path, max_shard_size=2 * LAYER)
    written = []
    for thawed in (2, 2, 3):
        model[thawed].requires_grad_(True)
        change(model[thawed])
        written.append(save(model, tmp_path, max_shard_size=2 * LAYER).bytes_written)
        assert is_saved(model, tmp_path)
    assert written == [2 * LAYER, LAYER, LAYER]


@pytest.mark.parametrize("name", ["4.bias", "4.weight", "1.bias", "1.weight"])
def test_one_changed_element(earlier: tuple[nn.Sequential, Path], name: str) -> None:
    """Catches a comparison that ends before the tensor that differs, small or large, frozen or trainable."""
    model, folder = earlier
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1
    assert save(model, folder).bytes_written == LAYER and is_saved(model, folder)


def test_tensors_that_came_went_or_became_others(tmp_path: Path) -> None:
    """Catches a shard that is taken over although one of its tensors has another name, dtype or shape now, or does not exist any more."""
    state = {name: torch.arange(1000.0) for name in ("same", "cast", "cut", "gone", "renamed")}
    shardsave.save(state, tmp_path, max_shard_size=4000)
    new = {
        "same": state["same"],
        "cast": state["cast"].view(torch.int32),
        "cut": state["cut"].reshape(10, 100),
        "other": state["renamed"],
    }
    report = shardsave.save(new, tmp_path, max_shard_size=4000)
    assert (report.bytes_written, report.bytes_reused) == (12000, 4000)
    loaded = shardsave.load(tmp_path)
    assert loaded.keys() == new.keys() and all(torch.equal(loaded[name], new[name]) for name in new)


def test_smaller_shards(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches shards that stay larger than the caller wants them now."""
    model, folder = earlier
    save(model, tmp_path / "large", max_shard_size="1GB")
    assert save(model, tmp_path / "large").bytes_reused == LAYER  # that of the trainable layer is small enough
    assert save(model, folder, max_shard_size="1GB").bytes_written == 0  # they may stay smaller


def test_what_cannot_be_taken_over(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches shards of a checkpoint that may not survive a loss of power, symbolic links, what others saved; and silence about it."""
    model, folder = earlier
    save(model, tmp_path / "fast", durable=False)
    (tmp_path / "linked").mkdir()
    for path in folder.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    for name in shards(folder):
        (tmp_path / "fast" / name).touch()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / INDEX).write_bytes((folder / INDEX).read_bytes())
    for path in folder.glob("*.safetensors"):
        (tmp_path / "hub" / path.name).symlink_to(path)
    reasons = {
        "fast": "it was saved with durable=False",
        "linked": "open of model.safetensors.index.json: a regular file was expected, it is a link",
        "missing": "open: No such file or directory",
        "": f"there is no {INDEX}",
        "hub": None,
    }
    for name, reason in reasons.items():
        report = save(model, tmp_path / "target", reuse=tmp_path / name if name else tmp_path)
        assert report.bytes_reused == 0
        if reason is not None:
            assert report.notes == (f"no shard of {tmp_path / name if name else tmp_path} was taken over: {reason}",)
    assert save(model, tmp_path / "target", durable=False).bytes_reused == 5 * LAYER
    assert save(model, tmp_path / "target", durable=False).bytes_reused == 0


def test_another_file_system(earlier: tuple[nn.Sequential, Path], memory: Path) -> None:
    """Catches a save that fails, or that compares and reads in vain, because no link leads to another file system."""
    model, folder = earlier
    if memory.stat().st_dev == folder.stat().st_dev:
        pytest.skip("there is no other file system")
    report = save(model, memory / "next", reuse=folder)
    assert report.bytes_reused == 0 and report.notes == (f"no shard of {folder} was taken over: it is on another file system",)
    assert is_saved(model, memory / "next")


def test_wrong_arguments(tmp_path: Path) -> None:
    """Catches a wrong value that shows only after the tensors were read, or never."""
    for options, error in (
        ({"reuse": True}, "reuse must be the path of a checkpoint, None or False, not True"),
        ({"reuse": 3}, "the path of a checkpoint must be a string"),
        ({"recheck_every": 0}, "recheck_every must be at least 1, not 0"),
        ({"recheck_every": 1.5}, "recheck_every must be a number of saves, not float"),
        ({"assume_frozen_unchanged": 1}, "assume_frozen_unchanged must be True or False, not 1"),
    ):
        for verb in (shardsave.save, shardsave.plan_save):
            with pytest.raises((TypeError, ValueError), match=error):
                verb({"x": torch.ones(1)}, tmp_path / "x", **options)  # type: ignore[operator]
    assert not (tmp_path / "x").exists()


def forget() -> None:
    """Lets the next save be the first that takes a shard over."""
    reuse._taken.clear()


def flip(path: Path) -> None:
    """Changes the last byte of a file, as a failing disk does: its size and time stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_rotten_shard_is_written_anew(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches damage on the disk that one checkpoint after the other takes over, and that nobody is told of."""
    model, folder = earlier
    forget()
    rotten = shardsave.inspect(folder).tensors["0.weight"].shard
    flip(folder / rotten)
    report = save(model, tmp_path / "next", reuse=folder)
    assert report.bytes_written == LAYER and is_saved(model, tmp_path / "next")
    (note,) = report.notes
    assert note.startswith(f"{rotten} of {folder} is damaged, it was written anew: tensor '0.bias' has checksum ")


def test_a_shard_is_read_back_from_time_to_time(earlier: tuple[nn.Sequential, Path]) -> None:
    """Catches a shard that is read back only once, or with every save."""
    model, folder = earlier
    forget()
    save(model, folder, recheck_every=3)
    rotten = shards(folder)[shardsave.inspect(folder).tensors["0.weight"].shard]
    flip(rotten)
    assert [save(model, folder, recheck_every=3).bytes_written for _ in range(4)] == [0, 0, LAYER, 0]
    assert is_saved(model, folder)


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 100), lambda path: path.write_text("x")]
)
def test_a_shard_that_is_not_as_its_index_says(
    earlier: tuple[nn.Sequential, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """Catches a save that fails because of a damaged earlier checkpoint, takes the damage over, or does not name it."""
    model, folder = earlier
    bad = shardsave.inspect(folder).tensors["0.weight"].shard
    damage(folder / bad)
    report = save(model, tmp_path / "next", reuse=folder)
    assert report.bytes_written == LAYER and is_saved(model, tmp_path / "next")
    assert len(report.notes) == 1 and bad in report.notes[0] and report.notes[0].endswith("was written anew")


def test_an_earlier_checkpoint_that_is_removed_meanwhile(
    earlier: tuple[nn.Sequential, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a save that fails because its earlier checkpoint goes, or takes over another file that has its name by then."""
    model, folder = earlier
    take = Transaction.take_over

    def replace_first(transaction: Transaction, name: str, *rest: Any) -> Any:
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            path.unlink()
            if "00002" in path.name:
                path.write_bytes(bytes(len(content)))
        return take(transaction, name, *rest)

    monkeypatch.setattr(Transaction, "take_over", replace_first)
    report = save(model, tmp_path / "next", reuse=folder)
    assert report.bytes_reused == 0 and is_saved(model, tmp_path / "next")


def test_a_file_is_synced_once(earlier: tuple[nn.Sequential, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a shard that is taken over without ever being made durable by this process, or that is not synced again though somebody has
    written to it; and one that is synced with every save, which waits for the disk each time."""
    model, folder = earlier
    synced: list[str] = []
    sync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)

    def files_synced(target: str, **options: Any) -> list[str]:
        synced.clear()
        assert save(model, tmp_path / target, reuse=folder, **options).bytes_written == 0
        return sorted({path for path in synced if path.endswith(".safetensors")})

    files = sorted(map(str, folder.glob("*.safetensors")))
    assert files_synced("fast", durable=False) == [] and files_synced("1") == files and files_synced("2") == []
    os.utime(files[0])
    assert files_synced("3") == files[:1] and files_synced("4") == []


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_survive(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches a checkpoint whose files become readable for others, or for fewer, because another one takes them over."""
    model, folder = earlier
    for path in folder.iterdir():
        path.chmod(0o640)
    assert save(model, folder).bytes_written == 0
    assert {mode_of(path) for path in folder.iterdir()} == {0o640}
    assert save(model, tmp_path / "next", reuse=folder).bytes_reused == 0  # they would not be those of a new file
    assert {mode_of(path) for path in folder.iterdir()} == {0o640}
    assert {mode_of(path) for path in (tmp_path / "next").glob("*.safetensors")} == {0o644}


@pytest.mark.skipif(os.geteuid() != 0, reason="files of several users are needed")
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_files_of_another_user(earlier: tuple[nn.Sequential, Path], tmp_path: Path, mode: int) -> None:
    """Catches a link to a file that another user may change whenever he likes, and one made because another user's index says so."""
    model, folder = earlier
    folder.chmod(mode)
    theirs = shards(folder)[shardsave.inspect(folder).tensors["0.weight"].shard]
    os.chown(theirs, 54322, 54322)
    (folder / INDEX).chmod(0o644)
    report = save(model, tmp_path / "next", reuse=folder)
    assert report.bytes_written == LAYER and is_saved(model, tmp_path / "next")
    os.chown(folder / INDEX, 54322, 54322)
    report = save(model, tmp_path / "third", reuse=folder)
    assert report.bytes_reused == (0 if mode & 0o002 else 4 * LAYER)


def test_no_file_system_with_links(
    earlier: tuple[nn.Sequential, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a save that needs hard links."""
    model, folder = earlier

    def refuse(self: Directory, name: str, into: Directory, new_name: str) -> None:
        raise shardsave._storage.directory.CallFailed("link", name, 1, "Operation not permitted")  # type: ignore[attr-defined]

    monkeypatch.setattr(Directory, "link", refuse)
    report = save(model, tmp_path / "next", reuse=folder)
    assert report.bytes_reused == 0 and is_saved(model, tmp_path / "next")
    assert report.notes == (
        f"5 unchanged shards of {folder} written again: a clone or a link of a file with the owner and the permissions of a new one was "
        "expected, it is not possible",
    )


@pytest.mark.parametrize("moment", ["before it is opened", "before it is linked", "before it is re-read"])
@pytest.mark.parametrize("whole", [False, True], ids=["one shard", "the checkpoint"])
def test_a_shard_that_is_deleted_meanwhile(
    earlier: tuple[nn.Sequential, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, whole: bool
) -> None:
    """Catches a note that blames the file system, or damage, for a shard that was deleted while it was compared, and a save that ends
    without a word of it."""
    model, folder = earlier
    name = shardsave.inspect(folder).tensors["0.weight"].shard

    def delete(*arguments: Any) -> None:
        if whole:
            (folder / INDEX).unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)

    def after(function: Callable[..., Any], act: Callable[..., None]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            act()
            return result

        return run

    if moment == "before it is opened":
        monkeypatch.setattr(Transaction, "earlier", after(Transaction.earlier, delete))
    elif moment == "before it is linked":
        monkeypatch.setattr(write, "find_unchanged", after(write.find_unchanged, delete))
    else:
        monkeypatch.setattr(Transaction, "take_over", after(Transaction.take_over, delete))
    report = save(model, tmp_path / "next", reuse=folder, recheck_every=1)
    assert is_saved(model, tmp_path / "next") and report.bytes_written == LAYER
    (note,) = report.notes
    if moment == "before it is opened" and not whole:  # that is damage
        assert note.startswith("corrupt checkpoint") and f"the index names {name}, there is no such file" in note
    else:
        assert "removed or replaced meanwhile" in note and str(folder) in note and "corrupt" not in note, note


def test_space_that_is_needed(earlier: tuple[nn.Sequential, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that is refused for lack of space that it does not need, or begun without the space that it needs."""
    model, folder = earlier
    change(model[4])
    free = 2 * LAYER
    monkeypatch.setattr(Directory, "free_bytes", lambda self: free)
    with pytest.raises(shardsave.OutOfSpaceError, match="needs 61.4 kB, 13.1 kB free; nothing was committed, the previous"):
        save(model, folder, reuse=False)
    names = os.listdir(folder)
    change(model[3])
    free = LAYER
    with pytest.raises(shardsave.OutOfSpaceError, match="needs 24.6 kB, 6.6 kB free; nothing was committed, the previous"):
        save(model, folder)
    assert sorted(os.listdir(folder)) == sorted(names)
    free = 4 * LAYER
    assert save(model, folder).bytes_written == 2 * LAYER


@torch.no_grad()
def test_assumed_to_be_unchanged(tmp_path: Path) -> None:
    """Catches parameters that are assumed to be unchanged although they were thawed, stepped, changed or replaced; and a pass over those
    that may be assumed so: a change that torch does not notice is then not saved."""
    model = layers()

    def changes_are_saved(layer: int, action: Callable[[], object], **more: Any) -> bool:
        action()
        report = save(model, tmp_path, assume_frozen_unchanged=True, max_shard_size=LAYER, **more)
        saved = shardsave.load(tmp_path)
        assert report.shards == 5
        return torch.equal(saved[f"{layer}.weight"], model[layer].weight)

    def unnoticed(layer: int) -> Callable[[], object]:
        return lambda: model[layer].weight.data.add_(1)

    assert changes_are_saved(0, unnoticed(0))  # the first save knows of no earlier one
    assert not changes_are_saved(0, unnoticed(0))
    assert changes_are_saved(0, lambda: model[0].weight.add_(1))
    assert not changes_are_saved(0, unnoticed(0))
    assert changes_are_saved(0, lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.clone(), requires_grad=False)))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    assert changes_are_saved(1, unnoticed(1), training={"groups": [optimizer]})
    assert changes_are_saved(2, lambda: (model[2].requires_grad_(True), unnoticed(2)()))
    assert changes_are_saved(2, lambda: (model[2].requires_grad_(False), unnoticed(2)()))
    assert save(model, tmp_path).bytes_written == 0 and is_saved(model, tmp_path)


def test_beside_a_training_state(tmp_path: Path) -> None:
    """Catches frozen weights that are written again because a training state is saved with them, or the other way round."""
    model = layers()
    optimizer = torch.optim.AdamW(model[4].parameters())
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    save(model, tmp_path, training={"optimizer": optimizer})
    optimizer.step()
    report = save(model, tmp_path, training={"optimizer": optimizer})
    assert report.bytes_reused == 4 * LAYER and report.bytes_written == 3 * LAYER + 8
    other, restored = layers(), torch.optim.AdamW(layers()[4].parameters())
    restored = torch.optim.AdamW(other[4].parameters())
    shardsave.resume(tmp_path, other, training={"optimizer": restored})
    assert same_state(model, other) and is_saved(model, tmp_path)


def test_an_adapter_that_stays(tmp_path: Path) -> None:
    """Catches an adapter whose second name, for PEFT, is lost or left behind when its shard is taken over."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(20, 20))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    shardsave.save(model, tmp_path, adapter_only=True)
    for _ in range(2):
        report = shardsave.save(model, tmp_path, adapter_only=True)
        assert report.bytes_written == 0 and len(report.reused) == 1
        assert not litter_in(tmp_path) and shardsave.verify(tmp_path).verified
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == (tmp_path / report.reused[0]).read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert shardsave.save(model, tmp_path, adapter_only=True).bytes_reused == 0
    assert not litter_in(tmp_path) and shardsave.verify(tmp_path).verified


def test_what_is_said_of_shared_shards(earlier: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    """Catches an inspection, a comparison or a verification that does not know that two checkpoints have the same files."""
    model, folder = earlier
    change(model[4])
    report = save(model, tmp_path / "next", reuse=folder)
    info = shardsave.inspect(tmp_path / "next")
    assert info.shared == report.reused and "4 shards taken over from an earlier checkpoint" in str(info)
    difference = shardsave.diff(folder, tmp_path / "next")
    assert len(difference.shared) == 4 and "4 shards in both" in str(difference) and difference.bytes == 2 * LAYER
    rotten = info.tensors["0.weight"].shard
    flip(tmp_path / "next" / rotten)
    for place in (folder, tmp_path / "next"):
        found = shardsave.verify(place, keep_going=True)
        assert (
            found.damaged
            and f"other checkpoints may have the same damage, since they share a file with this one: {rotten}" in str(found)
        )


@pytest.mark.parametrize("staging", ["ring", "snapshot"])
def test_beside_a_training_that_goes_on(tmp_path: Path, staging: Any) -> None:
    """Catches a save in the background that writes frozen weights again, that takes over a shard which a step has changed meanwhile or may
    change, and one that waits for what it does not write."""
    model = layers()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    training = {"optimizer": optimizer}
    shardsave.save_async(model, tmp_path / "1", training=training, staging=staging, max_shard_size=LAYER, progress=False).wait()
    at_the_call = layers()
    at_the_call.load_state_dict(model.state_dict())
    pending = shardsave.save_async(
        model, tmp_path / "2", training=training, staging=staging, reuse=tmp_path / "1", max_shard_size=LAYER, progress=False
    )
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    report = pending.wait()
    assert report.staging == staging
    # With a ring, the trainable layer may be changed by a step while it is compared, so it is written though it has not changed.
    assert report.bytes_written - (LAYER if staging == "ring" else 0) == 0 and report.bytes_reused >= 4 * LAYER
    assert is_saved(at_the_call, tmp_path / "2") and not same_state(at_the_call, model)


def test_a_frozen_tensor_that_changes_before_it_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a change after the call, of a tensor that is read beside the training, that decides about a shard without a word."""
    model = nn.Sequential(nn.Linear(600, 600).requires_grad_(False), nn.Linear(600, 1))  # small tensors are copied in the call
    training = {"optimizer": torch.optim.SGD(model[1].parameters(), lr=0.1)}
    save(model, tmp_path)
    earlier = Transaction.earlier

    def change_first(transaction: Transaction, path: str | None) -> Any:
        change(model[0])
        return earlier(transaction, path)

    before = model[0].weight.clone()
    monkeypatch.setattr(Transaction, "earlier", change_first)
    pending = shardsave.save_async(model, tmp_path, training=training, staging="ring", progress=False)
    with pytest.raises(shardsave.SaveNotCommittedError, match=r"'0\.weight'"):
        pending.wait()
    assert torch.equal(shardsave.load(tmp_path)["0.weight"], before)
