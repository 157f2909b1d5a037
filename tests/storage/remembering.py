"""Scenarios of `faults`, in which a directory is read anew, and the next save tried, only if its content is new: most trials end in the
same few.

``python -m storage.remembering scenarios|single_file SCENARIO,… first|overwrite FOLDER``, with the library of ``beneath.c`` preloaded.
Random names follow from the number of names since the last trial, so that the same saves lead to the same content.
"""

from __future__ import annotations

import os
import secrets
import sys
from itertools import count
from pathlib import Path
from typing import Any

from faults import savers, single_file
from faults import scenarios as saving
from faults.scenarios import run_scenarios

Content = tuple[tuple[str, Any], ...]


def content_of(folder: Path) -> Content:
    """Every path below ``folder`` with the bytes of the file, and where a link leads."""
    found: list[tuple[str, Any]] = []
    for where, folders, names in os.walk(folder):
        found += [(os.path.join(where, name), None) for name in folders]
        for name in names:
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                found.append((path, (os.path.islink(path) and os.readlink(path), file.read())))
    return tuple(sorted(found))


def remember_generations(*modules: Any) -> None:
    """`generation_in`, as these modules call it, gives the answer that the same content got before. An error is never remembered."""
    known: dict[Content, int | None] = {}
    read = savers.generation_in

    def generation_in(folder: Path) -> int | None:
        content = content_of(folder)
        if content not in known:
            known[content] = read(folder)
        return known[content]

    for module in modules:
        module.generation_in = generation_in


def remember_next_calls() -> None:
    """The next save, or conversion, works where it has worked with the same content before. One that does not is never remembered.

    Whether a trial has left a lock, a descriptor or a thread is looked at in each, and each is a save after the one before.
    """
    known: set[Content] = set()
    save, convert = savers.next_save_works, single_file.File.next_works

    def next_save_works(folder: Path) -> None:
        if (content := content_of(folder.parent)) not in known:
            save(folder)
            known.add(content)

    def next_works(file: single_file.File) -> None:
        if (content := content_of(file.target.parent)) not in known:
            convert(file)
            known.add(content)

    saving.next_save_works = next_save_works
    single_file.File.next_works = next_works  # type: ignore[method-assign]


def repeat_names() -> None:
    """Each trial takes the same random names. Those from before the trials, of a saver that dies, and of later saves are all different."""
    numbers = count()
    reset, parent = savers.Bench.reset, os.getpid()

    def reset_names(bench: savers.Bench) -> None:
        nonlocal numbers
        numbers = count(1 << 16)
        reset(bench)

    def token_hex(size: int | None = None) -> str:
        return f"{next(numbers) + (os.getpid() != parent) * (1 << 20):0{2 * (size or 32)}x}"

    secrets.token_hex = token_hex
    savers.Bench.reset = reset_names  # type: ignore[method-assign]


if __name__ == "__main__":
    scenarios = {"scenarios": saving, "single_file": single_file}[sys.argv[1]]
    # Not for `faults.scenarios`: there it is also what a fault meets.
    remember_generations(savers, *([scenarios] if scenarios is single_file else []))
    remember_next_calls()
    repeat_names()
    run_scenarios(scenarios.SCENARIOS, *sys.argv[2:])
