"""A load into a live module, in two phases: `load_model` and `resume` share it."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from shardsave._api.reports import LoadReport
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._format.index import TRAINING
from shardsave._huggingface.choose_loading import choose_layout
from shardsave._huggingface.recognize import transformers_model
from shardsave._loading.disk_layout import IdentityLayout
from shardsave._loading.job import LoadJob
from shardsave._loading.module_filler import ModuleFiller
from shardsave._loading.module_plan import plan_module
from shardsave._loading.read import TensorReader
from shardsave._loading.selection import choose_located, names_of_wrappers, selection
from shardsave._loading.slots import Inventory, has_extra_state, take_inventory
from shardsave._state.distributed_tensors import PartReader
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave.errors import IncompatibleCheckpointError


def check_part(part: object) -> None:
    """Raises TypeError if ``part`` cannot be the place of a part of the training state."""
    if part is not None and not isinstance(part, str):
        raise TypeError(
            f"part must be the name of a part of the training state such as 'ema', or None, not {type(part).__name__}"
        )


def needed_files(model: nn.Module, prefix: str, part: str | None) -> tuple[Callable[[str], bool] | None, tuple[str, ...]]:
    """Which tensors and which parts of a checkpoint `open_checkpoint` has to open to fill ``model``."""
    if part is not None:
        return no_tensor, (TRAINING,)
    return selection(None, prefix), ("architecture",) if has_extra_state(model) else ()


def no_tensor(name: str) -> bool:
    return False


class ModelLoad:
    """A load into ``model``. When it has been created, everything that can be refused has been refused, and nothing is changed.

    ``reads``: the stored tensors that `fill` reads. ``warnings``: those notes that need attention. ``flags``: what `fill` did to the
    flags.
    """

    @gc_paused()
    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        prefix: str | None,
        device: torch.device | None,
        *,
        strict: bool,
        restore_frozen: bool,
        part: str | None = None,
        parts: PartReader | None = None,
    ) -> None:
        """``prefix``: None if the caller's caller cannot pass one. ``parts``: reads distributed tensors."""
        self._strict = strict
        self._prefix = prefix
        inventory = take_inventory(model, checkpoint.path, parts)
        if part is None:
            self._filler, self._notes = _plan(
                model, inventory, checkpoint, prefix or "", device, strict=strict, restore_frozen=restore_frozen
            )
        else:
            self._filler, self._notes = _plan_part(model, inventory, checkpoint, prefix or "", device, part), ()
        self._filler.check(strict=strict, prefix=prefix, alone=parts is None)
        self.reads = self._filler.plan.reads
        self.nbytes = sum(located.nbytes for located in self.reads)
        self.host_bytes = self._filler.host_bytes

    def not_here(self) -> bytes:
        """Tells which stored tensors this module has no place for; empty if there are none."""
        names = self._filler.plan.unexpected
        return hashlib.sha256("\0".join(names).encode()).digest() if names else b""

    def agree_on_names(self, job: LoadJob, all_lack_the_same: bool) -> None:
        """Raises IncompatibleCheckpointError on all, if the load is strict and there are stored tensors that no process has a place for.

        ``all_lack_the_same``: `not_here` is the same everywhere. If it is not, as with stages of a pipeline, the processes tell each other
        which names they have.
        """
        if not all_lack_the_same:
            plan = self._filler.plan
            have = json.dumps(sorted(plan.stored.keys() - set(plan.unexpected))).encode()
            everywhere = job.of_all("the names that each has", zlib.compress(have, 1))
            self._filler.filled_elsewhere({name for one in everywhere for name in json.loads(zlib.decompress(one))})
        if self._strict and not (all_lack_the_same and not self._filler.plan.unexpected):
            job.attempt(partial(self._filler.check_unexpected, self._prefix))

    def filled(self) -> list[tuple[str, Located, torch.Tensor]]:
        """As of `ModuleFiller`."""
        return self._filler.filled()

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._filler.notes

    def fill(self, reader: TensorReader) -> None:
        """Fills the module, and restores its flags."""
        self._differences = self._filler.fill(reader, strict=self._strict)
        self.flags = self._filler.restore_flags()

    def report(self, report: LoadReport, notes: tuple[str, ...]) -> LoadReport:
        """``report`` with what is known of the module once it is filled, and with ``notes`` after its own."""
        plan = self._filler.plan
        return replace(
            report,
            notes=(*report.notes, *self._notes, *self._filler.notes, *plan.notes(), *self.flags.notes, *notes),
            missing=self._differences.missing,
            unexpected=self._differences.unexpected,
            mismatched=tuple(sorted(plan.mismatched.values())),
            frozen=self.flags.frozen,
            changed_flags=self.flags.changed,
        )


def _plan(
    model: nn.Module,
    inventory: Inventory,
    checkpoint: Checkpoint,
    prefix: str,
    device: torch.device | None,
    *,
    strict: bool,
    restore_frozen: bool,
) -> tuple[ModuleFiller, tuple[str, ...]]:
    """Plans which stored tensor fills which tensor of ``model``; nothing is checked or changed yet.

    Also returns notes for the report.
    """
    stored, wrapped = _without_wrappers(model, inventory, choose_located(checkpoint, prefix))
    layout = choose_layout(inventory, stored, checkpoint.path)
    extra_states = [name for name in inventory.extra_states if name not in layout.stored]
    plan = plan_module(
        inventory,
        layout,
        flags=_own_flags(checkpoint.flags, prefix, wrapped) if restore_frozen else None,
        extra_states=_extra_states(checkpoint, extra_states, prefix, strict),
        doubtful=_own_names(checkpoint.ties, prefix, wrapped).values() if checkpoint.record is None else (),
    )
    notes: tuple[str, ...] = ()
    if checkpoint.record is None and transformers_model(inventory.module) is not None:
        from shardsave._huggingface.transformers_round_trip import exchange_notes

        notes = exchange_notes(inventory, stored)
    return ModuleFiller(inventory, plan, layout, checkpoint, device), notes


def _plan_part(
    model: nn.Module, inventory: Inventory, checkpoint: Checkpoint, prefix: str, device: torch.device | None, part: str
) -> ModuleFiller:
    """As `_plan`, from the ``part`` of the training state. Its names are those in a module, whatever layout the model has on disk."""
    for module in ("shardsave._api.stored_training", "shardsave._training.parts"):
        import_at_use(module)  # no other load needs them
    from shardsave._api.stored_training import stored_training
    from shardsave._training.parts import find_part

    training = stored_training(checkpoint, f"load part {part!r} of", "the module is unchanged")
    found = find_part(training, part, prefix)
    assert checkpoint.training is not None
    tensors = {name: checkpoint.training.tensors[stored_name] for name, stored_name in found.tensors.items()}
    stored, wrapped = _without_wrappers(model, inventory, tensors)
    layout = IdentityLayout(stored)
    states = {wrapped.get(name, name): value for name, value in found.others.items()}
    return ModuleFiller(inventory, plan_module(inventory, layout, extra_states=states), layout, checkpoint, device)


def _without_wrappers(
    model: nn.Module, inventory: Inventory, stored: Mapping[str, Located]
) -> tuple[Mapping[str, Located], Mapping[str, str]]:
    """``stored`` by the names that ``model`` has without wrappers; also name → that name, for those that differ."""
    wrapped = names_of_wrappers(model, inventory.expected, stored)
    return {wrapped.get(name, name): located for name, located in stored.items()} if wrapped else stored, wrapped


def _own_names(names: Iterable[str], prefix: str, wrapped: Mapping[str, str]) -> dict[str, str]:
    """Those of ``names``, of the checkpoint, that begin with ``prefix`` → the names without it and without those of wrappers."""
    inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return {name: wrapped.get(own, own) for name, own in inside.items()}


def _own_flags(flags: Mapping[str, bool] | None, prefix: str, wrapped: Mapping[str, str]) -> Mapping[str, bool] | None:
    if flags is None or not (prefix or wrapped):
        return flags
    return {own: flags[name] for name, own in _own_names(flags, prefix, wrapped).items()}


def _extra_states(checkpoint: Checkpoint, names: list[str], prefix: str, strict: bool) -> dict[str, Any]:
    """Name → extra state that is not a tensor, from the checkpoint's architecture, for those of ``names`` that it has."""
    data = checkpoint.documents.get("architecture")
    if data is None or not names:
        return {}
    import_at_use("shardsave._architecture.extra_states")  # only modules with extra state need these
    from shardsave._architecture.document import Document
    from shardsave._architecture.extra_states import extra_states

    document = Document(data, f"the architecture in {checkpoint.path}")
    states, not_plain = extra_states(document, [prefix + name for name in names])
    if not_plain and strict:
        raise IncompatibleCheckpointError(
            f"cannot load {checkpoint.path}: extra state of plain data was expected, {not_plain[0]!r} has tensors or objects in it; "
            f"build the whole model with build_model, or leave extra state as it is with strict=False; the module is unchanged"
        )
    return {name.removeprefix(prefix): value for name, value in states.items()}
