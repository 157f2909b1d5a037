"""Files with a pickle that are no states of tensors: the errors name what they are, and the way out of those that are sound."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from shardsave._common.words import human_bytes, some
from shardsave._foreign.containers import children, is_container
from shardsave._foreign.records import Record
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError

#: How many names of classes a message lists.
_LISTED = 20

#: What to do with a module that was saved as an object; only its own classes can make it again.
MODULE_ADVICE = "load the file where its classes are, with torch.load(…, weights_only=False), and save its state_dict()"


def refuse_damaged(path: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt {os.path.basename(path)}: {path}: a file of torch.save was expected, {found}; nothing was written"
    ) from None  # torch's own messages have names from the file as they are


def refuse_program(path: str, records: Sequence[str]) -> None:
    """Refuses archives that hold a program beside the weights; the message names their kind."""
    inner = {name.partition("/")[2] for name in records}
    if "constants.pkl" in inner:
        kind, advice = "a TorchScript archive", "load it with torch.jit.load and save its state_dict()"
    elif {"archive_format", "archive_version"} <= inner or "serialized_exported_program.json" in {*inner, *records}:
        kind, advice = "a program of torch.export", "load it with torch.export.load and save its state_dict"
    else:
        return
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a file of torch.save was expected, it is {kind}; {advice}; nothing was written"
    )


def refuse_plain_pickle(path: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a file of torch.save was expected, it is a pickle that torch.save did not write; if you trust the "
        f"file, load it with pickle.load and save the tensors with torch.save; nothing was written"
    )


def refuse_long_pickle(path: str, found: int, most: int) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: at most {human_bytes(most)} of pickle were expected, it has {human_bytes(found)}, since NumPy arrays "
        f"and other values are in the pickle itself; load the file with torch and save tensors; nothing was written"
    )


def refuse_names(path: str, names: Iterable[str], content: Any) -> NoReturn:
    """Raises the error for a pickle with ``names`` that are not allowed. ``content`` is what it holds, or None if it is broken."""
    listed = list(names)
    allow = repr(listed[0]) if len(listed) == 1 else repr(listed[:_LISTED])
    object_ = "such an object as a record that does" if len(listed) == 1 else "such objects as records that do"
    advice = f"allow={allow} reads {object_} nothing"
    if isinstance(content, Record) and content.is_module:
        advice = f"it is a whole module, not a state: {MODULE_ADVICE}"
    elif _has_module(content):
        advice = f"a whole module is in it: {MODULE_ADVICE}; for the rest of the file, {advice}"
    raise UntrustedCodeError(
        f"cannot convert {path}: tensors, numbers, strings and containers of these were expected, its pickle asks for "
        f"{some(listed, _LISTED)}; nothing of it was run, and {advice}; nothing was written"
    )


def _has_module(content: Any) -> bool:
    """Whether there is a module anywhere in ``content``."""
    visited: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Record) and value.is_module:
            return True
        if is_container(value) and id(value) not in visited:
            visited.add(id(value))
            waiting += [child for _, child in children(value)]
    return False
