"""Loading into a transformers model: from the names and the layout on disk to those in memory, as `from_pretrained` converts them.

Each stored name is renamed as `from_pretrained` renames it. If several stored tensors make one tensor of the model (the experts of a
mixture), they are read straight into views of it: the slices that transformers takes of the tensor when it saves are where the parts
belong when it loads. If there are no such views, the parts are read into copies, one join at a time, and transformers converts
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shardsave._format.dtypes import BY_NAME, BY_TORCH, logical_shape, torch_shape
from shardsave._huggingface.transformers_names import Key, NamesInMemory, converts
from shardsave._huggingface.transformers_on_disk import DiskTensor, reverted
from shardsave._loading.disk_layout import Beside, Join
from shardsave._loading.slots import Inventory
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError

#: What PEFT puts into the name of a tensor whose layer it wraps.
_PEFT_LAYER = re.compile(r"\.(base_layer|original_module)(?=\.)")


class TransformersLayout:
    """The layout of a transformers model on disk; see `shardsave._loading.disk_layout.DiskLayout`."""

    def __init__(self, inventory: Inventory, stored: Mapping[str, Located], where: str) -> None:
        """``inventory``: of the model. ``stored``: name on disk → stored tensor. ``where``: the path of the checkpoint, for messages.

        Raises IncompatibleCheckpointError.
        """
        self.stored: dict[str, Located] = {}
        self.joins: list[Join] = []
        self.beside: Sequence[Beside] = ()
        self._model: Any = inventory.module
        self._names = dict.fromkeys(inventory.expected, True)
        self._targets: dict[str, tuple[str, ...]] = {}  # name on disk → names in the model
        self._keys: list[list[Key]] = []  # for each join, the key of each source
        unneeded = _unneeded(self._model)
        if not converts() or all(name in stored or self.may_be_missing(name) for name in self._names):
            # The names are those in memory. Renaming them could move a tensor: not every mapping is its own inverse.
            self.stored.update((n, t) for n, t in stored.items() if n in self._names or not _matches(unneeded, n))
        else:
            self._in_memory = NamesInMemory(self._model, self._names)
            self._plan(stored, unneeded, where)

    def may_be_missing(self, name: str) -> bool:
        """Whether transformers does not need ``name``: it is never saved, or it is computed again."""
        if name in (getattr(self._model, "_keys_to_ignore_on_save", None) or ()):
            return True
        return _matches(getattr(self._model, "_keys_to_ignore_on_load_missing", None), name)

    def flags(self, on_disk: Mapping[str, bool]) -> dict[str, bool]:
        """Flags by the names in this model, from flags by the names on disk, or in a model with another head or with adapters.

        A tensor with several flags is frozen if all of them are.
        """
        names = Names.of(self._model)
        known = {*self._names, *(names.plain(name) for name, _ in self._model.named_parameters(remove_duplicate=False))}
        flags: dict[str, bool] = {}
        others = {name: self._known_as(name, known) for name in on_disk if name not in known and name not in self._targets}
        unknown = [name for name, other in others.items() if other not in known]
        if unknown and converts():  # the flags may be all that is known of the checkpoint, so no tensor was renamed
            renamed = NamesInMemory(self._model, self._names).of(unknown)
            others.update((name, other) for name, (other, _) in renamed if other in known)
        for name, frozen in on_disk.items():
            for name_in_model in [name] if name in known else self._targets.get(name) or [others[name]]:
                flags[name_in_model] = frozen and flags.get(name_in_model, True)
        return flags

    def _known_as(self, name: str, known: set[str]) -> str:
        """Which of ``known`` is the parameter ``name`` of a model with another head, or with layers of PEFT; ``name`` if none is."""
        prefix = f"{self._model.base_model_prefix}."
        plain = _PEFT_LAYER.sub("", name)
        return next((other for other in (plain, plain.removeprefix(prefix), prefix + plain) if other in known), name)

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]:
        """For each join, a view for each source: the slices of ``tensors`` that transformers would save, if they have the right shapes."""
        if not self.joins:
            return []
        try:
            parts = reverted(self._model, tensors) if tensors else {}
        except UnsupportedTensorError:
            parts = {}
        parts_by_key: dict[Key, list[DiskTensor]] = {}
        for name, key in self._in_memory.of(parts):
            parts_by_key.setdefault(key, []).append(parts[name])
        return [_views(join, keys, parts_by_key) for join, keys in zip(self.joins, self._keys)]

    def _plan(self, stored: Mapping[str, Located], unneeded: Sequence[str], where: str) -> None:
        """Finds the name in the model, or the join, for each of ``stored``. Raises IncompatibleCheckpointError."""
        joined: dict[str, list[tuple[str, str]]] = {}  # name in the model → (name on disk, pattern)
        for name, (name_in_model, pattern) in self._in_memory.of(stored):
            if name_in_model in self._names and pattern:
                joined.setdefault(name_in_model, []).append((name, pattern))
            elif name_in_model in self._names and name_in_model not in self.stored:
                self.stored[name_in_model] = stored[name]
                self._targets[name] = (name_in_model,)
            elif not any(_matches(unneeded, candidate) for candidate in (name, name_in_model)):
                self.stored[name] = stored[name]
        for name_in_model, members in joined.items():
            self._join(name_in_model, members, stored, where)

    def _join(self, first: str, members: Sequence[tuple[str, str]], stored: Mapping[str, Located], where: str) -> None:
        """Adds the join of ``members`` (name on disk, pattern), which makes the tensor ``first`` and perhaps others.

        transformers first converts empty tensors on the meta device, to learn the names, dtypes and shapes of the targets.
        """
        sources = tuple(stored[name] for name, _ in members)

        def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            return self._in_memory.convert(first, members, tensors)

        try:
            targets = convert(
                [torch.empty(torch_shape(t.dtype, t.shape), dtype=BY_NAME[t.dtype].torch, device="meta") for t in sources]
            )
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {where}: {first!r} was expected to be made of {len(sources)} stored tensors, such as {members[0][0]!r}, "
                f"transformers raised {type(error).__name__}: {' '.join(str(error).split())}; the module is unchanged"
            ) from error
        for name, tensor in targets.items():
            self.stored[name] = Located(
                name, BY_TORCH[tensor.dtype].name, logical_shape(tensor.dtype, tensor.shape), tensor.nbytes, "", 0, None
            )
        self._targets.update(dict.fromkeys((name for name, _ in members), tuple(targets)))
        self.joins.append(Join(tuple(targets), sources, convert))
        self._keys.append([(first, part) for _, part in members])


def _views(join: Join, keys: Sequence[Key], parts: Mapping[Key, Sequence[DiskTensor]]) -> list[torch.Tensor] | None:
    """A view for each source of ``join``, taken from ``parts`` in order; None unless all fit and no part is left over."""
    remaining = {key: iter(parts.get(key, ())) for key in keys}
    views = []
    for key, source in zip(keys, join.sources):
        part = next(remaining[key], None)
        if part is None or part.is_copy or tuple(part.tensor.shape) != torch_shape(source.dtype, source.shape):
            return None
        views.append(part.tensor)
    return views if all(next(rest, None) is None for rest in remaining.values()) else None


def _unneeded(model: Any) -> list[str]:
    """Patterns of stored names that transformers ignores, such as those of buffers that only old versions saved."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    for buffer, pattern in (("rotary_emb.inv_freq", r"rotary_emb\.inv_freq"), ("position_ids", r"(^|\.)position_ids$")):
        if any(name.endswith(buffer) for name in buffers):
            patterns.append(pattern)
    return patterns


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
