"""How a manager saves and resumes one step: as the public verbs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

from shardsave._api.arguments import pick
from shardsave._common.imports import import_at_use

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.background import Around
    from shardsave._api.pending_save import PendingSave
    from shardsave._api.reports import SaveReport
    from shardsave._api.resumed import Resumed
    from shardsave._api.save import How


class PublicVerbs:
    """`shardsave.save`, `save_async` and `resume`, imported at first use."""

    def save(
        self,
        model: Any,
        path: str,
        before: Callable[[How], How],
        *,
        step: int,
        metrics: Mapping[str, float],
        options: Mapping[str, Any],
    ) -> SaveReport:
        """As `shardsave.save`, which does not know ``before``: it is called where this process leads, and returns how to save."""
        import_at_use("shardsave._api.save")
        from shardsave._api.save import How, save, save_now
        from shardsave._api.save_contents import What

        given = all_arguments(save, model, path, {"step": step, "metrics": metrics, **options})
        return save_now(model, path, pick(What, given), pick(How, given), before)

    def save_async(
        self, model: Any, path: str, around: Around, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]
    ) -> PendingSave:
        """As `shardsave.save_async`, which does not know ``around``."""
        from shardsave._api.background import InBackground, start
        from shardsave._api.save import How
        from shardsave._api.save_async import save_async
        from shardsave._api.save_contents import What

        given = all_arguments(save_async, model, path, {"step": step, "metrics": metrics, **options})
        return start(model, path, pick(What, given), pick(How, given), pick(InBackground, given), around)

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed:
        import_at_use("shardsave._api.resume")
        from shardsave._api.resume import resume

        resumed = resume(path, model, **options)
        return resumed if resumed.step is not None else replace(resumed, step=step)


def all_arguments(function: Callable[..., object], model: Any, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `save` or `save_async`, with the defaults of those that are not in ``options``."""
    bound = signature(function).bind(model, path, **options)
    bound.apply_defaults()
    return bound.arguments
