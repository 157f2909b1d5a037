"""`verify` asks safetensors' own parser about every header. No file is known that only ours accepts, so our parser is broken on purpose."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import shardsave
from rank_files import cut, save_ranks
from shardsave._common import strict_json
from shardsave._format.header import Header, Tensors, parse_header
from shardsave._format.packing import MAX_SHARD_HEADER_BYTES
from shardsave._storage import second_opinion, shard_files
from shardsave._storage.second_opinion import SecondOpinion

Change = Callable[[Header], Header]

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """Three tensors in two shards: a b, c."""
    state = {"a": torch.ones(4), "b": torch.ones(2, 2), "c": torch.ones(3)}
    shardsave.save(state, tmp_path / "ckpt", max_shard_size=32, durable=False)
    return tmp_path / "ckpt"


def columns(**columns: tuple[object, ...]) -> Change:
    """Replaces columns of the header's tensors."""
    return lambda header: header._replace(tensors=header.tensors._replace(**columns))


def one_more(header: Header) -> Header:
    names, dtypes, shapes, begins, sizes = map(tuple, header.tensors)
    return columns(
        names=(*names, "z"), dtypes=(*dtypes, "F32"), shapes=(*shapes, (0,)), begins=(*begins, 32), nbytes=(*sizes, 0)
    )(header)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            columns(dtypes=("F32", "I32")),
            "for 'b' it reads F32 of shape [2, 2] at 16, shardsave reads I32 of shape [2, 2] at 16",
        ),
        (columns(shapes=((2, 2), (2, 2))), "for 'a' it reads F32 of shape [4] at 0, shardsave reads F32 of shape [2, 2] at 0"),
        (columns(begins=(16, 0)), "for 'a' it reads F32 of shape [4] at 0, shardsave reads F32 of shape [4] at 16"),
        (columns(names=("a", "x")), "for 'b' it reads F32 of shape [2, 2] at 16, shardsave reads no such tensor"),
        (one_more, "it reads no tensor 'z'"),
        (lambda header: header._replace(metadata={}), "it reads another __metadata__"),
    ],
    ids=["dtype", "shape", "offset", "name", "one more", "metadata"],
)
def test_another_reading(ckpt: Path, monkeypatch: pytest.MonkeyPatch, change: Change, difference: str) -> None:
    """Catches a header that other libraries read differently and `verify` calls intact: the checksums are those of our reading."""

    def parse(data: bytes, file_length: int, where: str) -> Header:
        header = parse_header(data, file_length, where)
        return change(header) if where == f"shard {SHARD}" else header

    monkeypatch.setattr(shard_files, "parse_header", parse)
    monkeypatch.setattr("shardsave._storage.open_checkpoint._note_tensors", lambda *_: None)  # sees only some of these
    message = (
        f"corrupt shard {SHARD}: header: safetensors' own parser expected to read the same as shardsave, {difference}; nothing"
    )
    with pytest.raises(shardsave.CorruptCheckpointError) as error:
        shardsave.verify(ckpt)
    assert str(error.value).startswith(message)
    report = shardsave.verify(ckpt, keep_going=True)
    (damage,) = report.damaged
    assert (damage.shard, damage.tensors, report.verified) == (SHARD, ("a", "b"), False) and damage.message.startswith(message)


def test_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that no other library opens and `verify` calls intact: here our parser accepts a gap between two tensors."""
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}'
    path = tmp_path / "gap.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"123")
    whole = parse_header(*_without_gap(text), "file")
    monkeypatch.setattr(shard_files, "parse_header", lambda *_: columns(begins=(0, 2))(whole))
    (damage,) = shardsave.verify(path, keep_going=True).damaged
    assert (
        "own parser expected to read the same as shardsave, it refuses it (Error while deserializing header: " in damage.message
    )
    with pytest.raises(shardsave.CorruptCheckpointError, match="it refuses it"):
        shardsave.verify(path)
    assert shardsave.load(path)["y"].item() == ord("3")  # only `verify` asks


def _without_gap(text: bytes) -> tuple[bytes, int]:
    text = text.replace(b"[2,3]", b"[1,2]")
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + 2


def extra_tensors(folder: Path) -> None:
    model = torch.nn.Linear(1, 1)
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    shardsave.save(model, folder, architecture=True, durable=False)


def lone_file(folder: Path) -> None:
    folder.mkdir()
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")


def files_of_ranks(folder: Path) -> None:
    state = {"x": torch.ones(4, 2)}
    save_ranks(folder, state, {"x": cut(state["x"], 0)})


@pytest.mark.parametrize("write", [extra_tensors, lone_file, files_of_ranks])
def test_every_header_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]) -> None:
    """Catches a kind of file about which safetensors is not asked, and a file that is left open."""
    folder = tmp_path / "ckpt"
    write(folder)
    judged = set()
    check = SecondOpinion.check

    def note(self: SecondOpinion, raw: bytes, length: int, header: Header, file: str) -> None:
        judged.add(file)
        check(self, raw, length, header, file)

    monkeypatch.setattr(SecondOpinion, "check", note)
    shardsave.verify(folder)
    in_use = len(os.listdir("/proc/self/fd"))
    report = shardsave.verify(folder)
    assert len(os.listdir("/proc/self/fd")) == in_use and not report.damaged
    assert all(note.startswith("whole shapes are not recorded") for note in report.notes)  # of ranks
    assert judged == {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".tensors")}


def test_an_older_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dtype that the installed safetensors does not know and that counts as damage, or goes unmentioned."""

    def refuse(header: bytes) -> None:
        if b"F8_E4M3FNUZ" in header:
            raise safetensors.SafetensorError("unknown variant `F8_E4M3FNUZ`")

    def safe_open(path: str, framework: str) -> object:
        refuse(Path(path).read_bytes())
        return safetensors.safe_open(path, framework)

    older = SimpleNamespace(
        __version__="0.7.0", SafetensorError=safetensors.SafetensorError, safe_open=safe_open, deserialize=refuse
    )
    monkeypatch.setattr(second_opinion, "safetensors", older)
    second_opinion._knows.cache_clear()
    try:
        shardsave.save({"a": torch.ones(4), "b": torch.ones(2).to(torch.float8_e4m3fnuz)}, tmp_path, max_shard_size=16)
        report = shardsave.verify(tmp_path, keep_going=True)
        monkeypatch.setattr(older, "safe_open", lambda *_: refuse(b"F8_E4M3FNUZ"))
        shardsave.save({"a": torch.ones(4)}, tmp_path)
        damaged = shardsave.verify(tmp_path, keep_going=True)
    finally:
        second_opinion._knows.cache_clear()
    shard = "model-00002-of-00002.safetensors"
    note = f"safetensors 0.7.0 has no second opinion on the header of {shard}: it does not know F8_E4M3FNUZ"
    assert report.notes == (note,) and report.verified is True and not report.damaged
    assert len(damaged.damaged) == 1, "a refusal for another reason"


def test_a_system_without_files_in_memory(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an intact checkpoint that cannot be verified where safetensors cannot be asked, or that is silent about it."""

    def memfd_create(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    report = shardsave.verify(ckpt)
    (note,) = report.notes
    assert report.verified is True
    assert f"{SHARD}, model-00002-of-00002.safetensors: it cannot be asked ([Errno 38] Function not implemented)" in note


def test_memory_for_the_header_alone() -> None:
    """Catches an opinion that costs memory or time for the data of a shard: here 1 TB."""
    size = 10**12
    text = f'{{"x":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    raw, length = len(text).to_bytes(8, "little") + text, 8 + len(text) + size
    opinion = SecondOpinion()
    opinion.check(raw, length, parse_header(raw, length, "file"), "file")
    assert opinion.notes == ()


def judged(text: bytes) -> tuple[int, tuple[str, ...]]:
    """The most memory that judging the header ``text`` takes, in bytes, and the notes."""
    raw, header = parsed(text)
    opinion = SecondOpinion()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    opinion.check(raw, len(raw), header, "file")
    return status("VmHWM") - before, opinion.notes


def parsed(text: bytes) -> tuple[bytes, Header]:
    raw = len(text).to_bytes(8, "little") + text
    return raw, parse_header(raw, len(raw), "file")


def status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def tensor(number: int, shape: str = "0") -> str:
    return f'"{number:07x}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,0]}}'


#: Headers of some 4 MB for which safetensors takes far more memory than their text.
LARGE = {
    "tensors": "{" + ",".join(map(tensor, range(65_000))) + "}",
    "shapes": "{" + ",".join(tensor(number, "0" + ",0" * 99) for number in range(16_000)) + "}",
    "metadata": '{"__metadata__":{' + ",".join(f'"{number:06x}":""' for number in range(330_000)) + "}}",
    "one wide name": '{"😀' + "a" * 4_000_000 + '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("kind", LARGE)
def test_memory_of_a_hostile_header(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Catches an opinion that takes more memory than a hostile document may, or is left out silently. The bound is lowered: 4 MB stand
    for 100 MB."""
    text = LARGE[kind].encode()
    estimate = second_opinion._memory(*parsed(text))
    taken, notes = judged(text)
    assert taken < estimate and notes == ()
    monkeypatch.setattr(strict_json, "MAX_DOCUMENT_MEMORY", 8 * len(text))
    monkeypatch.setattr(strict_json, "check_memory", lambda _: None)  # our own parser is not meant here
    taken, notes = judged(text)
    said = f"has no second opinion on the header of file: that would take up to {estimate / 1e6:.1f} MB of memory"
    assert taken < len(text) and len(notes) == 1 and notes[0].endswith(said)


def test_the_longest_header_of_a_shard_is_judged() -> None:
    """Catches a bound that leaves headers without a second opinion that a save writes."""
    entry = len('"00000":{"dtype":"U8","shape":[],"data_offsets":[0,0]},') + 16  # the shortest, and its checksum
    count = MAX_SHARD_HEADER_BYTES // entry
    header = Header(Tensors([""] * count, [""] * count, [()] * count, [0] * count, [0] * count), {}, 0, None)
    assert second_opinion._memory(b" " * MAX_SHARD_HEADER_BYTES, header) <= strict_json.MAX_DOCUMENT_MEMORY // 2
