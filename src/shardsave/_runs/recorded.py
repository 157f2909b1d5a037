"""The file in which a manager records its policy, for those who list the run. It decides nothing: nobody removes a step because of it."""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, write_all
from shardsave._common.strict_json import NotJSON, parse_object
from shardsave._runs.policies import Keep, KeepBest, KeepEvery, KeepLast
from shardsave._storage.directory import Directory

#: The file, in the run's directory.
RECORD_NAME = "shardsave-run.json"

_NEW_NAME = f"{RECORD_NAME}.new"
_FORMAT = "shardsave-run"
_MAX_BYTES = 1_000_000


class RecordedPolicy(NamedTuple):
    """What a manager was given. ``own``: the name of the user's function, which nobody else can call."""

    save_every: int | str | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: tuple[str, str, int] | None = None
    own: str | None = None

    def keeps(self) -> list[Keep]:
        """The policies of keeping, but for the user's own."""
        found: list[Keep] = []
        if self.keep_last is not None:
            found.append(KeepLast(self.keep_last))
        if self.keep_every is not None:
            found.append(KeepEvery(self.keep_every))
        if self.keep_best is not None:
            found.append(KeepBest(*self.keep_best))
        return found


def write_policy(run: str, policy: RecordedPolicy) -> None:
    """Records ``policy`` in the run, unless it is there already, or another process records one at this moment. Raises CallFailed."""
    content = json.dumps({"format": _FORMAT, "version": 1, **policy._asdict()}).encode() + b"\n"
    with Directory() as folder:
        folder.open(run)
        with suppress(CallFailed):
            if folder.read_all(RECORD_NAME, _MAX_BYTES, follow=False) == content:
                return
        try:
            _replace(folder, content)
        except CallFailed as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST):
                raise


def _replace(folder: Directory, content: bytes) -> None:
    with Descriptor() as file:
        if folder.status_of(_NEW_NAME) is not None:
            folder.unlink(_NEW_NAME)  # of a process that has died
        folder.create(_NEW_NAME, file)
        write_all(file.fd, _NEW_NAME, content)
        file.close(_NEW_NAME)
        folder.rename(_NEW_NAME, folder, RECORD_NAME)


def read_policy(run: str) -> RecordedPolicy | None:
    """What was recorded last; None if nothing was, or it is not readable."""
    try:
        with Directory() as folder:
            folder.open(run)
            found = parse_object(folder.read_all(RECORD_NAME, _MAX_BYTES, follow=False) or b"")
    except (CallFailed, NotJSON):
        return None
    best = found.get("keep_best")
    if found.get("format") != _FORMAT or found.get("version") != 1:
        return None
    return RecordedPolicy(
        save_every=found.get("save_every") if isinstance(found.get("save_every"), (int, str)) else None,
        keep_last=_count(found.get("keep_last")),
        keep_every=_count(found.get("keep_every")),
        keep_best=_best(best) if isinstance(best, list) else None,
        own=found["own"] if isinstance(found.get("own"), str) else None,
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _best(value: list[object]) -> tuple[str, str, int] | None:
    if len(value) != 3:
        return None
    metric, mode, count = value
    if not isinstance(metric, str) or mode not in ("min", "max") or type(count) is not int or count < 1:
        return None
    return metric, str(mode), count
