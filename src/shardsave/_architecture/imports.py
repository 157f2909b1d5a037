"""Imports the classes and functions that a document names, after it is known that they are trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsave._architecture.document import Document
from shardsave._architecture.names import check_name, dotted, import_target, why_no_value
from shardsave._architecture.routines import why_unsafe
from shardsave._architecture.trust import Trust, all_lacking, lacking, lacking_method, refuse, version_in_words
from shardsave._architecture.uses import Use, Uses
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

NOTHING_IMPORTED = "nothing was imported"
NOTHING_BUILT = "nothing was built"


class Imports:
    """The classes and functions of a document by name, and what may be done with each. Refuses with UntrustedCodeError."""

    def __init__(self, targets: Mapping[str, Any], trust: Trust, where: str) -> None:
        self._targets = targets
        self._trust = trust
        self._where = where
        self._names: dict[int, list[str]] = {}
        self._allowed: set[tuple[str, Use]] = set()
        for name, target in targets.items():
            self._names.setdefault(id(target), []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def use(self, name: str, use: Use) -> Any:
        """The class or function ``name``, for this use."""
        target = self._targets[name]
        if (name, use) not in self._allowed:
            if (item := lacking(name, {use}, self._trust, target)) is not None:
                refuse(self._where, [item], self._trust, NOTHING_BUILT)
            self._allowed.add((name, use))
        return target

    def names_of(self, kind: type) -> list[str]:
        """The names in the document that lead to ``kind``."""
        return self._names.get(id(kind), [])

    def use_method(self, kind: type, method: str) -> None:
        """Refuses the method as a value, unless it is trusted for one of the names of its class ``kind``."""
        names = self.names_of(kind)
        if not any(self._trust.method(name, method) for name in names):
            refuse(self._where, [lacking_method(names[0], method)], self._trust, NOTHING_BUILT)


def resolve(document: Document, trust: Trust) -> Imports:
    """Imports what ``document`` names.

    Imports nothing until every name is known to be trusted. Raises UntrustedCodeError, which lists everything that is not trusted, and
    IncompatibleCheckpointError, which lists every name that is missing or must not be built from data.
    """
    where = document.where
    for name in document.imports:
        check_name(name, where)
    uses = Uses(document.imports, document.objects)
    if items := all_lacking(uses, trust):
        refuse(where, items, trust, NOTHING_IMPORTED)
    targets, missing = _import_all(document, trust)
    problems = []
    if missing:
        problems.append(
            f"its classes and functions were expected to be importable, not found: {', '.join(missing)}; "
            f"if one was renamed, pass classes={{'old.Name': NewClass}}"
        )
    unsafe = [f"{dotted(name)} ({danger})" for name, target in targets.items() if (danger := why_unsafe(target))]
    if unsafe:
        problems.append(f"classes that can safely be built from data expected, it asks for {', '.join(unsafe)}")
    imported = {name: target for name, target in targets.items() if dotted(name) not in trust.classes}
    methods = [f"{dotted(name)} ({reason})" for name, target in imported.items() if (reason := why_no_value(name, target))]
    if methods:
        problems.append(f"classes and functions of a module expected, it asks for {', '.join(methods)}")
    if problems:
        raise IncompatibleCheckpointError(f"cannot build {where}: {'; '.join(problems)}; nothing was built")
    if items := all_lacking(uses, trust, targets):
        refuse(where, items, trust, NOTHING_BUILT)
    return Imports(targets, trust, where)


def _import_all(document: Document, trust: Trust) -> tuple[dict[str, Any], list[str]]:
    """Name → class or function, and the names that cannot be imported, each with the reason."""
    targets: dict[str, Any] = {}
    missing: list[str] = []
    for name, version in document.imports.items():
        if dotted(name) in trust.classes:
            targets[name] = trust.classes[dotted(name)]
            continue
        try:
            targets[name] = import_target(name, document.where)
        except CorruptCheckpointError:
            raise
        except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
            saved = f"saved with {version_in_words(version)}" if version else "saved without a version"
            reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
            missing.append(f"{dotted(name)} ({saved}; {reason})")
    return targets, missing
