"""From the names and tensors of a transformers model on disk to those in memory, as `from_pretrained` renames and converts them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from shardsave._common.imports import import_at_use
from shardsave._huggingface.recognize import transformers_model
from shardsave._state.wrappers import plain_class, plain_classes

#: The name of a tensor in the model, and the pattern of the converter that takes the stored tensor, or "".
Key = tuple[str, str]


class NamesInMemory:
    """The names in memory that `from_pretrained` gives the tensors of a checkpoint for ``model``."""

    def __init__(self, model: Any, names: Collection[str], transforms: Iterable[Any] | None = None) -> None:
        """``names``: those of the model's own state dict. ``transforms``: those of transformers for the class, if not given."""
        loading = import_at_use("transformers.core_model_loading")
        transforms = list(model_transforms(model) if transforms is None else transforms)
        self._loading = loading
        self._model = model
        self._names = dict.fromkeys(names, True)
        self._renamings = [transform for transform in transforms if isinstance(transform, loading.WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, loading.WeightConverter)]

    def of(self, names: Iterable[str]) -> list[tuple[str, Key]]:
        """(name on disk, key) for each of ``names``, in the order in which transformers takes them."""
        rename = self._loading.rename_source_key
        prefix, renamings = self._model.base_model_prefix, copy.deepcopy(self._renamings)  # some of them keep a state
        renamed_names = []
        for name in sorted(names, key=self._loading.dot_natural_key):
            renamed, pattern = rename(name, renamings, self._converters, prefix, self._names)
            if renamed not in self._names and name in self._names:
                renamed, pattern = rename(name, [], [], prefix, self._names)
            renamed_names.append((name, (renamed, pattern or "")))
        return renamed_names

    def convert(
        self, first: str, members: Sequence[tuple[str, str]], tensors: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Converts ``tensors`` of ``members`` (name on disk, pattern), whose keys all name ``first``: name in memory → tensor."""
        pattern = members[0][1]
        converter = copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for (name, part), tensor in zip(members, tensors):
            converter.add_tensor(first, name, part, tensor)
        values: Mapping[str, Any] = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def model_transforms(model: Any) -> list[Any]:
    """What transformers does to names and tensors on disk to load them into ``model``, in order."""
    mapping = import_at_use("transformers.conversion_mapping")
    with plain_classes(model):
        return list(mapping.get_model_conversion_mapping(model))


def what_converts(model: Any) -> list[object]:
    """What decides how transformers converts ``model`` on its way to disk, as JSON. The conversions themselves take long to make."""
    mapping: Any = sys.modules.get("transformers.conversion_mapping")
    known = getattr(mapping, "_checkpoint_conversion_mapping_cache", None) or {}
    registered = sorted(getattr(mapping, "USER_REGISTERED_MAPPINGS", ()))
    models = [(name, part) for name, part in model.named_modules() if transformers_model(part) is part]
    loaded = getattr(model, "_weight_conversions", None)  # by `from_pretrained`
    return [
        [[name, plain_class(type(part)).__name__, getattr(part.config, "model_type", None)] for name, part in models],
        [sorted(map(str, getattr(part, "_tied_weights_keys", None) or ())) for _, part in models],
        sorted(map(str, getattr(model, "_keys_to_ignore_on_save", None) or ())),
        None if loaded is None else list(map(_words, loaded)),
        [[name, list(map(_words, known.get(name) or ()))] for name in registered],
    ]


def _words(transform: Any) -> list[object]:
    operations = [type(operation).__name__ for operation in getattr(transform, "operations", None) or ()]
    return [type(transform).__name__, str(transform.source_patterns), str(transform.target_patterns), operations]


def converts() -> bool:
    """Whether this version of transformers converts between names on disk and names in memory."""
    try:
        import_at_use("transformers.core_model_loading")
    except ImportError:  # older versions use the names in memory on disk, too
        return False
    return True
