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


#: The parameters of `save` and of `resume` that a manager passes itself.
_BY_THE_MANAGER = {"source", "directory", "step", "metrics", "training", "path", "model"}

#: Those options of all saves of a manager that are meant for its resumes too.
OF_BOTH = ("rng", "process_group", "rank_timeout", "phase_timeout", "progress")


class PublicVerbs:
    """`shardsave.save`, `save_async` and `resume`, imported at first use."""

    def save_options(self, *, asynchronous: bool) -> frozenset[str]:
        """The keywords that may be passed to `save`, or to `save_async`, in ``options``."""
        if asynchronous:
            import_at_use("shardsave._api.save_async")
            from shardsave._api.save_async import save_async

            return frozenset(signature(save_async).parameters) - _BY_THE_MANAGER
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        return frozenset(signature(save).parameters) - _BY_THE_MANAGER

    def check(self, options: Mapping[str, Any], *, asynchronous: bool) -> None:
        """Checks the values of ``options``, keywords of `save` or `save_async`. Raises TypeError or ValueError."""
        from shardsave._api.process_group import check_group
        from shardsave._api.save import How, check_values, save
        from shardsave._api.save_contents import What, check_what

        function: Callable[..., object] = save
        if asynchronous:
            from shardsave._api.save_async import save_async

            function = save_async
        given = _all_arguments(function, None, "", options)
        check_what(pick(What, given))
        if given["process_group"] is not None:
            check_group(given["process_group"])
        check_values(pick(How, given))
        if asynchronous:
            from shardsave._api.background import InBackground, check_background

            check_background(pick(InBackground, given))

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

        given = _all_arguments(save, model, path, {"step": step, "metrics": metrics, **options})
        return save_now(model, path, pick(What, given), pick(How, given), before)

    def save_async(
        self, model: Any, path: str, around: Around, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]
    ) -> PendingSave:
        """As `shardsave.save_async`, which does not know ``around``."""
        from shardsave._api.background import InBackground, start
        from shardsave._api.save import How
        from shardsave._api.save_async import save_async
        from shardsave._api.save_contents import What

        given = _all_arguments(save_async, model, path, {"step": step, "metrics": metrics, **options})
        return start(model, path, pick(What, given), pick(How, given), pick(InBackground, given), around)

    def resume_options(self) -> frozenset[str]:
        """The keywords that may be passed to `resume` in ``options``."""
        import_at_use("shardsave._api.resume")
        from shardsave._api.resume import resume

        return frozenset(signature(resume).parameters) - _BY_THE_MANAGER

    def resume(self, path: str, model: nn.Module, *, step: int, options: Mapping[str, Any]) -> Resumed:
        import_at_use("shardsave._api.resume")
        from shardsave._api.resume import resume

        resumed = resume(path, model, **options)
        return resumed if resumed.step is not None else replace(resumed, step=step)


def _all_arguments(function: Callable[..., object], model: Any, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `save` or `save_async`, with the defaults of those that are not in ``options``."""
    bound = signature(function).bind(model, path, **options)
    bound.apply_defaults()
    return bound.arguments
