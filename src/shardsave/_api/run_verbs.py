"""How a manager saves and resumes one step: through the public verbs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from shardsave._common.imports import import_at_use
from shardsave._runs.index_members import members

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.reports import SaveReport


class Resumed(NamedTuple):
    """What a resume found: the step that was finished when it was saved, the one to go on with, values, and notes."""

    step: int
    next_step: int
    values: Mapping[str, Any]
    notes: tuple[str, ...]


class RunVerbs(Protocol):
    """The two verbs that a manager calls."""

    def save(
        self, model: Any, path: str, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]
    ) -> SaveReport: ...

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed: ...


class PublicVerbs:
    """`shardsave.save` and `shardsave.load_model`."""

    def save(self, model: Any, path: str, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]) -> SaveReport:
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        noted = members(step, metrics, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        return save(model, path, **{**options, "metadata": {**(options.get("metadata") or {}), **noted}})

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed:
        import_at_use("shardsave._api.load")
        from shardsave._api.load import load_model

        report = load_model(model, path, **options)
        return Resumed(step, step + 1, {}, report.notes)
