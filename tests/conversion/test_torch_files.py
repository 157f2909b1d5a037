"""Files of torch.save in all their forms: sound ones are read, everything that their pickle names stays inert, others are named.

Method: torch itself writes the files, and pickles name objects that would leave a trace if they were imported or called.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import io
import os
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_convert import same
from torch import nn

import shardsave
from shardsave._foreign.pickled_tensors import _NAMES, Names
from shardsave._foreign.unpickling import Unpickler
from support import SmallModel

W = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def converted(source: Path, **options: Any) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    report = shardsave.convert(source, source.with_name("converted"), durable=False, **options)
    return shardsave.load(source.with_name("converted")), report.notes


def kinds_of_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    z = torch.complex(base, base + 1)
    attributes = torch.ones(3)
    attributes.note = "an attribute"  # type: ignore[attr-defined]
    return {
        "whole": base, "transposed": base.t(), "slice": base[1:3, 2:4], "conj": z.conj(), "neg": z.clone().conj().imag,
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "parameter": nn.Parameter(torch.ones(2)),
        "bool": torch.tensor([True, False]), "u16": torch.ones(3, dtype=torch.uint16), "f8": base.to(torch.float8_e4m3fn),
        "attributes": attributes,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path: Path, protocol: int, zipped: bool) -> None:
    """Catches a sound file that is called corrupt because of its protocol, and tensors that differ in one of the forms."""
    state = {**SmallModel().state_dict(), **kinds_of_tensors()}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    loaded, notes = converted(tmp_path / "x.pt")
    assert same(loaded, {name: tensor.detach() for name, tensor in state.items()})
    assert notes == ("left out, since an attribute of a tensor: 'attributes.note' (str)",)
    assert shardsave.inspect(tmp_path / "converted").ties.items() >= {("head.weight", "embed.weight")}


def test_a_file_without_checksums(tmp_path: Path) -> None:
    """Catches a sound file that is called corrupt because torch wrote no checksums into it."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(W, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(converted(tmp_path / "x.pt")[0], W)


@pytest.mark.parametrize("to", ["shardsave", "safetensors", "torch"])
def test_any_default_device(tmp_path: Path, to: str) -> None:
    """Catches memory of a conversion that is made on torch's default device and not on the CPU."""
    torch.save(W, tmp_path / "x.pt")
    torch.save(W, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    shardsave.save(W, tmp_path / "ckpt")
    for source in ("x.pt", "old.pt", "ckpt"):
        for dtype in (None, "float64"):
            with torch.device("meta"):
                shardsave.convert(tmp_path / source, tmp_path / "out", to=to, dtype=dtype, durable=False)
            read = torch.load if to == "torch" else shardsave.load
            assert same(read(tmp_path / "out"), {name: t.to(getattr(torch, dtype)) if dtype else t for name, t in W.items()})
        with warnings.catch_warnings(), torch.device("meta"):
            loaded = shardsave.load(tmp_path / "ckpt")
            assert same(loaded, W)


def test_parts_of_storages_in_torchs_oldest_files(tmp_path: Path) -> None:
    """Catches a view of a storage, as torch wrote it before version 0.4, that begins at the wrong element or ends outside."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            return value.saved if isinstance(value, Saved) else None

    for part, words in (((2, 3), None), ((4, 3), "refers to a part outside of its storage")):
        storage = Saved(("storage", torch.FloatStorage, "7", "cpu", 6, ("view", *part)))
        with open(tmp_path / "x.pt", "wb") as file:
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(value, file, 2)
            Writer(file, 2).dump({"w": Rebuilt(torch._utils._rebuild_tensor, (storage, 0, (3,), (1,)))})
            pickle.dump(["7"], file, 2)
            file.write((6).to_bytes(8, "little") + np.arange(6, dtype=np.float32).tobytes())
        if words is None:
            assert same(converted(tmp_path / "x.pt")[0], {"w": torch.arange(2.0, 5.0)})
        else:
            with pytest.raises(shardsave.CorruptCheckpointError, match=words):
                converted(tmp_path / "x.pt")


class Saved:
    """Pickles as a persistent id."""

    def __init__(self, saved: Any) -> None:
        self.saved = saved


class Rebuilt:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@dataclasses.dataclass
class Config:
    """A class of a training script: only the name of its module and its own are in a file."""

    width: int = 3
    weights: Any = None


def usual_values() -> dict[str, Any]:
    """What training scripts and libraries store beside the weights."""
    return {
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)), "best": np.float64(0.5), "count": np.int64(3),
        "words": np.array(["a"]), "objects": np.array([{}]),
        "seen": collections.defaultdict(list, a=[1]), "counts": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1), "space": types.SimpleNamespace(x=1), "folder": Path("/tmp"),
        "when": datetime.datetime(2024, 1, 1), "names": {"a", "b"}, "queue": collections.deque([1, 2]), "kind": np.dtype("f4"),
        "bytes": b"raw", "complex": 1j, "size": torch.Size([1, 2]), "dtype": torch.float16, "device": torch.device("cpu"),
        "nothing": None,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_usual_values_beside_the_weights(tmp_path: Path, protocol: int, zipped: bool) -> None:
    """Catches a usual file that is refused for a value beside its weights, or a value that is left out without a note."""
    torch.save(
        {"model": W, **usual_values()}, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )
    state, (note,) = converted(tmp_path / "x.pt")
    assert same(state, W) and "left out, since not in 'model': 'args' (argparse.Namespace), 'best' (numpy" in note
    state, notes = converted(tmp_path / "x.pt", drop=[*usual_values()])
    assert same(state, W) and notes == ()


def test_tensors_in_records(tmp_path: Path) -> None:
    """Catches weights inside of an object that are lost, because objects are not what they were."""
    ema = argparse.Namespace(weights={"w": torch.ones(3)}, decay=0.9)
    torch.save({"model": W, "ema": ema}, tmp_path / "x.pt")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'ema.weights' \(1 tensor, 12 B\)"):
        converted(tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt", key="ema.weights")[0], {"w": torch.ones(3)})
    _, notes = converted(tmp_path / "x.pt", key="model")
    assert notes == ("left out, since not in 'model': 'ema' (argparse.Namespace, 1 tensor, 12 B)",)
    torch.save(collections.defaultdict(dict, W), tmp_path / "y.pt")
    assert same(converted(tmp_path / "y.pt")[0], W)


def test_names_that_are_allowed(tmp_path: Path) -> None:
    """Catches a refusal without a way on, a way that imports what it allows, and tensors in such an object that are lost."""
    name = f"{__name__}.Config"
    torch.save({"model": W, "config": Config(5), "more": Config(6)}, tmp_path / "x.pt")
    with pytest.raises(shardsave.UntrustedCodeError) as caught:
        converted(tmp_path / "x.pt")
    assert f"its pickle asks for {name}; nothing of it was run, and allow='{name}' reads such an object" in str(caught.value)
    state, notes = converted(tmp_path / "x.pt", allow=name)
    assert same(state, W) and notes == (f"left out, since not in 'model': 'config' ({name}), 'more' ({name})",)
    torch.save({"model": W, "config": Config(5, [torch.ones(2)])}, tmp_path / "y.pt")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'weights.0' \(1 tensor|'config' \(1 tensor"):
        converted(tmp_path / "y.pt", allow=[name])
    with pytest.raises(TypeError, match="allow must be names of classes"):
        converted(tmp_path / "y.pt", allow=[3])


def calls(canary: Path) -> Iterator[tuple[str, Any]]:
    """Objects whose unpickling would write ``canary``, or change what an unpickler returns later."""
    command = f"touch {canary}"
    yield "posix.system", Rebuilt(os.system, (command,))
    yield "builtins.eval", Rebuilt(eval, (f"open({str(canary)!r}, 'w')",))
    yield "builtins.getattr", Rebuilt(getattr, (Rebuilt(Path, (str(canary),)), "touch"))
    yield (
        "torch.storage._load_from_bytes",
        Rebuilt(torch.storage._load_from_bytes, (pickle.dumps(Rebuilt(os.system, (command,))),)),
    )
    yield "torch.serialization.load", Rebuilt(torch.load, (str(canary),))
    yield "torch.hub.load", Rebuilt(torch.hub.load, (str(canary), "x"))
    yield "test_torch_files.Rebuilt", Rebuilt(Rebuilt, (os.system, (command,)))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_a_pickle_names_is_called(tmp_path: Path, zipped: bool) -> None:
    """Catches a name that a file reaches, with and without the permission of the user: then its object is a record as well."""
    canary = tmp_path / "canary"
    for name, value in calls(canary):
        torch.save({"model": W, "x": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(shardsave.UntrustedCodeError, match=name):
            converted(tmp_path / "x.pt")
        state, _ = converted(tmp_path / "x.pt", allow=[name, "posix.system"])
        assert same(state, W) and not canary.exists()


def test_nothing_is_imported(tmp_path: Path) -> None:
    """Catches an import of the module that a pickle names: importing alone runs its code."""
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass A: pass\n")
    data = b"\x80\x02}(X\x01\x00\x00\x00xchostile_module\nA\n)\x81u."
    torch.save({}, tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    sys.path.insert(0, str(tmp_path))
    try:
        for allow in ((), ("hostile_module.A",)):
            with pytest.raises(shardsave.ShardSaveError):
                converted(tmp_path / "x.pt", allow=allow)
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "canary").exists() and "hostile_module" not in sys.modules


def test_a_pickle_cannot_change_what_it_names() -> None:
    """Catches a value in the tables that a pickle can change or call with an effect, so that a later file is read differently."""
    key, value = b"X\x07\x00\x00\x00__new__", b"N"
    fields, slots = b"}" + key + value + b"s", b"N}" + key + value + b"s\x86"
    uses = [code for state in (fields, slots) for code in (state + b"b", b")R" + state + b"b", b")\x81" + state + b"b")]
    uses += [value + b"a", b"(" + value + b"e", key + value + b"s", b"(" + key + value + b"u", b"(" + value + b"\x90"]
    for module, name in _NAMES:
        value_of_name = _NAMES[module, name]
        before = dict(vars(value_of_name)) if isinstance(value_of_name, type) else None
        for use in uses:
            with contextlib.suppress(Exception):  # most of these fail
                Unpickler(io.BytesIO(b"\x80\x02c" + f"{module}\n{name}\n".encode() + use + b"."), Names().find).load()
        assert before is None or dict(vars(value_of_name)) == before, name


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02\x82\x01.", "extension code"), (b"\x80\x05\x96" + (1 << 50).to_bytes(8, "little") + b".", "MemoryError|ends too early"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", None), (b"\x80\x04X\xff\xff\xff\x7f.", "UnpicklingError|EOFError"),
        (b"\x80\x02" + b"(" * 100_000, "EOFError"), (b"\x80\x02K\x01Q.", "TypeError"), (b"", "EOFError"),
        (b"\x80\x02ctorch\nSize\ncargparse\nNamespace\n)\x81R.", "TypeError"),
        (b"\x80\x02N0.", "IndexError|UnpicklingError"), (b"\x80\x09.", "ValueError"),
    ],
)  # fmt: skip
def test_hostile_pickles(tmp_path: Path, pickled: bytes, words: str | None) -> None:
    """Catches a pickle that makes the reader allocate what it claims, or that raises an error of Python itself."""
    torch.save({}, tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    kind = shardsave.IncompatibleCheckpointError if words is None else shardsave.CorruptCheckpointError
    with pytest.raises(kind, match=words or "one mapping of names to tensors was expected"):
        converted(tmp_path / "x.pt")


def test_an_interrupt_ends_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C that becomes an error of a corrupt file, after which a program goes on.

    Method: the N-th read of the source is interrupted, for N = 1, 2, … until the conversion succeeds.
    """
    from shardsave._common import os_calls
    from shardsave._foreign import torch_file, torch_pickle

    for form in (True, False):
        torch.save(W, tmp_path / "x.pt", _use_new_zipfile_serialization=form)
        for last in range(1, 100):
            reads = iter(range(1, 1000))

            def interrupted(*arguments: Any, reads: Iterator[int] = reads, last: int = last) -> bytes:
                if next(reads) == last:
                    raise KeyboardInterrupt
                return os_calls.read_at(*arguments)

            for module in (torch_file, torch_pickle):
                monkeypatch.setattr(module, "read_at", interrupted)
            try:
                shardsave.convert(tmp_path / "x.pt", tmp_path / "out", durable=False)
            except KeyboardInterrupt:
                assert not (tmp_path / "out").exists()
            else:
                break
        assert 2 < last < 99
        for module in (torch_file, torch_pickle):
            monkeypatch.setattr(module, "read_at", os_calls.read_at)
        shardsave.convert(tmp_path / "x.pt", tmp_path / "out", durable=False)
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    """Catches an advice that leads in a circle: a file of one kind under a name of the other is converted as what it is."""
    torch.save(W, tmp_path / "x.safetensors")
    with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
        shardsave.load(tmp_path / "x.safetensors")
    assert f"shardsave convert {tmp_path}/x.safetensors DST makes a checkpoint of it" in str(caught.value)
    assert same(converted(tmp_path / "x.safetensors")[0], W)
    for folder, source in (("a", "model.safetensors"), ("b", "pytorch_model.bin")):
        (tmp_path / folder).mkdir()
        if folder == "a":
            torch.save(W, tmp_path / folder / source, _use_new_zipfile_serialization=False)
        else:
            shardsave.convert(tmp_path / "x.safetensors", tmp_path / folder / source, to="safetensors")
        assert same(converted(tmp_path / folder)[0], W)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    """Catches a file of another kind that is called a corrupt file of torch.save."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        zipped.writestr("weights/a.txt", "text")
    files: dict[str, tuple[bytes, type[Exception], str]] = {
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid",
            shardsave.CorruptCheckpointError,
            "it is a pointer of git-lfs",
        ),
        "page": (b"<!DOCTYPE html>", shardsave.CorruptCheckpointError, "it is a web page, most likely of a failed download"),
        "answer": (b"Invalid username or password.", shardsave.CorruptCheckpointError, "the answer to a failed download"),
        "empty": (b"", shardsave.CorruptCheckpointError, "it is empty"),
        "gguf": (b"GGUF\3\0\0\0", shardsave.IncompatibleCheckpointError, "it is a GGUF file"),
        "tar": ((tmp_path / "x.tar").read_bytes(), shardsave.IncompatibleCheckpointError, "it is a tar archive"),
        "gzip": (b"\x1f\x8b\x08", shardsave.IncompatibleCheckpointError, "it is a gzip archive"),
        "npz": (
            (tmp_path / "x.npz").read_bytes(),
            shardsave.IncompatibleCheckpointError,
            "it is a zip archive of NumPy arrays that",
        ),
        "zip": (
            (tmp_path / "x.zip").read_bytes(),
            shardsave.IncompatibleCheckpointError,
            "it is a zip archive that torch did not",
        ),
        "pickle": (
            pickle.dumps({"a": 1}),
            shardsave.IncompatibleCheckpointError,
            "it is a pickle that torch.save did not write",
        ),
    }
    for name, (data, kind, words) in files.items():
        (tmp_path / f"{name}.bin").write_bytes(data)
        with pytest.raises(kind, match=words):
            shardsave.convert(tmp_path / f"{name}.bin", tmp_path / "out")
