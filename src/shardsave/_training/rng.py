"""The state of random number generators: of the whole process, and of generator objects. Nothing is drawn from any of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch

from shardsave._training.kinds import GENERATORS
from shardsave._training.places import Place, refuse

#: How many random numbers a generator of numpy keeps, and the keys of the position of the next one in its state. numpy takes any
#: position, and would read beside these numbers.
_POSITIONS = {"MT19937": (624, ("state", "pos")), "Philox": (4, ("buffer_pos",))}


class WrongState(Exception):
    """A generator does not take the state."""


def process_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, and of that of every CUDA device if CUDA is in use."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def check_process_state(state: Any) -> None:
    """Raises WrongState if `set_process_state` could not set ``state``. Changes nothing."""
    if type(state) is not dict or not {"python", "numpy", "torch"} <= state.keys():
        raise WrongState("one of its parts is missing")
    try:
        random.Random().setstate(state["python"])
        own = np.random.get_state(legacy=False)
        assert isinstance(own, dict)
        _check_numpy(state["numpy"], own["bit_generator"])
        np.random.RandomState(getattr(np.random, own["bit_generator"])()).set_state(state["numpy"])
        torch.Generator().set_state(state["torch"])
        for device_state in state.get("cuda", ()):
            if not (isinstance(device_state, torch.Tensor) and device_state.dtype == torch.uint8 and device_state.dim() == 1):
                raise WrongState("that of a CUDA device is no tensor of bytes")
    except WrongState:
        raise
    except Exception as error:  # each library raises others
        raise WrongState(str(error)) from error


def _check_numpy(state: Any, kind: str) -> None:
    """Raises WrongState for the state of another generator of numpy than ``kind``, and for what numpy itself would take unchecked."""
    if type(state) is not dict:
        raise WrongState("numpy's is no dict")
    if state.get("bit_generator") != kind:
        raise WrongState(f"numpy's is a {state.get('bit_generator')}, here it is a {kind}")
    if kind in _POSITIONS:
        most, keys = _POSITIONS[kind]
        position = state
        for key in keys:
            position = position[key]
        if not (isinstance(position, Integral) and 0 <= position <= most):
            raise WrongState(f"the next number of a {kind} must be at 0 to {most}, not at {position!r}")


def set_process_state(state: dict[str, Any]) -> list[str]:
    """Sets what `process_state` returned. Returns notes."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    saved, devices = state.get("cuda", ()), torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, device_state in zip(range(devices), saved):
        torch.cuda.set_rng_state(device_state, device)
    if len(saved) == devices or not saved:
        return []
    return [f"rng: the states of {len(saved)} CUDA devices were saved, {devices} are here"]


def generator_class(generator: Any) -> str:
    return next(name for kind, name in GENERATORS.items() if isinstance(generator, kind))


def generator_state(generator: Any, place: Place) -> Any:
    """The state of a generator object. Raises UnsupportedTrainingError for one that has none, such as `random.SystemRandom`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    try:
        return generator.getstate()
    except NotImplementedError:
        refuse(place, "a generator with a state was", f"{type(generator).__name__} has none")


def check_generator_state(generator: Any, state: Any) -> Callable[[], object]:
    """Returns what sets ``state``. Raises WrongState if ``generator`` could not take it. Changes nothing."""
    try:
        if isinstance(generator, torch.Generator):
            torch.Generator(generator.device).set_state(state)
            return partial(generator.set_state, state)
        if isinstance(generator, np.random.Generator):
            _check_numpy(state, type(generator.bit_generator).__name__)
            type(generator.bit_generator)().state = state
            return partial(setattr, generator.bit_generator, "state", state)
        if isinstance(generator, np.random.RandomState):
            own: Any = generator.get_state(legacy=False)
            _check_numpy(state, own["bit_generator"])
            np.random.RandomState(getattr(np.random, own["bit_generator"])()).set_state(state)
            return partial(generator.set_state, state)
        random.Random().setstate(state)
        return partial(generator.setstate, state)
    except WrongState:
        raise
    except Exception as error:
        raise WrongState(str(error)) from error
