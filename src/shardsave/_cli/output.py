"""Prints the output of all commands: tables and colour on a terminal, plain lines in a pipe or file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Union

import click

from shardsave._printable import printable

if TYPE_CHECKING:
    from rich.text import Text

#: How many characters a bar has.
_BAR_WIDTH = 12

#: Text, or text with a style of rich.
Cell = Union[str, tuple[str, str]]

FROZEN, TRAINABLE, GOOD, BAD, DIM = "bold cyan", "yellow", "green", "bold red", "dim"


class Output:
    """Standard output. rich decides whether it is a terminal and which colours it has (NO_COLOR, TERM, FORCE_COLOR)."""

    def __init__(self) -> None:
        from rich.console import Console

        # Wider than any line, so that no name is cut; a narrow terminal wraps long lines itself.
        self._console = Console(highlight=False, markup=False, emoji=False, width=100_000)
        self.terminal = self._console.is_terminal

    def line(self, *cells: Cell) -> None:
        """Prints one line of text, never wrapped."""
        if self.terminal:
            self._console.print(self._text(*cells), soft_wrap=True)
        else:
            click.echo("".join(_plain(cell) for cell in cells).rstrip())

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: Iterable[int] = ()) -> None:
        """Prints rows under ``titles``; the columns in ``numbers`` are aligned to the right."""
        right = frozenset(numbers)
        if self.terminal:
            from rich.table import Table

            table = Table(box=None, pad_edge=False, header_style=DIM)
            for place, title in enumerate(titles):
                table.add_column(title, justify="right" if place in right else "left", no_wrap=True)
            for row in rows:
                table.add_row(*map(self._text, row))
            self._console.print(table)
            return
        cells = [list(titles), *([_plain(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        for row_ in cells:
            padded = (c.rjust(w) if place in right else c.ljust(w) for place, (c, w) in enumerate(zip(row_, widths)))
            click.echo("  ".join(padded).rstrip())

    def bar(self, share: float | None) -> list[Cell]:
        """Two cells: ``share`` as a bar and in per cent. Both are empty if it is None."""
        if share is None:
            return ["", ""]
        full = round(share * _BAR_WIDTH)
        if 0 < share < 1:
            full = min(max(full, 1), _BAR_WIDTH - 1)  # the bar looks full only for 100 %, and empty only for 0 %
        marks = ("█", "░") if self.terminal else ("#", ".")
        return [
            (marks[0] * full + marks[1] * (_BAR_WIDTH - full), FROZEN),
            f"{share:.0%}" if share in (0, 1) else f"{share:.1%}",
        ]

    @staticmethod
    def _text(*cells: Cell) -> Text:
        from rich.text import Text

        return Text.assemble(
            *((printable(cell), "") if isinstance(cell, str) else (printable(cell[0]), cell[1]) for cell in cells)
        )


def _plain(cell: Cell) -> str:
    return printable(cell if isinstance(cell, str) else cell[0])


def wants_bar() -> bool:
    """Whether to show a progress bar: stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()
