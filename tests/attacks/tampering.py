"""Makes bad checkpoints: saves a good one, changes one thing in it, and corrects every checksum around the change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import awscrt.checksums
import torch
from torch import nn

import shardsave

INDEX = "model.safetensors.index.json"
LONE = "model.safetensors"
#: The shards of `saved`: the frozen and the trainable tensors.
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KEY = "shardsave.crc64nvme"

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An attack. ``make`` writes it into an empty directory and returns the path to open, or None for the directory itself.

    ``message`` is the whole message of every verb, with ``$DIR`` for the directory.
    """

    name: str
    message: str
    make: Callable[[Path], Path | None]
    error: type[shardsave.ShardSaveError] = shardsave.CorruptCheckpointError


class Net(nn.Module):
    """The module in all checkpoints here: a frozen layer, a trainable layer, and a layer that is tied to it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.top = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.top.weight
        for start, parameter in enumerate(self.parameters()):
            parameter.data = torch.arange(start + seed, start + seed + parameter.numel()).reshape(parameter.shape).float()


def saved(folder: Path, seed: int = 0) -> None:
    """A good checkpoint of two shards."""
    shardsave.save(Net(seed), folder, metadata={"run": "7"}, durable=False)


def rewrite(path: Path, content: bytes) -> None:
    """Replaces a file by a new one. A file that is truncated and rewritten would be flushed to disk when it is closed."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def crc(data: bytes) -> str:
    return f"{awscrt.checksums.crc64nvme(data):016x}"


def seal(text: str) -> bytes:
    """Adds the seal to the JSON of an index. The record of shardsave must be the last key and must have other members."""
    assert text.endswith("}}")
    body = text[:-2].encode() + b', "crc64nvme": "'
    return body + crc(body).encode() + b'"}}\n'


def read_index(folder: Path) -> Json:
    index: Json = json.loads((folder / INDEX).read_bytes())
    index["shardsave"].pop("crc64nvme", None)
    return index


def edit_index(folder: Path, change: Callable[[Json], object]) -> None:
    """Changes the parsed index and reseals it."""
    index = read_index(folder)
    change(index)
    rewrite(folder / INDEX, seal(json.dumps(index)))


def edit_text(folder: Path, old: str, new: str) -> None:
    """Replaces a part of the text of the index and reseals it, for content that parsed JSON cannot hold."""
    text = json.dumps(read_index(folder))
    assert text.count(old) == 1, f"{text.count(old)} times in {text}"
    rewrite(folder / INDEX, seal(text.replace(old, new)))


def shard_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file. ``length``: the length of the header that the file states, if it must be a wrong one."""
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def record_of(content: bytes) -> list[Any]:
    """The record in the index of a shard with this content."""
    header_length = 8 + int.from_bytes(content[:8], "little")
    return [len(content), header_length, crc(content[:header_length])]


def replace_shard(folder: Path, shard: str, content: bytes) -> None:
    """Replaces the content of a shard, and its record in the index."""
    rewrite(folder / shard, content)
    edit_index(folder, lambda index: index["shardsave"]["shards"].update({shard: record_of(content)}))


def edit_header(folder: Path, shard: str, old: bytes, new: bytes) -> None:
    """Replaces a part of a shard's header by one of the same length, and its record in the index."""
    content = (folder / shard).read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    replace_shard(folder, shard, content.replace(old, new))


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    """A tensor's entry in a header, as JSON."""
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets}, separators=(",", ":"))


def foreign(folder: Path, weight_map: object = None, **top: object) -> None:
    """A sharded checkpoint as other libraries write it: ``x`` in a.safetensors and ``y`` in b.safetensors, four bytes each."""
    for name, tensor in (("a", "x"), ("b", "y")):
        (folder / f"{name}.safetensors").write_bytes(shard_bytes(f'{{"{tensor}":{entry()}}}', b"\0" * 4))
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    if weight_map is not None:
        index["weight_map"] = weight_map  # type: ignore[assignment]
    (folder / INDEX).write_text(json.dumps(index | top))
