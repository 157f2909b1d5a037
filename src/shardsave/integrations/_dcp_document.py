"""What DCP saved beside the weights, as the values of a training document, and back. See "A state dict of DCP" in FORMAT.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from shardsave._common.strict_json import glimpse
from shardsave._training.read_values import ValueReader
from shardsave.errors import CorruptCheckpointError
from shardsave.integrations._dcp_names import Path, Rule, name_of

_KEY = "torch.distributed.checkpoint"


class Document(NamedTuple):
    """``rule``: how the weights are called. ``paths``: weight → its path, where the rule says another one. ``values``: path → the JSON of
    a value; that of a tensor is ``{"tensor": name}``. ``streams``: the paths of values that are an ``io.BytesIO``, stored as bytes.
    """

    rule: Rule
    paths: Mapping[str, Path]
    values: Mapping[Path, Any]
    streams: Sequence[Path] = ()

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to say: DCP's names are those of the weights."""
        return self.rule == Rule() and not self.paths and not self.values

    def path(self, weight: str) -> Path:
        return self.paths[weight] if weight in self.paths else self.rule.path(weight)


def encode(document: Document) -> bytes:
    """The value ``shared`` of the training document, as JSON."""
    rule = document.rule
    members = {
        "under": {"list": [*rule.under]},
        "prefix": rule.prefix,
        "paths": {"dict": {name: {"list": [*path]} for name, path in document.paths.items()}},
        "values": {"pairs": [[{"tuple": [*path]}, value] for path, value in document.values.items()]},
        "streams": {"list": [{"list": [*path]} for path in document.streams]},
    }
    value = {"dict": {_KEY: {"dict": members}}}
    return json.dumps(value, allow_nan=False, check_circular=False, ensure_ascii=False).encode()


def decode(shared: Any, reader: ValueReader, weights: Iterable[str]) -> Document | None:
    """The document in ``shared``; None if DCP did not save it. ``weights``: the names of all weights, tied ones too.

    Raises CorruptCheckpointError.
    """
    saved = shared.get("dict") if isinstance(shared, dict) else None
    if not isinstance(saved, dict) or saved.keys() != {_KEY}:
        return None
    (value,) = saved.values()
    (members,) = reader.members(value, _KEY, {"dict": dict})
    under, prefix, paths, values, streams = reader.members(
        members, _KEY, {"under": object, "prefix": str, "paths": object, "values": dict, "streams": object}
    )
    listed, bytes_at = reader.value(paths, "paths"), reader.value(streams, "streams")
    if not isinstance(listed, dict) or not isinstance(bytes_at, list):
        reader.corrupt(_KEY, "a dict of paths and a list of streams were", members)
    keys = reader.pairs(values.get("pairs"), "values")
    document = Document(
        Rule(_path(reader.value(under, "under"), reader, empty=True), prefix),
        {name: _path(path, reader) for name, path in listed.items()},
        {_path(key, reader): item for key, item in keys},
        [_path(path, reader) for path in bytes_at],
    )
    _check_names(document, reader, weights)
    return document


def _path(keys: Any, reader: ValueReader, *, empty: bool = False) -> Path:
    if not isinstance(keys, (list, tuple)) or not (keys or empty) or not all(type(key) in (str, int) for key in keys):
        reader.corrupt("a path", "a list of names and positions was", keys)
    if not all(isinstance(key, str) or 0 <= key < 1 << 31 for key in keys):
        reader.corrupt("a path", "positions in lists were", keys)
    return tuple(keys)


def _check_names(document: Document, reader: ValueReader, weights: Iterable[str]) -> None:
    """Raises CorruptCheckpointError if two values have one name."""
    seen: set[str] = set()
    for path in (*map(document.path, weights), *document.values):
        name = name_of(path)
        if name in seen:
            _twice(name, reader)
        seen.add(name)


def _twice(name: str, reader: ValueReader) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt training state in {reader.where}: every name was expected once, {glimpse(name)} is there twice; nothing was changed"
    )
