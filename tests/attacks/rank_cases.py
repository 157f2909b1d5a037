"""Attacks on the files that several ranks wrote: their chunks do not make up whole tensors, or one rank is taken for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tampering import LONE, Case

import shardsave
from rank_files import cut, save_ranks

FIRST, SECOND, THIRD, FOURTH = (f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2, 3, 4))
CAUSE = "files of some ranks are missing, or files of several saves lie together"


def written(folder: Path) -> None:
    state = {"x": torch.arange(20.0).reshape(5, 4), "y": torch.ones(4)}
    save_ranks(folder / "ranks", state, {"x": cut(state["x"], 0, 1), "y": cut(state["y"], 0)})
    for file in (folder / "ranks").iterdir():
        file.rename(folder / file.name)
    (folder / "ranks").rmdir()


def ranks(
    name: str,
    message: str,
    damage: Callable[[Path], object],
    error: type[shardsave.ShardSaveError] = shardsave.CorruptCheckpointError,
) -> Case:
    """The files of four ranks, damaged."""

    def make(folder: Path) -> Path | None:
        written(folder)
        path = damage(folder)
        return path if isinstance(path, Path) else None

    return Case(name, message, make, error)


def to_fours(tensors: dict[str, torch.Tensor], begins: dict[str, Any]) -> None:
    tensors["x"] = torch.zeros(tensors["x"].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], name: str = SECOND) -> None:
    """Writes the file of a rank again; ``change`` takes its tensors and what its metadata says."""
    tensors = load_file(folder / name)
    with safe_open(folder / name, "pt") as file:
        begins = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    change(tensors, begins)
    save_file(tensors, folder / name, metadata={"DCP_SHARDING_INFO": begins.get("all", json.dumps(begins))})


def begins(name: str, value: Any, found: str) -> Case:
    """Another value where the metadata say at which index a chunk of x begins."""
    message = f"DCP_SHARDING_INFO expected to say where each chunk begins, of 'x' it says {found}"
    return ranks(
        f"ranks: {name}",
        f"corrupt shard {SECOND}: header: {message}; nothing else was read from it",
        lambda folder: changed(folder, lambda tensors, begins: begins["x"].update(saved_offsets=value)),
    )


def uncovered(name: str, shape: str, number: int, damage: Callable[[Path], object]) -> Case:
    return ranks(
        f"ranks: {name}",
        f"corrupt checkpoint $DIR: tensor 'x' expected of shape {shape} to be covered once by its {number} chunks, it is not; {CAUSE}",
        damage,
    )


def moved(name: str, shape: str, to: list[int]) -> Case:
    return uncovered(name, shape, 4, lambda folder: changed(folder, lambda _, begins: begins["x"].update(saved_offsets=to)))


def lone(name: str, path: str, file: str) -> Case:
    """The file of one rank is the path to open, or has the name of a whole checkpoint."""
    return ranks(
        f"ranks: {name}",
        f"cannot read $DIR/{file}: whole tensors were expected, it has the chunks of one rank of several, as "
        f"HuggingFaceStorageWriter writes them; to read all ranks, give the path of their directory: $DIR",
        lambda folder: ((folder / SECOND).rename(folder / file), folder / path)[1],
        shardsave.IncompatibleCheckpointError,
    )


RANKS = [
    uncovered("one is missing", "[5, 4]", 3, lambda folder: (folder / SECOND).unlink()),
    uncovered("one is there twice", "[5, 4]", 5,
              lambda folder: [shutil.copy(folder / SECOND, folder / "shard-00009-model-00001-of-00001.safetensors")]),
    moved("chunks overlap", "[5, 4]", [0, 1]),
    moved("a chunk lies apart", "[1003, 4]", [1000, 2]),
    moved("a chunk lies so far apart that its tensor fits nowhere", f"[{(1 << 62) + 3}, 4]", [1 << 62, 2]),
    begins("a chunk begins before its tensor", [-1, 0], "[-1, 0]"),
    begins("a chunk begins where no element can be", [(1 << 63) - 1, 2], f"[{(1 << 63) - 1}, 2]"),
    begins("a chunk has another number of dimensions", [3], "[3]"),
    begins("a chunk begins at a fraction", [3.0, 2], "[3.0, 2]"),
    begins("a chunk begins at a text", "3, 2", "'3, 2'"),
    begins("a chunk begins nowhere", None, "null"),
    ranks("ranks: metadata that are no JSON",
          f"corrupt shard {SECOND}: header: DCP_SHARDING_INFO expected to say where each chunk begins, of 'x' it says null; "
          "nothing else was read from it",
          lambda folder: changed(folder, lambda _, begins: begins.update(all="[" * 2000))),
    ranks("ranks: no metadata",
          f"corrupt shard {SECOND}: header: DCP_SHARDING_INFO expected, which says where each chunk begins, there is none; "
          "nothing else was read from it",
          lambda folder: save_file(load_file(folder / SECOND), folder / SECOND)),
    ranks("ranks: another dtype",
          f"corrupt checkpoint $DIR: tensor 'x' expected to have F32 and 2 dimensions, in {SECOND} it has other ones; {CAUSE}",
          lambda folder: changed(folder, lambda tensors, _: tensors.update(x=tensors["x"].double()))),
    ranks("ranks: a dtype whose elements share bytes",
          f"cannot read $DIR: chunks of whole bytes were expected, 'x' in {FIRST} has dtype F4",
          lambda folder: [changed(folder, to_fours, file) for file in sorted(path.name for path in folder.iterdir())],
          shardsave.IncompatibleCheckpointError),
    ranks("ranks: a file of a series is missing",
          "corrupt checkpoint $DIR: a file shard-*-model-00002-of-00003.safetensors was expected, there is none; the checkpoint was "
          "copied or downloaded in part",
          lambda folder: (folder / SECOND).rename(folder / "shard-00002-model-00003-of-00003.safetensors") and None),
    lone("path of one", SECOND, SECOND),
    lone("one with the name of a lone file", LONE, LONE),
    ranks("ranks: beside a lone file",
          f"cannot tell which checkpoint is meant: $DIR: one of {LONE} and the files of several ranks ({FIRST}, {THIRD}, {FOURTH}) was "
          f"expected, both are there; give the path of {LONE} to load it, or remove those that are not wanted",
          lambda folder: (folder / SECOND).rename(folder / LONE) and None,
          shardsave.IncompatibleCheckpointError),
    ranks("ranks: of two saves",
          f"corrupt checkpoint $DIR: files of one save were expected, {FIRST} and shard-00009-model-00002-of-00002.safetensors count "
          f"different numbers of files; {CAUSE}",
          lambda folder: [shutil.copy(folder / SECOND, folder / "shard-00009-model-00002-of-00002.safetensors")]),
    lone("path of one with another name", "x.safetensors", "x.safetensors"),
]  # fmt: skip
