"""Opens the source of a conversion: recognises which tool wrote the files at a path."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import ExitStack

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call, read_at
from shardsave._common.words import some
from shardsave._conversion.origin import Origin, Request, from_checkpoint, from_distributed, from_torch, from_torch_shards
from shardsave._foreign.dcp import TABLE_NAME
from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_NAME, LONE_NAME, TORCH_ENDINGS
from shardsave._format.index_parsing import parse_index
from shardsave._format.other_kinds import START_BYTES, ZIP, is_pickle, is_safetensors
from shardsave._format.rank_files import is_rank_file
from shardsave._storage.companions import ADAPTER_FILES, ADAPTER_NAMES, CONFIG_NAMES, MAX_COMPANION_BYTES
from shardsave._storage.directory import Directory
from shardsave._storage.find import cannot_read, find, latest_step, open_checkpoint_file
from shardsave.errors import CheckpointNotFoundError, IncompatibleCheckpointError

#: The file names that transformers uses for weights written by torch.save.
TORCH_NAME, TORCH_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
_TORCH_NAMES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")

#: The file name that PEFT uses for an adapter written by torch.save.
TORCH_ADAPTER_NAME = "adapter_model.bin"


def open_origin(path: str, request: Request, closing: ExitStack) -> Origin:
    """Recognises what is at ``path`` and opens it; ``closing`` closes it.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError.
    """
    if not _is_folder(path):
        return _noting_config(path, _from_file(path, request, closing))
    folder = _resolve_hub_cache(path)
    origin = _from_folder(folder, request, closing)
    companions = _read_configs(folder)
    beside = [name for name in sorted(ADAPTER_NAMES) if _has(folder, name)]
    if beside and not origin.adapter:
        note = f"{' and '.join(beside)} beside the weights, of an adapter that is not part of the checkpoint, was not read"
        origin = origin._replace(notes=(*origin.notes, note))
        companions.pop(ADAPTER_CONFIG, None)
    return origin._replace(companions=companions, notes=(*origin.notes, *_notes_on_others(folder, origin)))


def _notes_on_others(folder: str, origin: Origin) -> tuple[str, ...]:
    """A note of files in ``folder`` that may have weights or training state, and that no other note names."""
    known = {*map(os.path.basename, origin.files), *ADAPTER_NAMES}
    others = [
        name
        for name in _names_in(folder)
        if name.endswith((".safetensors", ".ckpt", *TORCH_ENDINGS)) and name not in known and not _TORCH_NAMES.fullmatch(name)
    ]
    if not others:
        return ()
    return (f"{some(others, 5)} beside the checkpoint {'was' if len(others) == 1 else 'were'} not read",)


def _noting_config(path: str, origin: Origin) -> Origin:
    """``origin``, with a note if the file at ``path`` is an adapter whose config lies beside it."""
    folder, name = os.path.split(path)
    if name not in ADAPTER_FILES or not _has(folder, ADAPTER_CONFIG):
        return origin
    note = (
        f"{ADAPTER_CONFIG} beside {name} was not read, so PEFT finds no adapter in the result; convert the directory to keep it"
    )
    return origin._replace(notes=(*origin.notes, note))


def _from_folder(path: str, request: Request, closing: ExitStack) -> Origin:
    safetensors = [name for name in (INDEX_NAME, LONE_NAME) if _has(path, name)]
    ranks = [name for name in _names_in(path) if is_rank_file(name)]
    table = [TABLE_NAME] if _has(path, TABLE_NAME) else []
    pickled = [name for name in (TORCH_INDEX_NAME, TORCH_NAME) if _has(path, name)]
    if not safetensors or (table and any(name.endswith(".distcp") for name in _names_in(path))):
        _refuse_several(path, [*safetensors, *ranks[:1], *table, *pickled])
    if safetensors or ranks:
        lone = os.path.join(path, LONE_NAME)
        is_pickled = safetensors == [LONE_NAME] and not ranks and _is_torch_file(lone)
        origin = from_torch(lone, request) if is_pickled else from_checkpoint(path, request, closing)
        if pickled:
            note = f"{' and '.join(pickled)} beside {safetensors[0]} was not read, since it should have the same weights"
            origin = origin._replace(notes=(*origin.notes, note))
        return origin
    if table:
        return from_distributed(path, request)
    if TORCH_INDEX_NAME in pickled:
        return from_torch_shards(os.path.join(path, TORCH_INDEX_NAME), request)
    if pickled:
        return _from_file(os.path.join(path, TORCH_NAME), request, closing)
    adapters = [name for name in (ADAPTER_WEIGHTS, TORCH_ADAPTER_NAME) if _has(path, name)]
    if adapters:
        is_pickled = ADAPTER_WEIGHTS not in adapters
        origin = from_torch(os.path.join(path, adapters[0]), request) if is_pickled else from_checkpoint(path, request, closing)
        return origin._replace(adapter=frozenset(origin.values))
    names = f"{LONE_NAME}, {INDEX_NAME}, {TORCH_NAME}, {TORCH_INDEX_NAME} and {TABLE_NAME}"
    raise CheckpointNotFoundError(f"no checkpoint at {path}: one of {names} was expected, none is there{_hint(path)}")


def _refuse_several(path: str, checkpoints: list[str]) -> None:
    """Raises IncompatibleCheckpointError if there is more than one of ``checkpoints``, each known by the name of one of its files."""
    if len(checkpoints) > 1:
        *others, last = checkpoints
        raise IncompatibleCheckpointError(
            f"cannot tell which checkpoint is meant: {path}: one was expected, the files of {len(checkpoints)} are there: "
            f"{', '.join(others)} and {last}; give the path of the one to convert, or remove the others; files of several ranks have no "
            f"path of their own, so move them to another directory; nothing was written"
        )


def _from_file(path: str, request: Request, closing: ExitStack) -> Origin:
    name = os.path.basename(path)
    if name == TABLE_NAME:
        return from_distributed(os.path.dirname(path) or ".", request)
    if name.endswith(".index.json"):
        index = parse_index(find(path).index_bytes or b"", f"index {name}")
        if all(shard.endswith(TORCH_ENDINGS) for shard in index.weight_map.values()) and index.weight_map:
            return from_torch_shards(path, request)
        return from_checkpoint(path, request, closing)
    return from_torch(path, request) if _is_torch_file(path) else from_checkpoint(path, request, closing)


def _read_configs(folder: str) -> dict[str, bytes]:
    """The configs of a transformers model and of an adapter beside the weights: file name → content."""
    with Directory() as directory:
        try:
            directory.open(folder)
            contents = {name: directory.read_all(name, MAX_COMPANION_BYTES) for name in (*CONFIG_NAMES, ADAPTER_CONFIG)}
        except CallFailed as error:
            raise cannot_read(error.path or folder, error) from error
    return {name: content for name, content in contents.items() if content is not None}


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


def _hint(folder: str) -> str:
    """Names the latest step of a run, or files in ``folder`` that could be converted if their path were given."""
    listed = _names_in(folder)
    if latest := latest_step(folder, listed):
        return latest
    files = [name for name in listed if name.endswith((".safetensors", *TORCH_ENDINGS, ".index.json"))]
    return f"; to read another file, give its path: {some(files)}" if files else ""


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _resolve_hub_cache(path: str) -> str:
    """For a repository in the Hugging Face cache, the snapshot of its main branch; otherwise ``path`` itself."""
    reference, snapshots = os.path.join(path, "refs", "main"), os.path.join(path, "snapshots")
    if not os.path.isdir(snapshots) or not os.path.isfile(reference):
        return path
    with Descriptor() as file:
        try:
            file.open(reference, os.O_RDONLY)
            commit = read_at(file.fd, 100, 0).decode("ascii", "replace").strip()
        except CallFailed as error:
            raise cannot_read(reference, error) from error
    snapshot = os.path.join(snapshots, commit)
    return snapshot if commit.isalnum() and os.path.isdir(snapshot) else path


def _is_torch_file(path: str) -> bool:
    """Whether to read the file as one of torch.save: its content decides, its name only if the content is of an unknown kind."""
    if not os.path.isfile(path):
        return False  # only regular files are opened; opening it as a checkpoint raises the right error
    file = open_checkpoint_file(path, os.path.basename(path))
    if file is None:
        return False
    with file:
        try:
            start = read_at(file.fd, START_BYTES, 0)
        except CallFailed as error:
            raise cannot_read(path, error) from error
    if start.startswith(ZIP) or is_pickle(start):
        return True
    return not is_safetensors(start) and not path.endswith(".safetensors")
