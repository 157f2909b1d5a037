"""Sources that a conversion must refuse: hostile pickles, damaged files, colliding paths. And how much memory a conversion takes.

Method: every refusal is one line in the usual shape, runs no code, and leaves source and destination unchanged.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import distributed, same

import shardsave
from warm_python import warm_python

pytestmark = pytest.mark.slow


class Evil:
    """Pickles as a call, which an unrestricted unpickler runs."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def refused(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        shardsave.convert(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and "nothing was written" in message and len(message) < 600
    return message


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_asks_for_a_command(tmp_path: Path, new_format: bool) -> None:
    """Catches a file of torch.save that is unpickled without torch's restrictions."""
    evil = Evil(os.system, f"touch {tmp_path}/owned")
    torch.save({"w": torch.ones(2), "x": evil}, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    assert refused(shardsave.UntrustedCodeError, tmp_path / "x.pt", tmp_path / "ckpt") == (
        f"cannot convert {tmp_path}/x.pt: tensors, numbers, strings and containers of these were expected, its pickle asks for "
        f"posix.system; nothing of it was run, and allow='posix.system' reads such an object as a record that does nothing; "
        f"nothing was written"
    )
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_programs_and_quantised_tensors(tmp_path: Path) -> None:
    """Catches programs and quantised tensors that are reported as damaged files of torch.save."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    torch.jit.script(model).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (torch.ones(2, 3),)), tmp_path / "program.pt2")
    for name, kind in (("script.pt", "a TorchScript archive"), ("program.pt2", "a program of torch.export")):
        message = refused(shardsave.IncompatibleCheckpointError, tmp_path / name, tmp_path / "ckpt")
        assert message.startswith(
            f"cannot convert {tmp_path}/{name}: a file of torch.save was expected, it is {kind}; load it with torch"
        )
    values = torch.rand(3, 2)
    kinds = {
        "tensor": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        "channel": torch.quantize_per_channel(values, torch.ones(3), torch.zeros(3), 0, torch.quint8),
    }
    for name, tensor in kinds.items():
        torch.save({"plain": torch.ones(2), "w": tensor}, tmp_path / f"{name}.pt")
        message = refused(shardsave.UnsupportedTensorError, tmp_path / f"{name}.pt", tmp_path / "ckpt")
        assert message == f"cannot save 'w': dtype {str(tensor.dtype)[6:]} has no safetensors equivalent; nothing was written"
    assert shardsave.convert(tmp_path / "tensor.pt", tmp_path / "rest", drop="w").notes == ()
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}).state_dict()
    torch.save(packed, tmp_path / "packed.pt")
    message = refused(shardsave.IncompatibleCheckpointError, tmp_path / "packed.pt", tmp_path / "ckpt")
    assert "'0._packed_params._packed_params' (2 tensors, 21 B, 1 of them quantized)" in message
    torch.save({"w": torch.ones(3).to_sparse()}, tmp_path / "sparse.pt")
    message = refused(shardsave.UnsupportedTensorError, tmp_path / "sparse.pt", tmp_path / "ckpt")
    assert "'w'" in message and "its layout is sparse_coo" in message and not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("call", [os.system, eval, exec, getattr, __import__, subprocess.Popen, torch.load, pickle.loads, type])
def test_a_table_that_asks_for_code(tmp_path: Path, call: Callable[..., Any]) -> None:
    """Catches a distributed checkpoint whose table reaches anything but inert records while it is unpickled."""
    distributed({"w": torch.ones(2)}, tmp_path / "dcp")
    for protocol in (0, 2, 4):
        (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(call, f"touch {tmp_path}/owned"), protocol))
        message = refused(shardsave.UntrustedCodeError, tmp_path / "dcp", tmp_path / "ckpt")
        assert (
            "the table of a distributed checkpoint was expected, its pickle asks for" in message
            and "nothing of it was run" in message
        )
    assert os.listdir(tmp_path) == ["dcp"]


def test_a_part_that_asks_for_a_command(tmp_path: Path) -> None:
    """Catches the archive of a tensor in a distributed checkpoint that is unpickled without restrictions."""
    distributed({"w": torch.ones(2)}, tmp_path / "dcp")
    file = tmp_path / "dcp" / "__0_0.distcp"
    length = file.stat().st_size
    torch.save(Evil(os.system, f"touch {tmp_path}/owned"), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    table = (tmp_path / "dcp" / ".metadata").read_bytes()
    assert length < 65536 and table.count(b"M" + length.to_bytes(2, "little")) == 1
    (tmp_path / "dcp" / ".metadata").write_bytes(
        table.replace(b"M" + length.to_bytes(2, "little"), b"M" + len(evil).to_bytes(2, "little"))
    )
    file.write_bytes(evil)
    assert "asks for posix.system" in refused(shardsave.UntrustedCodeError, tmp_path / "dcp", tmp_path / "ckpt")
    assert not (tmp_path / "owned").exists()


TABLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a pickled table was expected, it is broken"),
    "text": (b"hello, world", "a pickled table was expected, it is broken"),
    "no table": (pickle.dumps({"a": 1}), "the table of a distributed checkpoint was expected, it is a dict"),
    "memory": (b"\x80\x02Nr\xff\xff\xff\x7f.", "the table of a distributed checkpoint was expected, it is a NoneType"),
    "bytes": (b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".", "a pickled table was expected, it is broken"),
    "nesting": (b"\x80\x04" + b"]" * 10 + b"a" * 9 + b".", "it is a list"),
}


@pytest.mark.parametrize("name", TABLES)
def test_broken_tables(tmp_path: Path, name: str) -> None:
    """Catches a table that makes the reader allocate what it claims, or that raises an error of Python itself."""
    distributed({"w": torch.ones(2)}, tmp_path / "dcp")
    data, words = TABLES[name]
    (tmp_path / "dcp" / ".metadata").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refused(shardsave.CorruptCheckpointError, tmp_path / "dcp", tmp_path / "ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_every_cut_and_many_flips_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    """Catches a damaged table that raises another error than ours, or one of several lines."""
    state = {"w": torch.arange(6.0), "b": torch.ones(2)}
    distributed(state, tmp_path / "dcp")
    table = tmp_path / "dcp" / ".metadata"
    good = table.read_bytes()
    for at in range(0, len(good), 3):
        table.write_bytes(good[:at])
        refused(shardsave.CorruptCheckpointError, tmp_path / "dcp", tmp_path / "ckpt")
        table.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            shardsave.convert(tmp_path / "dcp", tmp_path / "flipped", durable=False)
        except shardsave.ShardSaveError as error:
            assert "\n" not in str(error)


def test_broken_files_of_torch(tmp_path: Path) -> None:
    """Catches a file whose pickle points outside the file, that was cut, or that has another format."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "x.pt")
    raw = (tmp_path / "x.pt").read_bytes()
    cases = {
        "cut": raw[:-100],
        "half": raw[:2000],
        "empty": b"",
        "text": b"no checkpoint at all",
        "zip": b"PK\x03\x04" + bytes(100),
    }
    for name, data in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        assert "a file of torch.save was expected" in refused(
            shardsave.CorruptCheckpointError, tmp_path / f"{name}.pt", tmp_path / "ckpt"
        )
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:100] if entry.filename.endswith("data/0") else data)
    message = refused(shardsave.CorruptCheckpointError, tmp_path / "short.pt", tmp_path / "ckpt")
    assert "it ends at" in message or "a file of torch.save was expected" in message
    assert not (tmp_path / "ckpt").exists()


def test_colliding_paths(tmp_path: Path) -> None:
    """Catches a source that is overwritten, a file replaced by a directory, and a directory created by a conversion that fails."""
    shardsave.save({"x": torch.ones(3)}, tmp_path / "ckpt")
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pt")
    (tmp_path / "link").symlink_to("ckpt")
    os.link(tmp_path / "x.pt", tmp_path / "y.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    one, inside = "two separate paths were expected, they are the same", "one is inside the other"
    for source, destination, to, words in (
        ("ckpt", "ckpt", "shardsave", one), ("ckpt", "link", "shardsave", one), ("x.pt", "x.pt", "torch", one),
        ("x.pt", "y.pt", "torch", one), ("ckpt", "ckpt/new", "shardsave", inside), ("ckpt", "ckpt/m.pt", "torch", inside),
        ("ckpt/model.safetensors.index.json", "ckpt", "shardsave", inside), ("x.pt", ".", "shardsave", inside),
    ):  # fmt: skip
        assert words in refused(ValueError, tmp_path / source, tmp_path / destination, to=to)
    for source, destination, to, words in (
        ("x.pt", "file", "shardsave", "a directory, or nothing, was expected, it is a file"),
        ("ckpt", "folder", "torch", "a regular file, or nothing, was expected, it is a directory"),
        ("ckpt", "folder", "safetensors", "a regular file, or nothing, was expected, it is a directory"),
        ("ckpt", "fifo", "torch", "a regular file, or nothing, was expected, it is a FIFO"),
    ):
        (tmp_path / "file").write_bytes(b"mine")
        (tmp_path / "folder").mkdir(exist_ok=True)
        if not (tmp_path / "fifo").exists():
            os.mkfifo(tmp_path / "fifo")
        assert words in refused(shardsave.SaveNotCommittedError, tmp_path / source, tmp_path / destination, to=to)
    with pytest.raises(shardsave.CheckpointNotFoundError, match=r"none.pt: No such file or directory"):
        shardsave.convert(tmp_path / "none.pt", tmp_path / "new" / "place")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        shardsave.CheckpointNotFoundError, match=r"pytorch_model.bin.index.json and .metadata was expected, none is there"
    ):
        shardsave.convert(tmp_path / "empty", tmp_path / "new" / "place")
    with pytest.raises(shardsave.CorruptCheckpointError, match="a regular file was expected, it is a FIFO"):
        shardsave.convert(tmp_path / "fifo", tmp_path / "new" / "place")
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_bytes() == b"mine"
    assert all(path.read_bytes() == data for path, data in before.items())


def test_names_that_collide_or_are_all_dropped(tmp_path: Path) -> None:
    """Catches a tensor that is silently lost because another gets the same name."""
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    message = refused(shardsave.IncompatibleCheckpointError, tmp_path / "x.pt", tmp_path / "c", rename=[("a|b", "q")])
    assert "'a' and 'b' would both be 'q'" in message
    assert "none is left" in refused(shardsave.IncompatibleCheckpointError, tmp_path / "x.pt", tmp_path / "c", drop="*")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"to": "pickle"}, ValueError), ({"dtype": "int8"}, ValueError), ({"dtype": 3}, TypeError), ({"drop": 3}, TypeError),
        ({"drop": [3]}, TypeError), ({"rename": "ab"}, TypeError), ({"rename": {"a": "b"}}, TypeError),
        ({"rename": [("(", "b")]}, ValueError),
        ({"rename": [("a", r"\7")]}, ValueError), ({"key": 3}, TypeError), ({"max_shard_size": "big"}, ValueError),
        ({"durable": 1}, TypeError),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], kind: type[Exception]) -> None:
    """Catches a wrong argument that is refused only after something was written."""
    with pytest.raises(kind):
        shardsave.convert(tmp_path / "none", tmp_path / "new", **options)


FULL = """
import resource, sys, torch, shardsave
torch.save({"x": torch.ones(1_000_000)}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    shardsave.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
except shardsave.SaveNotCommittedError as error:
    print(error)
"""


@pytest.mark.parametrize("to", ["torch", "safetensors", "shardsave"])
def test_a_file_that_cannot_be_written(tmp_path: Path, to: str) -> None:
    """Catches a failed write that leaves half a file at the destination, scratch files beside it, or a damaged previous file."""
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / ("ckpt" if to == "shardsave" else "m")
    if to != "shardsave":
        target.write_bytes(b"what was there")
    done = warm_python().run(["-c", FULL, tmp_path / "x.pt", target, to], action="ignore")
    assert "File too large" in done.stdout and "nothing was" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert os.listdir(tmp_path / "out") == [target.name]
    assert os.listdir(target) == [] if to == "shardsave" else target.read_bytes() == b"what was there"


MEMORY = """
import sys, threading, time, torch, shardsave
def now():
    return {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in open("/proc/self/status")) if k in ("VmRSS", "RssAnon")}
source, target, to, dtype = sys.argv[1:5]
small = {"x": torch.ones(5_000_000)}
torch.save(small, target + ".small")
shardsave.convert(target + ".small", target + ".warm", dtype="float64")  # allocates what is needed once: the ring of buffers, the code
base, most, done = now(), {}, threading.Event()
def watch():
    while not done.wait(0.002):
        for name, kilobytes in now().items():
            most[name] = max(most.get(name, 0), kilobytes - base[name])
watcher = threading.Thread(target=watch)
watcher.start()
shardsave.convert(source, target, to=to, dtype=dtype or None, durable=False)
done.set()
watcher.join()
print(most["VmRSS"], most["RssAnon"])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """A file of torch.save with 320 MB, and what is in it."""
    path, state = tmp_path_factory.mktemp("large") / "x.pt", {f"w{n}": torch.ones(8_000_000) for n in range(10)}
    torch.save({"model": state}, path)
    yield path, state
    path.unlink()


@pytest.mark.parametrize(
    ("to", "dtype"), [("shardsave", ""), ("shardsave", "bfloat16"), ("safetensors", ""), ("torch", ""), ("torch", "float16")]
)
def test_memory_is_bounded(tmp_path: Path, large: tuple[Path, dict[str, torch.Tensor]], to: str, dtype: str) -> None:
    """Catches a conversion that holds the model, or a cast copy of it, in memory.

    For a model of 320 MB, resident memory may grow by 256 MB, of which 100 MB may be anonymous.
    """
    path, state = large
    done = warm_python().run(["-c", MEMORY, path, tmp_path / "new", to, dtype], action="ignore")
    assert done.returncode == 0, done.stderr
    resident, anonymous = map(int, done.stdout.split())
    assert resident < 256_000 and anonymous < 100_000
    if to == "shardsave":
        assert same(shardsave.load(tmp_path / "new"), {name: t.bfloat16() if dtype else t for name, t in state.items()})
