"""The names of a checkpoint's files, and the patterns by which files are recognised. No file is opened here."""

from __future__ import annotations

import re

INDEX_NAME = "model.safetensors.index.json"

#: A checkpoint in one file, without an index.
LONE_NAME = "model.safetensors"

#: The files of an adapter as PEFT writes it.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: Endings of files that are almost always written by ``torch.save``.
TORCH_ENDINGS = (".bin", ".pt", ".pth")

#: The extension of a file with tensors that are no weights, such as extra tensors. Other tools read every ``*.safetensors`` of a directory
#: as weights.
PART_TENSORS = "tensors"

#: Exactly the names that `shard_names` and `part_name` return, or returned in version 1 of the format (``extra-….safetensors``): a save
#: may remove such a file once no index names it.
OWN_PATTERN = re.compile(
    r"model-(?:[0-9a-f]{8}-)?[0-9]{5}-of-[0-9]{5}\.safetensors"
    r"|(?:architecture|program)-[0-9a-f]{8}\.json|extra-[0-9a-f]{8}\.(?:tensors|safetensors)"
)

MAX_SHARDS = 99_999
_NO_FILE_NAME = re.compile(r"[/\x00-\x1f\x7f]|\A\.{0,2}\Z")


def check_shard_count(count: int) -> None:
    """Raises ValueError if a five-digit number is too short for ``count`` shards."""
    if count > MAX_SHARDS:
        raise ValueError(f"at most {MAX_SHARDS} shards can be numbered, {count} would be needed; raise max_shard_size")


def shard_names(count: int, tag: str | None = None) -> tuple[str, ...]:
    """``model-00001-of-0000N.safetensors``; with ``tag`` (eight hex digits), ``model-<tag>-00001-of-0000N.safetensors``."""
    check_shard_count(count)
    stem = "model" if tag is None else f"model-{tag}"
    return tuple(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def part_name(stem: str, tag: str, extension: str) -> str:
    """``architecture-1a2b3c4d.json``; a new tag gives a new name, so that a committed file is never replaced."""
    return f"{stem}-{tag}.{extension}"


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a single path component, printable in a message and short enough for any file system."""
    return not _NO_FILE_NAME.search(name) and len(name.encode()) <= 255
