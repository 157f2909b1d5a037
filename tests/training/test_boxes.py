"""Tensors that are stored in boxes, in directories made by hand: put together, or refused by what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardsave
from shardsave._common.progress import Progress
from shardsave._common.sources import TensorSource
from shardsave._format.boxes import BOXES_KEY, StoredBox
from shardsave._saving.contents import plan_contents
from shardsave._saving.disk_layout import IdentityLayout
from shardsave._saving.training_directory import plan_training_directory
from shardsave._saving.write import write_checkpoint
from shardsave._state.module import Entry, read_state
from shardsave._state.parts import Parts
from training_state import MOMENT, edit_training, training_directory

WHOLE = torch.arange(24, dtype=torch.float32).view(4, 6)

#: Rank → stored name → the elements, and of what they are a box.
Stored = dict[int, dict[str, tuple[torch.Tensor, StoredBox | None]]]


def boxed(begin: Sequence[int], tensor: torch.Tensor, shape: Sequence[int] = (4, 6)) -> tuple[torch.Tensor, StoredBox]:
    return tensor, StoredBox("t", tuple(shape), tuple(begin))


def quarters() -> Stored:
    """Four boxes of three sizes on three ranks, and a tensor that is whole."""
    return {
        0: {"t at 0,0": boxed((0, 0), WHOLE[:1, :4]), "whole": (torch.ones(2), None)},
        1: {"t at 0,4": boxed((0, 4), WHOLE[:, 4:]), "t at 3,0": boxed((3, 0), WHOLE[3:, :4])},
        2: {"t at 1,0": boxed((1, 0), WHOLE[1:3, :4])},
    }


def save(folder: Path, stored: Stored, text: Callable[[str], str] = lambda text: text, **options: Any) -> Path:
    """Saves a checkpoint with ``stored``. ``text``: changes what headers say of boxes."""
    shared = json.dumps({"dict": {"t": {"tensor": "t"}, "whole": {"tensor": "whole"}}}).encode()
    entries = {
        rank: [Entry(name, "tensor", None, None, TensorSource.of(tensor)) for name, (tensor, _) in of_rank.items()]
        for rank, of_rank in stored.items()
    }
    boxes = {name: box for of_rank in stored.values() for name, (_, box) in of_rank.items() if box is not None}
    directory = plan_training_directory(shared, {}, entries, 10_000, ranks=3, boxes=boxes)
    shards = {
        name: replace(shard, more={BOXES_KEY: text(shard.more[BOXES_KEY])}) if shard.more else shard
        for name, shard in directory.shards.items()
    }
    on_disk = IdentityLayout().apply(read_state({"x": torch.ones(1)}))
    contents = plan_contents(on_disk, Parts(), 10_000, {}, directories=[replace(directory, shards=shards)], moment=MOMENT)
    with Progress(False, "saving", contents.tensor_bytes) as progress:
        write_checkpoint(contents, folder, durable=False, lock_timeout=10, progress=progress)
    return folder


def test_boxes_are_put_together(tmp_path: Path) -> None:
    """Catches elements in a wrong place, and a verb that does not know boxes."""
    folder = save(tmp_path / "ckpt", quarters())
    live = {"t": torch.zeros(4, 6), "whole": torch.zeros(2)}
    resumed = shardsave.resume(folder, training=live)
    assert torch.equal(live["t"], WHOLE) and live["whole"].tolist() == [1, 1] and resumed.notes == ()
    assert resumed.report is not None and resumed.report.verified
    strided = {"t": torch.zeros(6, 4).t(), "whole": torch.zeros(2)}
    shardsave.resume(folder, training=strided)
    assert torch.equal(strided["t"], WHOLE)
    assert shardsave.verify(folder).verified and shardsave.diff(folder, folder).same
    document = json.loads((training_directory(folder) / "index.json").read_bytes())
    assert document["requires"] == ["boxes"]
    shardsave.convert(folder, tmp_path / "converted")
    assert shardsave.diff(folder, tmp_path / "converted").same
    names = {path.name: path.read_bytes() for path in training_directory(folder).glob("*.tensors")}
    converted = {path.name: path.read_bytes() for path in training_directory(tmp_path / "converted").glob("*.tensors")}
    assert names == converted and len(names) == 3


def test_without_the_feature(tmp_path: Path) -> None:
    """Catches a reader that looks for boxes where a document does not ask for it."""
    folder = save(tmp_path, quarters())
    edit_training(folder, lambda document: document.update(requires=[]))
    with pytest.raises(shardsave.CorruptCheckpointError, match="the name of a stored tensor was expected, it is 't'"):
        shardsave.resume(folder, training={"t": torch.zeros(4, 6), "whole": torch.zeros(2)})


def changed(change: Callable[[Stored], object]) -> Stored:
    stored = quarters()
    change(stored)
    return stored


def box_of(change: Mapping[str, Any]) -> Stored:
    """The first box says something else of itself."""
    stored = quarters()
    tensor, box = stored[0]["t at 0,0"]
    assert box is not None
    stored[0]["t at 0,0"] = tensor, box._replace(**change)
    return stored


HOLE = "tensor 't' expected of shape [4, 6] to be covered once, its "
FIRST = "t at 0,0"

REFUSED: dict[str, tuple[str, Stored, Callable[[str], str]]] = {
    "a hole": (f"{HOLE}3 parts do not do that", changed(lambda stored: stored[2].pop("t at 1,0")), str),
    "an overlap": (
        f"{HOLE}4 parts do not do that",
        changed(lambda stored: stored[2].update({"t at 1,0": boxed((0, 0), WHOLE[:2, :4])})),
        str,
    ),
    "twice": (f"{HOLE}5 parts do not do that", changed(lambda stored: stored[2].update(again=boxed((3, 0), WHOLE[3:, :4]))), str),
    "another shape": ("expected to be F32 of shape [5, 6]", box_of({"shape": (5, 6)}), str),
    "another dtype": (
        "expected to be F32 of shape [4, 6]",
        changed(lambda stored: stored[2].update({"t at 1,0": boxed((1, 0), WHOLE[1:3, :4].int())})),
        str,
    ),
    "a name that is taken": (
        "tensor 't' expected to have a name that no stored tensor has",
        changed(lambda stored: stored[2].update({"t": (torch.ones(1), None)})),
        str,
    ),
    "outside": (f"expected to say of which larger tensor '{FIRST}'", box_of({"begin": (0, 3)}), str),
    "before": (f"expected to say of which larger tensor '{FIRST}'", box_of({"begin": (-1, 0)}), str),
    "other dimensions": (f"expected to say of which larger tensor '{FIRST}'", box_of({"begin": (0, 0, 0)}), str),
    "a huge shape": (f"expected to say of which larger tensor '{FIRST}'", box_of({"shape": (1 << 40, 1 << 40)}), str),
    "a large shape": ("expected to be F32 of shape [1073741824, 6]", box_of({"shape": (1 << 30, 6)}), str),
    "no JSON": ("expected to be JSON", quarters(), lambda text: text[:-1]),
    "a list": ("expected to be JSON", quarters(), lambda text: "[]"),
    "a name that is not there": ("expected to name tensors of the file, it has 'none'", quarters(), lambda text: '{"none":["t",[1],[0]]}'),
    "a number": (f"expected to say of which larger tensor '{FIRST}'", quarters(), lambda text: f'{{"{FIRST}":5}}'),
    "true": (f"expected to say of which larger tensor '{FIRST}'", quarters(), lambda text: text.replace("[0,0]", "[false,0]")),
}  # fmt: skip


@pytest.mark.parametrize(("message", "stored", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, message: str, stored: Stored, text: Callable[[str], str]) -> None:
    """Catches boxes that are believed where they are wrong, and an error of Python itself."""
    folder = save(tmp_path, stored, text)
    live = {"t": torch.zeros(4, 6), "whole": torch.zeros(2)}
    for verb in (shardsave.verify, lambda path: shardsave.resume(path, training=live)):
        with pytest.raises(shardsave.CorruptCheckpointError) as caught:
            verb(folder)
        assert message in str(caught.value)
    assert not live["t"].any()
    assert shardsave.verify(folder, keep_going=True).damaged


def test_a_missing_file_of_boxes(tmp_path: Path) -> None:
    """Catches boxes that are not verified because others are missing."""
    folder = save(tmp_path, quarters())
    file = next(training_directory(folder).glob("rank-00002-*.tensors"))
    content = bytearray(next(training_directory(folder).glob("rank-00001-*.tensors")).read_bytes())
    file.unlink()
    report = shardsave.verify(folder, keep_going=True)
    assert [damage.shard for damage in report.damaged] == [f"{file.parent.name}/{file.name}"]
    content[-1] ^= 1
    other = next(training_directory(folder).glob("rank-00001-*.tensors"))
    other.unlink()
    other.write_bytes(content)
    assert len(shardsave.verify(folder, keep_going=True).damaged) == 2
