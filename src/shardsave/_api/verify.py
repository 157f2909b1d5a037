"""`verify`: whether the bytes of a checkpoint are still those that were saved."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.findings import Damage, VerifyReport
from shardsave._api.load_jobs import job_of_load
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT
from shardsave._api.reports import Phases
from shardsave._common.backend import engine_name
from shardsave._common.job_errors import mark
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import some
from shardsave._engine.totals import Totals
from shardsave._loading.job import LoadJob, opened
from shardsave._loading.read import Target, TensorReader
from shardsave._storage.checkpoint import PARTS, Checkpoint
from shardsave._storage.second_opinion import SecondOpinion
from shardsave.errors import CorruptCheckpointError, DirectoryBusyError, ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
@verb()
def verify(
    path: str | os.PathLike[str],
    *,
    keep_going: bool = False,
    progress: ProgressArgument = None,
    process_group: ProcessGroup | None = None,
    rank_timeout: float = RANK_TIMEOUT,
    phase_timeout: float = PHASE_TIMEOUT,
) -> VerifyReport:
    """Reads every byte of the checkpoint at ``path`` and compares it with the stored checksums; loads no tensor.

    Each header is also read by safetensors' own parser; if that refuses it, or reads something else from it, the file counts as damaged.

    With ``keep_going``, damage raises no error: everything that can be read is read, and the report says what is damaged and what is
    intact. Without it, CorruptCheckpointError is raised, which names what is damaged. Other errors are those of `inspect`.

    Collective:
        Only with a ``process_group``: all its ranks must make the call. They share the tensors file by file, and all return the same report
        or raise the same error. ``rank_timeout``: the most seconds without a sign of life of another rank, and until all have come;
        ``phase_timeout``: the most seconds that one step of the call may take.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(3)}, "three-ones")
        >>> shardsave.verify("three-ones").verified
        True
    """
    with job_of_load(None, path, "verify", process_group, rank_timeout, phase_timeout) as job:
        check_path(path)
        check_switches(keep_going=keep_going)
        check_progress(progress)
        job.check_equal({"keep_going": keep_going})
        report, error = _verified(os.fspath(path), job, keep_going=keep_going, progress=progress)
    if error is not None:  # raised here, where all ranks do so in the same words
        if job.size > 1:
            mark(error)
        raise error
    return report


class _Found(NamedTuple):
    """What one process has found in the files that it read, as JSON values.

    ``damaged``: the fields of each `Damage`. ``shared``: the damaged files that other checkpoints share. ``tensors``: how many are intact.
    ``opinion``, ``companions``: notes.
    """

    damaged: Sequence[tuple[str, Sequence[str], str]]
    shared: Sequence[str]
    tensors: int
    verified: bool | None
    totals: dict[str, Any]
    opinion: Sequence[str]
    companions: Sequence[str]
    plan_seconds: float
    read_seconds: float


def _verified(
    path: str, job: LoadJob, *, keep_going: bool, progress: ProgressArgument
) -> tuple[VerifyReport, CorruptCheckpointError | None]:
    """The report and, unless damage is only to be reported, the error for it."""
    started = time.perf_counter()
    broken: dict[str, ShardSaveError] = {}
    opinion = SecondOpinion()
    with opened(job, path, parts=PARTS, broken=broken if keep_going else None, header_check=opinion.check) as checkpoint:
        unopened = _unopened_anywhere(broken, job) if keep_going else {}
        stored = [*checkpoint.all_located(checkpoint.tensors.values())]
        targets: list[Target] = [(place, None) for one in stored for place in one.places if place.shard not in unopened]
        mine = _own_share(targets, job)
        planned = time.perf_counter()
        shown = progress if job.leads or callable(progress) else False
        with Progress(shown, "verifying", sum(located.nbytes for located, _ in mine)) as reporter:
            reader = job.reader(checkpoint, verify=True, progress=reporter)
            damaged = _read_by_shard(reader, mine) if keep_going else _read(reader, mine)
        found = _Found(
            damaged=[(one.shard, one.tensors, f"{job.here}{one.message}") for one in damaged],
            shared=[shard for shard in sorted({*broken, *(one.shard for one in damaged)}) if checkpoint.is_shared(shard)],
            tensors=reader.tensors,
            verified=reader.verified,
            totals=asdict(reader.totals),
            opinion=opinion.notes,
            companions=checkpoint.notes(whole=True) if job.leads else (),
            plan_seconds=planned - started,
            read_seconds=time.perf_counter() - planned,
        )
        everywhere = [_Found(*json.loads(data)) for data in job.of_all("what was verified", json.dumps(found).encode())]
        order = dict.fromkeys(located.shard for located, _ in targets)
        all_damaged = _in_order(everywhere, [*order] if keep_going else sorted(order))
        report = _report(path, checkpoint, everywhere, [*_unopened(checkpoint, unopened), *all_damaged], targets, unopened)
        left = sum(1 for one in stored if any(place.shard not in unopened for place in one.places))
        report = replace(report, tensors=report.tensors - (len(targets) - left))
    more = f"; {len(all_damaged) - 1} more tensors are damaged" if len(all_damaged) > 1 else ""
    return report, None if keep_going or not all_damaged else CorruptCheckpointError(all_damaged[0].message + more)


def _report(
    path: str,
    checkpoint: Checkpoint,
    everywhere: Sequence[_Found],
    damaged: Sequence[Damage],
    targets: Sequence[Target],
    unopened: Container[str],
) -> VerifyReport:
    """The report of all processes. ``damaged``: everything that is. ``targets``: what they have read together."""
    lead = everywhere[0]
    totals = Totals()
    for found in everywhere:
        totals = totals.joined(Totals.of(found.totals))
    unread = [f"the {role} was not verified: this version of shardsave knows no such part" for role in checkpoint.unknown_parts]
    elsewhere = _damaged_elsewhere({shard for found in everywhere for shard in found.shared})
    plan_seconds = max(found.plan_seconds for found in everywhere)
    read_seconds = max(found.read_seconds for found in everywhere)
    return VerifyReport(
        path=path,
        bytes=totals.bytes,
        tensors=sum(found.tensors for found in everywhere),
        shards=len(checkpoint.shards),
        seconds=plan_seconds + read_seconds,
        phases=Phases(plan=plan_seconds, transfer=read_seconds),
        engine=engine_name(),
        direct=totals.direct,
        staging_bytes=totals.staging_bytes,
        pinned=totals.pinned,
        notes=(*lead.opinion, *unread, *elsewhere, *totals.notes, *lead.companions),
        verified=False if damaged else (None if None in [found.verified for found in everywhere] else True),
        damaged=tuple(damaged),
        intact=_intact((file for file in checkpoint.files if file not in unopened), targets, damaged),
        ranks=len(everywhere),
    )


def _unopened_anywhere(broken: Mapping[str, ShardSaveError], job: LoadJob) -> dict[str, str]:
    """The files that some process could not open, each with the reason."""
    mine = json.dumps({file: f"{job.here}{error}" for file, error in broken.items()}).encode()
    unopened: dict[str, str] = {}
    for data in job.of_all("files that cannot be opened", mine):
        for file, reason in json.loads(data).items():
            unopened.setdefault(file, reason)
    return unopened


def _unopened(checkpoint: Checkpoint, unopened: Mapping[str, str]) -> list[Damage]:
    """The files that could not be opened, each with the names of the tensors that it holds according to the index."""
    names_by_shard: dict[str, list[str]] = {shard: [] for shard in unopened}
    for name, shard in (checkpoint.index.weight_map if checkpoint.index is not None else {}).items():
        if shard in names_by_shard:
            names_by_shard[shard].append(name)
    return [Damage(shard, tuple(names_by_shard[shard]), reason) for shard, reason in unopened.items()]


def _own_share(targets: Sequence[Target], job: LoadJob) -> Sequence[Target]:
    """Those of ``targets`` that this process reads: all in files of its own; each process has about the same number of bytes."""
    if job.size == 1:
        return targets
    sizes: Counter[str] = Counter()
    for located, _ in targets:
        sizes[located.shard] += located.nbytes
    loads = [(0, number) for number in range(job.size)]
    own = set()
    for shard, nbytes in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + nbytes, number))
        if number == job.number:
            own.add(shard)
    return [target for target in targets if target[0].shard in own]


def _read(reader: TensorReader, targets: Sequence[Target]) -> list[Damage]:
    """Reads ``targets``. Returns the tensors whose checksums are wrong; what cannot be read is an error."""
    try:
        reader.read(targets)
    except CorruptCheckpointError:
        if not reader.damaged:
            raise
    return [Damage(located.shard, (located.name,), message) for located, message in reader.damaged]


def _read_by_shard(reader: TensorReader, targets: Iterable[Target]) -> list[Damage]:
    """Reads shard after shard, so that one unreadable shard does not keep the others from being verified."""
    by_shard: dict[str, list[Target]] = {}
    for target in targets:
        by_shard.setdefault(target[0].shard, []).append(target)
    damaged = []
    for shard, shard_targets in by_shard.items():
        before = len(reader.damaged)
        try:
            reader.read(shard_targets)
        except DirectoryBusyError:  # the shard was replaced, which is not damage
            raise
        except ShardSaveError as error:
            new = reader.damaged[before:]
            damaged += [Damage(shard, (located.name,), message) for located, message in new]
            if not new:
                damaged.append(Damage(shard, tuple(located.name for located, _ in shard_targets), str(error)))
    return damaged


def _in_order(everywhere: Iterable[_Found], shards: Sequence[str]) -> list[Damage]:
    """What all processes have found damaged, in the order of ``shards``, each of which one process has read."""
    number = {shard: place for place, shard in enumerate(shards)}
    found = [Damage(shard, tuple(names), message) for one in everywhere for shard, names, message in one.damaged]
    return sorted(found, key=lambda damage: number[damage.shard])


def _damaged_elsewhere(shared: Iterable[str]) -> list[str]:
    """A note, if damaged shards were taken over from an earlier checkpoint, or by a later one."""
    names = sorted(shared)
    return (
        [f"other checkpoints may have the same damage, since they share a file with this one: {some(names)}"] if names else []
    )


def _intact(files: Iterable[str], targets: Iterable[Target], damaged: Iterable[Damage]) -> dict[str, tuple[str, ...]]:
    """File → the names of the tensors in it that are not damaged."""
    damaged_names = {(damage.shard, name) for damage in damaged for name in damage.tensors}
    intact: dict[str, list[str]] = {file: [] for file in files}
    for located, _ in targets:
        if (located.shard, located.name) not in damaged_names:
            intact[located.shard].append(located.name)
    return {file: tuple(names) for file, names in intact.items()}
