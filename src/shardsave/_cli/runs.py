"""Commands that are given a run take its latest step, and say so."""

from __future__ import annotations

import os

import click

from shardsave._common.words import count
from shardsave._format.file_names import INDEX_NAME, LONE_NAME
from shardsave._runs.steps import Run


def latest_of_run(command: str, directory: str, others: tuple[str, ...] = ()) -> str:
    """The path of the latest step, if ``directory`` is a run and no checkpoint; otherwise ``directory``.

    ``others``: endings of files that make it something else to this ``command``.
    """
    if not os.path.isdir(directory) or any(os.path.lexists(os.path.join(directory, name)) for name in (INDEX_NAME, LONE_NAME)):
        return directory
    run = Run(directory)
    latest = next((info for info in run.newest_first() if info.committed), None)
    if latest is None or (others and any(name.endswith(others) for name in os.listdir(directory))):
        return directory
    total = count(len(run.numbers()), "step")
    click.echo(f"shardsave {command}: {directory} has {total}, this is the latest: {latest.path}", err=True)
    return latest.path
