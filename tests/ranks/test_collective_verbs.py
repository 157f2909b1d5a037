"""Which verbs are collective: the table in docs/ranks.md, and the docstring of each verb."""

from __future__ import annotations

import re

import shardsave
from support import ROOT

VERBS = sorted(name for name in shardsave.__all__ if name[0].islower())


def table() -> dict[str, tuple[str, str]]:
    """Verb → when it is collective without and with a group, as the document says it."""
    section = (ROOT / "docs" / "ranks.md").read_text().split("## Which calls are collective")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {
        verb: (without.strip(), given.strip())
        for verbs, without, given in rows
        if "CheckpointManager" not in verbs
        for verb in re.findall("`([a-z_]+)`", verbs)
    }


def test_the_table_names_every_verb() -> None:
    """Catches a verb that the table leaves out, or a name in it that is no verb."""
    assert sorted(table()) == VERBS


def test_docstrings_say_what_the_table_says() -> None:
    """Catches a docstring that does not say whether the call waits for other ranks, or says something else than the table."""
    for verb, (without, given) in table().items():
        text = " ".join((getattr(shardsave, verb).__doc__ or "").split())
        if given == "not offered":
            assert "Never collective: a rank that calls it waits for no other." in text, verb
            continue
        _, _, section = text.partition(" Collective: ")
        assert "With a ``process_group``" in section or "Only with a ``process_group``" in section, verb
        assert ("DTensor" in section) == ("DTensor" in without), verb
    assert " Collective: " in " ".join((shardsave.CheckpointManager.__doc__ or "").split())
