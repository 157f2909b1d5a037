"""Chooses the layout on disk of what is saved."""

from __future__ import annotations

from shardsave._common.imports import import_at_use
from shardsave._common.words import an
from shardsave._huggingface.recognize import has_added_adapter, peft_model, transformers_model
from shardsave._saving.disk_layout import DiskLayout, IdentityLayout
from shardsave._state.module import Source


def choose_layout(source: Source, adapter_only: bool, *, with_parts: bool) -> DiskLayout:
    """The layout of ``source`` on disk. ``with_parts``: keep the names in the module, which an architecture and a program refer to.

    Raises TypeError, ValueError for ``adapter_only`` where there is no adapter, or with parts.
    """
    if adapter_only:
        adapter = peft_model(source)
        if adapter is None:
            raise TypeError(f"adapter_only=True needs a PeftModel, not {an(type(source).__name__)}")
        if with_parts:
            raise ValueError("adapter_only=True saves no architecture and no program: they need the base model's weights")
        import_at_use("shardsave._huggingface.peft_saving")  # no other model needs these
        from shardsave._huggingface.peft_saving import AdapterLayout

        return AdapterLayout(adapter)
    model = transformers_model(source)
    if model is None:
        return IdentityLayout()
    if has_added_adapter(model):
        import_at_use("shardsave._huggingface.added_adapter_saving")
        from shardsave._huggingface.added_adapter_saving import AddedAdapterLayout

        return AddedAdapterLayout(model, keep_names=with_parts)
    import_at_use("shardsave._huggingface.transformers_saving")
    from shardsave._huggingface.transformers_saving import TransformersLayout

    return TransformersLayout(model, keep_names=with_parts)
