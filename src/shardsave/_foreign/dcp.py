"""Reads directories of ``torch.distributed.checkpoint``: one pickled table, and files with the chunks of every tensor.

The table is unpickled into inert records of our own. Its pickle may use only the names in `_NAMES`, so it reaches no class of torch
and no other code. Values that are no tensors have pickles of their own, in which every other name leads to an inert record.
"""

from __future__ import annotations

import io
import os
from typing import Any, NoReturn, Union

import torch

from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.coverage import covered_once
from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call
from shardsave._common.words import an
from shardsave._foreign.containers import Unread, kind_of
from shardsave._foreign.records import Dict, GlobalName, Record, Sequence, record_class
from shardsave._foreign.torch_archive import Archives
from shardsave._foreign.torch_file import TorchFile
from shardsave._foreign.unpickling import MAX_PICKLE_BYTES, Unpickler
from shardsave._format.file_names import is_file_name
from shardsave._format.other_kinds import START_BYTES
from shardsave._storage.find import cannot_read, refuse_other_kind
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError, UntrustedCodeError

TABLE_NAME = ".metadata"

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


_RECORDS = {
    (module, name): record_class(module, name)
    for module, names in {
        _METADATA: (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        _FILES: ("_StorageInfo", "_StoragePrefix"),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    }.items()
    for name in names
}  # fmt: skip
_NAMES: dict[GlobalName, Any] = {
    **_RECORDS,
    ("torch", "Size"): Sequence,
    ("collections", "OrderedDict"): Dict,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
_TABLE = _RECORDS[_METADATA, "Metadata"]
_TENSOR = _RECORDS[_METADATA, "TensorStorageMetadata"]
_INDEX = _RECORDS[_METADATA, "MetadataIndex"]
_PLACE = _RECORDS[_FILES, "_StorageInfo"]


def _find(module: str, name: str) -> Any:
    value = _NAMES.get((module, name))
    if value is None:
        raise _ForbiddenName(f"{module}.{name}")
    return value


class _ForbiddenName(Exception):
    """The pickle uses a name that is not in `_NAMES`."""


def read_distributed(folder: str) -> TorchFile:
    """Reads the table of ``folder`` and maps its files; the content is nested as it was when it was saved."""
    table = _read_table(os.path.join(folder, TABLE_NAME))
    tensors, places, paths = table["state_dict_metadata"], table["storage_data"], table["planner_data"]
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        _bad(folder, "tables of tensors and of their places were expected, there are none")
    place_of: dict[tuple[Any, Any], Record] = {}
    for index, place in places.items():
        if type(index) is not _INDEX or type(place) is not _PLACE:
            _bad(folder, "a table of the places of tensors was expected, one of its entries is something else")
        place_of[_key(index["fqn"], index["offset"], folder)] = place
    archives = Archives(folder)
    content: dict[Any, Any] = {}
    try:
        for name, description in tensors.items():
            if not isinstance(name, str):
                _bad(folder, f"names of tensors were expected, one is {an(kind_of(name))}")
            is_tensor = type(description) is _TENSOR
            value = (
                _tensor(name, description, place_of, archives, folder)
                if is_tensor
                else _value(name, place_of, archives, folder)
            )
            _put(content, _path_of(name, paths), value, folder)
    finally:
        mappings = archives.close()
    return TorchFile(content, mappings, ())


def _read_table(path: str) -> Record:
    with Descriptor() as file:
        try:
            file.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
            length = call(os.fstat, path, file.fd).st_size
            if length > MAX_PICKLE_BYTES:
                _bad(path, f"at most {MAX_PICKLE_BYTES} bytes were expected, it has {length}")
            data = call(os.read, path, file.fd, length + 1)
        except CallFailed as error:
            raise cannot_read(path, error) from error
    refuse_other_kind(data[:START_BYTES], os.path.basename(path), path, "the table of a distributed checkpoint")
    try:
        table = Unpickler(io.BytesIO(data), _find).load()
    except _ForbiddenName as name:
        raise UntrustedCodeError(
            f"cannot convert {path}: the table of a distributed checkpoint was expected, its pickle asks for {name}; "
            f"nothing of it was run, nothing was written"
        ) from None
    except Exception as error:  # unpickling damaged data may raise anything
        _bad(path, f"a pickled table was expected, it is broken ({type(error).__name__})")
    if type(table) is not _TABLE:
        _bad(path, f"the table of a distributed checkpoint was expected, it is a {type(table).__name__}")
    return table


def _tensor(
    name: str, description: Record, place_of: dict[tuple[Any, Any], Record], archives: Archives, folder: str
) -> Union[torch.Tensor, Assembled]:
    properties, records = description["properties"], description["chunks"]
    shape = _sizes(description["size"], name, folder)
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(dtype, torch.dtype) or not isinstance(records, list) or not records:
        _bad(folder, f"{name!r} was expected to have a dtype and parts, it has none")
    chunks = []
    for record in records:
        begin, sizes = (
            _sizes(record[field] if isinstance(record, Record) else None, name, folder) for field in ("offsets", "sizes")
        )
        if len(begin) != len(shape) or len(sizes) != len(shape) or any(b + s > n for b, s, n in zip(begin, sizes, shape)):
            _bad(folder, f"{name!r} of shape {shape} was expected, a part of {sizes} lies at {begin}")
        tensor = _chunk_tensor(name, place_of.get((name, begin)), archives, folder)
        if tensor.dtype != dtype or tuple(tensor.shape) != sizes:
            stored = f"{tensor.dtype} {tuple(tensor.shape)}"
            _bad(folder, f"{name!r} was expected to have a part of {dtype} {sizes} at {begin}, its file has {stored}")
        chunks.append(Chunk(begin, tensor))
    if len(chunks) == 1 and tuple(chunks[0].tensor.shape) == shape:
        return chunks[0].tensor
    if not covered_once(shape, [(begin, tuple(tensor.shape)) for begin, tensor in chunks]):
        _bad(folder, f"{name!r} was expected to be covered by its {len(chunks)} parts once, it is not")
    return Assembled(dtype, shape, [chunk for chunk in chunks if chunk.tensor.numel()])


def _chunk_tensor(name: str, place: Record | None, archives: Archives, folder: str) -> torch.Tensor:
    if place is None:
        _bad(folder, f"a place of each part of {name!r} was expected, one has none")
    return archives.tensor(*_range(name, place, folder))


def _value(name: str, place_of: dict[tuple[Any, Any], Record], archives: Archives, folder: str) -> Any:
    """A value that is no tensor, and has a pickle of its own. It is read because it may have tensors in it."""
    place = place_of.get((name, None))
    try:
        return archives.value(*_range(name, place, folder)) if place is not None else Unread("value without a place")
    except ShardSaveError:
        return Unread("value that cannot be read")


def _range(name: str, place: Record, folder: str) -> tuple[str, int, int]:
    """The file, the offset and the length of something at ``place``."""
    file, offset, length = place["relative_path"], place["offset"], place["length"]
    if not isinstance(file, str) or not is_file_name(file) or type(offset) is not int or type(length) is not int:
        _bad(folder, f"{name!r} was expected to lie in a file of this directory, its place is {_shown(file)}")
    if place["transform_descriptors"]:
        raise IncompatibleCheckpointError(
            f"cannot convert {folder}: {name!r} was expected to be stored without a transformation, it was transformed by "
            f"{_shown(place['transform_descriptors'])} when it was saved; nothing was written"
        )
    return file, offset, length


def _key(name: Any, offset: Any, folder: str) -> tuple[Any, Any]:
    if not isinstance(name, str):
        _bad(folder, f"names of tensors were expected, one is {an(kind_of(name))}")
    return name, None if offset is None else _sizes(offset, name, folder)


def _sizes(value: Any, name: object, folder: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < 1 << 62 for size in value):
        _bad(folder, f"sizes were expected of {name!r}, it has {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value of the table for a message: a string as it is, of all others their kind, since they may contain each other."""
    return repr(value)[:60] if isinstance(value, str) else an(kind_of(value))


def _path_of(name: Any, paths: Any) -> tuple[Any, ...]:
    """The keys that led to the value in the saved state; its stored name is these keys joined."""
    path = paths.get(name) if isinstance(paths, dict) else None
    valid = isinstance(path, (tuple, list)) and path and all(isinstance(key, (str, int)) for key in path)
    return tuple(path) if valid and path is not None else (name,)


def _put(content: dict[Any, Any], path: tuple[Any, ...], value: object, folder: str) -> None:
    for key in path[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            _bad(folder, f"the name {key!r} was expected once, it is there twice")
    if path[-1] in content:
        _bad(folder, f"the name {path[-1]!r} was expected once, it is there twice")
    content[path[-1]] = value


def _bad(path: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt distributed checkpoint: {path}: {found}; nothing was written") from None
