"""Walks through what a file holds: mappings and sequences in each other, with tensors and other values in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from shardsave._common.assembled import Assembled
from shardsave._common.words import count, human_bytes


class Unread:
    """Takes the place of a value that is not read, or not as what it is; ``kind`` says what it is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def parts(self) -> Mapping[str, Any]:
        """What is known of its content, by name."""
        return {}


class UnreadArray(Unread):
    """Takes the place of an array of ``nbytes`` that cannot become a tensor; it is counted as one, so that it is not overlooked."""

    dtype = None

    def __init__(self, kind: str, shape: tuple[int, ...], nbytes: int) -> None:
        super().__init__(kind)
        self.shape, self.nbytes = shape, nbytes


class Attributed(Unread):
    """A tensor with attributes of its own, or (``is_subclass``) of a class that is not imported."""

    def __init__(self, kind: str, tensor: Any, attributes: dict[str, Any], *, is_subclass: bool) -> None:
        super().__init__(kind)
        self.tensor, self.attributes, self.is_subclass = tensor, attributes, is_subclass

    def parts(self) -> Mapping[str, Any]:
        return {"(tensor)": self.tensor, **self.attributes}


def without_attributes(value: Any) -> Any:
    """The tensor alone if ``value`` is one with attributes; otherwise ``value`` itself."""
    return value.tensor if isinstance(value, Attributed) and not value.is_subclass else value


def counts_as_tensor(value: object) -> bool:
    """Whether ``value`` is no tensor, but must not be overlooked either: an array that is not read, or a tensor of a subclass."""
    return isinstance(value, UnreadArray) or (isinstance(value, Attributed) and value.is_subclass)


def is_tensor(value: object) -> bool:
    return isinstance(value, (torch.Tensor, Assembled))


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """The values in a container, each with its key; sequences and sets have the keys "0", "1", …. Nothing for any other value."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield str(key), child
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, child in enumerate(value):
            yield str(number), child
    elif isinstance(value, Unread):
        yield from value.parts().items()


def is_container(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset)) or (isinstance(value, Unread) and bool(value.parts()))


def is_tensor_list(value: object) -> bool:
    """Whether ``value`` is a sequence of tensors only, or a mapping from numbers to tensors, as a distributed checkpoint has it."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(key, int) for key in value) and all(map(_is_item, value.values()))
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_item(v) and not _is_quantized(v) for v in value)


def _is_item(value: object) -> bool:
    return is_tensor(without_attributes(value))


def tensors_in(value: Any) -> Iterator[Any]:
    """Every tensor and unread array in ``value``, at any depth; a container that is there several times is visited once."""
    visited: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if is_tensor(value) or isinstance(value, UnreadArray):
            yield value
        elif is_container(value) and id(value) not in visited:
            visited.add(id(value))
            waiting += [child for _, child in children(value)]


def bytes_of(tensor: Any) -> int:
    """The bytes of all elements of a tensor of any layout, or of what counts as a tensor."""
    if isinstance(tensor, Attributed):
        return bytes_of(tensor.tensor)
    return tensor.nbytes if isinstance(tensor, (Assembled, UnreadArray)) else tensor.numel() * tensor.element_size()


def describe(value: Any, kind: str | None = None) -> str:
    """``dict, 12 tensors, 3.4 MB`` or ``int``: what ``value`` is, for a message; ``kind`` takes the place of its type."""
    if is_tensor(value):
        return f"{'quantized ' if _is_quantized(value) else ''}tensor, {human_bytes(bytes_of(value))}"
    words = kind or kind_of(value)
    tensors = [] if isinstance(value, UnreadArray) else [*tensors_in(value)]  # its kind has its bytes
    return f"{words}, {count_tensors(tensors)}" if tensors else words


def count_tensors(tensors: Collection[Any]) -> str:
    """``12 tensors, 3.4 MB``."""
    quantized = sum(map(_is_quantized, tensors))
    kind = f", {quantized} of them quantized" if quantized else ""
    return f"{count(len(tensors), 'tensor')}, {human_bytes(sum(map(bytes_of, tensors)))}{kind}"


def kind_of(value: object) -> str:
    """The type of ``value``, for a message."""
    return value.kind if isinstance(value, Unread) else type(value).__name__


def _is_quantized(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_quantized
