"""The errors for a program that cannot be read, or cannot be saved."""

from __future__ import annotations

from typing import Any, NoReturn

from shardsave._common.strict_json import glimpse
from shardsave.errors import UnsupportedModuleError


class BadProgram(Exception):
    """A program document breaks a rule at ``where``: ``wanted`` describes what was expected there, ``found`` shows the value in short."""

    def __init__(self, where: str, wanted: str, found: Any) -> None:
        super().__init__(where, wanted, found)
        self.where, self.wanted, self.found = where, wanted, glimpse(found)


def refuse_to_save(reason: str) -> NoReturn:
    raise UnsupportedModuleError(f"cannot save a program: {reason}; nothing was written")
