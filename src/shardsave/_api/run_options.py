"""The keywords of `save` and `resume` that a manager hands on: those for all calls, joined with those of one, and checked early.

A wrong keyword is found when the manager is made, or in the first call that has it, also if nothing is saved or resumed then: it must not
show only after hours, or after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from shardsave._api.arguments import pick
from shardsave._api.run_verbs import all_arguments
from shardsave._common.imports import import_at_use
from shardsave._common.words import some

#: The parameters of `save` and of `resume` that a manager passes itself.
_BY_THE_MANAGER = {"source", "directory", "step", "metrics", "training", "path", "model"}

#: Those options of all saves of a manager that are meant for its resumes too.
_OF_BOTH = ("rng", "process_group", "rank_timeout", "phase_timeout", "progress")


class RunOptions:
    """``options``: for all saves of a manager, by `save_async` if it is ``asynchronous``. Raises TypeError or ValueError."""

    def __init__(self, options: Mapping[str, Any], *, asynchronous: bool) -> None:
        self._verb = _save_async() if asynchronous else _save()
        self._asynchronous = asynchronous
        self._known = signature(self._verb).parameters.keys() - _BY_THE_MANAGER
        self._of_all: Mapping[str, Any] = {}
        self.check(options)
        self._of_all = options

    def of_save(self, options: Mapping[str, Any], training: Any = None) -> dict[str, Any]:
        """All keywords of a save with these ``options``, which override those of the manager."""
        return {**self._of_all, **_joined(options, training)}

    def of_resume(self, options: Mapping[str, Any], training: Any) -> dict[str, Any]:
        """All keywords of a resume with these ``options``."""
        return {**{name: self._of_all[name] for name in _OF_BOTH if name in self._of_all}, **_joined(options, training)}

    def check(self, options: Mapping[str, Any]) -> None:
        """Checks the ``options`` of one save, names and values. Raises TypeError or ValueError."""
        unknown = sorted(options.keys() - self._known)
        if unknown:
            raise TypeError(f"keywords of CheckpointManager or of save were expected, not {some(unknown)}")
        if options:
            self._check_values({**self._of_all, **options})

    def error_in(self, options: Mapping[str, Any]) -> TypeError | ValueError | None:
        """What is wrong with the ``options`` of one save."""
        try:
            self.check(options)
        except (TypeError, ValueError) as error:
            return error
        return None

    def error_in_resume(self, options: Mapping[str, Any]) -> TypeError | None:
        """What is wrong with the names of the ``options`` of one resume."""
        unknown = sorted(options.keys() - (signature(_resume()).parameters.keys() - _BY_THE_MANAGER))
        return TypeError(f"keywords of resume were expected, not {some(unknown)}") if unknown else None

    def _check_values(self, options: Mapping[str, Any]) -> None:
        from shardsave._api.process_group import check_group
        from shardsave._api.save import How, check_values
        from shardsave._api.save_contents import What, check_what

        given = all_arguments(self._verb, None, "", options)
        check_what(pick(What, given))
        if given["process_group"] is not None:
            check_group(given["process_group"])
        check_values(pick(How, given))
        if self._asynchronous:
            from shardsave._api.background import InBackground, check_background

            check_background(pick(InBackground, given))


def _joined(options: Mapping[str, Any], training: Any) -> dict[str, Any]:
    return {**options, **({"training": training} if training is not None else {})}


def _save() -> Callable[..., object]:
    import_at_use("shardsave._api.save")
    from shardsave._api.save import save

    return save


def _save_async() -> Callable[..., object]:
    import_at_use("shardsave._api.save_async")
    from shardsave._api.save_async import save_async

    return save_async


def _resume() -> Callable[..., object]:
    import_at_use("shardsave._api.resume")
    from shardsave._api.resume import resume

    return resume
