"""Restores a training state in phases. `plan_restore` refuses everything that can be refused, and changes nothing. The caller reads the
tensors of `RestorePlan.fresh`; `RestorePlan.check` then refuses what only these can tell. After those of `RestorePlan.in_place`,
`RestorePlan.apply` hands every object its state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from shardsave._common.gc_pause import gc_paused
from shardsave._state.distributed_tensors import PartReader
from shardsave._training.kinds import reshard_all
from shardsave._training.leaves import LeafPlanner
from shardsave._training.match import Matcher
from shardsave._training.parameter_names import Model, ParameterNames
from shardsave._training.places import RNG
from shardsave._training.read_values import UNCHANGED, Stored, ValueReader
from shardsave._training.rng import WrongState, check_process_state, set_process_state
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError


class StoredTraining(NamedTuple):
    """What a checkpoint has of a training state. ``where``: its path, for messages.

    ``shared``: the JSON of what all ranks share. ``leaves``: key → the JSON of what belongs to this rank. ``tensors``: by stored name.
    ``ranks``: how many ranks saved it. ``has_placements``: whether the JSON says which tensors were distributed.
    """

    where: str
    shared: Any
    leaves: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    ranks: int
    has_placements: bool = False


class Options(NamedTuple):
    """Options of a restore; see `shardsave.resume`. ``ranks``: how many there are now. ``device``: where the model's parameters are about
    to be moved; None: nowhere. ``parts``: reads distributed tensors; None if this process alone resumes."""

    rng: bool = False
    strict: bool = True
    only: Collection[str] | None = None
    skip: Collection[str] = ()
    on_world_change: Literal["fresh", "raise"] = "fresh"
    ranks: int = 1
    device: torch.device | None = None
    parts: PartReader | None = None


_DEFAULTS = Options()


class RestorePlan:
    """A restore that nothing refuses. ``fresh``: (stored name, the new tensor to read it into); read all of them, then call `check`.

    ``in_place``: the same for tensors that exist; read all of them, then call `apply`. A tensor of either may be distributed: this
    process fills its part. ``filled``: the memory of those that exist, and of those that are copied from another one. ``notes``: what
    was fresh, unused, kept or cast; more come with `apply`.
    """

    def __init__(self, reader: ValueReader, matcher: Matcher, values: Any, rng: Any, where: str) -> None:
        targets = [*reader.targets.items(), *reader.distributed]
        self._existing = reader.existing
        self.fresh: list[tuple[str, torch.Tensor]] = [one for one in targets if id(one[1]) not in reader.existing]
        self.in_place: list[tuple[str, torch.Tensor]] = [one for one in targets if id(one[1]) in reader.existing]
        names = {id(tensor): name for name, tensor in reader.targets.items()}
        copies = [(names[id(source)], tensor) for tensor, source in reader.copies if id(tensor) in reader.existing]
        self.filled: list[tuple[str, torch.Tensor]] = [
            (name, reader.existing[id(tensor)]) for name, tensor in (*self.in_place, *copies)
        ]
        self.notes: tuple[str, ...] = tuple(matcher.notes)
        self._reader = reader
        self._leaves = matcher.leaves
        self._values = values
        self._rng = rng
        self._where = where

    def check(self) -> None:
        """Raises CorruptCheckpointError for the state of a generator that it does not take. Only new tensors have been changed then."""
        self._copy([copy for copy in self._reader.copies if self._existing.keys().isdisjoint(map(id, copy))])
        for path, check in self._leaves.checks:
            self._check(path, check)
        if self._rng is not None:
            self._check(RNG.path, lambda: check_process_state(self._rng))

    def expect_writes(self) -> None:
        """Must be called before anything is read into tensors that exist: neither autograd nor a save in the background notices that, but
        both notice a new version number. A stale backward then raises, and such a save fails.
        """
        written = [tensor for _, tensor in (*self._reader.in_place, *self.in_place)]
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])

    def apply(self, *, flags_restored: bool) -> Any:
        """Hands every object its state, and sets the generators of the process at the very end. No object runs a step.

        ``flags_restored``: whether parameters are frozen as they were when they were saved.
        Returns the training state as it was given, with plain data as it was saved. Raises IncompatibleCheckpointError if an object
        refuses its state.
        """
        self._copy(self._reader.copies)
        for path, load in self._leaves.loads:
            try:
                load()
            except Exception as error:
                raise IncompatibleCheckpointError(
                    f"cannot resume {path} from {self._where}: an object that takes its state was expected, it raised "
                    f"{type(error).__name__}: {' '.join(str(error).split())}; the training state is partly restored"
                ) from error
        self.notes += tuple(note for late in self._leaves.late_notes for note in late(flags_restored))
        if self._rng is not None:
            self.notes += tuple(set_process_state(self._rng))
        return self._values

    @staticmethod
    def _copy(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.no_grad():
            for tensor, source in copies:
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(source)

    def _check(self, path: str, check: Callable[[], object]) -> None:
        try:
            check()
        except WrongState as error:
            raise CorruptCheckpointError(
                f"corrupt training state in {self._where}: {path}: the state of a generator was expected, {error}; {UNCHANGED}"
            ) from error


@gc_paused()
def plan_restore(training: Any, model: Model, stored: StoredTraining, options: Options = _DEFAULTS) -> RestorePlan:
    """Plans how ``training`` continues from ``stored``. Changes nothing; new tensors are made already.

    ``model``: gives the parameters of optimizers their names. Raises IncompatibleCheckpointError if the structures differ (``strict``)
    or with another number of ranks (``on_world_change="raise"``), TypeError and ValueError for wrong ``only`` and ``skip``,
    UnsupportedTensorError for tensors that cannot be filled, CorruptCheckpointError for a document that is none.
    """
    for argument, names in (("only", options.only), ("skip", options.skip)):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise TypeError(f"{argument} must be a collection of names such as ['optimizer'], not {names!r}")
    where = stored.where
    if options.parts is not None:
        reshard_all(model, training)
    if stored.ranks != options.ranks and options.on_world_change == "raise":
        raise IncompatibleCheckpointError(
            f"cannot resume from {where}: {options.ranks} ranks were expected, {stored.ranks} saved it; {UNCHANGED}"
        )
    reader = ValueReader(stored.tensors, where, options.parts, has_placements=stored.has_placements)
    if not isinstance(stored.leaves, Mapping):
        reader.corrupt("what belongs to a rank", "an object was", stored.leaves)
    leaves = LeafPlanner(reader, ParameterNames(model, training), options.device)
    rank_leaves = stored.leaves if stored.ranks == options.ranks else None
    matcher = Matcher(reader, leaves, rank_leaves, only=options.only, skip=options.skip)
    values = matcher.match(training, stored.shared)
    rng = None
    if options.rng and matcher.selected(RNG):
        rng = _process_state(matcher, reader, rank_leaves, stored)
    elif options.rng and RNG.path in (rank_leaves or ()):
        matcher.notes.append(f"{RNG.path}: skipped")
    matcher.check_selection()
    leaves.check_objects()
    problems = [*matcher.differences, *matcher.missing, *matcher.unexpected]
    if problems and options.strict:
        more = f"; {len(problems) - 10:,} more" if len(problems) > 10 else ""
        raise IncompatibleCheckpointError(
            f"cannot resume from {where}: the training state that was saved was expected, {'; '.join(problems[:10])}{more}; "
            f"strict=False restores what fits; {UNCHANGED}"
        )
    matcher.notes += [
        f"{problem}; it keeps the state that it has" if problem in leaves.left else problem for problem in problems
    ]
    leaves.arrange_schedulers(matcher.notes)
    reader.check_overlaps()
    return RestorePlan(reader, matcher, values, rng, where)


def _process_state(matcher: Matcher, reader: ValueReader, leaves: Mapping[str, Any] | None, stored: StoredTraining) -> Any:
    if leaves is None:
        matcher.notes.append(f"{RNG.path}: not set, since {stored.ranks} ranks saved it")
        return None
    if RNG.path not in leaves:
        matcher.missing.append("rng: the checkpoint has no random generators, it was saved without rng=True")
        return None
    reader.begin_leaf()
    return reader.value(leaves[RNG.path], RNG.path)
