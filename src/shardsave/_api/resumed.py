"""What a resumed training gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardsave._api.reports import LoadReport
from shardsave._printable import printable
from shardsave._training.per_rank import PerRank

__all__ = ["PerRank", "Resumed"]


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on.

    ``step``: the step that was saved; None if the save was given none. ``values``: the training state as it was passed, without
    `PerRank`, and with plain data (numbers, text, None, containers of these) as it was saved. ``notes``: what of the training state was
    fresh, unused, kept or cast, and which freeze flags have changed. ``report``: of the load, of everything that was read; its
    ``missing``, ``unexpected`` and so on are those of the model. The values, which may be large, are not part of the ``repr``.
    """

    step: int | None
    values: Any = field(repr=False)
    notes: tuple[str, ...] = ()
    report: LoadReport | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def next_step(self) -> int:
        """The first step that has not been saved; 1 if the save was given no step."""
        return 1 if self.step is None else self.step + 1

    def __str__(self) -> str:
        begin = f"resumed after step {self.step:,}" if self.step is not None else "resumed"
        lines = ["; ".join([begin, *self.notes])]
        return "\n".join([*lines, str(self.report)] if self.report is not None else lines)
