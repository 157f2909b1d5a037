"""Method: every verb that reads a training state is called with every bad one in the table. It must raise exactly the message in the
table, and verbs that need only the weights must not notice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from file_cases import SPECIALS, link_to_itself, link_to_nothing
from tampering import INDEX, Json, crc, edit_index, record_of, rewrite
from test_refusal_coverage import refusals

import shardsave
from shardsave._format import training_state as format_of_training
from shardsave._storage import training as reading
from shardsave._storage.open_checkpoint import open_checkpoint
from training_state import save_with_training, training_directory, training_generation

FIRST, SECOND, RANK = "rank-00000-00001.tensors", "rank-00000-00002.tensors", "rank-00000.json"

Damage = Callable[[Path], object]


def replace_document(folder: Path, text: str | bytes) -> None:
    """Replaces the document of the training state, and its record in the index."""
    content = text.encode() if isinstance(text, str) else text
    rewrite(training_directory(folder) / "index.json", content)
    record = [len(content), len(content), crc(content)]
    edit_index(folder, lambda index: index["shardsave"]["parts"]["training state"].__setitem__(slice(1, None), record))


def edit(change: Callable[[Json], object]) -> Damage:
    """Changes the document of the training state, and its record in the index."""

    def damage(folder: Path) -> None:
        document = json.loads((training_directory(folder) / "index.json").read_bytes())
        change(document)
        replace_document(folder, json.dumps(document))

    return damage


def edit_rank(change: Callable[[Json], object]) -> Damage:
    """Changes the document of a rank, and its record."""

    def damage(folder: Path) -> None:
        path = training_directory(folder) / RANK
        document = json.loads(path.read_bytes())
        change(document)
        content = json.dumps(document).encode()
        rewrite(path, content)
        edit(lambda top: top["files"].update({RANK: [len(content), len(content), crc(content)]}))(folder)

    return damage


def same_tensors_twice(folder: Path) -> None:
    content = (training_directory(folder) / FIRST).read_bytes()
    rewrite(training_directory(folder) / SECOND, content)
    edit(lambda top: top["files"].update({SECOND: record_of(content)}))(folder)


def put(name: str, create: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (training_directory(folder) / name).unlink()
        create(training_directory(folder) / name)

    return damage


def put_directory(create: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        training = training_directory(folder)
        training.rename(folder / "elsewhere")
        create(training)

    return damage


def refused(refusal: str, file: str = "index.json") -> str:
    return f"corrupt part $TRAINING/{file}: {refusal}; nothing else of the training state was read"


def newer(version: object, requires: object, file: str = "index.json") -> str:
    return (
        f"cannot read part $TRAINING/{file}: it is of version {version} and requires {requires}, which this version of shardsave does "
        "not know; the checkpoint is intact, read it with a newer version"
    )


PART = "the checkpoint was copied or downloaded in part"
CRC = "0" * 16
RECORD = "expected to have length, header length and checksum, it has"

CASES: list[tuple[str, str, Damage]] = [
    ("empty", refused("JSON expected, it is empty"), lambda folder: replace_document(folder, "        ")),
    ("no JSON", refused("JSON expected, it is broken at character 0"), lambda folder: replace_document(folder, b"PK\3\4" * 3)),
    ("deep JSON", refused("JSON expected, it is nested too deeply"), lambda folder: replace_document(folder, '{"a":' * 99_999)),
    ("a list", refused("a JSON object expected, it is []"), lambda folder: replace_document(folder, "[]      ")),
    ("a member twice", refused("keys expected once, 'format' appears twice"),
     lambda folder: replace_document(folder, '{"format":1,"format":1}')),
    ("another format", refused("format shardsave-training expected, it is 'shardsave-program'"),
     edit(lambda top: top.update(format="shardsave-program"))),
    ("document of a rank", refused("format shardsave-training expected, it is 'shardsave-training-rank'"),
     edit(lambda top: top.update(format="shardsave-training-rank"))),
    ("newer version", newer(2, "[]"), edit(lambda top: top.update(version=2))),
    ("newer feature", newer(1, "['spiral']"), edit(lambda top: top.update(requires=["spiral"]))),
    ("no version", newer("null", "[]"), edit(lambda top: top.pop("version"))),
    ("ranks is zero", refused("ranks expected to be a number of processes, it is 0"), edit(lambda top: top.update(ranks=0))),
    ("ranks is true", refused("ranks expected to be a number of processes, it is true"), edit(lambda top: top.update(ranks=True))),
    ("files is a list", refused("files expected to be an object, it is []"), edit(lambda top: top.update(files=[]))),
    ("no shared values", refused("shared values expected, there are none"), edit(lambda top: top.pop("shared"))),
    *((f"file {name!r}", refused(f"files of 1 ranks expected, it names {name!r}"),
       edit(lambda top, name=name: top["files"].update({name: [8, 8, CRC]})))
      for name in ("../../etc/passwd", "/etc/passwd", "..", "", "index.json", "rank-00001.json", "rank-0.json", "rank-00000.json\n",
                   "rank-00000-00001.safetensors", "a/rank-00000.json", "rank-00000-0000١.tensors")),
    ("record is a number", f"corrupt part $TRAINING/index.json: file {RANK} {RECORD} 5; no shard was opened",
     edit(lambda top: top["files"].update({RANK: 5}))),
    ("rank: another format", refused("format shardsave-training-rank expected, it is null", RANK),
     edit_rank(lambda top: top.pop("format"))),
    ("rank: newer", newer(1, "['x']", RANK), edit_rank(lambda top: top.update(requires=["x"]))),
    ("rank: another rank", refused("rank 0 expected, it is 1", RANK), edit_rank(lambda top: top.update(rank=1))),
    ("rank: true", refused("rank 0 expected, it is false", RANK), edit_rank(lambda top: top.update(rank=False))),
    ("rank: leaves is a list", refused("leaves expected to be an object, it is []", RANK),
     edit_rank(lambda top: top.update(leaves=[]))),
    ("a name in two files",
     f"corrupt shard $TRAINING/{SECOND}: names that no other file of the training state has were expected, 'optimizer/m0' is also in "
     f"$TRAINING/{FIRST}; nothing else of the training state was read", same_tensors_twice),
    ("document missing", f"corrupt checkpoint $DIR: the index names $TRAINING/index.json, there is no such file; {PART}",
     lambda folder: (training_directory(folder) / "index.json").unlink()),
    ("directory missing", f"corrupt checkpoint $DIR: the index names $TRAINING/index.json, there is no such file; {PART}",
     lambda folder: training_directory(folder).rename(folder / "elsewhere")),
    ("tensors missing", f"corrupt checkpoint $DIR: the index names $TRAINING/{SECOND}, there is no such file; {PART}",
     lambda folder: (training_directory(folder) / SECOND).unlink()),
    ("tensors cut", f"corrupt shard $TRAINING/{FIRST}: the index says 6896 bytes, the file has 6895; it was cut, half copied or half "
     "downloaded, or it belongs to another save",
     lambda folder: os.truncate(training_directory(folder) / FIRST, 6895)),
    *((f"{file} is {word}", f"corrupt shard $TRAINING/{file}: $DIR/$TRAINING/{file}: a regular file was expected, it is {kind}; it was "
       "not read", put(file, create)) for file in ("index.json", RANK, FIRST) for word, kind, create in SPECIALS),
    ("a link to nothing", f"corrupt checkpoint $DIR: the index names $TRAINING/{FIRST}, it is a link to nothing; {PART}",
     put(FIRST, link_to_nothing)),
    *((f"directory is {word}", f"corrupt checkpoint $DIR: the index names $TRAINING/index.json, there is no such file; {PART}",
       put_directory(create)) for word, _, create in SPECIALS if create is not link_to_itself),
]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_with_training({"x": torch.ones(3)}, tmp_path / "ckpt", durable=False)
    return tmp_path / "ckpt"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("message", "damage"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused(message: str, damage: Damage, checkpoint: Path) -> None:
    """Catches a bad training state that is read, an unclear message, an error of Python itself, a hang, a leaked descriptor, and a load of
    the weights that fails because of it."""
    name = training_directory(checkpoint).name
    damage(checkpoint)
    expected = message.replace("$DIR", str(checkpoint)).replace("$TRAINING", name)
    before = len(os.listdir("/proc/self/fd"))
    for verb in (
        shardsave.verify,
        lambda path: open_checkpoint(path, parts=["training state"]),
        lambda path: shardsave.diff(path, path),
        lambda path: shardsave.convert(path, checkpoint.parent / "converted"),
    ):
        with pytest.raises(shardsave.ShardSaveError) as caught:
            verb(checkpoint)
        assert str(caught.value) == expected
    del caught
    assert len(os.listdir("/proc/self/fd")) == before
    assert shardsave.load(checkpoint)["x"].tolist() == [1, 1, 1] and shardsave.inspect(checkpoint).part_bytes
    assert shardsave.convert(checkpoint, checkpoint.parent / "weights", drop="training", durable=False).tensors == 1
    report = shardsave.verify(checkpoint, keep_going=True)
    assert report.verified is False and expected in [damage.message for damage in report.damaged]
    assert not (checkpoint.parent / "converted").exists()


def test_verify_names_every_damaged_file(checkpoint: Path) -> None:
    """Catches a damaged file of a training state behind which others are not read, or whose tensors are called intact."""
    training = training_directory(checkpoint)
    content = (training / FIRST).read_bytes()
    rewrite(training / FIRST, content[:-1] + bytes([content[-1] ^ 1]))
    (training / RANK).unlink()
    report = shardsave.verify(checkpoint, keep_going=True)
    assert {damage.shard: damage.tensors for damage in report.damaged} == {
        f"{training.name}/{FIRST}": ("optimizer/m0",),
        f"{training.name}/{RANK}": (),
    }
    assert report.intact[f"{training.name}/{SECOND}"] == ("optimizer/m1",) and f"{training.name}/{RANK}" not in report.intact
    with pytest.raises(shardsave.CorruptCheckpointError):
        shardsave.verify(checkpoint)


@pytest.mark.slow
def test_every_byte_counts(checkpoint: Path) -> None:
    """Catches a flipped byte of a training state that `verify` does not notice; those between a header and the data are padding."""
    for path in sorted(training_directory(checkpoint).iterdir()):
        content = path.read_bytes()
        for at in range(0, len(content), 37):
            rewrite(path, content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            assert shardsave.verify(checkpoint, keep_going=True).verified is False, (path.name, at)
        rewrite(path, content)
    assert shardsave.verify(checkpoint).verified and training_generation(checkpoint) == 1


def test_every_refusal_is_attacked(tmp_path: Path) -> None:
    """Catches a refusal that was added without an attack, and a refusal that cannot be reached."""
    files = {str(module.__file__): Path(str(module.__file__)) for module in (format_of_training, reading)}
    reached: dict[str, set[int]] = {name: set() for name in files}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines = reached.get(frame.f_code.co_filename)
        if lines is not None and event == "line":
            lines.add(frame.f_lineno)
        return trace if lines is not None else None

    before = sys.gettrace()
    for number, (_, _, damage) in enumerate(CASES):
        folder = tmp_path / str(number)
        save_with_training({"x": torch.ones(3)}, folder, durable=False)
        damage(folder)
        sys.settrace(trace)
        try:
            with pytest.raises(shardsave.ShardSaveError):
                open_checkpoint(folder, parts=["training state"])
        finally:
            sys.settrace(before)
    missed = [
        f"{Path(name).name}:{line}: {text}"
        for name, path in files.items()
        for line, text in refusals(path).items()
        if line not in reached[name]
    ]
    assert not missed, "\n".join(["no attack reaches", *missed])
    assert (tmp_path / "0" / INDEX).exists()
