"""Log records of the logger ``shardsave``: one sentence each, and the same facts as data in ``record.shardsave``."""

from __future__ import annotations

import logging

from shardsave._printable import printable

_logger = logging.getLogger("shardsave")


def log(level: int, event: str, message: str, **facts: object) -> None:
    """Logs ``message``. ``record.shardsave`` is a dict: ``event``, a fixed name for programs, and ``facts``."""
    _logger.log(level, "%s", printable(message), extra={"shardsave": {"event": event, **facts}})
