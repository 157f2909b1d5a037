"""The parts of a save that describe a whole model, the architecture and the program, and when several ranks can save them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from shardsave._common.imports import import_at_use
from shardsave._common.warn_caller import warnings_collected
from shardsave._common.words import count
from shardsave._state.distributed_tensors import PartReader, is_distributed
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.module import State
from shardsave._state.parts import Parts
from shardsave._state.wrappers import Names, unwrap
from shardsave.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from shardsave._program.capture import Program


class Needed(NamedTuple):
    """What a build of the architecture needs: entries of ``trust``, and classes of a script for ``classes``."""

    trust: tuple[str, ...] = ()
    script_classes: tuple[str, ...] = ()


class PlannedParts(NamedTuple):
    """The requested parts, notes for the report, and what a build of the architecture needs."""

    parts: Parts = Parts()
    notes: tuple[str, ...] = ()
    needed: Needed = Needed()


class Among(NamedTuple):
    """The processes that save together: what ``readers`` of their tensors they have, and their ``state``. ``leads``: whether this one does;
    it warns for all of what is not saved."""

    readers: PartReader
    state: State
    leads: bool


def plan_parts(
    source: nn.Module, own: State, among: Among | None, *, architecture: bool, program: Program | None
) -> PlannedParts:
    """``own``: the state of this process. ``among``: None if it is alone.

    Raises UnsupportedModuleError for what cannot be saved as data, and for a module of which no single process could build the whole.
    """
    documents: dict[str, bytes] = {}
    notes: tuple[str, ...] = ()
    needed = Needed()
    module = unwrap(source)
    spread: Mapping[int, str] = {}
    if among is not None:
        _check_whole("architecture" if architecture else "program", own, among.state)
        spread = _names_of_spread(source, among.state)
        _check_not_split(module, spread, architecture=architecture, program=program is not None)
    extra = ExtraTensors(own.entries, spread)
    if architecture:
        import_at_use("shardsave._architecture.describe")  # a plain save must not import this
        from shardsave._architecture.describe import describe
        from shardsave._architecture.trust import script_classes, trust_entries

        with nullcontext() if among is None or among.leads else warnings_collected():
            documents["architecture"], lacking = describe(module, extra)
        needed = Needed(trust_entries(lacking), script_classes(lacking))
    if program is not None:
        from shardsave._program.capture import capture

        captured = capture(module, program, extra)
        documents["program"], notes = captured.document, captured.notes
    kept = tuple(extra.kept)
    if among is not None:
        kept = tuple(entry._replace(source=among.readers.replicated(entry.tensor)) for entry in kept)
    return PlannedParts(Parts(documents, kept), notes, needed)


def _names_of_spread(source: nn.Module, agreed: State) -> Mapping[int, str]:
    """`id` of each tensor of ``source`` of which this process has a part → the name under which it is stored."""
    names = Names.of(source)
    stored = {entry.name: entry.tied_to or entry.name for entry in agreed.entries}
    tensors = chain(source.named_parameters(remove_duplicate=False), source.named_buffers(remove_duplicate=False))
    named = ((names.plain(name), tensor) for name, tensor in tensors if is_distributed(tensor))
    return {id(tensor): stored[name] for name, tensor in named if name in stored}


def _check_whole(part: str, own: State, agreed: State) -> None:
    """Refuses to save a ``part`` of a module that is only a stage of a pipeline, or has only some of the experts."""
    lacking = sorted({entry.name for entry in agreed.entries} - {entry.name for entry in own.entries})
    if lacking:
        raise UnsupportedModuleError(
            f"cannot save the {part}: a module with all {count(len(agreed.entries), 'tensor')} of the checkpoint was expected on each "
            f"rank, {lacking[0]!r} is not on every rank, as among the stages of a pipeline; {_way_out(part, 'divided')}"
        )


def _check_not_split(module: nn.Module, spread: Mapping[int, str], *, architecture: bool, program: bool) -> None:
    """Refuses a module whose code does not compute with whole tensors. FSDP2 gives it whole ones whenever it computes.

    ``spread``: as `_names_of_spread` returns it.
    """
    if program and spread:
        raise UnsupportedModuleError(
            f"cannot save the program: tensors that are whole in this process were expected, {next(iter(spread.values()))!r} is spread "
            f"over several; {_way_out('program', 'sharded')}"
        )
    import_at_use("shardsave._state.tensor_parallel")  # few saves need it
    from shardsave._state.tensor_parallel import place_of_tensor_parallelism

    place = place_of_tensor_parallelism(module)
    if place is not None:
        part = "architecture" if architecture else "program"
        raise UnsupportedModuleError(
            f"cannot save the {part}: a module that is sharded by fully_shard alone was expected, {place!r} is split in another way, as by "
            f"tensor parallelism; {_way_out(part, 'parallelised')}"
        )


def _way_out(part: str, done: str) -> str:
    return (
        f"save the {part} once in one process, from the model before it is {done}, into another directory; nothing was written"
    )
