"""Places in a training state: how messages name them, and how the names of stored tensors begin there."""

from __future__ import annotations

import reprlib
from typing import NamedTuple, NoReturn

from shardsave._common.words import an
from shardsave.errors import UnsupportedTrainingError


class Place(NamedTuple):
    """``path``: for messages, such as ``training['parts'][0]``. ``name``: for ``only=`` and ``skip=``, such as ``parts/0``."""

    path: str
    name: str

    def at(self, key: object) -> Place:
        """The place of an item of this one."""
        return Place(f"{self.path}[{reprlib.repr(key)}]", f"{self.name}/{key}" if self.name else str(key))

    def in_state(self) -> Place:
        """The place of what ``state_dict()`` of this one returns."""
        return Place(f"{self.path}.state_dict()", self.name)


ROOT = Place("training", "")
RNG = Place("rng", "rng")


def refuse(place: Place, expected: str, actual: str) -> NoReturn:
    """Raises UnsupportedTrainingError for what cannot be saved at ``place``."""
    raise UnsupportedTrainingError(f"cannot save {place.path}: {expected} expected, {actual}; nothing was written")


def refuse_value(place: Place, value: object) -> NoReturn:
    """Raises UnsupportedTrainingError for ``value``, which is no data."""
    refuse(
        place, "plain data, a tensor or an object with state_dict and load_state_dict was", f"it is {an(type(value).__name__)}"
    )
