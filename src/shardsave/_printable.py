"""Text that a terminal can show."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with every control and format character, and every half of a surrogate pair, as an escape such as ``\\x1b``.

    Names and paths come from untrusted files. They must not move the cursor, reverse the line or start a new one. Letters of all
    scripts, accents and emoji stay as they are, and so does text that is already escaped.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
