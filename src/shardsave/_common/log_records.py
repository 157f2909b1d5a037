"""Structured records of Python's ``logging``: one for each finished call, with the fields of its report, and for decisions in a run.

No handler is installed here. Without any, only errors are logged, which nothing else might tell: Python's handler of last resort prints
them. It would also print warnings, but the report has these anyway. If the level is off, nothing is formatted.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from shardsave._common.warn_caller import caller_level
from shardsave._printable import printable

_logger = logging.getLogger("shardsave")


def somebody_listens() -> bool:
    """Whether any record may reach a handler; a report that is only for the log is not made otherwise."""
    return _logger.isEnabledFor(logging.WARNING) and _logger.hasHandlers()


def log_record(event: str, report: Any, *, matters: bool = False, **facts: object) -> None:
    """Logs ``report``, a dataclass, at level INFO; if it ``matters``, because something needs attention, at level WARNING.

    The record's attribute ``shardsave`` is a dict of plain values: ``event`` ("save", "load", "resume", "convert", "delete"), each
    field of the report, and ``facts``.
    """
    level = logging.WARNING if matters else logging.INFO
    if _logger.isEnabledFor(level) and _logger.hasHandlers():
        fields = {field.name: _plain(getattr(report, field.name)) for field in dataclasses.fields(report)}
        _logger.log(level, "%s", report, extra={"shardsave": {"event": event, **fields, **facts}}, stacklevel=caller_level())


def log_event(level: int, event: str, message: str, **facts: object) -> None:
    """Logs ``message``, one sentence. The record's attribute ``shardsave`` is a dict: ``event``, a fixed name, and ``facts``."""
    if _logger.isEnabledFor(level) and (level >= logging.ERROR or _logger.hasHandlers()):
        _logger.log(level, "%s", printable(message), extra={"shardsave": {"event": event, **facts}}, stacklevel=caller_level())


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
