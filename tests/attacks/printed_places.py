"""Places of files, paths and models that have names, with text in them that would command a terminal."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from architecture_cases import edit_architecture
from tampering import INDEX, LONE, entry, foreign, rewrite, saved, shard_bytes
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

import shardsave
from transformers_models import tiny

#: Escape, bell, right-to-left override, zero width space, line separator, the one-byte form of "escape [", and a forged second line.
FORMATS = "\u202e\u200b\u2028\x9b31m"
HOSTILE = f"x\x1b[31m\x07{FORMATS}\nFORGED\r"
#: The same without control characters of ASCII, which the name of a shard must not have.
HOSTILE_FILE = f"x{FORMATS}.safetensors"
#: What print must have instead.
ESCAPED = r"\u202e\u200b\u2028\x9b31m"


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.add_module(name, nn.Linear(2, 2))
        self.inner.register_buffer(name + "b", torch.ones(3))


def tensor_names(folder: Path) -> Path:
    shardsave.save({HOSTILE: torch.ones(2), f"{HOSTILE}.y": torch.ones(3)}, folder, durable=False)
    return folder


def parameter_names(folder: Path) -> Path:
    shardsave.save(Net(HOSTILE), folder, metadata={HOSTILE: HOSTILE}, durable=False)
    return folder


def damaged_tensor(folder: Path) -> Path:
    tensor_names(folder)
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    rewrite(shard, bytes(content))
    return folder


def header_of_a_file(folder: Path) -> Path:
    metadata = json.dumps({HOSTILE: HOSTILE})
    header = f'{{"__metadata__": {metadata}, {json.dumps(HOSTILE)}: {entry()}}}'
    (folder / LONE).write_bytes(shard_bytes(header, b"\0" * 4))
    return folder / LONE


def unknown_dtype(folder: Path) -> Path:
    (folder / LONE).write_bytes(shard_bytes(f"{{{json.dumps(HOSTILE)}: {entry(HOSTILE)}}}", b"\0" * 4))
    return folder


def repeated_name(folder: Path) -> Path:
    name = json.dumps(HOSTILE)
    (folder / LONE).write_bytes(shard_bytes(f"{{{name}: {entry()}, {name}: {entry()}}}", b"\0" * 4))
    return folder


def missing_shard(folder: Path) -> Path:
    foreign(folder, {HOSTILE: "a.safetensors", "y": HOSTILE_FILE})
    return folder


def damaged_shard(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", "y": HOSTILE_FILE})
    (folder / HOSTILE_FILE).write_bytes(b"short")
    return folder


def shard_that_is_a_directory(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", "y": HOSTILE_FILE})
    (folder / HOSTILE_FILE).mkdir()
    return folder


def shard_name_that_is_none(folder: Path) -> Path:
    foreign(folder, {"x": f"../{HOSTILE}", "y": "b.safetensors"})
    return folder


def name_that_the_shard_lacks(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", HOSTILE: "b.safetensors"})
    return folder


def index_without_json(folder: Path) -> Path:
    (folder / INDEX).write_text(f'{{"weight_map": {HOSTILE}')
    return folder


def architecture_attribute(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["objects"][0].update({HOSTILE: HOSTILE}))
    return folder


def architecture_device(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    hostile = {"x": {"device": HOSTILE}}
    edit_architecture(folder, lambda document: document["objects"][0].setdefault("attributes", {}).update(hostile))
    return folder


def architecture_import(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["imports"].update({f"zoo:{HOSTILE}": HOSTILE}))
    return folder


def architecture_version(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["imports"].update({"zoo:Gone": HOSTILE}))
    return folder


def program_of(folder: Path) -> Path:
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(2, 2))
    shardsave.save(model, folder, program=((torch.ones(1, 2),), {}), durable=False)
    return folder


def torch_names(folder: Path) -> Path:
    torch.save({HOSTILE: torch.ones(2), "x": 3, f"{HOSTILE}2": HOSTILE}, folder / f"{FORMATS}.pt")
    return folder / f"{FORMATS}.pt"


def torch_states(folder: Path) -> Path:
    torch.save({HOSTILE: {"w": torch.ones(2)}, "other": {HOSTILE: torch.ones(2)}}, folder / f"{FORMATS}.pt")
    return folder / f"{FORMATS}.pt"


class Named:
    """Pickles as a call of a function with a hostile name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return hostile_function, (1,)


def hostile_function(_: object) -> None:
    pass


def torch_pickle(folder: Path) -> Path:
    torch.save({"w": torch.ones(2), "z": Named()}, folder / f"{FORMATS}.pt", pickle_module=HostilePickle)
    return folder / f"{FORMATS}.pt"


def torch_global(folder: Path) -> Path:
    """A pickle that asks for a name which begins with an escape; torch's own message has it as it is."""
    path = folder / f"{FORMATS}.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c\x1b[31m" + FORMATS.encode() + b"\nsystem\n.")
        archive.writestr("x/version", "3\n")
    return path


def torch_archive(folder: Path) -> Path:
    (folder / f"{FORMATS}.pt").write_bytes(b"PK\x03\x04" + HOSTILE.encode())
    return folder / f"{FORMATS}.pt"


def torch_old_format(folder: Path) -> Path:
    torch.save({HOSTILE: torch.ones(2)}, folder / f"{FORMATS}.pt", _use_new_zipfile_serialization=False)
    return folder / f"{FORMATS}.pt"


def torch_shards(folder: Path) -> Path:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {HOSTILE: "x.bin"}}))
    torch.save({"y": torch.ones(1)}, folder / "x.bin")
    return folder


def torch_shard_that_is_missing(folder: Path) -> Path:
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"w": f"{HOSTILE_FILE}.bin"}})
    )
    return folder


def hint_of_other_files(folder: Path) -> Path:
    (folder / f"{HOSTILE}.bin").write_bytes(b"")
    return folder


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save({HOSTILE: {HOSTILE: torch.ones(2)}, "s": 1}, checkpoint_id=folder)
    return folder


def distributed_twice(folder: Path) -> Path:
    def change(table: Metadata) -> None:
        table.state_dict_metadata[HOSTILE] = next(
            kind for kind in table.state_dict_metadata.values() if isinstance(kind, TensorStorageMetadata)
        )
        table.state_dict_metadata["s"] = BytesStorageMetadata()

    return edit_table(distributed(folder), change)


def distributed_file(folder: Path) -> Path:
    def change(table: Metadata) -> None:
        for place in table.storage_data.values():
            place.relative_path = HOSTILE_FILE

    return edit_table(distributed(folder), change)


def edit_table(folder: Path, change: Callable[[Metadata], None]) -> Path:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


def distributed_pickle(folder: Path) -> Path:
    module = f"x\x1b[31m{FORMATS}".encode()
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c\x06system\x93.")
    return folder


def config_architecture(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": [HOSTILE], HOSTILE: HOSTILE}))
    return folder


def config_type(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": HOSTILE}))
    return folder


def config_value(folder: Path) -> Path:
    saved(folder)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": HOSTILE, "hidden_size": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_activation(folder: Path) -> Path:
    saved(folder)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": HOSTILE, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of_generation(folder: Path) -> Path:
    shardsave.save(tiny("GPT-2"), folder, durable=False)
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": HOSTILE}))
    return folder


def config_without_json(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(f'{{"architectures": {HOSTILE}')
    return folder


def path_of_a_checkpoint(folder: Path) -> Path:
    saved(folder / HOSTILE)
    return folder / HOSTILE


def path_of_bytes(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder / HOSTILE) + b"\xff"))
    saved(path)
    return path


def path_without_a_checkpoint(folder: Path) -> Path:
    return folder / HOSTILE / "nothing"


PLACES = {
    place.__name__: place
    for place in (
        tensor_names, parameter_names, damaged_tensor, header_of_a_file, unknown_dtype, repeated_name, missing_shard,
        damaged_shard, shard_that_is_a_directory, shard_name_that_is_none, name_that_the_shard_lacks, index_without_json,
        architecture_attribute, architecture_device, architecture_import, architecture_version, torch_names, torch_states,
        torch_pickle, torch_global,
        torch_archive, torch_old_format, torch_shards, torch_shard_that_is_missing, hint_of_other_files, distributed,
        distributed_twice, distributed_file, distributed_pickle, config_architecture, config_type, config_value, config_activation,
        config_of_generation, config_without_json, path_of_a_checkpoint, path_of_bytes, path_without_a_checkpoint,
    )
}  # fmt: skip


class HostilePickle:
    """The module pickle, but `Named` pickles as a global whose module has a hostile name."""

    class Pickler(pickle._Pickler):
        def save_global(self, value: object, name: str | None = None) -> None:
            if value is not hostile_function:
                super().save_global(value, name)  # type: ignore[misc]
                return
            self.write(b"c" + f"x\x1b[31m{FORMATS}".encode() + b"\nsystem\n")  # type: ignore[attr-defined]

        dispatch = pickle._Pickler.dispatch | {type(hostile_function): save_global}
