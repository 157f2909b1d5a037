"""Everything that knows transformers: the names and the layout of a model on disk, and which files lie beside its weights.

transformers is never imported here unless a model of its is at hand, and then it has been already.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from shardsave._common.sources import TensorSource
from shardsave._common.words import human_bytes
from shardsave._state.module import Entry, State
from shardsave._state.wrappers import unwrap
from shardsave.errors import UnsupportedTensorError

_SOURCES = "_shardsave_sources"


def pretrained(source: object) -> Any:
    """The transformers model that ``source`` is, seen through wrappers; None where it is none."""
    module = sys.modules.get("transformers.modeling_utils")
    kind = getattr(module, "PreTrainedModel", None)
    if kind is None or not isinstance(source, torch.nn.Module):
        return None
    inner = unwrap(source)
    return inner if isinstance(inner, kind) else None


def companions(model: Any) -> dict[str, bytes]:
    """What `save_pretrained` puts beside the weights of ``model``: file name → content."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if "transformers_weights" in config.__dict__:
        del config.transformers_weights
    files = {"config.json": config.to_json_string(use_diff=True)}
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    return {name: text.encode() for name, text in files.items()}


class OnDisk(NamedTuple):
    """A model as it is stored. ``module_flags``: name in the module → frozen, where the names in ``state`` are others."""

    state: State
    module_flags: Mapping[str, bool] | None
    notes: tuple[str, ...]


def on_disk(model: Any, state: State) -> OnDisk:
    """``state``, the entries of ``model``, under the names and in the layout that `save_pretrained` gives them.

    Without a transformers ``model`` they stay as they are. Fused tensors become views of their parts: nothing is copied, except
    where parts are joined on disk, which is noted.
    Raises UnsupportedTensorError.
    """
    if model is None:
        return OnDisk(state, state.beside.module_flags, ())
    ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    entries = _stored_as_they_do(model, [entry for entry in state.entries if entry.name not in ignored])
    by_name = {entry.name: entry for entry in entries}
    stored = {entry.name: entry.tensor for entry in entries if entry.tied_to is None}
    renamed = reverted(model, stored)
    place = {name: n for n, name in enumerate(stored)}
    made = [_entry(name, part, [by_name[source] for source in part.sources]) for name, part in renamed.items()]
    order = {name: min(place[source] for source in part.sources) for name, part in renamed.items()}
    made.sort(key=lambda entry: order[entry.name])  # stable: the parts of one tensor stay as they are
    made += _ties(model, entries, renamed)
    flags = None
    if {entry.name for entry in made} != {entry.name for entry in state.entries}:
        flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    copied = sum(part.tensor.nbytes for part in renamed.values() if part.is_copy)
    notes = (f"{human_bytes(copied)} were copied in memory, since they are joined on disk",) if copied else ()
    return OnDisk(state._replace(entries=tuple(made)), flags, notes)


class Part(NamedTuple):
    """What is stored under one name: a view of the one of its ``sources``, names in the module, or a copy of several."""

    tensor: torch.Tensor
    sources: tuple[str, ...]
    is_copy: bool


def reverted(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """Name on disk → what is stored there of ``tensors``, by their names in the module, as transformers itself converts them.

    Raises UnsupportedTensorError.
    """
    revert = _conversion("revert_weight_conversion")
    if revert is None:
        return {name: Part(tensor, (name,), False) for name, tensor in tensors.items()}
    memory = {}
    marked = {}
    for name, tensor in tensors.items():
        marked[name] = tensor.detach()
        setattr(marked[name], _SOURCES, (name,))
        memory[name] = _memory_of(tensor)
    try:
        with _WithoutCopies(), torch.no_grad():
            made = dict(revert(model, marked))
    except Exception as error:
        raise UnsupportedTensorError(
            f"cannot save {type(model).__name__}: transformers was expected to convert it to the layout that it has on disk, it "
            f"raised {type(error).__name__}: {' '.join(str(error).split())}; nothing was written"
        ) from error
    parts = {}
    for name, tensor in made.items():
        sources = getattr(tensor, _SOURCES)
        is_copy = _memory_of(tensor) not in [memory[source] for source in sources]
        parts[name] = Part(tensor, sources, is_copy)
    return parts


class _WithoutCopies(TorchFunctionMode):
    """What is cut out of a tensor stays a view of it, however it lies; and each tensor knows which it was made of."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.contiguous:
            return args[0]
        made = function(*args, **(kwargs or {}))
        sources = [source for tensor in _tensors((args, kwargs or {})) for source in getattr(tensor, _SOURCES, ())]
        for tensor in _tensors(made):
            setattr(tensor, _SOURCES, tuple(dict.fromkeys(sources)))
        return made


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _memory_of(tensor: torch.Tensor) -> object:
    """What tells a storage from every other, also on the meta device."""
    return tensor.untyped_storage()._cdata


def _entry(name: str, part: Part, sources: Iterable[Entry]) -> Entry:
    """Frozen when all that it is made of is."""
    flags = [entry.frozen for entry in sources if entry.frozen is not None]
    return Entry(name, "parameter" if flags else "buffer", all(flags) if flags else None, None, TensorSource.of(part.tensor))


def _stored_as_they_do(model: Any, entries: list[Entry]) -> list[Entry]:
    """Of names that share memory `save_pretrained` keeps the one that the model ties the others to: so do we."""
    if all(entry.tied_to is None for entry in entries):
        return entries
    patterns = [
        re.compile(f"{name}.{key}" if name else key)
        for name, module in model.named_modules()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    ]
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.tied_to or entry.name, []).append(entry.name)
    keeper = {}
    for names in groups.values():
        free = [name for name in names if not any(pattern.search(name) for pattern in patterns)]
        keeper.update(dict.fromkeys(names, free[0] if free else max(names)))
    return [entry._replace(tied_to=keeper[entry.name] if keeper[entry.name] != entry.name else None) for entry in entries]


def _ties(model: Any, entries: Iterable[Entry], stored: Mapping[str, Part]) -> list[Entry]:
    """The tied entries under the names that they would have on disk, as far as these are names of their own."""
    tied = {entry.name: entry for entry in entries if entry.tied_to is not None}
    whole = {part.sources[0]: name for name, part in stored.items() if len(part.sources) == 1 and not part.is_copy}
    once = {source for source in whole if sum(part.sources == (source,) for part in stored.values()) == 1} if tied else set()
    made = []
    for name, part in reverted(model, {name: entry.tensor for name, entry in tied.items()}).items() if tied else ():
        entry = tied[part.sources[0]]
        if len(part.sources) == 1 and entry.tied_to in once and name not in stored:
            made.append(entry._replace(name=name, tied_to=whole[entry.tied_to]))
    return made


def _conversion(name: str, module: str = "core_model_loading") -> Any:
    """A function of transformers that converts between the layouts in memory and on disk; None where it is too old to have any."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name, None)
    except ImportError:
        return None
