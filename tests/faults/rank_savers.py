"""What four ranks save in fault tests, how a call of theirs ends, and how one process judges the directory afterwards."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardsave
from faults.beneath import Fate
from faults.savers import Bench, generation_in, loaded_generation, state
from jobs import Job
from shardsave._common.progress import Progress
from shardsave._loading.read import TensorReader
from shardsave._ranks import group as groups
from shardsave._ranks.open_session import begin
from shardsave._storage.open_checkpoint import open_checkpoint

SIZE = 4

#: Without a sign of life for so long, in seconds, a rank is lost; and where one is stopped, so that all wait for just that.
RANK_TIMEOUT, SHORT_TIMEOUT = 3.0, 1.5


class Result(NamedTuple):
    """What a call has come to on one rank: ``error``, the class, and ``message``; or the leftovers and notes of a report."""

    error: str = ""
    message: str = ""
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Case(NamedTuple):
    """One scenario: what is saved, whether it is the first save, and the fate of the calls of rank ``victim``: of number ``begin``, and of
    every so many from there on."""

    folder: Path
    kind: str
    first: bool
    victim: int
    fate: Fate
    number: int
    begin: int
    every: int

    def calls(self) -> Iterator[int]:
        """The numbers of the calls that are tried."""
        return count(self.begin, self.every)


class Training(NamedTuple):
    """A model whose every value is its generation, and its training state."""

    model: nn.Module
    state: dict[str, Any]


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (SIZE,))


def by_rows(tensor: torch.Tensor) -> DTensor:
    """``tensor`` with some of its rows on each rank."""
    local = tensor.chunk(SIZE)[dist.get_rank()]
    return DTensor.from_local(local, mesh(), [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def sharded_state(generation: int) -> dict[str, torch.Tensor]:
    """The tensors of `savers.state`: rows on each rank, but for one that all have whole."""
    return {name: by_rows(tensor) if name != "t1" else tensor for name, tensor in state(generation).items()}


def training(generation: int) -> Training:
    """The same tensors in a module, with an optimizer, a value that all ranks share, one of each rank, and the generators."""
    model = nn.Module()
    for name, tensor in sharded_state(generation).items():
        model.register_parameter(name, nn.Parameter(tensor))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        whole = torch.full(parameter.shape, float(generation))
        optimizer.state[parameter]["momentum_buffer"] = by_rows(whole) if isinstance(parameter, DTensor) else whole
    torch.manual_seed(generation)
    own = shardsave.PerRank(own_value(generation, dist.get_rank()))
    return Training(model, {"optimizer": optimizer, "epoch": generation, "own": own})


def own_value(generation: int, rank: int) -> int:
    return 10 * generation + rank


class Options(NamedTuple):
    durable: bool = True
    rank_timeout: float = RANK_TIMEOUT

    def of_save(self) -> dict[str, Any]:
        return {**self._asdict(), "max_shard_size": 5000, "progress": False}


def save_plain(generation: int, folder: Path, options: Options) -> shardsave.SaveReport:
    return shardsave.save(sharded_state(generation), folder, **options.of_save())


def save_half(generation: int, folder: Path, options: Options, reuse: Path | None = None) -> shardsave.SaveReport:
    """One of the two shards is the same in all generations, so it is taken over: from ``reuse``, or from the checkpoint in ``folder``."""
    tensors = {name: by_rows(tensor) if name != "t1" else tensor for name, tensor in state(generation, half=True).items()}
    return shardsave.save(tensors, folder, reuse=reuse, **options.of_save())


def save_half_of_another(generation: int, folder: Path, options: Options) -> shardsave.SaveReport:
    earlier = folder.parent / "template"
    return save_half(generation, folder, options, earlier if earlier.exists() else None)


def save_training(generation: int, folder: Path, options: Options) -> shardsave.SaveReport:
    model, of_training = training(generation)
    return shardsave.save(model, folder, training=of_training, rng=True, step=generation, **options.of_save())


def save_in_background(generation: int, folder: Path, options: Options) -> shardsave.SaveReport:
    """The training goes on: nothing that it changes may come into the checkpoint."""
    model, of_training = training(generation)
    pending = shardsave.save_async(model, folder, training=of_training, rng=True, step=generation, **options.of_save())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-7)
            of_training["optimizer"].state[parameter]["momentum_buffer"].fill_(-7)
    return pending.wait(120)


def save_between_hosts(generation: int, folder: Path, options: Options) -> shardsave.SaveReport:
    """Two ranks seem to be on another machine."""
    own, number = groups.this_host(), dist.get_rank() // 2
    host = groups.Host(f"{own.key}{number}", f"host{number}")
    with mock.patch.object(groups, "this_host", lambda: host):
        return save_training(generation, folder, options)


def training_generation_in(folder: Path) -> int | None:
    """The generation of the model and of the training state, which are whole and of one save; None where there is no checkpoint."""
    generation = loaded_generation(folder)
    if generation is None:
        return None
    with open_checkpoint(folder, lambda name: False, parts=["training state"]) as checkpoint:
        stored = checkpoint.training
        assert stored is not None and checkpoint.moment.step == generation, checkpoint.moment
        loaded = {name: torch.empty(t.shape) for name, t in stored.tensors.items() if not name.startswith("rank ")}
        with Progress(False, "loading", 0) as progress:
            TensorReader(checkpoint, verify=True, progress=progress).read([(stored.tensors[n], t) for n, t in loaded.items()])
    assert stored.shared["dict"]["epoch"] == generation, stored.shared
    own = {rank: leaves["training['own']"] for rank, leaves in stored.leaves.items()}
    assert own == {rank: own_value(generation, rank) for rank in range(SIZE)}, own
    assert len(loaded) == 4 and all(bool((t == generation).all()) for t in loaded.values()), generation
    return generation


class Kind(NamedTuple):
    """How ranks save a generation, and how one process finds which one is in a directory."""

    save: Callable[[int, Path, Options], shardsave.SaveReport]
    generation_in: Callable[[Path], int | None]


KINDS = {
    "plain": Kind(save_plain, generation_in),
    "reuse": Kind(save_half, generation_in),
    "reuse-step": Kind(save_half_of_another, generation_in),
    "training": Kind(save_training, training_generation_in),
    "hosts": Kind(save_between_hosts, training_generation_in),
    "background": Kind(save_in_background, training_generation_in),
}


def attempt(act: Callable[[], shardsave.SaveReport]) -> Result:
    """The result of ``act`` on this rank. What a commit removes is freed before this returns."""
    try:
        report = act()
    except (shardsave.ShardSaveError, TypeError, ValueError) as error:
        return Result(type(error).__name__, str(error))
    assert report.wait_cleaned(60)
    return Result(leftovers=report.leftovers, notes=report.notes)


def attempt_save(kind: str, generation: int, folder: Path, options: Options = Options()) -> Result:  # noqa: B008
    return attempt(partial(KINDS[kind].save, generation, folder, options))


def from_all(value: object) -> list[Any]:
    values: list[object] = [None] * SIZE
    dist.all_gather_object(values, value)
    return values


class RankBench(Bench):
    """A directory that is reset for each trial, with a checkpoint of generation 1 in it if there is a ``template``."""

    def __init__(self, case: Case, template: Path | None) -> None:
        super().__init__(case.folder, first=True)
        self.old, self._template = (None, None) if template is None else (1, template)
        self._kind = KINDS[case.kind]

    def found(self) -> int | None:
        return self._kind.generation_in(self.target)


def in_a_job(scenario: Callable[..., Any], *arguments: object) -> Any:
    """What ``scenario`` returns on rank 0. Where one rank fails, nobody waits for the others."""
    with Job(SIZE, scenario, *arguments) as job:
        deadline = time.monotonic() + float(os.environ.get("SHARDSAVE_SECONDS", "300"))
        while (waiting := [rank for rank in range(SIZE) if not job._pipes[rank].poll()]) and time.monotonic() < deadline:
            if len(waiting) < SIZE:
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.002)
        ready = [rank for rank in range(SIZE) if rank not in waiting]
        ends = dict(zip(ready, job.ended(10, ready)))
    failed = [f"rank {rank}: {end.trace or end}" for rank, end in ends.items() if end.error or end.exit_code is not None]
    assert len(ends) == SIZE and not failed, "\n".join([f"ranks {waiting} have not ended", *failed])
    return ends[0].value


def save_template(rank: int, case: Case) -> None:
    attempt_save(case.kind, 1, case.folder / "template", Options(durable=False))


def bench_of_jobs(case: Case) -> RankBench:
    """For scenarios that start a job for each trial."""
    if not case.first:
        in_a_job(save_template, case)
    return RankBench(case, None if case.first else case.folder / "template")


# -- what a rank that lives has left


class Lived(NamedTuple):
    """How a call ended on one rank, and what it has left open there."""

    result: Result
    left: list[str]


def lived(act: Callable[[], Result], strike: Callable[[], object]) -> Lived:
    """Calls ``strike``, which may end this process later, and ``act``."""
    mesh()
    begin(dist.group.WORLD, "save", "here").close()  # what a process keeps for later sessions
    dist.barrier()  # a new connection to a store whose server has died is only given up after the timeout of the store
    before = things_open()
    strike()
    result = act()
    deadline = time.monotonic() + 10
    while (left := things_open() - before) and time.monotonic() < deadline:
        time.sleep(0.005)
    return Lived(result, sorted(left.elements()))


def things_open() -> Counter[str]:
    """The descriptors of this process by what they lead to, its threads, and its process groups."""
    things = Counter(thread.name for thread in threading.enumerate())
    for fd in os.listdir("/proc/self/fd"):
        try:
            things[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
        except FileNotFoundError:
            continue  # that of the listing
    things["process group"] = len(dist.distributed_c10d._world.pg_map)
    return things
