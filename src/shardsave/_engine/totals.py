"""The sum of several runs of the engine: what a report says about how the bytes were moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardsave._engine.transfer import Transfer


@dataclass(frozen=True)
class Totals:
    """What several runs did together.

    ``bytes``: how many were moved. ``direct``: whether every file is known to have bypassed the page cache.
    ``staging_bytes``: the most staging memory that one run held. ``pinned``: whether any of it was pinned. ``notes``: those of all
    runs, each once.
    """

    bytes: int = 0
    direct: bool = True
    staging_bytes: int = 0
    pinned: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Totals:
        """The inverse of `dataclasses.asdict`, also after JSON, which has lists in the place of tuples."""
        return cls(**{**fields, "notes": tuple(fields["notes"])})

    def plus(self, transfer: Transfer, moved: int) -> Totals:
        """These totals and one more run, which moved ``moved`` bytes."""
        return replace(
            self,
            bytes=self.bytes + moved,
            direct=self.direct and all(transfer.direct),
            staging_bytes=max(self.staging_bytes, transfer.staging_bytes),
            pinned=self.pinned or transfer.pinned,
            notes=tuple(dict.fromkeys([*self.notes, *transfer.notes])),
        )

    def joined(self, other: Totals) -> Totals:
        """These totals and those of another process."""
        return Totals(
            bytes=self.bytes + other.bytes,
            direct=self.direct and other.direct,
            staging_bytes=max(self.staging_bytes, other.staging_bytes),
            pinned=self.pinned or other.pinned,
            notes=tuple(dict.fromkeys([*self.notes, *other.notes])),
        )
