"""Writes what DCP plans as one checkpoint: the same contents and the same commit as every save."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Union

import torch.distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from shardsave._api.arguments import parse_size
from shardsave._api.moments import check_moment
from shardsave._api.process_group import check_group
from shardsave._api.reports import SaveReport
from shardsave._api.save import How, check_how, log_saved, write_planned
from shardsave._api.save_contents import Planned
from shardsave._api.save_jobs import beside_other_ranks, check_digests, job_of_save
from shardsave._api.save_parts import Needed
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._format.metadata import check_metadata
from shardsave._ranks.save_job import SaveJob
from shardsave._saving.contents import plan_contents
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.job import ALONE, Job
from shardsave._saving.training_directory import plan_training_directory
from shardsave._state.module import Entry, State
from shardsave._state.parts import Parts
from shardsave.integrations._dcp_document import Document, encode
from shardsave.integrations._dcp_model import ModelRecord
from shardsave.integrations._dcp_names import Rule
from shardsave.integrations._dcp_plan import Arranged, alone, arrange, resolve
from shardsave.integrations._dcp_ranks import join


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


class Noted(NamedTuple):
    """What the writer notes in DCP's plans. It depends on them alone, since a planner may keep plans for the next save.

    ``rule``: how the weights are called; None if this rank has none. ``ranks``: how many ranks save.
    """

    rule: Rule | None
    ranks: int


class Request(NamedTuple):
    """What one save of DCP is to write. ``order``: DCP's name → its place in the state dict, before DCP left out what other ranks write."""

    plan: SavePlan
    planner: SavePlanner
    noted: Noted
    record: ModelRecord | None
    order: Mapping[str, int]
    options: Options

    def part(self) -> Arranged:
        """What this rank saves."""
        return arrange(resolve(self.plan, self.planner), self.noted.rule, self.record)


@uncompiled
@verb()
def write(request: Request, directory: str, how: How, process_group: ProcessGroup | None) -> SaveReport:
    """Writes and commits everything that all ranks have, as the checkpoint of ``directory``. Raises what `save` raises.

    ``process_group``: the group that DCP was called with; None: the default one.
    """
    started = time.perf_counter()
    with _job(directory, how, request.noted.ranks, process_group) as job:
        path, part = check_how(directory, how), request.part()
        job = beside_other_ranks(job, path, request.options.step)
        if isinstance(job, SaveJob):
            state, others, document = join(job.session, part, request.noted.rule, request.order)
        else:
            (state, others), document = alone(part), part.document
        planned = _planned(state, others, document, request, job.size)
        check_digests(planned.contents, job, {"durable": how.durable})
        report, warnings = write_planned(planned, directory, path, how, time.perf_counter() - started, job=job)
    if job.leads:
        log_saved(report, warnings)
        for warning in warnings:
            warn_caller(warning)
    return report


def _job(directory: str, how: How, ranks: int, group: ProcessGroup | None) -> AbstractContextManager[Job]:
    """The job of the ``ranks`` that DCP saves on. What one of them raises within the context is raised on all."""
    if ranks == 1:
        return nullcontext(ALONE)
    group = group if group is not None else torch.distributed.group.WORLD
    check_group(group)
    assert group is not None
    if group.size() != ranks:
        raise ValueError(
            f"process_group must be the group that DCP was called with, which has {ranks} processes, it has {group.size()}"
        )
    return job_of_save(
        {},
        directory,
        group,
        durable=how.durable,
        rank_timeout=how.rank_timeout,
        phase_timeout=how.phase_timeout,
        on_divergence=how.on_divergence,
    )


def _planned(state: State, others: Sequence[Entry], document: Document, request: Request, ranks: int) -> Planned:
    record, options = request.record, request.options
    max_shard_bytes = parse_size(options.max_shard_size)
    directories = []
    if not document.is_plain:
        directories = [plan_training_directory(encode(document), {}, {0: others}, max_shard_bytes, ranks=ranks)]
    moment = check_moment(options.step, options.metrics, is_training=bool(directories))
    contents = plan_contents(
        OnDisk(state, record.companions if record is not None else {}),
        Parts(),
        max_shard_bytes,
        check_metadata(options.metadata),
        directories=directories,
        moment=moment._replace(ranks=moment.ranks and ranks),
    )
    return Planned(contents, Needed(), 0, ())
