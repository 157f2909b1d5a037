"""Numbers and names in words, for messages and reports."""

from __future__ import annotations

from collections.abc import Iterable


def an(noun: str) -> str:
    """``noun`` with its article, for a message: ``a list``, ``an int``."""
    vowel = noun[:1].lower() in "aeio" or noun[:2].lower() == "un"
    return f"{'an' if vowel else 'a'} {noun}"


def human_bytes(count: float) -> str:
    """``14200000000`` → ``14.2 GB``; decimal units, as for disks and file sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 tensor``, ``2,000 tensors``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def some(names: Iterable[str], most: int = 3) -> str:
    """``a, b, c and 4 more``: the first ``most`` of ``names``, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def build_arguments(trust: Iterable[str], script_classes: Iterable[str]) -> str:
    """``trust=['mylib'], classes={'__main__.Net': Net}``: arguments of `build_model`, as they are written."""
    entries = list(trust)
    classes = ", ".join(f"'{name}': {name.removeprefix('__main__.')}" for name in script_classes)
    return ", ".join([*([f"trust={entries}"] if entries else []), *([f"classes={{{classes}}}"] if classes else [])])
