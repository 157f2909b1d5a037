"""Method: a directory to which everybody may write (as /tmp), in which another user has planted what a save obeys: staging directories
and their lists, and indexes. A save and a `clean` there do nothing of what these say, remove nothing that is another user's, and name
what stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from neighbours import (
    NEIGHBOUR,
    SAVER,
    STAGING,
    TWO_USERS,
    WORK,
    by,
    give,
    give_link,
    plant_index,
    plant_staging,
    put,
    save,
    saved_value,
)
from tampering import INDEX, LONE, edit_index

import shardsave
from shardsave._storage.directory import Directory
from support import let_everybody_in

pytestmark = TWO_USERS


def test_a_planted_list(shared: Path) -> None:
    """Catches a save and a `clean` that remove what another user's list names."""
    for name in WORK:
        put(shared / name, "work", SAVER)
    plant_staging(shared, [*WORK, "model-00001-of-00001.safetensors"])
    cleaned = by(SAVER, lambda: shardsave.clean(shared, other_hosts=True))
    assert cleaned.endswith(f"; 0 removed; kept, since another user may have made or changed them: {STAGING}"), cleaned
    report = by(SAVER, lambda: save(shared))
    assert f"what belongs to other users of this directory, to which everybody may write, stays (8.2 kB): {STAGING}" in report
    again = by(SAVER, lambda: save(shared, 2))
    assert "removed or replaced model-00001-of-00001.safetensors; " in again and STAGING in again
    assert all((shared / name).read_text() == "work" for name in WORK) and saved_value(shared) == 2
    assert os.listdir(shared / STAGING) == ["names"]


def test_a_planted_list_and_no_room(shared: Path) -> None:
    """Catches a save that makes room by removing what another user's list names, and then says that all is intact."""
    for name in WORK:
        put(shared / name, "work", SAVER)
    plant_staging(shared, list(WORK))
    huge = torch.zeros(1).expand(1 << 45)
    error = by(SAVER, lambda: shardsave.save({"x": huge}, shared, durable=False))
    assert error.startswith("OutOfSpaceError") and error.endswith(
        "; nothing was committed, the directory had no checkpoint before"
    ), error
    assert {*WORK, STAGING} == set(os.listdir(shared))


def test_the_savers_own_list_is_obeyed(shared: Path) -> None:
    """Catches leavings that nobody removes, files that are removed without being named, and a planted file under a listed name."""
    planted = "model-00009-of-00009.safetensors"
    for name in WORK:
        put(shared / name, "left", SAVER)
    put(shared / planted, "planted", NEIGHBOUR)
    plant_staging(shared, [*WORK, planted], SAVER)
    report = by(SAVER, lambda: save(shared))
    assert f"removed or replaced {', '.join(WORK)}, {STAGING}/names; " in report, report
    assert f"stays (4.1 kB): {planted}" in report and (shared / planted).read_text() == "planted"
    assert {planted, INDEX, "model-00001-of-00001.safetensors"} == set(os.listdir(shared))


def test_what_was_removed_is_named_by_an_error(shared: Path) -> None:
    """Catches an error that hides that leavings of a dead saver were removed to make room."""
    put(shared / WORK[0], "left", SAVER)
    plant_staging(shared, [WORK[0]], SAVER)
    error = by(SAVER, lambda: shardsave.save({"x": torch.zeros(1).expand(1 << 45)}, shared, durable=False))
    assert error.endswith(f"before, and what dead savers left was removed: {WORK[0]}, {STAGING}/names"), error


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_planted_index(mode: int, shared: Path) -> None:
    """Catches a save that removes what another user's index names, and an error that calls that user's checkpoint our own."""
    shared.chmod(mode)
    for name in WORK:
        put(shared / name, "work", SAVER)
    plant_index(shared)
    cleaned = by(SAVER, lambda: shardsave.clean(shared))
    assert cleaned == (
        f"ShardSaveError: cannot clean {shared}: a {INDEX} that only this user can have written was expected, since everybody may "
        "write to this directory; another user made it, or may have changed it; nothing was removed"
    )
    report = by(SAVER, lambda: save(shared))
    if mode == 0o1777:
        assert report == (
            f"SaveNotCommittedError: cannot write {shared / INDEX}: rename: it belongs to user {NEIGHBOUR}, and in this directory "
            "(sticky) nobody else may replace it; nothing was committed, all other files are unchanged"
        )
        assert {*WORK, INDEX} == set(os.listdir(shared))
    else:
        assert "nothing was removed that the replaced index names, since another user of this directory made it" in report
        assert f"stays (8.2 kB): {', '.join(WORK)}" in report and saved_value(shared) == 1
    assert all((shared / name).read_text() == "work" for name in WORK)


def test_root_replaces_a_planted_index(shared: Path) -> None:
    """Catches a save of a user who may replace everything, and who removes what another user's index names, does not name the index
    that it replaced, or calls its own file another user's."""
    for name, owner in zip(WORK, (0, SAVER)):
        put(shared / name, "work", owner)
    plant_index(shared)
    report = save(shared)
    assert report.removed == (INDEX,) and saved_value(shared) == 1
    assert report.notes[0].startswith("nothing was removed that the replaced index names, since another user")
    assert (
        report.notes[1]
        == f"what belongs to other users of this directory, to which everybody may write, stays (4.1 kB): {WORK[1]}"
    )
    assert report.notes[2] == f"what other users of this directory may have changed or named stays (4.1 kB): {WORK[0]}"
    assert all((shared / name).read_text() == "work" for name in WORK)


def test_a_link_to_the_savers_own_index(shared: Path, tmp_path: Path) -> None:
    """Catches an index that counts as the saver's own because another user's link, symbolic or hard, leads to one."""
    own = tmp_path / "own"
    own.mkdir()
    plant_index(own, 0)
    for name in WORK:
        put(shared / name, "work", 0)
    for link in (give_link, lambda link, target: os.link(target, link)):
        link(shared / INDEX, own / INDEX)
        assert save(shared).removed == (INDEX,) and all((shared / name).read_text() == "work" for name in WORK)
        (shared / INDEX).unlink()
    assert (own / INDEX).read_text()


def test_an_index_that_everybody_may_write(shared: Path) -> None:
    """Catches a save that does what an index says that another user has changed, or that writes such an index itself."""
    before = os.umask(0)
    try:
        save(shared)
        assert (shared / INDEX).stat().st_mode & 0o777 == 0o644
        shard = "model-00001-of-00001.safetensors"
        (shared / INDEX).chmod(0o666)
        assert save(shared).removed == () and (shared / shard).exists()
        assert save(shared).removed != ()
    finally:
        os.umask(before)


def test_no_other_user_enters_a_staging_directory(shared: Path) -> None:
    """Catches a staging directory in which another user could replace the list or the shards, whatever the umask."""
    modes = []
    before = os.umask(0)
    try:
        shardsave.save(
            {"x": torch.ones(3)},
            shared,
            durable=False,
            progress=lambda done, total: modes.extend(path.stat().st_mode & 0o777 for path in shared.glob(".shardsave-*")),
        )
    finally:
        os.umask(before)
    assert set(modes) == {0o700}
    plant_staging(shared, list(WORK), 0).chmod(0o777)
    put(shared / WORK[0], "work", 0)
    assert save(shared).removed == ("model-00001-of-00001.safetensors",) and (shared / WORK[0]).exists()


def test_a_planted_lone_file(shared: Path) -> None:
    """Catches a save that says nothing although other libraries will read another user's file and not the new weights."""
    put(shared / LONE, "planted", NEIGHBOUR)

    def save_and_collect() -> object:
        with pytest.warns(UserWarning) as caught:
            report = save(shared)
        return [str(warning.message) for warning in caught], str(report)

    report = by(SAVER, save_and_collect)
    assert f"{LONE} is still in {shared}: transformers and other libraries will read that file" in report
    assert f"stays (4.1 kB): {LONE}" in report and (shared / LONE).read_text() == "planted" and saved_value(shared) == 1
    found = by(SAVER, lambda: [(leaving.name, leaving.files, leaving.ours) for leaving in shardsave.clean(shared).found])
    assert found == f"[('{LONE}', (), False)]"


@pytest.mark.parametrize("content", ["{}", None])
def test_a_planted_config(content: str | None, shared: Path) -> None:
    """Catches a save that is committed and then fails at a file that it may not replace, or that keeps another user's config because it
    has the right bytes today."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10))
    if content is None:
        model.config.save_pretrained(shared)
        content = (shared / "config.json").read_text()
    put(shared / "config.json", content, NEIGHBOUR)
    error = by(SAVER, lambda: shardsave.save(model, shared, durable=False))
    assert error == (
        f"SaveNotCommittedError: cannot write {shared / 'config.json'}: rename: it belongs to user {NEIGHBOUR}, and in this "
        "directory (sticky) nobody else may replace it; nothing was committed, the directory had no checkpoint before"
    )
    assert os.listdir(shared) == ["config.json"]
    assert shardsave.save(model, shared, durable=False).removed == ("config.json",)  # root may
    assert (shared / "config.json").stat().st_uid == 0


def test_a_staged_config_of_another_user(shared: Path) -> None:
    """Catches another user's file that is put in the place of a missing config, because it has the right checksum."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10))
    shardsave.save(model, shared, durable=False)
    staging = plant_staging(shared, [])
    (shared / "config.json").rename(give(staging, NEIGHBOUR) / "config.json")
    give(staging / "config.json", NEIGHBOUR)
    shardsave.save({"x": torch.ones(1)}, shared, durable=False)
    assert not (shared / "config.json").exists() and (staging / "config.json").exists()


def test_owner_on_a_server_that_gives_files_to_another_user(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that compares owners with its own user id, and not with the owner of what it makes there (NFS with root_squash)."""
    squashed = 65534
    mkdir = Directory.mkdir
    monkeypatch.setattr(
        Directory,
        "mkdir",
        lambda folder, name, mode=0o777: (mkdir(folder, name, mode), os.chown(name, squashed, -1, dir_fd=folder.fd)),
    )
    for name, owner in zip(WORK, (squashed, 0)):
        put(shared / name, "left", owner)
    plant_staging(shared, list(WORK), squashed)
    report = save(shared)
    assert report.removed == (WORK[0], f"{STAGING}/names") and report.notes[-1].endswith(f": {WORK[1]}")
    plant_staging(shared, [], owner=0)
    os.chown(shared / INDEX, squashed, -1)
    assert shardsave.clean(shared).found[0].ours is False and (shared / STAGING).exists()


def test_in_a_directory_of_a_group(shared: Path) -> None:
    """Catches members of a group whose crashed saves no other member can clean up."""
    shared.chmod(0o2775)
    os.chown(shared, 0, SAVER)
    for name in WORK:
        put(shared / name, "left", NEIGHBOUR)
    plant_staging(shared, list(WORK), NEIGHBOUR).chmod(0o777)
    report = by(SAVER, lambda: save(shared))
    assert f"removed or replaced {', '.join(WORK)}, {STAGING}/names" in report and not (shared / WORK[0]).exists(), report


def test_listing_a_directory_that_one_may_not_write(shared: Path) -> None:
    """Catches a listing that fails where nothing can be created, and needs a new file to learn an owner."""
    plant_staging(shared, [])
    shared.chmod(0o1777)
    shutil.chown(shared, NEIGHBOUR)
    assert "kept, since another user may have made or changed them" in by(SAVER, lambda: shardsave.clean(shared, remove=False))
    assert os.listdir(shared) == [STAGING]


def test_a_supersedes_record_of_another_user(shared: Path) -> None:
    """Catches a save that removes a lone file because another user's index calls it replaced."""
    save(shared)
    lone = put(shared / LONE, "work", SAVER)
    status = lone.stat()
    edit_index(
        shared, lambda index: index["shardsave"].update(supersedes={"size": status.st_size, "mtime_ns": status.st_mtime_ns})
    )
    give(shared / INDEX, NEIGHBOUR)
    assert by(SAVER, lambda: shardsave.clean(shared)).startswith("ShardSaveError")
    assert by(SAVER, lambda: save(shared)).startswith("SaveNotCommittedError") and lone.read_text() == "work"


def group_may_write(staging: Path) -> None:
    staging.chmod(0o775)


def group_may_write_list(staging: Path) -> None:
    (staging / "names").chmod(0o664)


def give_list(staging: Path) -> None:
    give(staging / "names", NEIGHBOUR)


def link_list(staging: Path) -> None:
    os.link(staging / "names", staging.parent / "second name")


def give_content(staging: Path) -> None:
    put(staging / WORK[0], "planted", NEIGHBOUR)


@pytest.mark.parametrize("change", [group_may_write, group_may_write_list, give_list, link_list, give_content])
def test_a_staging_directory_that_others_could_enter(change: Callable[[Path], None], shared: Path) -> None:
    """Catches a save that removes what a list names that a member of the saver's group wrote into the saver's staging directory, while
    the mode of the directory permitted it."""
    for name in WORK:
        put(shared / name, "work", SAVER)
    change(plant_staging(shared, list(WORK), SAVER))
    cleaned = by(SAVER, lambda: shardsave.clean(shared, other_hosts=True))
    assert "; 0 removed; kept, since another user may have made or changed them: " in cleaned, cleaned
    report = by(SAVER, lambda: save(shared))
    size = "12.3 kB" if change is give_content else "8.2 kB"
    assert f"what other users of this directory may have changed or named stays ({size}): {STAGING}" in report
    assert all((shared / name).read_text() == "work" for name in WORK) and (shared / STAGING / "names").exists()


def test_an_index_that_a_group_may_write(shared: Path) -> None:
    """Catches a save that removes what a member of the saver's group wrote into the index, or whose own index, list or config a group may
    write, so that the next save does not obey them."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10))
    before = os.umask(0o002)
    try:
        removed = [shardsave.save(model, shared, durable=False).removed for _ in range(2)]
        assert removed == [(), ("model-00001-of-00001.safetensors",)]
        assert [(shared / name).stat().st_mode & 0o777 for name in (INDEX, "config.json")] == [0o644, 0o644]
    finally:
        os.umask(before)
    for name in WORK:
        put(shared / name, "work", SAVER)
    for path in shared.iterdir():
        give(path, SAVER)
    plant_index(shared, SAVER).chmod(0o664)
    assert by(SAVER, lambda: shardsave.clean(shared)).startswith("ShardSaveError: cannot clean")
    report = by(SAVER, lambda: save(shared))
    assert f"what other users of this directory may have changed or named stays (8.2 kB): {', '.join(WORK)}" in report
    assert "belongs to other users" not in report and "removed or replaced model-" not in report
    assert all((shared / name).read_text() == "work" for name in WORK)


@pytest.mark.parametrize("owner", [SAVER, NEIGHBOUR])
def test_leavings_beside_a_single_file(owner: int, shared: Path) -> None:
    """Catches a conversion that removes another user's directory because of its name, or removes anything without naming it."""
    save(shared / "source")
    let_everybody_in(shared / "source")
    scratch, workspace = f".out.safetensors.{'0' * 16}.part", f".out.safetensors.{'0' * 16}.part.d"
    (shared / workspace).mkdir()
    put(shared / workspace / "work", "work", owner)
    give(shared / workspace, owner)
    put(shared / scratch, "left", owner)
    report = by(
        SAVER, lambda: shardsave.convert(shared / "source", shared / "out.safetensors", to="safetensors", progress=False)
    )
    if owner == SAVER:
        assert f"; removed or replaced {workspace}, {scratch}" in report and not (shared / workspace).exists(), report
    else:
        assert f"everybody may write, stays (4.1 kB): {scratch}" in report and (shared / workspace / "work").exists(), report
