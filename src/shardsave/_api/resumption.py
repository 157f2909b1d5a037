"""A resume in two phases: everything that can be refused is refused, then a model and a training state are filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardsave._api.model_load import ModelLoad
from shardsave._api.shared_memory import Filled, check_shared_memory
from shardsave._api.stored_training import stored_training
from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory_errors import check_free_memory
from shardsave._common.spread import Spread
from shardsave._common.words import count, some
from shardsave._format.index import TRAINING
from shardsave._loading.freeze_flags import RestoredFlags
from shardsave._loading.job import LoadJob
from shardsave._loading.read import Target, TensorReader
from shardsave._state.distributed_tensors import PartReader, is_distributed
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave._training.distributed import part_to_fill
from shardsave._training.places import RNG
from shardsave._training.read_values import UNCHANGED
from shardsave._training.restore import Options, RestorePlan, plan_restore
from shardsave._training.write_values import belongs_to_rank
from shardsave.errors import ShardSaveError

#: How many parameters whose flag has changed are named.
_MOST_NAMES = 10


class Resumption:
    """A resume from an open checkpoint. When it has been created, everything that can be refused has been refused; nothing is changed.

    ``model``: the load of the model, if there is one. ``notes``: of the training state; ``warnings``: of lack of memory.
    """

    @gc_paused()
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module | None,
        training: Any,
        options: Options,
        job: LoadJob,
        *,
        restore_frozen: bool,
    ) -> None:
        self.model: ModelLoad | None = None
        self.notes: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._checkpoint = checkpoint
        self._training = training
        self._job = job
        self._plan = self._plan_training(model, options) if training is not None or options.rng else None
        self._fresh, self._in_place = self._targets()
        if model is not None:
            strict, parts = options.strict, options.parts
            self.model = ModelLoad(
                model, checkpoint, None, options.device, strict=strict, restore_frozen=restore_frozen, parts=parts
            )
            self.warnings = self.model.warnings
            self._check_shared_memory()
        self._check_memory()

    def not_here(self) -> bytes:
        """As of `ModelLoad`."""
        return self.model.not_here() if self.model is not None else b""

    @property
    def nbytes(self) -> int:
        """How many bytes of tensors are read."""
        of_model = self.model.nbytes if self.model is not None else 0
        return of_model + sum(_nbytes_here(located, into) for located, into in (*self._fresh, *self._in_place))

    def run(self, reader: TensorReader) -> Any:
        """Fills the model, hands every object its state, and sets the generators last. Returns the values."""
        plan = self._plan
        with in_state(UNCHANGED):
            if plan is not None:
                self._read(reader, self._fresh)
                plan.check()
            self._job.checked()  # no rank changes anything that another one may still refuse
        if self.model is not None:
            with in_state("the training state is unchanged" if plan is not None else ""):
                self.model.fill(reader)
            self.notes += (*_notes_on_flags(self.model.flags),)
        if plan is None:
            return self._training
        model = "the model is loaded, " if self.model is not None else ""
        with in_state(f"{model}tensors in place in the training state are partly restored, no object has received its state"):
            plan.expect_writes()
            self._read(reader, self._in_place)
        with in_state(model.removesuffix(", ")):
            values = plan.apply(flags_restored=self.model is not None and self.model.flags.frozen is not None)
        self.notes += plan.notes
        return values

    def _read(self, reader: TensorReader, targets: Sequence[Target]) -> None:
        """Reads what the ranks share together, and what belongs to this one alone."""
        own = [target for target in targets if belongs_to_rank(target[0].name)]
        shared = [target for target in targets if not belongs_to_rank(target[0].name)] if own else targets
        reader.read_together(shared)
        if own:
            reader.read(own)

    def _plan_training(self, model: nn.Module | None, options: Options) -> RestorePlan:
        rank = options.parts.rank if options.parts is not None else 0
        stored = stored_training(self._checkpoint, "resume from", UNCHANGED, rank)
        if self._training is None:
            if stored.shared is not None:
                self.notes += ("training: it was saved, and was not asked for",)
            stored = stored._replace(shared=None)
        elif not options.rng and RNG.path in stored.leaves:
            self.notes += ("rng: the generators were saved, and were not asked for",)
        return plan_restore(self._training, model, stored, options)

    def _targets(self) -> tuple[list[Target], list[Target]]:
        """What is read into new tensors of the training state, and into those that exist."""
        if self._plan is None or self._checkpoint.training is None:
            return [], []
        tensors, parts = self._checkpoint.training.tensors, self._job.parts
        fresh: list[Target] = [(tensors[name], _part_here(name, tensor, parts)) for name, tensor in self._plan.fresh]
        return fresh, [(tensors[name], _part_here(name, tensor, parts)) for name, tensor in self._plan.in_place]

    def _check_shared_memory(self) -> None:
        if self.model is None or self._plan is None or self._checkpoint.training is None or not self._plan.filled:
            return
        tensors = self._checkpoint.training.tensors
        of_model = [Filled(*one) for one in self.model.filled()]
        check_shared_memory(of_model, [Filled(name, tensors[name], tensor) for name, tensor in self._plan.filled])

    def _check_memory(self) -> None:
        """Refuses what surely does not fit; the model alone has been checked."""
        if new := sum(_host_bytes(located, into) for located, into in self._fresh):
            needed = new + (self.model.host_bytes if self.model is not None else 0)
            lacking = check_free_memory(self._checkpoint.path, needed, UNCHANGED)
            self.notes += lacking
            self.warnings += lacking
        if self._plan is None and TRAINING in self._checkpoint.parts:
            self.notes += ("training: it was saved, and was not asked for",)


def _part_here(name: str, tensor: torch.Tensor, parts: PartReader | None) -> torch.Tensor | Spread:
    """``tensor``, which is filled from the stored tensor ``name``, or its part in this process."""
    return part_to_fill(name, tensor, parts).spread if parts is not None and is_distributed(tensor) else tensor


def _nbytes_here(located: Located, into: torch.Tensor | Spread | None) -> int:
    """The bytes of a stored tensor for which there is memory in this process."""
    return sum(chunk.tensor.nbytes for chunk in into.local) if isinstance(into, Spread) else located.nbytes


def _host_bytes(located: Located, into: torch.Tensor | Spread | None) -> int:
    """The bytes of a stored tensor for which there is memory of the host in this process."""
    if isinstance(into, Spread):
        return sum(chunk.tensor.nbytes for chunk in into.local if chunk.tensor.is_cpu)
    return located.nbytes if into is not None and into.is_cpu else 0


def _notes_on_flags(flags: RestoredFlags) -> Iterator[str]:
    """Names the parameters whose flag has changed: someone may have frozen or thawed them on purpose, before the resume."""
    for names, before, now in ((flags.now_frozen, "trainable", "frozen"), (flags.now_trainable, "frozen", "trainable")):
        if names:
            were, are, they = ("was", "is", "it was") if len(names) == 1 else ("were", "are", "they were")
            yield (
                f"flags: {count(len(names), 'parameter')} {were} {before} and {are} {now} now, as {they} saved: "
                f"{some(map(repr, names), _MOST_NAMES)}; restore_frozen=False keeps the flags of the model"
            )


@contextmanager
def in_state(state: str) -> Iterator[None]:
    """Adds to our errors in which ``state`` things are; the error of another rank may say it already."""
    try:
        yield
    except ShardSaveError as error:
        if not state or str(error).endswith(state):
            raise
        raise type(error)(f"{error}; {state}") from error
