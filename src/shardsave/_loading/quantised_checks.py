"""Refuses quantised parameters whose parts cannot be filled with those of the checkpoint."""

from __future__ import annotations

import torch

from shardsave._common.words import an
from shardsave._format.quantised import forms_of_parts
from shardsave._loading.allocation import stays
from shardsave._loading.module_plan import ModulePlan
from shardsave._loading.slots import Inventory
from shardsave._state.quantised import differences
from shardsave._storage.checkpoint import Checkpoint
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError


def check_quantised(inventory: Inventory, plan: ModulePlan, device: torch.device | None, checkpoint: Checkpoint) -> None:
    """Refuses quantised parameters that would have to move, and those that were quantised in another way than the stored ones.

    A checkpoint that does not say how its tensors were quantised is taken at its names, dtypes and shapes.
    """
    where = checkpoint.path
    slots = [slot for slot in inventory.slots.values() if slot.whole is not None]
    forms = forms_of_parts(checkpoint.quantised) if slots else {}
    seen = set()
    for slot in slots:
        assert slot.whole is not None
        kind = an(type(slot.whole).__name__)
        if not stays(slot.tensor, device):
            found = "it is on the meta device" if slot.tensor.is_meta else f"it is on {slot.tensor.device}"
            raise UnsupportedTensorError(
                f"cannot load {where}: {slot.name!r}: a part of {kind} with memory on the wanted device was expected, {found}; move the "
                f"module first, and leave out device=; the module is unchanged"
            )
        if (located := plan.matched.get(slot.name)) is None or id(slot.whole) in seen or located.name not in forms:
            continue
        seen.add(id(slot.whole))
        if different := differences(slot.whole, forms[located.name]):
            raise IncompatibleCheckpointError(
                f"cannot load {where}: {slot.name!r}: a part of {kind} that was quantised as in the module was expected, "
                f"{'; '.join(different)}; the module is unchanged"
            )
