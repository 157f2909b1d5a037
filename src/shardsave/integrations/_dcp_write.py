"""Writes what DCP plans as one checkpoint: the same contents and the same commit as every save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Union

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from shardsave._api.arguments import parse_size
from shardsave._api.moments import check_moment
from shardsave._api.reports import SaveReport
from shardsave._api.save import How, check_how, log_saved, write_planned
from shardsave._api.save_contents import Needed, Planned
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._format.metadata import check_metadata
from shardsave._saving.contents import plan_contents
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.training_directory import plan_training_directory
from shardsave._state.module import Entry, State
from shardsave._state.parts import Parts
from shardsave.integrations._dcp_document import Document, encode
from shardsave.integrations._dcp_model import ModelRecord
from shardsave.integrations._dcp_names import Rule
from shardsave.integrations._dcp_plan import alone, arrange, resolve


class Options(NamedTuple):
    """The arguments of a writer that say what to save beside the state dict."""

    max_shard_size: Union[int, str]
    metadata: Mapping[str, Any] | None
    step: int | None
    metrics: Mapping[str, Any] | None

    def check(self) -> None:
        """Raises TypeError or ValueError."""
        parse_size(self.max_shard_size)
        check_metadata(self.metadata)
        check_moment(self.step, self.metrics)


@uncompiled
@verb()
def write(
    plan: SavePlan, planner: SavePlanner, directory: str, rule: Rule, record: ModelRecord | None, options: Options, how: How
) -> SaveReport:
    """Writes and commits everything in ``plan`` as the checkpoint of ``directory``. Raises what `save` raises."""
    started = time.perf_counter()
    path = check_how(directory, how)
    part = arrange(resolve(plan, planner), rule, record)
    planned = _planned(*alone(part), part.document, record, options)
    report, warnings = write_planned(planned, directory, path, how, time.perf_counter() - started)
    log_saved(report, warnings)
    for warning in warnings:
        warn_caller(warning)
    return report


def _planned(
    state: State, others: tuple[Entry, ...], document: Document, record: ModelRecord | None, options: Options
) -> Planned:
    max_shard_bytes = parse_size(options.max_shard_size)
    directories = []
    if not document.is_plain:
        directories = [plan_training_directory(encode(document), {}, {0: others}, max_shard_bytes)]
    contents = plan_contents(
        OnDisk(state, record.companions if record is not None else {}),
        Parts(),
        max_shard_bytes,
        check_metadata(options.metadata),
        directories=directories,
        moment=check_moment(options.step, options.metrics, is_training=bool(directories)),
    )
    return Planned(contents, Needed(), 0, ())
