"""Method: a directory whose files are symbolic links (a snapshot of the Hub's cache, files under DVC) is saved into. What the save
replaces is the link and never what it leads to; afterwards transformers and safetensors read the new weights from this directory.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import shardsave
from faults.dying import die_after_the_commit, killed
from faults.savers import INDEX, generation_in, litter_in
from faults.savers import save as save_generation
from shardsave._common.os_calls import CallFailed
from shardsave._storage.directory import Directory
from support import same_bits

transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.slow

LONE = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
NOTE = "symbolic links were removed or replaced, not what they led to: "


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertModel(transformers.BertConfig(layer_norm_eps=10.0**-seed, **sizes))


def linked(folder: Path) -> dict[str, bytes]:
    """Moves the files of ``folder`` elsewhere and puts links in their place. Returns the content of each file."""
    elsewhere = folder.parent / f"{folder.name}-blobs"
    elsewhere.mkdir()
    content = {}
    for path in sorted(folder.iterdir()):
        content[path.name] = path.read_bytes()
        path.rename(elsewhere / path.name)
        path.symlink_to(Path("..") / elsewhere.name / path.name)
    return content


def targets(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder.parent / f"{folder.name}-blobs").iterdir())}


def save(folder: Path, value: float = 1) -> shardsave.SaveReport:
    return shardsave.save({"x": torch.full((3,), value)}, folder, durable=False)


@pytest.mark.parametrize("bound", ["1GB", "2KB"])
def test_a_snapshot_of_the_hub(bound: str, tmp_path: Path) -> None:
    """Catches a save that says "replaced" while the links stay, so that from_pretrained returns the old weights or the old config."""
    folder, new = tmp_path / "snapshot", model(2)
    model(1).save_pretrained(folder, max_shard_size=bound)
    before = linked(folder)
    report = shardsave.save(new, folder)
    again = transformers.BertModel.from_pretrained(folder)
    assert again.config.layer_norm_eps == 0.01
    assert all(same_bits(left, right) for left, right in zip(new.state_dict().values(), again.state_dict().values()))
    assert targets(folder) == before and not any(path.is_symlink() for path in folder.iterdir())
    assert not litter_in(folder) and set(report.removed) == before.keys() and report.leftovers == ()
    assert report.notes[-1].startswith(NOTE + "config.json, ") and (folder / "config.json").is_file()
    assert save(folder).notes == ()


def test_our_own_files_under_dvc(tmp_path: Path) -> None:
    """Catches an overwrite of a linked checkpoint of ours that leaves links behind, or that changes a target."""
    folder = tmp_path / "ckpt"
    save_generation(1, folder)
    before = linked(folder)
    report = save_generation(2, folder)
    assert generation_in(folder) == 2 and targets(folder) == before and not litter_in(folder)
    assert set(report.removed) == before.keys() - {INDEX} and report.notes[-1].startswith(NOTE)
    for path in folder.glob("*.safetensors"):
        assert load_file(path)


@pytest.mark.parametrize("name", [LONE, "config.json", "model-00007-of-00007.safetensors"])
@pytest.mark.parametrize("target", ["nowhere", "itself", "a directory"])
def test_links_to_no_file(name: str, target: str, tmp_path: Path) -> None:
    """Catches a link to nothing that stays, and that would win over the new weights as soon as its target is there; and a failure."""
    folder = tmp_path / "ckpt"
    save(folder)
    (folder / INDEX).write_text(
        f'{{"metadata": {{}}, "weight_map": {{"x": "{SHARD}", "y": "model-00007-of-00007.safetensors"}}}}'
    )
    (tmp_path / "a directory").mkdir()
    (folder / name).symlink_to(name if target == "itself" else tmp_path / target)
    report = shardsave.save(model(2), folder)
    assert transformers.BertModel.from_pretrained(folder).config.layer_norm_eps == 0.01
    assert not (folder / name).is_symlink() and (tmp_path / "a directory").is_dir() and not (tmp_path / "nowhere").exists()
    assert name in report.removed and report.notes[-1] == NOTE + name and not litter_in(folder)


def test_an_index_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    """Catches an index that is created where a link leads, and a link that is replaced without a word."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / INDEX).symlink_to(tmp_path / "elsewhere")
    assert save(tmp_path / "ckpt").notes == (NOTE + INDEX,)
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "ckpt" / INDEX).is_symlink()


def test_a_config_with_the_same_bytes(tmp_path: Path) -> None:
    """Catches a checkpoint whose config is a link: what it leads to may change or go, and the checkpoint would change with it."""
    folder = tmp_path / "ckpt"
    shardsave.save(model(1), folder)
    linked(folder)
    shardsave.save(model(1), folder)
    assert not (folder / "config.json").is_symlink() and not shardsave.inspect(folder).notes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_that_was_replaced_by_links(tmp_path: Path) -> None:
    """Catches an adapter that stays because it became a link, and that other libraries would apply to the new weights."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "ckpt"
    for replaced in (False, True):
        adapted = peft.get_peft_model(model(1), peft.LoraConfig(r=2, target_modules=["query"]))
        shardsave.save(adapted, folder, adapter_only=True)
        if not replaced:
            before = linked(folder)
    assert not any(path.is_symlink() for path in folder.iterdir())
    (folder.parent / "ckpt-blobs").rename(folder.parent / "first")
    before = linked(folder)
    report = shardsave.save(model(2), folder)
    assert report.leftovers == () and not list(folder.glob("adapter*")) and targets(folder) == before
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(report.removed)


def test_convert_into_links(tmp_path: Path) -> None:
    """Catches a conversion into a directory of links that leaves them; one to a file that is a link is refused."""
    folder = tmp_path / "ckpt"
    save_file({"x": torch.zeros(3)}, tmp_path / "source.safetensors")
    model(1).save_pretrained(folder)
    before = linked(folder)
    report = shardsave.convert(tmp_path / "source.safetensors", folder)
    assert report.removed == (LONE,) and report.notes[-1] == NOTE + LONE and targets(folder) == before
    assert shardsave.load(folder).keys() == {"x"}
    (tmp_path / "one.safetensors").symlink_to(tmp_path / "source.safetensors")
    with pytest.raises(shardsave.SaveNotCommittedError, match="a regular file, or nothing, was expected, it is a link"):
        shardsave.convert(folder, tmp_path / "one.safetensors", to="safetensors")


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("why", ["refused", "changed"])
def test_a_lone_file_that_stays(why: str, link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that says "replaced" while other libraries go on reading the lone file. It warns, and so does its report."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_file({"x": torch.zeros(3)}, folder / LONE)
    if link:
        linked(folder)
    unlink = Directory.unlink

    def not_permitted(directory: Directory, name: str) -> None:
        if name == LONE:
            raise CallFailed("unlink", name, errno.EPERM, "Operation not permitted")
        unlink(directory, name)

    def change(done: int, total: int) -> None:
        os.utime(folder / LONE, ns=(1, 1))

    if why == "refused":
        monkeypatch.setattr(Directory, "unlink", not_permitted)
    with pytest.warns(UserWarning, match=rf"{LONE} is still in .*: transformers and other libraries will read") as seen:
        report = shardsave.save({"x": torch.ones(3)}, folder, durable=False, progress=change if why == "changed" else None)
    assert seen[0].filename == __file__ and str(seen[0].message) in report.notes and (folder / LONE).exists()
    assert report.leftovers == ((LONE,) if why == "refused" else ()) and LONE not in report.removed
    assert not any("replaced" in note for note in report.notes), report.notes


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_links_of_a_killed_save(tmp_path: Path) -> None:
    """Catches links that stay for good because the save that replaced them was killed before it could remove them."""
    for number, finish in enumerate((lambda folder: save_generation(3, folder), shardsave.clean)):
        folder = tmp_path / str(number)
        save_generation(1, folder)
        save_file({"x": torch.zeros(3)}, folder / LONE)
        before = linked(folder)
        killed(folder, die_after_the_commit)
        listed = shardsave.clean(folder, remove=False)
        assert listed.found[1].name == LONE and before.keys() - {INDEX, LONE} < set(listed.found[0].files)
        finish(folder)
        assert generation_in(folder) == (2 if number else 3) and not litter_in(folder) and targets(folder) == before
