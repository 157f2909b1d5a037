"""Errors of other libraries that Python prints above one of ours, as its cause: they may quote text of a file as it is."""

from __future__ import annotations

from shardsave._printable import printable


class EscapedError(Exception):
    """Stands for an error whose text a terminal cannot show: it has the name, the escaped text and the traceback of that error."""


def escape_causes(error: BaseException, outer: BaseException | None) -> None:
    """Replaces errors that are printed above ``error``, and whose text a terminal cannot show. ``outer`` and those above it are the
    caller's.
    """
    seen = {id(error)}
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None or cause is outer or id(cause) in seen:
            return
        seen.add(id(cause))
        if not _is_plain(cause):
            cause = _escaped(cause)
            if error.__cause__ is not None:
                error.__cause__ = cause
            else:
                error.__context__ = cause
        error = cause


def _is_plain(error: BaseException) -> bool:
    return all(text.isprintable() for text in (_text(error), *getattr(error, "__notes__", ())))


def _escaped(error: BaseException) -> EscapedError:
    escaped = EscapedError(f"{type(error).__name__}: {printable(_text(error))}").with_traceback(error.__traceback__)
    escaped.__cause__, escaped.__context__ = error.__cause__, error.__context__
    escaped.__suppress_context__ = error.__suppress_context__
    return escaped


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "?"
