"""Loading into a transformers model: from the names and the layout on disk to those in memory, as transformers itself goes.

Each stored name is renamed as `from_pretrained` renames it. Where several stored tensors make one of the model (the experts of a
mixture), they are read straight into views of it: what transformers would cut out of the tensor when it saves is where it would put
it when it loads. Only what has no such view is read into copies, one group at a time, and converted by transformers.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shardsave._format.dtypes import BY_NAME, BY_TORCH, logical_shape, torch_shape
from shardsave._huggingface.transformers_saving import Part, reverted
from shardsave._loading.fill_groups import Join
from shardsave._loading.slots import expected_names, slots, sub_modules
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError


class Conversion:
    """How the stored tensors of a checkpoint become those of a transformers model.

    ``stored``: name in the model → stored tensor, also for what is joined, and the names on disk of what the model has no use for.
    """

    def __init__(self, model: Any) -> None:
        self.stored: dict[str, Located] = {}
        self.joins: list[Join] = []
        self._model = model
        self._names = dict.fromkeys(expected_names(own := sub_modules(model), slots(own)), True)
        self._sent: dict[str, tuple[str, ...]] = {}  # name on disk → those in the model
        self._keys: list[list[tuple[str, str]]] = []  # for each join: what each of its sources is, in the words of transformers
        self._renamings: list[Any] = []
        self._converters: list[Any] = []

    def optional(self, name: str) -> bool:
        """Whether transformers does not mind that ``name`` is missing: it is not saved, or can be made again."""
        if name in (getattr(self._model, "_keys_to_ignore_on_save", None) or ()):
            return True
        return _matches(getattr(self._model, "_keys_to_ignore_on_load_missing", None), name)

    def flags(self, given: Mapping[str, bool]) -> dict[str, bool]:
        """Flags by names on disk, or of a model with another head, by the names in this one: frozen when all that it has is."""
        names = Names.of(self._model)
        known = {*self._names, *(names.plain(name) for name, _ in self._model.named_parameters(remove_duplicate=False))}
        flags: dict[str, bool] = {}
        for name, frozen in given.items():
            for own in [name] if name in known else self._sent.get(name) or [self._with_or_without_prefix(name, known)]:
                flags[own] = frozen and flags.get(own, True)
        return flags

    def _with_or_without_prefix(self, name: str, known: set[str]) -> str:
        prefix = f"{self._model.base_model_prefix}."
        return next((other for other in (name.removeprefix(prefix), prefix + name) if other in known), name)

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]:
        """For each join where its sources lie in ``tensors``, those of the model by name; None where they are no part of them."""
        try:
            parts = reverted(self._model, tensors) if tensors else {}
        except UnsupportedTensorError:
            parts = {}
        found: dict[tuple[str, str], list[Part]] = {}
        for name, key in self._renamed(parts):
            found.setdefault(key, []).append(parts[name])
        made: list[Sequence[torch.Tensor] | None] = []
        for join, keys in zip(self.joins, self._keys):
            waiting = {key: iter(found.get(key, ())) for key in keys}
            views = [next(waiting[key], None) for key in keys]
            fits = [
                view is not None and not view.is_copy and tuple(view.tensor.shape) == torch_shape(source.dtype, source.shape)
                for view, source in zip(views, join.sources)
            ]
            used_up = all(next(rest, None) is None for rest in waiting.values())
            made.append([view.tensor for view in views if view is not None] if all(fits) and used_up else None)
        return made

    def _renamed(self, names: Iterable[str]) -> list[tuple[str, tuple[str, str]]]:
        """(name on disk, (name in the model, the pattern of a converter that takes part or "")) in the order of transformers."""
        loading = importlib.import_module("transformers.core_model_loading")
        prefix, renamings = self._model.base_model_prefix, copy.deepcopy(self._renamings)  # some remember what they have seen
        made = []
        for name in sorted(names, key=loading.dot_natural_key):
            renamed, pattern = loading.rename_source_key(name, renamings, self._converters, prefix, self._names)
            if renamed not in self._names and name in self._names:
                renamed, pattern = loading.rename_source_key(name, [], [], prefix, self._names)
            made.append((name, (renamed, pattern or "")))
        return made

    def plan(self, stored: Mapping[str, Located], where: str) -> None:
        """Finds out what each of ``stored`` (name on disk → stored tensor) is in the model. Raises IncompatibleCheckpointError."""
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(self._model)
        self._renamings = [transform for transform in transforms if isinstance(transform, loading.WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, loading.WeightConverter)]
        unneeded = _unneeded(self._model)
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, (own, pattern) in self._renamed(stored):
            if own in self._names and pattern:
                groups.setdefault(own, []).append((name, pattern))
            elif own in self._names and own not in self.stored:
                self.stored[own] = stored[name]
                self._sent[name] = (own,)
            elif not any(_matches(unneeded, either) for either in (name, own)):
                self.stored[name] = stored[name]
        for own, members in groups.items():
            self._join(own, members, stored, where)

    def _join(self, first: str, members: Sequence[tuple[str, str]], stored: Mapping[str, Located], where: str) -> None:
        pattern = members[0][1]
        blank = next(converter for converter in self._converters if pattern in converter.source_patterns)
        sources = tuple(stored[name] for name, _ in members)

        def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            converter = copy.deepcopy(blank)
            for (name, part), tensor in zip(members, tensors):
                converter.add_tensor(first, name, part, tensor)
            made = converter.convert(first, model=self._model, config=self._model.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

        try:
            made = convert(
                [torch.empty(torch_shape(t.dtype, t.shape), dtype=BY_NAME[t.dtype].torch, device="meta") for t in sources]
            )
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {where}: {first!r} was expected to be made of {len(sources)} stored tensors, such as {members[0][0]!r}, "
                f"transformers raised {type(error).__name__}: {' '.join(str(error).split())}; the module is unchanged"
            ) from error
        for name, tensor in made.items():
            self.stored[name] = Located(
                name, BY_TORCH[tensor.dtype].name, logical_shape(tensor.dtype, tensor.shape), tensor.nbytes, "", 0, None
            )
        self._sent.update(dict.fromkeys((name for name, _ in members), tuple(made)))
        self.joins.append(Join(tuple(made), sources, convert))
        self._keys.append([(first, part) for _, part in members])


def conversion(model: Any, stored: Mapping[str, Located], where: str) -> Conversion:
    """How ``stored``, by their names on disk, become the tensors of ``model``. Raises IncompatibleCheckpointError."""
    made = Conversion(model)
    if stored.keys() == made._names.keys() or not _converts():
        made.stored.update(stored)
    else:
        made.plan(stored, where)
    return made


def _converts() -> bool:
    try:
        importlib.import_module("transformers.core_model_loading")
    except ImportError:  # older versions have the names in memory on disk, too
        return False
    return True


def _unneeded(model: Any) -> list[str]:
    """Patterns of names that transformers does not mind to find: of old versions, when some buffers were saved."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    for buffer, pattern in (("rotary_emb.inv_freq", r"rotary_emb\.inv_freq"), ("position_ids", r"(^|\.)position_ids$")):
        if any(name.endswith(buffer) for name in buffers):
            patterns.append(pattern)
    return patterns


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
