"""The report of a load, from what was read and when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from shardsave._api.reports import LoadReport, Phases
from shardsave._common.backend import engine_name
from shardsave._common.log_records import log_record
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
        self, path: str | os.PathLike[str], reads: Iterable[Located], reader: TensorReader | None, notes: tuple[str, ...] = ()
    ) -> LoadReport:
        """The report of a load of ``reads``, without what only a module has. ``reader``: None if the files were mapped."""
        reads, ended = list(reads), time.perf_counter()
        return LoadReport(
            path=os.fspath(path),
            bytes=reader.totals.bytes if reader is not None else sum(located.nbytes for located in reads),
            tensors=reader.tensors if reader is not None else len(reads),
            shards=len(reader.shards if reader is not None else {place.shard for located in reads for place in located.places}),
            seconds=ended - self._started,
            phases=Phases(
                plan=self._planned - self._started,
                transfer=self._transferred - self._planned,
                commit=ended - self._transferred,
            ),
            engine=engine_name() if reader is not None else "mmap",
            direct=reader.totals.direct if reader is not None else False,
            staging_bytes=reader.totals.staging_bytes if reader is not None else 0,
            pinned=reader.totals.pinned if reader is not None else False,
            notes=(*(reader.totals.notes if reader is not None else ()), *notes),
            verified=reader.verified if reader is not None else False,
        )


def log_load(
    report: LoadReport, warnings: tuple[str, ...] = (), *, event: str = "load", may_be_empty: bool = False, **facts: object
) -> None:
    """Logs ``report``, and more ``facts``. ``warnings``: those of its notes that need attention; so do shapes that differ, and a load of
    nothing, unless it ``may_be_empty``."""
    is_empty = report.tensors == 0 and not may_be_empty
    log_record(event, report, matters=bool(warnings or report.mismatched or is_empty), **facts)
