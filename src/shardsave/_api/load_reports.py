"""The report of a load, from what was read and when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from shardsave._api.reports import LoadReport, Phases
from shardsave._common.backend import engine_name
from shardsave._common.log_records import log_record
from shardsave._engine.totals import Totals
from shardsave._loading.job import ALONE, LoadJob
from shardsave._loading.read import TensorReader
from shardsave._storage.located import Located


class LoadClock:
    """Measures the phases of a load: created when it begins, told when its plan is made and when its bytes have been read."""

    def __init__(self) -> None:
        self._started = self._planned = self._transferred = time.perf_counter()

    def planned(self) -> None:
        self._planned = self._transferred = time.perf_counter()

    def transferred(self) -> None:
        self._transferred = time.perf_counter()

    def report(
        self,
        path: str | os.PathLike[str],
        reads: Iterable[Located],
        reader: TensorReader | None,
        notes: tuple[str, ...] = (),
        job: LoadJob = ALONE,
    ) -> LoadReport:
        """The report of a load of ``reads``, without what only a module has. ``reader``: None if the files were mapped.

        Waits for the other processes of ``job``, and adds up what all have read.
        """
        reads = list(reads)
        if reader is not None:
            totals, shards = job.ended(reader.totals, reader.shards)
        else:
            totals = Totals(sum(t.nbytes for t in reads), direct=False)
            shards = len({place.shard for located in reads for place in located.places})
        ended = time.perf_counter()
        return LoadReport(
            path=os.fspath(path),
            bytes=totals.bytes,
            tensors=reader.tensors if reader is not None else len(reads),
            shards=shards,
            seconds=ended - self._started,
            phases=Phases(
                plan=self._planned - self._started,
                transfer=self._transferred - self._planned,
                commit=ended - self._transferred,
            ),
            engine=engine_name() if reader is not None else "mmap",
            direct=totals.direct,
            staging_bytes=totals.staging_bytes,
            pinned=totals.pinned,
            notes=(*totals.notes, *notes),
            verified=reader.verified if reader is not None else False,
            ranks=job.size,
            rank_bytes=reader.totals.bytes if reader is not None else totals.bytes,
        )


def log_load(
    report: LoadReport, warnings: tuple[str, ...] = (), *, event: str = "load", may_be_empty: bool = False, **facts: object
) -> None:
    """Logs ``report``, and more ``facts``. ``warnings``: those of its notes that need attention; so do shapes that differ, and a load of
    nothing, unless it ``may_be_empty``."""
    is_empty = report.tensors == 0 and not may_be_empty
    log_record(event, report, matters=bool(warnings or report.mismatched or is_empty), **facts)
