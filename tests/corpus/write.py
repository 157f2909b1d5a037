"""Writes the corpus: small checkpoints of every kind, through public verbs only, with fixed "random" names, versions and times.

Method: ``python tests/corpus/write.py FOLDER`` writes a folder for each case, and ``expected.json``: the files of each case, and
what a reader must find in them (`corpus.record` reads that by the rules of FORMAT.md).

``tests/corpus/<version>/`` was written by that version. The folder of a released version never changes: an intended change of the
files gets a new folder, and a new case goes into the newest folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.torch_version import TorchVersion

import shardsave
from corpus import models, record
from corpus.record import Json

#: The modification time of the file that a save replaces, in ns since 1970.
MTIME = 1_700_000_000_123_456_000

#: The packages whose version changes the bytes of some cases.
PACKAGES = ("peft", "torch", "transformers")


@dataclass(frozen=True)
class Case:
    """One checkpoint directory, or one file.

    ``write`` fills an empty folder. ``needs``: the packages whose version changes the bytes. ``model``: the function in `corpus.models`
    that creates the saved model; tests fill and build it. ``build``: what `build_model` must trust; None if it cannot build the model.
    ``program``: whether the checkpoint has one. ``file``: the name of the file to open; empty for the directory itself.
    """

    write: Callable[[Path], object]
    needs: tuple[str, ...] = ()
    model: str | None = None
    build: tuple[str, ...] | None = None
    program: bool = False
    file: str = ""


def plain_result(model: nn.Module) -> Any:
    """The model's result for `models.NUMBERS`, as JSON. The numbers are exact."""
    with torch.no_grad():
        return as_json(model(models.NUMBERS))


def as_json(result: Any) -> Any:
    if isinstance(result, dict):
        return {key: as_json(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return list(map(as_json, result))
    return result.tolist() if isinstance(result, torch.Tensor) else result


class FixedNames:
    """Replaces ``secrets.token_hex``. Returns one value per save, so that the files do not depend on the order of the calls."""

    def __init__(self) -> None:
        self._case, self._saves, self._asked = "", 0, 0

    def begin(self, case: str) -> None:
        self._case, self._saves, self._asked = case, 0, 0

    def next_save(self) -> None:
        self._saves, self._asked = self._saves + 1, 0

    def __call__(self, nbytes: int | None = None) -> str:
        self._asked += 1
        assert self._asked < 100, "a name is requested again and again, since it is already in use"
        return hashlib.sha256(f"{self._case} {self._saves}".encode()).hexdigest()[: 2 * (nbytes or 32)]


NAMES = FixedNames()


def save(source: nn.Module | Mapping[str, Any], folder: Path, **options: Any) -> None:
    NAMES.next_save()
    shardsave.save(source, folder, progress=False, **options)


def convert(source: Path, destination: Path, **options: Any) -> None:
    shardsave.convert(source, destination, progress=False, **options)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the sources of conversions, which are not part of the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def numbers(count: int, dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count).to(dtype)


def all_dtypes(folder: Path) -> None:
    """Every dtype of safetensors, with odd lengths, in another order than that of the file."""
    state: dict[str, Any] = {}
    for length, name in enumerate(record.TORCH_NAMES.values(), start=3):
        dtype = getattr(torch, name)
        raw = torch.arange(length * dtype.itemsize, dtype=torch.uint8) + length
        state[name] = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    save(state, folder)


def all_layouts(folder: Path) -> None:
    """Views whose memory is not laid out as in the file, empty and 0-d tensors, NaN payloads, a Parameter and an array."""
    base = numbers(24).reshape(4, 6)
    z = torch.complex(base, base + 1)
    special = torch.tensor([0x7FC00001, 0xFFC00000 - 2**32, 0x80000000 - 2**32, 0x7F800000, 1], dtype=torch.int32)
    save(
        {
            "scalar": torch.tensor(2.5), "empty": torch.empty(3, 0), "transposed": base.t(), "slice": base[1:3, 2:4],
            "expanded": base[0].expand(3, 6), "conj": z.conj(), "negative": z.conj().imag, "special": special.view(torch.float32),
            "parameter": nn.Parameter(numbers(2)), "array": base.numpy()[::2, ::3], "half": base[:1].half(),
        },
        folder,
    )  # fmt: skip


def names(folder: Path) -> None:
    """Names with a special meaning in JSON, in a file system or in a pattern."""
    special_names = (
        "", " ", ".", "..", "a.b", "a..b", "/etc/x", "../up", "a\\b", 'quote"', "apo'strophe", "tab\tline\n", "\x00\x1f\x7f", "naïve",
        "日本語", "e\u0301", "\u00e9", "🙂", "\u2028", "*?[", "__proto__", "constructor", "total_size", "model.safetensors", "%s{}",
    )  # fmt: skip
    shared = numbers(2)
    state = {name: numbers(1, first=place) for place, name in enumerate(special_names)}
    save({**state, "tied.é": shared, '"tied"': shared}, folder, metadata={name: name for name in special_names})


def tied_mapping(folder: Path) -> None:
    """Three names for one tensor, two for a frozen parameter, two for a view, and a view that only overlaps it."""
    one, two, base = numbers(3), nn.Parameter(numbers(2), requires_grad=False), numbers(6)
    state = {"z": one, "m": one, "a": one, "p": two, "q": two, "left": base[:4], "right": base[2:], "same": base[:4]}
    save(state, folder)


def many(folder: Path) -> None:
    """A header of more than 4096 bytes; names in unsorted order."""
    save({f"layer.{(place * 37) % 101}.weight": numbers(1 + place % 3, first=place) for place in range(101)}, folder)


def several_shards(folder: Path) -> None:
    """Frozen tensors in shards of their own, and one tensor that is larger than ``max_shard_size``."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    save(models.numbered(model), folder, max_shard_size=128, metadata={"epoch": 3})


def names_taken(folder: Path) -> None:
    """The third save into a directory where someone else's file has the name of the first shard."""
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"someone else's")
    (folder / "notes.txt").write_text("not ours\n")
    for number in (2, 1, 0):
        save(models.numbered(models.frozen(), number), folder, metadata={"saves left": number})


def superseded(folder: Path) -> None:
    """A replaced ``model.safetensors`` that still exists, as after a saver that died before it removed the file."""
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    lone = folder / "model.safetensors"
    for again in (False, True):
        lone.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80?")
        os.utime(lone, ns=(MTIME, MTIME))
        if not again:
            save({"x": numbers(2)}, folder)


def from_torch(folder: Path) -> None:
    shared = numbers(4).reshape(2, 2)
    state = {"module.a.weight": shared, "module.b.weight": shared, "module.t": numbers(6).reshape(2, 3).t()}
    with scratch() as sources:
        torch.save({"state_dict": state, "epoch": 3}, sources / "old.pt")
        convert(sources / "old.pt", folder, rename=[("^module\\.", "")])


def from_distributed(folder: Path) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint

    state = {"model": models.tied().state_dict(), "step": 3}
    with scratch() as sources, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        distributed_checkpoint.save(state, checkpoint_id=sources / "dcp")
        convert(sources / "dcp", folder)


def from_foreign(folder: Path) -> None:
    """Third-party shards, without alignment and checksums."""
    weight_map = {}
    with scratch() as sources:
        for shard, name in (("a.safetensors", "x"), ("b.safetensors", "y")):
            header = f'{{"{name}":{{"dtype":"I16","shape":[3],"data_offsets":[0,6]}}}} '.encode()
            (sources / shard).write_bytes(len(header).to_bytes(8, "little") + header + b"\1\0\2\0\3\0")
            weight_map[name] = shard
        index = {"metadata": {"total_size": 12}, "weight_map": weight_map}
        (sources / record.INDEX).write_text(json.dumps(index))
        convert(sources, folder)


def changed(folder: Path) -> None:
    """Cast, renamed and split into shards, some tensors dropped; flags, ties and metadata are kept."""
    with scratch() as sources:
        save(models.tied(), sources / "ckpt", metadata={"run": "7"})
        convert(
            sources / "ckpt", folder, dtype="bfloat16", drop=["norm.*"], rename=[("^body", "trunk")], max_shard_size=64, durable=False
        )  # fmt: skip


def whole_converted(folder: Path) -> None:
    with scratch() as sources:
        save(models.parts(), sources / "ckpt", architecture=True, program=((models.NUMBERS,), {}))
        convert(sources / "ckpt", folder)


def hub_converted(folder: Path) -> None:
    """The config gets the new dtype."""
    with scratch() as sources:
        save(models.bert(), sources / "ckpt")
        convert(sources / "ckpt", folder, dtype="float16")


def exported(folder: Path) -> None:
    """A program with a dynamic size, a branch and a buffer that it writes to."""
    model = models.steps()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "twice": None}
    program = torch.export.export(model, (models.NUMBERS,), {"twice": False}, dynamic_shapes=shapes)
    save(model, folder, program=program)


def mostly_buffers(folder: Path) -> None:
    """Most names are not parameters."""
    save(models.numbered(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))), folder)


def one_file(folder: Path) -> None:
    with scratch() as sources:
        save(models.tied(), sources / "ckpt", metadata={"license": "mit", "steps": 3})
        convert(sources / "ckpt", folder / "model.safetensors", to="safetensors")


def torch_file(folder: Path) -> None:
    with scratch() as sources:
        save(models.tied(), sources / "ckpt")
        convert(sources / "ckpt", folder / "model.pt", to="torch")


def torch_file_cast(folder: Path) -> None:
    with scratch() as sources:
        save(models.tied(), sources / "ckpt")
        convert(sources / "ckpt", folder / "model.pt", to="torch", dtype=torch.float16)


METADATA = {"run": "7", "steps": [1, 2.5, None, True], "nested": {"é": {"": "☃"}}, "big": 10**20}
CALL = ((models.NUMBERS,), {})

CASES: dict[str, Case] = {
    "sequential": Case(lambda f: save(models.sequential(), f, metadata=METADATA), model="sequential"),
    "compiled": Case(lambda f: save(models.wrapped(), f), model="wrapped"),
    "tied": Case(lambda f: save(models.tied(), f), model="tied"),
    "tied-mapping": Case(tied_mapping),
    "frozen": Case(lambda f: save(models.frozen(), f), model="frozen"),
    "buffers": Case(mostly_buffers),
    "state-dict": Case(lambda f: save(models.sequential().state_dict(), f, metadata={"kind": "state_dict"})),
    "not-durable": Case(lambda f: save(models.sequential(), f, durable=False), model="sequential"),
    "empty": Case(lambda f: save({}, f)),
    "no-tensors": Case(lambda f: save(nn.Sequential(nn.ReLU()), f)),
    "dtypes": Case(all_dtypes),
    "layouts": Case(all_layouts),
    "names": Case(names),
    "many": Case(many),
    "shards": Case(several_shards),
    "names-taken": Case(names_taken, model="frozen"),
    "superseded": Case(superseded),
    "extra-state": Case(lambda f: save(models.remembers(), f, architecture=True), ("torch",), "remembers", ("corpus.models",)),
    "architecture": Case(lambda f: save(models.parts(), f, architecture=True), ("torch",), "parts", ("corpus.models",)),
    "architecture-tied": Case(lambda f: save(models.tied(), f, architecture=True), ("torch",), "tied", ("corpus.models",)),
    "architecture-values": Case(
        lambda f: save(models.values(), f, architecture=True), ("torch",), "values", ("corpus.models",)
    ),
    "program-sizes": Case(exported, ("torch",), "steps", program=True),
    "program": Case(lambda f: save(models.parts(), f, program=CALL), ("torch",), "parts", program=True),
    "converted-whole": Case(whole_converted, ("torch",), "parts", ("corpus.models",), program=True),
    "transformers": Case(lambda f: save(models.bert(), f), ("torch", "transformers"), "bert", ("transformers",)),
    "experts": Case(lambda f: save(models.mixtral(), f), ("torch", "transformers"), "mixtral", ("transformers",)),
    "adapter": Case(lambda f: save(models.adapter(), f, adapter_only=True), PACKAGES, "adapter"),
    "converted-transformers": Case(hub_converted, ("torch", "transformers")),
    "converted-torch": Case(from_torch),
    "converted-distributed": Case(from_distributed, model="tied"),
    "converted-foreign": Case(from_foreign),
    "converted-changed": Case(changed),
    "one-file": Case(one_file, model="tied", file="model.safetensors"),
    "torch-file": Case(torch_file, ("torch",), file="model.pt"),
    "torch-file-cast": Case(torch_file_cast, ("torch",), file="model.pt"),
}


def plain(version: str) -> str:
    """The version without its build: the corpus is the same for every build of torch."""
    return version.partition("+")[0]


def versions() -> dict[str, str]:
    return {package: plain(importlib.metadata.version(package)) for package in PACKAGES}


@contextmanager
def fixed(case: str, version: str) -> Iterator[None]:
    """Fixes the random names, the version of shardsave and the build of torch ("2.13.0+cpu"), which the files would have."""
    NAMES.begin(case)
    versioned_modules = [
        m for name, m in sys.modules.items() if name.partition(".")[0] == "shardsave" and "__version__" in vars(m)
    ]
    with ExitStack() as patches:
        for module in versioned_modules:
            patches.enter_context(mock.patch.object(module, "__version__", version))
        patches.enter_context(mock.patch.object(torch, "__version__", TorchVersion(plain(torch.__version__))))
        patches.enter_context(mock.patch.object(secrets, "token_hex", NAMES))
        yield


def write_case(name: str, folder: Path, version: str) -> Json:
    """Writes one case into the new ``folder`` and returns its entry for ``expected.json``."""
    case = CASES[name]
    folder.mkdir()
    with fixed(name, version):
        case.write(folder)
    readers = {"": record.directory_record, ".safetensors": record.file_record, ".pt": record.torch_record}
    content = readers[Path(case.file).suffix](folder / case.file)
    entry = {"needs": list(case.needs), "file": case.file, "model": case.model, "program": case.program, **content}
    entry["build"] = list(case.build) if case.build is not None else None
    if case.program or case.model == "parts":
        entry["result"] = plain_result(getattr(models, str(case.model))())
    if name == "superseded":
        entry["mtimes"] = {"model.safetensors": MTIME}
    return {"files": record.digests(folder), **entry}


def write_corpus(folder: Path, version: str) -> None:
    """Writes every case into the new ``folder``, as ``version`` of shardsave."""
    folder.mkdir(parents=True)
    assert shardsave.save and shardsave.convert  # loads their modules, whose versions `fixed` replaces
    lines = [f'"versions": {json.dumps(versions())}']
    for name in CASES:
        lines.append(f"{json.dumps(name)}: {json.dumps(write_case(name, folder / name, version), ensure_ascii=False)}")
    (folder / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else shardsave.__version__)
