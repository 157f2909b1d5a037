"""Tensors that consist of other tensors (``__tensor_flatten__``): the one place that decides about them.

Those of the classes in `FORMS` are stored: the inner tensors as tensors, what else the class has as a value. Nothing is imported: an
optimizer that takes such a state has imported its class.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.strict_json import glimpse
from shardsave._common.words import an
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._training.places import Place
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError

#: The tag of a value that is such a tensor.
TAG = "subclass"


class Reader(Protocol):
    """What a reader of values does for those that consist of others; `ValueReader` is the one."""

    where: str

    def corrupt(self, path: str, expected: str, found: object) -> NoReturn: ...

    def members(self, value: Any, path: str, kinds: Mapping[str, type]) -> list[Any]: ...

    def value(self, value: Any, path: str, onto: Any = None) -> Any: ...

    def stored(self, name: Any, path: str) -> Any: ...

    def fill(self, name: Any, tensor: torch.Tensor, path: str) -> bool: ...


class Form(NamedTuple):
    """What the tensors of one class consist of.

    ``inner``: name → the dtype of an inner tensor. ``context``: the types of what else there is; the last is the dtype that the whole
    tensor seems to have. ``codes``: how many codes its table has; None without a table.
    """

    inner: Mapping[str, torch.dtype]
    context: tuple[type, ...]
    codes: int | None


_WITH_TABLE = {"codes": torch.uint8, "scale": torch.float32, "qmap": torch.float32}

#: The full name of each class that can be stored → its form. A form with a size packs two codes into a byte.
FORMS: Mapping[str, Form] = {
    "torchao.optim.subclass_8bit.OptimState8bit": Form(_WITH_TABLE, (bool, torch.dtype), 256),
    "torchao.optim.subclass_4bit.OptimState4bit": Form(_WITH_TABLE, (bool, torch.Size, torch.dtype), 16),
    "torchao.optim.subclass_fp8.OptimStateFp8": Form(
        {"codes": torch.float8_e4m3fn, "scale": torch.float32}, (torch.dtype,), None
    ),
}


def write_subclass(tensor: torch.Tensor, place: Place, write: Callable[[Any, Place], Any]) -> Any:
    """The value for ``tensor``; ``write`` writes what it consists of. Raises UnsupportedTensorError for a class that is not in `FORMS`."""
    kind = type(tensor)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in FORMS or _class_of(name) is not kind:
        raise UnsupportedTensorError(
            f"cannot save {place.path}: a plain tensor was expected, it is {an(kind.__name__)}, which consists of other tensors; "
            f"nothing was written"
        )
    inner, context = _parts(tensor)
    problem = _problem(FORMS[name], inner, context)
    if problem is None and (tensor.dtype != context[-1] or not tensor.is_contiguous()):
        problem = "contiguous and of the dtype in its context"
    if problem is not None:
        raise UnsupportedTensorError(
            f"cannot save {place.path}: {an(kind.__name__)} {problem} was expected, it has another form; nothing was written"
        )
    return {
        TAG: {
            "class": name,
            "inner": {key: write(part, place.at(key)) for key, part in inner.items()},
            "context": write(context, place),
            "size": list(tensor.shape),
            "stride": list(tensor.stride()),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    }


def read_subclass(content: Any, path: str, reader: Reader, onto: Any) -> torch.Tensor:
    """A new tensor for what follows the tag; its inner tensors are read from disk. ``onto``: where they are made."""
    name, inner_values, context, size, stride, dtype = _members(content, path, reader)
    kind = _class_of(name)
    if kind is None:
        module = name.rpartition(".")[0]
        raise IncompatibleCheckpointError(
            f"cannot resume from {reader.where}: {path}: {name} was expected, the program has not imported it; import {module} first; "
            f"nothing was changed"
        )
    inner = {key: reader.value(value, f"{path}.{key}", onto) for key, value in inner_values.items()}
    if (problem := _problem(FORMS[name], inner, context)) is not None:
        reader.corrupt(path, f"{an(kind.__name__)} {problem} was", content)
    with torch.inference_mode(False):
        tensor: torch.Tensor = kind.__tensor_unflatten__(inner, context, None, None)
    if (list(tensor.shape), list(tensor.stride())) != (size, stride) or str(tensor.dtype) != f"torch.{dtype}":
        reader.corrupt(path, "the size, stride and dtype of its inner tensors were", [size, stride, dtype])
    return tensor


def fill_subclass(live: torch.Tensor, content: Any, path: str, reader: Reader) -> str | None:
    """Has the inner tensors of ``live`` read from disk. Returns how it differs from what is stored, in words; then it is left as it is."""
    name, inner_values, context, size, _, _ = _members(content, path, reader)
    if type(live) is not _class_of(name):
        return f"{path}: the checkpoint has {an(name.rpartition('.')[2])}, here is {an(type(live).__name__)}"
    own, own_context = _parts(live)
    stored_names = {}
    for key, value in inner_values.items():
        (stored_names[key],) = reader.members(value, f"{path}.{key}", {"tensor": object})
        stored = reader.stored(stored_names[key], f"{path}.{key}")
        dtype, shape = BY_NAME[stored.dtype].torch, torch_shape(stored.dtype, stored.shape)
        if (dtype, shape) != (own[key].dtype, own[key].shape):
            return f"{path}: {key!r} is {list(shape)} on disk, {list(own[key].shape)} here"
    if context != own_context or size != list(live.shape):
        return f"{path}: it is {list(live.shape)} and {own_context} here, {glimpse(size)} and {context} on disk".replace(
            "torch.", ""
        )
    for key, stored_name in stored_names.items():
        reader.fill(stored_name, own[key], f"{path}.{key}")
    return None


def _members(content: Any, path: str, reader: Reader) -> tuple[str, dict[str, Any], list[Any], list[Any], list[Any], str]:
    kinds = {"class": str, "inner": dict, "context": object, "size": list, "stride": list, "dtype": str}
    name, inner, context, size, stride, dtype = reader.members(content, path, kinds)
    if name not in FORMS:
        raise IncompatibleCheckpointError(
            f"cannot resume from {reader.where}: {path}: a tensor of a known class was expected, it is of {glimpse(name)}; "
            f"nothing was changed"
        )
    form = FORMS[name]
    if inner.keys() != form.inner.keys():
        reader.corrupt(path, f"the inner tensors {', '.join(form.inner)} were", list(inner))
    context = reader.value(context, path)
    if type(context) is not list or [*map(type, context)] != [*form.context]:
        reader.corrupt(path, f"a list of {', '.join(kind.__name__ for kind in form.context)} was", context)
    return name, inner, context, size, stride, dtype


def _class_of(name: str) -> Any:
    """The class called ``name``, which is in `FORMS`; None if the program has not imported it."""
    module, _, own_name = name.rpartition(".")
    return getattr(sys.modules.get(module), own_name, None)


def _parts(tensor: Any) -> tuple[dict[str, Any], list[Any]]:
    """The inner tensors and the context of ``tensor``."""
    names, context = tensor.__tensor_flatten__()
    return {key: getattr(tensor, key) for key in names}, [torch.Size(x) if isinstance(x, tuple) else x for x in context]


def _problem(form: Form, inner: Mapping[str, Any], context: list[Any]) -> str | None:
    """What is expected of ``inner`` and ``context``, in words, if they make no tensor of ``form``; None if they do."""
    if inner.keys() != form.inner.keys() or [*map(type, context)] != [*form.context]:
        return f"of {', '.join(form.inner)}"
    if not all(type(part) in PLAIN_TYPES and part.dtype == form.inner[key] for key, part in inner.items()):
        return "of " + ", ".join(f"{dtype} {key}".removeprefix("torch.") for key, dtype in form.inner.items())
    if len({part.device for part in inner.values()}) != 1:
        return "on one device"
    if not context[-1].is_floating_point:
        return "with a floating dtype"
    codes, scale = inner["codes"], inner["scale"]
    if form.codes is not None and list(inner["qmap"].shape) != [form.codes]:
        return f"with a table of {form.codes} codes"
    if scale.dim() != 1 or not scale.numel() or not codes.numel() or codes.numel() % scale.numel():
        return "with a scale for each of its blocks"
    if torch.Size in form.context:
        size = context[form.context.index(torch.Size)]
        if codes.dim() != 1 or min(size, default=1) < 1 or math.prod(size) != 2 * codes.numel():
            return "with two codes in each byte"
    return None
