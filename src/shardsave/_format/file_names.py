"""The names of a checkpoint's files, and the patterns by which files are recognised. No file is opened here."""

from __future__ import annotations

import re

INDEX_NAME = "model.safetensors.index.json"

#: The name of a checkpoint's index while the whole checkpoint is being removed: it then says which files must go.
REMOVED_INDEX_NAME = f"{INDEX_NAME}.removed"

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

#: Exactly the names that `directory_name` returns: a save may remove what it made in such a directory once no index names it.
DIRECTORY_PATTERN = re.compile(r"training-[0-9a-f]{8}")

#: The document of a part that has a directory of its own, in that directory. The index names it; it names the other files there.
DIRECTORY_INDEX = "index.json"

#: The files of such a directory beside its document, each of which belongs to one rank: values as JSON, and tensors.
RANK_DOCUMENT = re.compile(r"rank-([0-9]{5})\.json")
RANK_TENSORS = re.compile(r"rank-([0-9]{5})-[0-9]{5}\.tensors")

MAX_SHARDS = 99_999

#: The last step that can have a directory, far more than any training has.
MAX_STEP = 10**15

_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")
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


def directory_name(stem: str, tag: str) -> str:
    """``training-1a2b3c4d``, the directory of a part, in which its files have names that no longer need a tag."""
    return f"{stem}-{tag}"


def rank_document(rank: int) -> str:
    """``rank-00000.json``, in the directory of a part."""
    return f"rank-{rank:05d}.json"


def rank_tensors(rank: int, number: int) -> str:
    """``rank-00000-00001.tensors``, in the directory of a part; ``number`` counts the files of a rank from 1."""
    return f"rank-{rank:05d}-{number:05d}.tensors"


def is_in_directory(name: str) -> bool:
    """Whether a save gives this name to a file in the directory of a part."""
    patterns = (RANK_DOCUMENT, RANK_TENSORS)
    return name == DIRECTORY_INDEX or any(pattern.fullmatch(name) for pattern in patterns)


def step_name(step: int) -> str:
    """``step-00001000``: the name of a step's directory in a run."""
    return f"step-{step:08d}"


def step_number(name: str) -> int | None:
    """The step whose directory has this name; None if `step_name` returns no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match is not None else None


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a single path component, printable in a message and short enough for any file system."""
    return not _NO_FILE_NAME.search(name) and len(name.encode()) <= 255
