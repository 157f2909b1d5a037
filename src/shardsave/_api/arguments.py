"""Checks of arguments. Every verb makes them before anything else happens."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Mapping
from typing import Any, TypeVar, Union

from shardsave._common.strict_json import glimpse

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_Fields = TypeVar("_Fields")


def pick(kind: type[_Fields], arguments: Mapping[str, Any]) -> _Fields:
    """A named tuple of those ``arguments`` that are its fields; ``arguments`` of a verb are its ``locals()``."""
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(**{name: arguments[name] for name in names if name in arguments})


def check_path(path: object) -> None:
    """Raises TypeError or ValueError if ``path`` cannot be the path of a checkpoint."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"the path of a checkpoint must be a string or a pathlib.Path, not {type(path).__name__}")
    if not os.fspath(path):
        raise ValueError("the path of a checkpoint must not be empty; the current directory is '.'")


def check_switches(**switches: object) -> None:
    """Raises TypeError if a switch is not True or False, for example if a path or a device is passed in its place."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")


def check_progress(progress: object) -> None:
    """Raises TypeError if ``progress`` is neither a callable nor one of None, True and False."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be None, True, False or a callable, not {type(progress).__name__}")


def check_timeout(seconds: object, name: str = "lock_timeout") -> None:
    """Raises TypeError or ValueError if ``seconds``, the argument ``name``, is not a time to wait."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not seconds >= 0:
        raise ValueError(f"{name} must be at least 0 seconds, not {seconds!r}")
    if isinstance(seconds, int) and seconds > threading.TIMEOUT_MAX:
        raise ValueError(f"{name} must be at most {threading.TIMEOUT_MAX:.0f} seconds; float('inf') waits for ever")


def check_reuse(reuse: object, recheck_every: object) -> None:
    """Raises TypeError or ValueError for a wrong ``reuse`` or ``recheck_every``."""
    if reuse is True:
        raise TypeError("reuse must be the path of a checkpoint, None or False, not True")
    if reuse is not None and reuse is not False:
        check_path(reuse)
    if type(recheck_every) is not int:
        raise TypeError(f"recheck_every must be a number of saves, not {type(recheck_every).__name__}")
    if recheck_every < 1:
        raise ValueError(f"recheck_every must be at least 1, not {recheck_every}")


def parse_size(size: Union[int, str]) -> int:
    """Returns ``size`` in bytes: ``"5GB"`` is 5·10⁹, ``"2GiB"`` is 2·2³⁰, an int is already in bytes. Raises TypeError or ValueError."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"max_shard_size must be an int of bytes or a string such as '5GB', not {type(size).__name__}")
    if isinstance(size, int):
        byte_count = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"max_shard_size must be like '5GB', '500MB' or '2GiB', not {glimpse(size)}")
        number = float(match[1]) * unit
        if math.isinf(number):
            raise ValueError(f"max_shard_size must be a size that a file can have, not {glimpse(size)}")
        byte_count = int(number)
    if byte_count <= 0:
        raise ValueError(f"max_shard_size must be at least one byte, not {size!r}")
    return byte_count
