"""`build_model` and `load_program`: from a checkpoint to a whole model, without its definition, or without its classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.load import load_model
from shardsave._architecture.builder import Builder
from shardsave._architecture.trust import resolve
from shardsave._architecture.values import Document
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._format.dtypes import BY_NAME
from shardsave._huggingface.transformers_config import CONFIG_NAME, empty_model, read_config
from shardsave._huggingface.transformers_loading import conversion
from shardsave._loading.new_tensors import NewTensors
from shardsave._loading.read import TensorReader
from shardsave._program.program import LoadedProgram, ProgramDocument
from shardsave._storage.checkpoint import PARTS, Checkpoint, open_checkpoint
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, an


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

    No ``__init__`` is called, and nothing is imported but ``torch.nn`` and what is trusted. Weights go straight to ``device``,
    once. Trusting a module means that its code may run, with what the file says: see SECURITY.md.

    Without an architecture, a model of transformers is made by the config beside the weights (``trust=["transformers"]``), in
    evaluation mode as from_pretrained gives it; a config other than the one saved with the weights gives a warning.

    Args:
        path: the checkpoint.
        device: where the tensors go; the CPU by default.
        trust: modules (``"mylib"``, with all below it, or ``"mylib.models"``) and exact classes (``"mylib.models.Net"``).
        classes: for what was renamed, or defined in a script (``{"__main__.Net": Net}``): the name as it was saved → the class.
        verify: as in ``load``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UntrustedCodeError: it asks for what is not trusted; all of it is named, none was imported.
        IncompatibleCheckpointError: there is no architecture, or a class is not there any more, or takes no such state.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError.

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
    check_switches(verify=verify)
    check_progress(progress)
    trusted, replaced = _check_trust(trust), _check_classes(classes)
    where = check_device(device) or torch.device("cpu")
    with open_checkpoint(path, parts=PARTS) as checkpoint:
        data = checkpoint.documents.get("architecture")
        if data is None:
            return _built_by_config(checkpoint, trusted, where, verify, progress)
        document = Document(data, f"the architecture in {checkpoint.path}")
        found = resolve(document.imports, trusted, replaced, document.where)
        memory = NewTensors(checkpoint, where)
        builder = Builder(document, found, memory)
        with torch.inference_mode(False), torch.no_grad():
            model = builder.build()
            with Progress(progress, "loading", sum(located.nbytes for located, _ in memory.targets)) as shown:
                TensorReader(checkpoint, verify=verify, progress=shown).read(memory.targets)
            builder.set_extra_states()
    return model


@verb()
def load_program(
    path: str | os.PathLike[str], *, device: Device = None, verify: bool = True, progress: ProgressArgument = None
) -> nn.Module:
    """What a model that was saved with ``program=`` computes, as a module to call; its own classes need not be installed.

    Takes arguments of the shapes that it was exported with; others raise TypeError or ValueError, or RuntimeError where sizes do not go
    together. Results of the model's own classes come as dicts. Weights go straight to ``device``, flags come back. A program is a graph
    of torch's own operators, run one by one; nothing of it is evaluated, nothing of the model's package is imported.

    Args:
        path: the checkpoint.
        device: where it runs; the CPU by default.
        verify: as in ``load``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        IncompatibleCheckpointError: there is no program, or a newer shardsave wrote it.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> report = shardsave.save(model, "linear-program", program=((torch.ones(3, 4),), {}))
        >>> shardsave.load_program("linear-program")(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    check_path(path)
    check_switches(verify=verify)
    check_progress(progress)
    where = check_device(device) or torch.device("cpu")
    with open_checkpoint(path, parts=PARTS) as checkpoint:
        data = checkpoint.documents.get("program")
        if data is None:
            raise IncompatibleCheckpointError(
                f"cannot load a program from {checkpoint.path}: a program was expected, the checkpoint has none; "
                f"save with program=(args, kwargs)"
            )
        document = ProgramDocument(data, f"the program in {checkpoint.path}", where)
        memory = NewTensors(checkpoint, where)
        with torch.inference_mode(False):
            tensors = _tensors(document, memory)
            with Progress(progress, "loading", sum(located.nbytes for located, _ in memory.targets)) as shown:
                TensorReader(checkpoint, verify=verify, progress=shown).read(memory.targets)
            return LoadedProgram(document, tensors)


def _tensors(document: ProgramDocument, memory: NewTensors) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for place in document.places:
        tensor = memory(place.tensor, place.kept, None)
        if tensor is None:
            raise CorruptCheckpointError(
                f"corrupt {document.where}: tensor {place.tensor!r} expected in the checkpoint, it is not there; nothing was run"
            )
        made[place.name] = tensor
    return made


def _built_by_config(
    checkpoint: Checkpoint, trust: frozenset[str], device: torch.device, verify: bool, progress: ProgressArgument
) -> nn.Module:
    folder = os.path.dirname(checkpoint.path_of(CONFIG_NAME))
    config = read_config(folder)
    if config is None:
        raise IncompatibleCheckpointError(
            f"cannot build a model from {checkpoint.path}: an architecture or a config of transformers was expected, there is "
            f"neither; save with architecture=True, or define the model and use load_model"
        )
    for note in checkpoint.companion_notes():
        warnings.warn(note, stacklevel=4)
    model = empty_model(folder, config, trust, device)
    _take_stored_dtypes(model, checkpoint)
    load_model(model, checkpoint.path, verify=verify, progress=progress)
    return model


def _take_stored_dtypes(model: nn.Module, checkpoint: Checkpoint) -> None:
    """A config knows one dtype for all; what was saved in another comes back in that."""
    stored = {name: checkpoint.tensors[name] for name in checkpoint.stored_names}
    stored.update({name: checkpoint.tensors[other] for name, other in checkpoint.ties.items()})
    found = conversion(model, stored, checkpoint.path).stored
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in found and BY_NAME[found[name].dtype].torch != tensor.dtype:
            tensor.data = torch.empty_like(tensor, dtype=BY_NAME[found[name].dtype].torch)


def _check_classes(classes: Mapping[str, Any] | None) -> dict[str, Any]:
    if classes is not None and not isinstance(classes, Mapping):
        raise TypeError(f"classes must be a mapping such as {{'old.Name': NewClass}}, not {an(type(classes).__name__)}")
    for name, thing in (classes or {}).items():
        if not isinstance(name, str) or not callable(thing):
            raise TypeError(f"classes must map names as they were saved to classes or functions, not {name!r} to {thing!r}")
    return dict(classes or {})


def _check_trust(trust: Iterable[str]) -> frozenset[str]:
    if isinstance(trust, (str, bytes)):
        raise TypeError("trust must be an iterable of names, not one string")
    given = frozenset(trust)
    for name in given:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"trust must be names of modules or classes, such as 'mylib.models', not {name!r}")
    return given
