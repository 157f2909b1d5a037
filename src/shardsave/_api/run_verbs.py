"""How a manager saves and resumes one step: through the public verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

from shardsave._common.imports import import_at_use

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.reports import SaveReport
    from shardsave._api.resumed import Resumed


#: The parameters of `save` and of `resume` that a manager passes itself.
_BY_THE_MANAGER = {"source", "directory", "step", "metrics", "training", "path", "model"}

#: Those options of all saves of a manager that are meant for its resumes too.
OF_BOTH = ("rng", "process_group", "progress")


class PublicVerbs:
    """`shardsave.save` and `shardsave.resume`, imported at first use."""

    def save_options(self) -> frozenset[str]:
        """The keywords that may be passed to `save` in ``options``."""
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        return frozenset(signature(save).parameters) - _BY_THE_MANAGER

    def save(self, model: Any, path: str, *, step: int, metrics: Mapping[str, float], options: Mapping[str, Any]) -> SaveReport:
        import_at_use("shardsave._api.save")
        from shardsave._api.save import save

        return save(model, path, step=step, metrics=metrics, **options)

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
