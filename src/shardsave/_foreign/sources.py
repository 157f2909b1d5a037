"""What others leave behind, and what we do: from a path to tensors by name, mapped and not yet read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from mmap import mmap
from typing import Any, NamedTuple, NoReturn

import torch

from shardsave._common.assembled import Assembled
from shardsave._common.os_calls import CallFailed, Descriptor, call, read_all
from shardsave._common.sources import TensorSource
from shardsave._foreign.dcp import TABLE_NAME, read_distributed
from shardsave._foreign.torch_file import read_torch_file
from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.index import INDEX_NAME, LONE_NAME, parse_index
from shardsave._loading.mapped import Maps
from shardsave._state.module import Beside, Entry
from shardsave._storage.checkpoint import PARTS, Checkpoint, Located, open_checkpoint
from shardsave._storage.companions import CONFIG_NAMES, MAX_COMPANION_BYTES
from shardsave._storage.find import cannot_read, find
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError

TORCH_NAME, TORCH_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"

#: How deep a state may lie inside of what was saved with it.
_LEVELS = 4

Wanted = Callable[[str], bool]


class Origin(NamedTuple):
    """What a conversion begins with. ``values`` by name are tensors, or else what a file has in their place.

    ``kind``: "shardsave", "safetensors", "torch" or "distributed". ``flags``: name → frozen, None where unknown. ``stored``: what
    has checksums, in the open ``checkpoint``. ``files``: every file that it lies in. ``beside``: what comes along where nothing is
    changed.
    """

    kind: str
    values: Mapping[str, Any]
    flags: Mapping[str, bool] | None
    metadata: Mapping[str, Any]
    mappings: tuple[mmap, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    checkpoint: Checkpoint | None = None
    stored: tuple[Located, ...] = ()
    beside: Beside = Beside()


def open_origin(path: str, key: str | None, wanted: Wanted, closing: ExitStack) -> Origin:
    """Finds out what is at ``path`` and opens it; ``closing`` closes it. ``key``: which of several nested states is meant.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError.
    """
    if not _is_folder(path):
        return _from_file(path, key, wanted, closing)
    folder = _snapshot(path)
    origin = _from_folder(folder, key, wanted, closing)
    return origin._replace(beside=origin.beside._replace(companions=_configs(folder)))


def _from_folder(path: str, key: str | None, wanted: Wanted, closing: ExitStack) -> Origin:
    if _has(path, INDEX_NAME) or _has(path, LONE_NAME):
        return _from_checkpoint(path, key, wanted, closing)
    if _has(path, TABLE_NAME):
        return _from_distributed(path, key, wanted)
    if _has(path, TORCH_INDEX_NAME):
        return _from_shards(os.path.join(path, TORCH_INDEX_NAME), key, wanted)
    if _has(path, TORCH_NAME):
        return _from_torch(os.path.join(path, TORCH_NAME), key, wanted)
    looked_for = f"{LONE_NAME}, {INDEX_NAME}, {TORCH_NAME}, {TORCH_INDEX_NAME} and {TABLE_NAME}"
    raise CheckpointNotFoundError(f"no checkpoint at {path}: one of {looked_for} was expected, none is there{_others(path)}")


def _configs(folder: str) -> dict[str, bytes]:
    """The configs of a transformers model that lie beside its weights: file name → content."""
    with Descriptor() as opened:
        try:
            opened.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            read = {name: read_all(name, opened.fd, MAX_COMPANION_BYTES) for name in CONFIG_NAMES}
        except CallFailed as error:
            raise cannot_read(error.path or folder, error) from error
    return {name: data for name, data in read.items() if data is not None}


def _from_file(path: str, key: str | None, wanted: Wanted, closing: ExitStack) -> Origin:
    name = os.path.basename(path)
    if name == TABLE_NAME:
        return _from_distributed(os.path.dirname(path) or ".", key, wanted)
    if name.endswith(".index.json"):
        index = parse_index(find(path).index_bytes or b"", f"index {name}")
        if all(shard.endswith((".bin", ".pt", ".pth")) for shard in index.weight_map.values()) and index.weight_map:
            return _from_shards(path, key, wanted)
        return _from_checkpoint(path, key, wanted, closing)
    if name.endswith(".safetensors") or _looks_like_safetensors(path):
        return _from_checkpoint(path, key, wanted, closing)
    return _from_torch(path, key, wanted)


def _from_checkpoint(path: str, key: str | None, wanted: Wanted, closing: ExitStack) -> Origin:
    if key is not None:
        _no_such_key(path, key, "names to tensors, without anything around them")
    checkpoint = closing.enter_context(open_checkpoint(path, parts=PARTS))
    record = checkpoint.record
    ours = record is not None
    told = checkpoint.file_metadata
    ties = checkpoint.ties
    names = {name: name for name in checkpoint.stored_names} | dict(ties)
    chosen = {name: stored for name, stored in names.items() if wanted(name)}
    located = {stored: checkpoint.tensors[stored] for stored in chosen.values()}
    maps = Maps(checkpoint, aligned=False)
    tensors = maps.tensors(located)
    lone = {name: value for name, value in told.items() if name not in ties and name not in ("format", CHECKSUM_KEY)}
    extra = maps.tensors(checkpoint.kept)
    beside = Beside(
        checkpoint.documents,
        tuple(Entry(name, "buffer", None, None, TensorSource.of(tensor)) for name, tensor in extra.items()),
        module_flags=record.module_flags if record is not None else None,
    )
    return Origin(
        "shardsave" if ours else "safetensors",
        {name: tensors[stored] for name, stored in chosen.items()},
        record.flags if record is not None else None,
        checkpoint.metadata if ours else lone,
        maps.mappings,
        tuple(map(checkpoint.path_of, checkpoint.files)),
        (),
        checkpoint,
        tuple(t for t in (*located.values(), *checkpoint.kept.values()) if t.checksum is not None),
        beside,
    )


def _from_torch(path: str, key: str | None, wanted: Wanted) -> Origin:
    content, mappings, notes = read_torch_file(path)
    values, left = choose_state(content, key, wanted, path)
    return Origin("torch", values, None, {}, mappings, (path,), (*notes, *left))


def _from_distributed(path: str, key: str | None, wanted: Wanted) -> Origin:
    content, mappings, notes = read_distributed(path)
    values, left = choose_state(content, key, wanted, path)
    return Origin("distributed", values, None, {}, mappings, (), (*notes, *left))


def _from_shards(path: str, key: str | None, wanted: Wanted) -> Origin:
    folder, name = os.path.split(path)
    if key is not None:
        _no_such_key(path, key, "shards of names to tensors, without anything around them")
    index = parse_index(find(path).index_bytes or b"", f"index {name}")
    values: dict[str, Any] = {}
    mappings: list[mmap] = []
    notes: list[str] = []
    files = dict.fromkeys(index.weight_map.values())
    for shard in files:
        at = os.path.join(folder, shard)
        try:
            content, mapped, more = read_torch_file(at)
        except CheckpointNotFoundError:
            raise CorruptCheckpointError(
                f"corrupt checkpoint {folder}: the index names {shard}, there is no such file; the checkpoint was copied or "
                f"downloaded in part"
            ) from None
        named = {n for n, s in index.weight_map.items() if s == shard}
        if not isinstance(content, dict) or content.keys() != named:
            found = set(content) if isinstance(content, dict) else set()
            differing = sorted(map(str, found ^ named))
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the names that the index gives it were expected, {differing[0]!r} is only in one of them; "
                f"index and shard belong to different saves"
            )
        values.update(content)
        mappings += mapped
        notes += more
    in_order = {n: values[n] for n in index.weight_map if wanted(n)}
    return Origin("torch", in_order, None, {}, tuple(mappings), tuple(os.path.join(folder, f) for f in files), tuple(notes))


def choose_state(content: Any, key: str | None, wanted: Wanted, path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The names and tensors that are meant in what was saved: the outermost mapping of these, or that at ``key``; and a note of what
    lies beside it.

    Raises IncompatibleCheckpointError, which lists what there is.
    """
    mappings = list(_mappings(content, ()))
    states = [(at, made) for at, made in mappings if _is_state(made, wanted)]
    if key is not None:
        found = next(((at, made) for at, made in mappings if ".".join(at) == key), None)
        if found is None:
            _no_such_key(path, key, _listed(states) or "no mapping of names to tensors")
        at, asked = found
        return {str(name): value for name, value in asked.items() if wanted(str(name))}, _left_out(content, at)
    depth = min((len(at) for at, _ in states), default=0)
    outermost = [(at, made) for at, made in states if len(at) == depth]
    if len(outermost) == 1:
        at, chosen = outermost[0]
        return {name: value for name, value in chosen.items() if wanted(name)}, _left_out(content, at)
    if not outermost:
        whole = content if isinstance(content, dict) else {}
        others = [f"{name!r} ({_kind(value)})" for name, value in whole.items() if not _is_tensor(value)]
        first = next((str(name) for name, value in whole.items() if not _is_tensor(value)), "")
        among = f" among its tensors, which can be left out with drop={first!r}" if len(others) < len(whole) else ""
        _refuse(path, f"it has {', '.join(others[:5])}{among}" if others else f"it is a {type(content).__name__} without any")
    _refuse(path, f"it has {_listed(outermost)}; choose one with key={'.'.join(outermost[0][0])!r}")


def _kind(value: object) -> str:
    quantized = isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) and part.is_quantized for part in value)
    return f"{type(value).__name__}{' with a quantized tensor' if quantized else ''}"


def _left_out(content: Any, at: tuple[str, ...]) -> tuple[str, ...]:
    """What a file has beside the state ``at`` those keys, on the way to it."""
    beside = []
    for depth, key in enumerate(at):
        beside += [
            f"{'.'.join((*at[:depth], str(name)))!r} ({type(value).__name__})" for name, value in content.items() if name != key
        ]
        content = content[key]
    more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
    return (f"left out, as it lies beside {'.'.join(at)!r}: {', '.join(beside[:5])}{more}",) if beside else ()


def _refuse(path: str, found: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: one mapping of names to tensors was expected, {found}; nothing was written"
    )


def _no_such_key(path: str, key: str, found: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a mapping at key {key!r} was expected, there is {found}; nothing was written"
    )


def _mappings(content: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Every mapping in ``content`` by the keys that lead to it."""
    if not isinstance(content, dict) or len(at) > _LEVELS:
        return
    yield at, content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict):
            yield from _mappings(value, (*at, name))


def _is_state(mapping: dict[Any, Any], wanted: Wanted) -> bool:
    """Whether there are tensors, and nothing else, but for what is not wanted."""
    if not all(isinstance(name, str) for name in mapping):
        return False
    return any(map(_is_tensor, mapping.values())) and all(_is_tensor(value) for name, value in mapping.items() if wanted(name))


def _is_tensor(value: object) -> bool:
    return isinstance(value, (torch.Tensor, Assembled))


def _listed(states: list[tuple[tuple[str, ...], dict[Any, Any]]]) -> str:
    more = f" and {len(states) - 5} more" if len(states) > 5 else ""
    return ", ".join(f"{'.'.join(at)!r} ({len(made)} tensors)" for at, made in states[:5]) + more


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(call(os.stat, path, path).st_mode)
    except CallFailed as error:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error


def _has(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    try:
        call(os.lstat, path, path)
    except CallFailed as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise cannot_read(path, error) from error
    return True


def _others(folder: str) -> str:
    try:
        listed = sorted(os.listdir(folder))
    except OSError:
        return ""
    files = [name for name in listed if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json"))]
    return f"; to read another file, give its path: {', '.join(files[:3])}" if files else ""


def _snapshot(path: str) -> str:
    """Of a repository in the hub's cache, the snapshot that its main branch was when it was fetched; else ``path`` itself."""
    reference, snapshots = os.path.join(path, "refs", "main"), os.path.join(path, "snapshots")
    if not os.path.isdir(snapshots) or not os.path.isfile(reference):
        return path
    with open(reference, encoding="ascii", errors="replace") as file:
        commit = file.read(100).strip()
    chosen = os.path.join(snapshots, commit)
    return chosen if commit.isalnum() and os.path.isdir(chosen) else path


def _looks_like_safetensors(path: str) -> bool:
    if not os.path.isfile(path):
        return True  # what it is, its opening says: nothing but a regular file is opened
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:9] == b"{" and not start.startswith(b"PK")
