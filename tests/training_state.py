"""Checkpoints with a training state: made by hand, as the code that describes a training would make it, or edited afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import shardsave
from shardsave._common.progress import Progress
from shardsave._format.crc64 import crc64
from shardsave._format.index import Moment
from shardsave._loading.read import TensorReader
from shardsave._saving.contents import plan_contents
from shardsave._saving.disk_layout import IdentityLayout
from shardsave._saving.training_directory import plan_training_directory
from shardsave._saving.write import write_checkpoint
from shardsave._state.module import Source, read_state
from shardsave._state.parts import Parts
from shardsave._storage.open_checkpoint import open_checkpoint

INDEX = "model.safetensors.index.json"
MOMENT = Moment(step=1, metrics={"loss": 0.5}, ranks=1, created="2026-11-30T05:40:00Z")


def training_tensors(generation: int) -> dict[str, torch.Tensor]:
    """Two tensors for two files; every value is the generation."""
    return {f"optimizer/m{n}": torch.full((700 + n,), float(generation)) for n in range(2)}


def save_with_training(
    source: Source,
    folder: Path,
    generation: int = 1,
    *,
    durable: bool = True,
    tensors: Mapping[str, torch.Tensor] | None = None,
    moment: Moment = MOMENT,
    metadata: Mapping[str, Any] | None = None,
) -> shardsave.SaveReport:
    """Saves ``source`` with a training state: shared values, values of rank 0, and tensors in files of at most 5000 bytes."""
    state = read_state(training_tensors(generation) if tensors is None else tensors)
    shared = json.dumps({"dict": {"generation": generation, "nan": {"float": "nan"}}}).encode()
    leaves = json.dumps({"loader": generation}).encode()
    directory = plan_training_directory(shared, {0: leaves}, {0: state.entries}, 5000)
    on_disk = IdentityLayout().apply(read_state(source))
    contents = plan_contents(on_disk, Parts(), 5000, metadata or {}, directories=[directory], moment=moment)
    with Progress(False, "saving", contents.tensor_bytes) as progress:
        outcome = write_checkpoint(contents, folder, durable=durable, lock_timeout=10, progress=progress)
    return shardsave.SaveReport(
        path=str(folder),
        bytes=contents.weight_bytes,
        tensors=outcome.tensors,
        shards=outcome.shards,
        seconds=0.0,
        phases=outcome.phases,
        engine="",
        direct=outcome.totals.direct,
        staging_bytes=outcome.totals.staging_bytes,
        pinned=False,
        notes=outcome.notes,
        durable=durable,
        leftovers=outcome.leftovers,
        removed=outcome.removed,
    )


def training_directory(folder: Path) -> Path:
    """The directory of the training state that the index in ``folder`` names."""
    file = json.loads((folder / INDEX).read_bytes())["shardsave"]["parts"]["training state"][0]
    return folder / str(file).partition("/")[0]


def training_generation(folder: Path) -> int | None:
    """The generation of the training state in ``folder``, which is whole bit for bit; None if the checkpoint has none."""
    with open_checkpoint(folder, lambda name: False, parts=["training state"]) as checkpoint:
        training = checkpoint.training
        if training is None:
            return None
        loaded = {name: torch.empty(t.shape) for name, t in training.tensors.items()}
        with Progress(False, "loading", 0) as progress:
            TensorReader(checkpoint, verify=True, progress=progress).read([(t, loaded[n]) for n, t in training.tensors.items()])
        generation = int(training.shared["dict"]["generation"])
        assert [*training.leaves.values()] == [{"loader": generation}]
    expected = training_tensors(generation)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    return generation


def names_of_training(folder: Path) -> set[str]:
    """The names in the directory of the training state in ``folder`` that belong to it, relative to ``folder``; none if there is none."""
    with open_checkpoint(folder, lambda name: False, parts=["training state"]) as checkpoint:
        return set(checkpoint.files)


def edit_training(folder: Path, change: Callable[[Any], object], name: str = "index.json") -> None:
    """Changes a document of the training state in ``folder``, the file ``name``, and the checksums of it above."""
    path = training_directory(folder) / name
    document = json.loads(path.read_bytes())
    change(document)
    content = json.dumps(document).encode()
    replace(path, content)
    record = [len(content), len(content), f"{crc64(content):016x}"]
    if name != "index.json":
        edit_training(folder, lambda top: top["files"].update({name: record}))
        return
    index = json.loads((folder / INDEX).read_bytes())
    index["shardsave"].pop("crc64nvme")
    index["shardsave"]["parts"]["training state"][1:] = record
    body = json.dumps(index)[:-2].encode() + b', "crc64nvme": "'
    replace(folder / INDEX, body + f"{crc64(body):016x}".encode() + b'"}}\n')


def replace(path: Path, content: bytes) -> None:
    """Replaces a file by a new one. A file that is truncated and rewritten would be flushed to disk when it is closed."""
    path.unlink()
    path.write_bytes(content)
