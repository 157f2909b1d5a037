"""What holds while a constructor of transformers runs with arguments from a file: no request leaves the thread, and the tensors that it
makes are counted against what the checkpoint holds.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardsave.errors import IncompatibleCheckpointError

#: A model may make this many times what its checkpoint stores: ties, buffers and intermediate values, and a few of each for any model.
_MORE_TENSORS, _MORE_ELEMENTS = 8, 8
_ANY_TENSORS, _ANY_ELEMENTS = 1 << 12, 1 << 26

#: How to undo what is in force while a constructor runs, for a process that is forked meanwhile.
_undoing: list[Callable[[], None]] = []


def _undo_in_child() -> None:
    while _undoing:
        _undoing.pop()()


os.register_at_fork(after_in_child=_undo_in_child)


@contextmanager
def guarded(inside: set[int]) -> Iterator[None]:
    """Inside, the threads ``inside`` are offline. If the block is left by an exception, what transformers changes for the time of a
    construction is put back: its own code for that may have been stopped midway.
    """
    before = _SharedState()
    with offline(inside), _undone_in_child(before.restore):
        try:
            yield
        except BaseException:
            before.restore()
            raise


class _SharedState:
    """The default dtype of torch, and the attributes of modules and classes that transformers replaces while it constructs a model."""

    def __init__(self) -> None:
        self._dtype = torch.get_default_dtype()
        owners: list[Any] = [module for name, module in sys.modules.items() if _PATCHED.fullmatch(name)]
        owners.append(importlib.import_module("transformers.modeling_utils").PreTrainedModel)
        self._attributes = [(owner, dict(vars(owner))) for owner in owners]

    def restore(self) -> None:
        torch.set_default_dtype(self._dtype)
        for owner, attributes in self._attributes:
            now = vars(owner)
            for name, before in attributes.items():
                if callable(before) and now.get(name) is not before:
                    setattr(owner, name, before)


#: Modules whose functions transformers replaces.
_PATCHED = re.compile(r"torch|torch\.nn\.init|torch\.nn\.modules\.\w+")


@contextmanager
def _undone_in_child(undo: Callable[[], None]) -> Iterator[None]:
    _undoing.append(undo)
    try:
        yield
    finally:
        if undo in _undoing:
            _undoing.remove(undo)


@contextmanager
def offline(inside: set[int]) -> Iterator[None]:
    """Inside, the threads ``inside`` are offline: huggingface_hub makes no request, and no socket connects. Others are not affected.

    ``HF_HUB_OFFLINE`` is a constant of a module, and some modules have copied it, so sockets are closed to the threads as well.
    """
    replaced: list[tuple[Any, str, Any]] = []

    def put_back() -> None:
        for owner, name, before in reversed(replaced):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    with _undone_in_child(put_back):
        try:
            for owner, name, guard in _guards(inside):
                replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, guard)
            yield
        finally:
            put_back()


class Offline(ConnectionError):
    """A constructor asked for a connection."""


_ABSENT = object()


def _guards(inside: Collection[int]) -> Iterator[tuple[Any, str, Any]]:
    """Owner, attribute, and what stands there while the threads ``inside`` are offline."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        pass
    else:
        yield constants, "HF_HUB_OFFLINE", _OfflineIn(inside, constants.HF_HUB_OFFLINE)
    for name in ("connect", "connect_ex", "sendto"):
        yield socket.socket, name, _refusing(inside, getattr(socket.socket, name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        yield socket, name, _refusing(inside, getattr(socket, name))


class _OfflineIn:
    """A constant that is true in the threads ``inside``, and as it was in all others."""

    def __init__(self, inside: Collection[int], elsewhere: Any) -> None:
        self._inside = inside
        self._elsewhere = elsewhere

    def __bool__(self) -> bool:
        return threading.get_ident() in self._inside or bool(self._elsewhere)


def _refusing(inside: Collection[int], routine: Callable[..., Any]) -> Callable[..., Any]:
    """``routine``, which raises in the threads ``inside``; a method, if it stands in a class."""

    def guarded(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() in inside:
            raise Offline("nothing is fetched while a model is built")
        return routine(*arguments, **options)

    return guarded


class CountedTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors that the calling thread makes, and stops it when there are more than a checkpoint of ``tensors`` tensors with
    ``elements`` elements in all can be for. Tensors on meta count as well: their sizes are those of the model.

    ``check`` raises what was raised inside once more, for constructors that catch every error.
    """

    def __init__(self, where: str, tensors: int, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self._tensors = self._most_tensors = _ANY_TENSORS + _MORE_TENSORS * tensors
        self._elements = self._most_elements = _ANY_ELEMENTS + _MORE_ELEMENTS * elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if options.get("device") is not None and torch.device(options["device"]).type != "meta":
            # A constructor may ask for the CPU: what it would take is known on meta, before any memory is.
            unpinned = {"pin_memory": None} if "pin_memory" in options else {}
            self._count(func(*args, **(options | {"device": torch.device("meta")} | unpinned)))
            return func(*args, **options)
        result = func(*args, **options)
        if not any(returned.alias_info for returned in func._schema.returns):
            self._count(result)
        return result

    def _count(self, result: Any) -> None:
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._tensors -= 1
                self._elements -= tensor.numel()
        self.check()

    def check(self) -> None:
        """Raises IncompatibleCheckpointError if too much was made."""
        if min(self._tensors, self._elements) < 0:
            raise IncompatibleCheckpointError(
                f"cannot build {self._where}: a model with the sizes of the checkpoint expected, its config leads to more than "
                f"{self._most_tensors} tensors or {self._most_elements} numbers; nothing was built"
            )
