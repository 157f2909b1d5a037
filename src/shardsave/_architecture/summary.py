"""Lists what a document asks for, so that a person can decide whether to trust it. Imports nothing of it."""

from __future__ import annotations

from typing import NamedTuple

from shardsave._architecture.document import Document
from shardsave._architecture.names import dotted
from shardsave._architecture.trust import Lacking, Trust, all_lacking
from shardsave._architecture.uses import Uses


class Asked(NamedTuple):
    """A class, function or method that a document names.

    ``uses``: what for, in words. ``version``: the package that it was saved with. ``lacking``: what a build needs to be trusted for it.
    """

    name: str
    uses: tuple[str, ...]
    version: str | None
    lacking: Lacking | None


def summarize(document: Document) -> list[Asked]:
    """Everything that ``document`` names, methods last."""
    uses = Uses(document.imports, document.objects)
    lacking = {item.name: item for item in all_lacking(uses, Trust())}
    names = [
        Asked(
            dotted(name),
            tuple(use.value for use in sorted(of_name, key=lambda use: use.value)),
            document.imports[name],
            lacking.get(dotted(name)),
        )
        for name, of_name in uses.names.items()
    ]
    methods = [(f"{dotted(kind)}.{method}", document.imports[kind]) for kind, method in uses.methods]
    return [
        *names,
        *(Asked(name, ("a method that the model can call",), version, lacking.get(name)) for name, version in methods),
    ]
