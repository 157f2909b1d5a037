"""Chooses the layout of a checkpoint on disk for the module that it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping

from shardsave._common.imports import import_at_use
from shardsave._huggingface.recognize import has_added_adapter, peft_model, transformers_model
from shardsave._loading.disk_layout import DiskLayout, IdentityLayout
from shardsave._loading.slots import Inventory
from shardsave._storage.located import Located


def choose_layout(inventory: Inventory, stored: Mapping[str, Located], where: str) -> DiskLayout:
    """The layout of ``stored`` (name on disk → stored tensor) for the module; only models of transformers and PEFT have their own."""
    if (transformer := transformers_model(inventory.module)) is not None:
        if has_added_adapter(transformer):
            import_at_use("shardsave._huggingface.added_adapter_loading")  # no other model needs these
            from shardsave._huggingface.added_adapter_loading import AddedAdapterLayout

            return AddedAdapterLayout(inventory, stored, where)
        import_at_use("shardsave._huggingface.transformers_loading")
        from shardsave._huggingface.transformers_loading import TransformersLayout

        return TransformersLayout(inventory, stored, where)
    if (model := peft_model(inventory.module)) is not None:
        import_at_use("shardsave._huggingface.peft_loading")
        from shardsave._huggingface.peft_loading import adapter_layout

        return adapter_layout(model, stored, where) or IdentityLayout(stored)
    return IdentityLayout(stored)
