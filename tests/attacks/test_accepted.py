"""Method: good checkpoints that look like attacks are loaded. A reader that refuses too much makes a good checkpoint useless."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from file_cases import flip
from tampering import FIRST, INDEX, LONE, SECOND, Json, Net, crc, edit_index, entry, foreign, record_of, saved, shard_bytes

import shardsave
from support import same_bits


def no_tensors(folder: Path) -> None:
    """Adds a shard that is recorded, and that no name in weight_map leads to."""
    (folder / "more.safetensors").write_bytes(shard_bytes('{"__metadata__":{"shardsave.crc64nvme":""}}'))
    content = (folder / "more.safetensors").read_bytes()
    edit_index(folder, lambda index: index["shardsave"]["shards"].update({"more.safetensors": record_of(content)}))


def stale_lone_file(folder: Path) -> None:
    (folder / LONE).write_bytes(b"whatever the save replaced")
    status = (folder / LONE).stat()
    stale = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    edit_index(folder, lambda index: index["shardsave"].update(supersedes=stale))


def unknown_keys(index: Json) -> None:
    index["shardsave"].update(version=99, colour="blue", writer={"name": "another"})
    index["shardsave"]["flags"]["melted"] = ["top.bias"]
    index["metadata"]["note"] = {"deep": [1, 2.5, None]}


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("unknown keys", lambda folder: edit_index(folder, unknown_keys)),
    ("wrong total_size", lambda folder: edit_index(folder, lambda index: index["metadata"].update(total_size=1))),
    ("no metadata", lambda folder: edit_index(folder, lambda index: index.pop("metadata"))),
    ("a shard without tensors", no_tensors),
    ("stale lone file", stale_lone_file),
    ("lone file that is a link to nothing", lambda folder: (folder / LONE).symlink_to("gone")),
    ("shard reached through links", lambda folder: through_links(folder)),
    (
        "names of the default too",
        lambda folder: edit_index(folder, lambda index: index["shardsave"]["flags"].update(trainable=[])),
    ),
]


def through_links(folder: Path) -> None:
    (folder / SECOND).rename(folder / "blob")
    (folder / "link").symlink_to("blob")
    (folder / SECOND).symlink_to(folder / "link")


@pytest.mark.parametrize(("change"), [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_accepted(change: Callable[[Path], object], tmp_path: Path) -> None:
    """Catches a reader that refuses something that FORMAT.md tells readers to ignore."""
    saved(tmp_path)
    change(tmp_path)
    model = Net(seed=3)
    shardsave.load_model(model, tmp_path)
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), Net().state_dict().values()))
    assert not model.base.weight.requires_grad and model.top.weight.requires_grad
    assert shardsave.verify(tmp_path).verified and shardsave.inspect(tmp_path).frozen == {"base.weight", "base.bias"}
    assert shardsave.load(tmp_path, mmap=True).keys() == model.state_dict().keys()


def test_a_part_of_a_newer_version(tmp_path: Path) -> None:
    """Catches an unknown part that is dropped or not verified without a word, or that keeps the weights from loading."""
    saved(tmp_path / "a")
    edit_index(
        tmp_path / "a", lambda index: index["shardsave"].update(parts={"recipe": ["recipe-0123abcd.json", 9, 9, "0" * 16]})
    )
    assert shardsave.load(tmp_path / "a").keys() == Net().state_dict().keys()
    report = shardsave.verify(tmp_path / "a")
    assert report.verified and report.notes == ("the recipe was not verified: this version of shardsave knows no such part",)
    assert shardsave.convert(tmp_path / "a", tmp_path / "b").notes == (
        "the recipe was left out: this version of shardsave knows no such part",
    )
    save = shardsave.save(Net(), tmp_path / "a")
    assert save.leftovers == () and shardsave.verify(tmp_path / "a").notes == ()


def test_index_of_another_library(tmp_path: Path) -> None:
    """Catches a reader that uses or refuses other members than weight_map in an index without shardsave's record."""
    foreign(tmp_path, metadata={"total_size": -1.5}, note=[1])
    assert shardsave.load(tmp_path).keys() == {"x", "y"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert shardsave.inspect(tmp_path).frozen is None and shardsave.load(tmp_path)["x"].tolist() == [0]
    (tmp_path / INDEX).rename(tmp_path / "other.safetensors.index.json")
    assert shardsave.load(tmp_path / "other.safetensors.index.json").keys() == {"x"}
    (tmp_path / "other.safetensors.index.json").write_text("{")
    with pytest.raises(
        shardsave.CorruptCheckpointError, match=r"^corrupt index other\.safetensors\.index\.json: JSON expected, it"
    ):
        shardsave.load(tmp_path / "other.safetensors.index.json")


def test_header_of_another_library(tmp_path: Path) -> None:
    """Catches a reader that requires the order, the padding or the alignment that shardsave writes."""
    header = f'{{"z":{entry("U8", [3], [4, 7])},"__metadata__":{{}},"a":{entry()},"e":{entry("F64", [0, 9], [7, 7])}}}   '
    (tmp_path / LONE).write_bytes(shard_bytes(header, bytes(range(7))))
    for mmap in (False, True):
        loaded = shardsave.load(tmp_path, mmap=mmap)
        assert loaded["z"].tolist() == [4, 5, 6] and loaded["e"].shape == (0, 9)


def test_damaged_data(tmp_path: Path) -> None:
    """Catches damaged data that is not noticed, or a message without the place, the checksums and the state of the module."""
    saved(tmp_path)
    content = (tmp_path / FIRST).read_bytes()
    at = 4096 + Net().base.weight.nbytes
    flip(tmp_path / FIRST, at)
    good, bad = crc(content[at : at + 8]), crc((tmp_path / FIRST).read_bytes()[at : at + 8])
    message = (
        f"corrupt shard {FIRST}: tensor 'base.bias' has checksum {bad}, its header says {good}; "
        f"the file was changed after it was saved"
    )
    for verb in (shardsave.load, shardsave.verify):
        with pytest.raises(shardsave.CorruptCheckpointError) as caught:
            verb(tmp_path)
        assert str(caught.value) == message
    model = Net(seed=3)
    with pytest.raises(shardsave.CorruptCheckpointError) as caught:
        shardsave.load_model(model, tmp_path)
    assert str(caught.value) == f"{message}; the module is partly loaded, 3 of 4 tensors"
    assert shardsave.load(tmp_path, prefix="top.").keys() == {"weight", "bias"}
    flip(tmp_path / SECOND, 4096)
    flip(tmp_path / SECOND, 4119)
    with pytest.raises(shardsave.CorruptCheckpointError) as caught:
        shardsave.verify(tmp_path)
    assert str(caught.value) == f"{message}; 2 more tensors are damaged"
