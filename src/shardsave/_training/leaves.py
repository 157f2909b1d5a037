"""Plans how each leaf of a training state takes its saved state: what to read, what to check, and what to call then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from shardsave._common.words import an
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._training import schedulers
from shardsave._training.distributed import TAG as BOXES
from shardsave._training.distributed import distributed_in, fill_boxes, has_distributed
from shardsave._training.kinds import class_name, inner
from shardsave._training.modules import plan_module
from shardsave._training.parameter_names import ParameterNames
from shardsave._training.places import Place
from shardsave._training.read_values import UNCHANGED, ValueReader, array_memory
from shardsave._training.restore_optimizers import plan_optimizer
from shardsave._training.rng import check_generator_state, generator_class
from shardsave._training.scalers import wrong_scaler
from shardsave._training.subclasses import TAG as SUBCLASS
from shardsave._training.subclasses import fill_subclass
from shardsave.errors import IncompatibleCheckpointError


class LeafPlanner:
    """Collects what has to be done with the leaves, in order.

    ``checks``: (path, what raises `WrongState`), to be called before anything is changed. ``loads``: (path, what gives an object its
    state). ``differences``: leaves that do not fit and keep their state, in words. ``late_notes``: make more notes, which depend on
    the flags of parameters and so on whether the model has been loaded.
    """

    def __init__(self, reader: ValueReader, names: ParameterNames, device: torch.device | None) -> None:
        self.checks: list[tuple[str, Callable[[], object]]] = []
        self.loads: list[tuple[str, Callable[[], object]]] = []
        self.differences: list[str] = []
        self.left: set[str] = set()
        self.notes: list[str] = []
        self.late_notes: list[Callable[[bool], list[str]]] = []
        self._reader = reader
        self._names = names
        self._device = device
        self._planned: dict[int, tuple[Any, Any, str]] = {}  # id → the object, its saved state, its path
        self._orders: dict[int, schedulers.Order] = {}
        self._objects: list[tuple[Any, Any, str]] = []

    def plan(self, kind: str, live: Any, saved: Any, place: Place) -> None:
        """Plans ``live``, a leaf of ``kind``; ``saved``: what follows its tag."""
        if id(live) in self._planned:
            _, other, path = self._planned[id(live)]
            if other != saved:
                self.differences.append(f"{place.path}: it is also {path}, where another state was saved")
            return
        self._planned[id(live)] = live, saved, place.path
        self._reader.begin_leaf(self._likes(kind, live, saved, place))
        {
            "optimizer": self._optimizer,
            "module": self._module,
            "generator": self._generator,
            "object": self._object,
            "tensor": self._tensor,
            "array": self._array,
            SUBCLASS: self._subclass,
            BOXES: self._boxes,
        }[kind](live, saved, place)

    def _likes(self, kind: str, live: Any, saved: Any, place: Place) -> dict[str, torch.Tensor]:
        """The distributed tensors in the state of ``live``, by path, if it is an object and such tensors were saved."""
        if kind != "object" or self._reader.parts is None or not has_distributed(saved):
            return {}
        try:
            return distributed_in(live.state_dict(), place.in_state().path)
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot resume {place.path}: the state that it has was expected, to make distributed tensors alike, state_dict() raised "
                f"{type(error).__name__}: {' '.join(str(error).split())}; {UNCHANGED}"
            ) from error

    def check_objects(self) -> None:
        """Refuses states that an object would take and could not go on from. Called when everything is planned."""
        for live, state, path in self._objects:
            if difference := schedulers.wrong_state(live, state, self._orders, path) or wrong_scaler(live, state, path):
                self._leave(difference, path)

    def _leave(self, difference: str, path: str) -> None:
        """Lets the leaf at ``path`` keep its state."""
        self.differences.append(difference)
        self.left.add(difference)
        self.loads = [load for load in self.loads if load[0] != path]
        self._objects = [one for one in self._objects if one[2] != path]

    def arrange_schedulers(self, notes: list[str]) -> None:
        """Brings the lists of schedulers into the order that the groups of their optimizers have now."""
        for live, state, path in self._objects:
            notes += schedulers.arrange(live, state, self._orders, path)

    def _optimizer(self, live: Any, saved: Any, place: Place) -> None:
        plan = plan_optimizer(live, saved, self._reader, place, self._names, self._device)
        if plan.difference is not None:
            self.differences.append(plan.difference)
            self.left.add(plan.difference)
            return
        self.notes += plan.notes
        self.late_notes.append(plan.late_notes)
        self._orders[id(inner(live))] = plan.order, plan.saved_groups
        self.loads.append((place.path, plan.load))

    def _module(self, live: Any, saved: Any, place: Place) -> None:
        load, differences, notes = plan_module(live, saved, self._reader, place)
        self.differences += differences
        self.notes += notes
        if load is not None:
            self.loads.append((place.path, load))

    def _object(self, live: Any, saved: Any, place: Place) -> None:
        saved_class, encoded = self._reader.members(saved, place.path, {"class": str, "state": object})
        if saved_class != class_name(live):
            self.differences.append(
                f"{place.path}: the checkpoint has the state of {saved_class:.80}, this is {an(class_name(live))}"
            )
            return
        state = self._reader.value(encoded, place.in_state().path)
        self._objects.append((live, state, place.path))
        self.loads.append((place.path, partial(live.load_state_dict, state)))

    def _generator(self, live: Any, saved: Any, place: Place) -> None:
        saved_class, encoded = self._reader.members(saved, place.path, {"class": str, "state": object})
        if saved_class != generator_class(live):
            self.differences.append(
                f"{place.path}: the checkpoint has the state of {saved_class:.80}, this is {an(generator_class(live))}"
            )
            return
        state = self._reader.value(encoded, place.path)
        self.checks.append((place.path, lambda: check_generator_state(live, state)))
        self.loads.append((place.path, lambda: check_generator_state(live, state)()))

    def _tensor(self, live: torch.Tensor, saved: Any, place: Place) -> None:
        stored = self._reader.stored(saved, place.path)
        dtype, shape = BY_NAME[stored.dtype].torch, torch_shape(stored.dtype, stored.shape)
        if live.dtype != dtype or live.shape != shape:
            self.differences.append(
                f"{place.path}: it is {list(shape)} of {dtype} on disk, {list(live.shape)} of {live.dtype} here".replace(
                    "torch.", ""
                )
            )
            return
        self._reader.fill(saved, live, place.path)

    def _subclass(self, live: torch.Tensor, saved: Any, place: Place) -> None:
        if difference := fill_subclass(live, saved, place.path, self._reader):
            self.differences.append(difference)

    def _boxes(self, live: torch.Tensor, saved: Any, place: Place) -> None:
        if difference := fill_boxes(live, saved, place.path, self._reader):
            self.differences.append(difference)

    def _array(self, live: np.ndarray[Any, Any], saved: Any, place: Place) -> None:
        if live.dtype.kind == "O":
            raise IncompatibleCheckpointError(
                f"cannot resume {place.path}: an array of numbers was expected, its dtype is {live.dtype}; {UNCHANGED}"
            )
        self._tensor(array_memory(place.path, live), saved, place)
