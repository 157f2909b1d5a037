"""What the report of a save says about files that it removed, replaced, or had to leave."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping

from shardsave._common.words import count, human_bytes, some
from shardsave._format.file_names import INDEX_NAME, LONE_NAME
from shardsave._storage.cleanup import Cleaner


def cleaning_notes(path: str, cleaner: Cleaner, replaced_links: Iterable[str], finished: Iterable[str]) -> list[str]:
    """Notes on the cleaning of the directory ``path`` after a commit.

    ``replaced_links``: symbolic links that the commit replaced. ``finished``: companions of a dead saver that were put in place.
    """
    notes = [f"{name} of an interrupted save was put in place first" for name in finished]
    links = sorted({*replaced_links, *cleaner.links})
    if links:
        notes.append(f"symbolic links were removed or replaced, not what they led to: {some(links)}")
    notes += strangers_notes(cleaner.strangers)
    if cleaner.doubtful:
        size = human_bytes(sum(cleaner.doubtful.values()))
        notes.append(f"what other users of this directory may have changed or named stays ({size}): {some(cleaner.doubtful)}")
    if cleaner.foreign:
        notes.append(
            f"{count(len(cleaner.foreign), 'leaving')} of saves on other hosts, which may still be at work, stay: {some(cleaner.foreign)} "
            f"(when they have ended: shardsave clean {shlex.quote(path)} --other-hosts)"
        )
    return notes


def strangers_notes(strangers: Mapping[str, int]) -> list[str]:
    """A note, if there is anything, on what belongs to other users (name → bytes on disk) and was not removed."""
    if not strangers:
        return []
    size = human_bytes(sum(strangers.values()))
    return [f"what belongs to other users of this directory, to which everybody may write, stays ({size}): {some(strangers)}"]


def cleaning_warnings(path: str, cleaner: Cleaner) -> list[str]:
    """What the caller must not overlook of the cleaning of the directory ``path`` after a commit."""
    warnings = [_lone_stays(path)] if cleaner.lone_stays else []
    if cleaner.ranks_stay:
        warnings.append(_ranks_stay(path, cleaner.ranks_stay))
    if cleaner.adapter_stays:
        warnings.append(_adapter_stays(path, cleaner.adapter_stays))
    return warnings


def _lone_stays(path: str) -> str:
    """The replaced lone file is still there, and other libraries prefer it to an index."""
    return (
        f"{LONE_NAME} is still in {path}: transformers and other libraries will read that file, and not the weights that were just "
        f"saved, until it is removed"
    )


def _ranks_stay(path: str, names: Iterable[str]) -> str:
    """Files of several ranks lie beside the new checkpoint, so that no reader knows which of the two is meant."""
    return (
        f"files of several ranks are still in {path}: {some(names)}; until they are removed, the checkpoint that was just saved can "
        f"only be loaded by the path of its {INDEX_NAME}"
    )


def _adapter_stays(path: str, names: Collection[str]) -> str:
    """The files ``names`` of an adapter that another tool saved lie beside the new checkpoint."""
    subject, belongs = ("they are", "stay") if len(names) > 1 else ("it is", "stays")
    return (
        f"{' and '.join(names)} {belongs} in {path}, though {subject} not of this save: from_pretrained adds that adapter to what it "
        f"reads there; remove the adapter if it does not belong to these weights"
    )
