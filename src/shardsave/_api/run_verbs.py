"""How a manager saves and resumes one step: through the public verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

from shardsave._common.imports import import_at_use

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.reports import SaveReport


#: The parameters of `save` that a manager passes itself.
_BY_THE_MANAGER = {"source", "directory", "step", "metrics", "training"}


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on: the ``step`` that was saved, ``values`` of the training state, and notes."""

    step: int
    values: Any
    notes: tuple[str, ...] = ()

    @property
    def next_step(self) -> int:
        """The first step that has not been saved."""
        return self.step + 1


class RunVerbs(Protocol):
    """The two verbs that a manager calls."""

    def save_options(self) -> frozenset[str]:
        """The keywords that may be passed to `save` in ``options``."""

    def save(
        self, model: Any, path: str, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]
    ) -> SaveReport: ...

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed: ...


class PublicVerbs:
    """`shardsave.save` and `shardsave.load_model`."""

    def save_options(self) -> frozenset[str]:
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        return frozenset(signature(save).parameters) - _BY_THE_MANAGER

    def save(self, model: Any, path: str, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]) -> SaveReport:
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        return save(model, path, step=step, metrics=metrics, **options)

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed:
        import_at_use("shardsave._api.load")
        from shardsave._api.load import load_model

        report = load_model(model, path, **options)
        return Resumed(step, {}, report.notes)
