"""`restore_flags`: the freeze flags of a checkpoint, before there is an optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardsave._api.arguments import check_path
from shardsave._api.reports import Printed
from shardsave._common.gc_pause import gc_paused
from shardsave._common.shutdown import verb
from shardsave._common.words import count, some
from shardsave._huggingface.choose_loading import choose_layout
from shardsave._loading.freeze_flags import named_parameters
from shardsave._loading.freeze_flags import restore_flags as set_flags
from shardsave._loading.selection import names_of_wrappers
from shardsave._loading.slots import take_inventory
from shardsave._printable import printable
from shardsave._storage.open_checkpoint import open_checkpoint


@dataclass(frozen=True)
class FlagsReport(Printed):
    """What `restore_flags` did.

    ``frozen``: how many parameters are frozen by the checkpoint's flags; None if it records none. ``changed``: how many had another
    flag before. ``missing``: parameters for which it has no flag; ``unexpected``: names with a flag that the module does not have.
    """

    path: str
    frozen: int | None
    changed: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    def _lines(self) -> Iterator[str]:
        if self.frozen is None:
            yield f"{self.path} records no flags; all were left alone"
            return
        more = [f"no flag for {some(self.missing)}"] if self.missing else []
        more += [f"not in the module: {some(self.unexpected)}"] if self.unexpected else []
        changed = f"{self.frozen} frozen ({count(self.changed, 'flag')} changed)"
        yield "; ".join([f"flags of {self.path}: {changed}", *more, *self.notes])


@verb()
def restore_flags(model: nn.Module, path: str | os.PathLike[str]) -> FlagsReport:
    """Sets ``requires_grad`` of every floating-point parameter of ``model`` to what was saved; changes nothing else.

    Reads the index alone: no shard is opened. So call it before the optimizer is made, before ``fully_shard``, and for models on the
    meta device. Names are found as in ``load_model``.

    Never collective: a rank that calls it waits for no other.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, UnsupportedTensorError, DirectoryBusyError: the
            module is unchanged.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save(torch.nn.Linear(4, 2).requires_grad_(False), "frozen-linear")
        >>> model = torch.nn.Linear(4, 2)
        >>> shardsave.restore_flags(model, "frozen-linear").frozen
        2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    check_path(path)
    with open_checkpoint(path, lambda name: False) as checkpoint:
        flags, where = checkpoint.flags, checkpoint.path
    if flags is None:
        return FlagsReport(os.fspath(path), None, 0)
    with gc_paused():
        inventory = take_inventory(model, where)
        parameters = dict(named_parameters(inventory, inventory.self_loading))
        wrapped = names_of_wrappers(model, frozenset(parameters), flags)
        own = choose_layout(inventory, {}, where).flags({wrapped.get(name, name): frozen for name, frozen in flags.items()})
        restored = set_flags(parameters.items(), own)
    with_flag = {id(parameters[name]) for name in own if name in parameters}
    can_train = [(name, p) for name, p in parameters.items() if p.is_floating_point() or p.is_complex()]
    return FlagsReport(
        path=os.fspath(path),
        frozen=restored.frozen,
        changed=restored.changed,
        missing=tuple(sorted(name for name, p in can_train if id(p) not in with_flag)),
        unexpected=tuple(sorted(own.keys() - parameters.keys())),
        notes=restored.notes,
    )
