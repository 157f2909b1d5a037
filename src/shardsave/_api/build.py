"""`build_model` and `load_program`: a whole model from a checkpoint, without calling its constructor or without its classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.operators import check_operators
from shardsave._api.reports import LoadReport
from shardsave._architecture.builder import Builder
from shardsave._architecture.document import Document
from shardsave._architecture.imports import resolve
from shardsave._architecture.trust import Trust, check_entries
from shardsave._common.log_records import somebody_listens
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._common.words import an
from shardsave._huggingface.transformers_config import (
    CONFIG_NAME,
    empty_model,
    read_config,
    take_stored_dtypes,
    untie_differing,
)
from shardsave._huggingface.transformers_loading import TransformersLayout
from shardsave._huggingface.transformers_round_trip import exchange_notes
from shardsave._loading.module_filler import ModuleFiller
from shardsave._loading.module_plan import plan_module
from shardsave._loading.new_tensors import NewTensors
from shardsave._loading.read import TensorReader
from shardsave._loading.selection import choose_located
from shardsave._loading.slots import take_inventory
from shardsave._loading.stored_bytes import same_bytes
from shardsave._program.program import LoadedProgram, ProgramDocument
from shardsave._storage.checkpoint import PARTS, Checkpoint
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError


@uncompiled
@verb()
def build_model(
    path: str | os.PathLike[str],
    *,
    device: Device = None,
    trust: Iterable[str] = (),
    classes: Mapping[str, Any] | None = None,
    verify: bool = True,
    progress: ProgressArgument = None,
) -> nn.Module:
    """Builds the model that was saved with ``architecture=True``: its modules, attributes, weights, buffers and flags.

    No ``__init__`` is called, and nothing is imported except ``torch.nn`` and what you trust. Weights are read once, straight to
    ``device``. A trusted package runs no code on values from the file while the model is built; what is trusted by its exact name does:
    see SECURITY.md. The report of the save has the list that a build needs.

    Without an architecture, a transformers model is built from the config beside the weights (``trust=["transformers"]``), in
    evaluation mode, as ``from_pretrained`` does. If the config is not the one that was saved with the weights, a warning says so.

    Never collective: a rank that calls it waits for no other.

    Args:
        path: the checkpoint.
        device: where the tensors go; the CPU by default.
        trust: packages and modules (``"mylib"``, with everything below it, or ``"mylib.models"``), whose classes may be instantiated,
            and exact names of classes, functions and methods (``"mylib.models.Net"``), which may also run and be called.
        classes: the name as it was saved → the class, for classes that were renamed or defined in a script
            (``{"__main__.Net": Net}``).
        verify: as in ``load``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UntrustedCodeError: the checkpoint asks for code that you do not trust; the message lists it, with what would run.
        IncompatibleCheckpointError: there is no architecture, or a class no longer exists, or does not accept the saved state.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError, OutOfMemoryError.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> report = shardsave.save(model, "whole-model", architecture=True)
        >>> shardsave.build_model("whole-model")
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    check_path(path)
    check_operators("build a model from", path, "nothing was built")
    check_switches(verify=verify)
    check_progress(progress)
    trusted, replacements = _check_trust(trust), _check_classes(classes)
    target_device = check_device(device) or torch.device("cpu")
    clock = LoadClock()
    with open_checkpoint(path, parts=PARTS) as checkpoint:
        data = checkpoint.documents.get("architecture")
        if data is None:
            model, report, warnings = _build_from_config(checkpoint, trusted, target_device, verify, progress, clock)
            log_load(replace(report, path=os.fspath(path)), warnings)
            return model
        document = Document(data, f"the architecture in {checkpoint.path}")
        imports = resolve(document, Trust(trusted, replacements))
        memory = NewTensors(checkpoint, target_device)
        builder = Builder(document, imports, memory)
        with torch.inference_mode(False), torch.no_grad():
            model = builder.build()
            _read(path, checkpoint, memory, verify, progress, clock)
            builder.set_extra_states()
    return model


def _read(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    memory: NewTensors,
    verify: bool,
    progress: ProgressArgument,
    clock: LoadClock,
) -> None:
    """Fills the tensors of ``memory``, once it is known that they fit, and logs that."""
    notes = memory.check_free()
    clock.planned()
    with Progress(progress, "loading", sum(located.nbytes for located, _ in memory.targets)) as reporter:
        reader = TensorReader(checkpoint, verify=verify, progress=reporter)
        reader.read(memory.targets)
    clock.transferred()
    if somebody_listens():
        log_load(clock.report(path, [located for located, _ in memory.targets], reader, notes), notes)


@uncompiled
@verb()
def load_program(
    path: str | os.PathLike[str], *, device: Device = None, verify: bool = True, progress: ProgressArgument = None
) -> nn.Module:
    """Loads a model that was saved with ``program=`` as a module that can be called; the classes of the model need not be installed.

    The module takes arguments of the shapes that it was exported with; others raise TypeError or ValueError, or RuntimeError if sizes do
    not match. Results of the model's own classes become dicts. Weights are read straight to ``device``, and flags are restored. A program
    is a graph of torch's own operators, which are called one by one. No code from the file is evaluated, and nothing of the model's
    package is imported.

    Never collective: a rank that calls it waits for no other.

    Args:
        path: the checkpoint.
        device: where the program runs; the CPU by default.
        verify: as in ``load``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        IncompatibleCheckpointError: there is no program, or it was written by a newer shardsave.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError, OutOfMemoryError.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> report = shardsave.save(model, "linear-program", program=((torch.ones(3, 4),), {}))
        >>> shardsave.load_program("linear-program")(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    check_path(path)
    check_operators("load a program from", path, "nothing was built")
    check_switches(verify=verify)
    check_progress(progress)
    target_device = check_device(device) or torch.device("cpu")
    clock = LoadClock()
    with open_checkpoint(path, parts=PARTS) as checkpoint:
        data = checkpoint.documents.get("program")
        if data is None:
            raise IncompatibleCheckpointError(
                f"cannot load a program from {checkpoint.path}: a program was expected, the checkpoint has none; "
                f"save with program=(args, kwargs)"
            )
        document = ProgramDocument(data, f"the program in {checkpoint.path}", target_device)
        memory = NewTensors(checkpoint, target_device)
        with torch.inference_mode(False):
            tensors = _tensors(document, memory)
            _read(path, checkpoint, memory, verify, progress, clock)
            return LoadedProgram(document, tensors)


def _tensors(document: ProgramDocument, memory: NewTensors) -> dict[str, torch.Tensor]:
    """Name in the program → a new tensor for it."""
    tensors: dict[str, torch.Tensor] = {}
    for place in document.places:
        tensor = memory(place.tensor, place.kept, None)
        if tensor is None:
            raise CorruptCheckpointError(
                f"corrupt {document.where}: tensor {place.tensor!r} expected in the checkpoint, it is not there; nothing was run"
            )
        tensors[place.name] = tensor
    return tensors


def _build_from_config(
    checkpoint: Checkpoint,
    trust: frozenset[str],
    device: torch.device,
    verify: bool,
    progress: ProgressArgument,
    clock: LoadClock,
) -> tuple[nn.Module, LoadReport, tuple[str, ...]]:
    """Builds a transformers model from the config beside the weights. Also returns the report for the log, and what was warned of."""
    folder = os.path.dirname(checkpoint.path_of(CONFIG_NAME))
    config = read_config(folder)
    if config is None:
        raise IncompatibleCheckpointError(
            f"cannot build a model from {checkpoint.path}: an architecture or a config of transformers was expected, there is "
            f"neither; save with architecture=True, or define the model and use load_model"
        )
    warnings: list[str] = []

    def warn(note: str) -> None:
        warn_caller(note)
        warnings.append(note)

    for note in checkpoint.notes():
        warn(note)
    stored = choose_located(checkpoint, "")
    model = empty_model(folder, config, trust, device, stored)
    layout = TransformersLayout(take_inventory(model, checkpoint.path), stored, checkpoint.path)
    for kept, name in untie_differing(model, layout.stored, partial(same_bytes, checkpoint)):
        warn(
            f"{name} and {kept} have different values in {checkpoint.path}, so they are not tied, although the config ties them "
            f"(tie_word_embeddings); each has its own values"
        )
    take_stored_dtypes(model, layout.stored)
    inventory = take_inventory(model, checkpoint.path)
    for note in exchange_notes(inventory, stored) if checkpoint.record is None else ():
        warn(note)
    doubtful = checkpoint.ties if checkpoint.record is None else ()
    plan = plan_module(inventory, layout, flags=checkpoint.flags, doubtful=doubtful)
    filler = ModuleFiller(inventory, plan, layout, checkpoint, None)
    filler.check(strict=True)
    clock.planned()
    with Progress(progress, "loading", sum(located.nbytes for located in plan.reads)) as reporter:
        reader = TensorReader(checkpoint, verify=verify, progress=reporter)
        filler.fill(reader, strict=True)
    clock.transferred()
    filler.restore_flags()
    notes = (*warnings, *filler.notes)
    return model, clock.report(checkpoint.path, plan.reads, reader, notes), notes


def _check_classes(classes: Mapping[str, Any] | None) -> dict[str, Any]:
    if classes is not None and not isinstance(classes, Mapping):
        raise TypeError(f"classes must be a mapping such as {{'old.Name': NewClass}}, not {an(type(classes).__name__)}")
    for name, replacement in (classes or {}).items():
        if not isinstance(name, str) or not callable(replacement):
            raise TypeError(
                f"classes must map names as they were saved to classes or functions, not {name!r} to {replacement!r}"
            )
    return dict(classes or {})


def _check_trust(trust: Iterable[str]) -> frozenset[str]:
    if isinstance(trust, (str, bytes)):
        raise TypeError("trust must be an iterable of names, not one string")
    names = frozenset(trust)
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"trust must be names of modules or classes, such as 'mylib.models', not {name!r}")
    check_entries(names)
    return names
