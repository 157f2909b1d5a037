"""What failed in the background and is still to be told: the next save of this process has it in its notes."""

from __future__ import annotations

import os

_untold: list[str] = []


def note_failure(sentence: str) -> None:
    _untold.append(sentence)


def take_failures() -> tuple[str, ...]:
    """The sentences of all failures that no report has told yet."""
    sentences = []
    while _untold:
        sentences.append(_untold.pop(0))
    return tuple(sentences)


os.register_at_fork(after_in_child=_untold.clear)
