"""Reads a checkpoint by the rules of FORMAT.md only, without shardsave: what a reader must find in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import awscrt.checksums

INDEX = "model.safetensors.index.json"
KEY = "shardsave.crc64nvme"

Json = dict[str, Any]

#: The dtypes of FORMAT.md → torch's names.
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


def crc(data: bytes) -> str:
    return f"{awscrt.checksums.crc64nvme(data):016x}"


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in ``folder``, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def shard_tensors(path: Path) -> Json:
    """Name → torch's dtype and shape, and the checksum of the bytes, of one safetensors file."""
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if entry["dtype"] == "F4":  # two elements to a byte: torch's last size is half of that in the file
            shape = [*shape[:-1], shape[-1] // 2]
        tensors[name] = [TORCH_NAMES[entry["dtype"]], shape, crc(content[data + begin : data + end])]
    return tensors


def directory_record(folder: Path) -> Json:
    """What a reader must find in a directory. Names are in the index's order, then the ties; flags have the module's names."""
    index = json.loads((folder / INDEX).read_bytes())
    own_record = index["shardsave"]
    by_shard = {shard: shard_tensors(folder / shard) for shard in own_record["shards"]}
    stored = {name: by_shard[shard][name] for name, shard in index["weight_map"].items()}
    return {
        "tensors": stored | {name: stored[target] for name, target in own_record["ties"].items()},
        "ties": own_record["ties"],
        "flags": _flags(own_record, [*stored, *own_record["ties"]]),
        "metadata": own_record["metadata"],
        "durable": own_record["durable"],
        "parts": {role: part[0] for role, part in own_record.get("parts", {}).items()},
        "companions": sorted(own_record.get("companions", {})),
    }


def file_record(path: Path) -> Json:
    """What a reader must find in one safetensors file; its metadata has the ties."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = shard_tensors(path)
    metadata: dict[str, str] = header["__metadata__"]
    ties = {name: target for name, target in metadata.items() if target in tensors}
    return {"tensors": tensors | {name: tensors[target] for name, target in ties.items()}, "ties": ties, "flags": None}


def torch_record(path: Path) -> Json:
    """What a reader must find in a file of torch.save, read by torch itself."""
    import torch

    state = torch.load(path, weights_only=True)
    tensors = {name: tensor_record(tensor) for name, tensor in state.items()}
    first_name: dict[int, str] = {}
    holders = {name: first_name.setdefault(tensor.untyped_storage()._cdata, name) for name, tensor in state.items()}
    return {"tensors": tensors, "ties": {name: holder for name, holder in holders.items() if holder != name}, "flags": None}


def tensor_record(tensor: Any) -> list[Any]:
    """A tensor in memory as `shard_tensors` describes one in a file."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), crc(raw)]


def _flags(own_record: Json, names: list[str]) -> Json | None:
    """``parameters`` and ``frozen``, each a sorted list; None if the flags are unknown."""
    if "module_flags" in own_record:
        flags = own_record["module_flags"]
        return {"parameters": sorted(flags["frozen"] + flags["trainable"]), "frozen": sorted(flags["frozen"])}
    flags = own_record["flags"]
    if flags is None:
        return None
    words = {name: flags["default"] for name in names}
    for word in ("frozen", "trainable", "none"):
        words.update(dict.fromkeys(flags.get(word, ()), word))
    parameters = sorted(name for name, word in words.items() if word != "none")
    return {"parameters": parameters, "frozen": sorted(name for name, word in words.items() if word == "frozen")}
