"""``shardsave clean``: shows what crashed saves left behind, and removes it on request."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from shardsave._cli.output import DIM, GOOD, TRAINABLE, Cell, Output
from shardsave._cli.paths import CHECKPOINT
from shardsave._common.words import count, human_bytes

if TYPE_CHECKING:
    import shardsave

#: How many seconds to wait for a running save; the user can then decide to wait longer.
_PATIENCE = 5.0


@click.command(
    short_help="Show and remove files that crashed saves left behind.",
    epilog="""\b
Examples:
  shardsave clean ckpt
  shardsave clean ckpt --yes
  shardsave clean ckpt --dry-run && echo tidy
  shardsave clean ckpt --json | jq .found

Exit codes: 0 nothing is left, 1 something is left or a step could not be cleaned,
2 wrong usage, 3 failed (a save is running, or the index cannot be read).""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--yes", "-y", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", "-n", is_flag=True, help="Only show.")
@click.option(
    "--other-hosts", is_flag=True, help="Also remove what saves on other hosts left. Make sure that no save is running there."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON; removes only with --yes.")
@click.pass_context
def clean(context: click.Context, directory: str, yes: bool, dry_run: bool, other_hosts: bool, as_json: bool) -> None:
    """Remove files that crashed saves left in DIRECTORY, after showing them.

    The checkpoint stays as it is, and so do files that no save wrote. Files from another host are only shown, because this host
    cannot know whether that save is still running.
    """
    import shardsave

    output = Output()
    report = shardsave.clean(directory, remove=False, lock_timeout=_PATIENCE)
    chosen = [leaving for leaving in report.found if leaving.ours and (leaving.dead or other_hosts)]
    if not as_json:
        _print(report, chosen, output)
    if chosen and not dry_run and (yes or (not as_json and _agreed(chosen))):
        report = shardsave.clean(directory, other_hosts=other_hosts, lock_timeout=_PATIENCE)
        if not as_json:
            output.line((str(report), GOOD if not (report.left or report.refused) else TRAINABLE))
    if as_json:
        click.echo(json.dumps(asdict(report)))
    context.exit(1 if report.left or report.refused else 0)


def _print(report: shardsave.CleanReport, chosen: list[shardsave.Leaving], output: Output) -> None:
    for problem in report.refused:
        output.line((problem, TRAINABLE))
    if not report.found:
        output.line((str(report).splitlines()[-1], GOOD))
        return
    rows: list[list[Cell]] = []
    for leaving in report.found:
        owner: Cell = "dead" if leaving.dead else ("another host" if leaving.ours else "another user", TRAINABLE)
        rows.append([leaving.name, count(len(leaving.files), "file"), human_bytes(leaving.bytes), owner])
    output.table(["left behind", "files", "size", "owner"], rows, numbers=(1, 2))
    for leaving in report.found:
        for name in leaving.files:
            output.line(("  " + name, DIM))
    if any(leaving.ours and leaving not in chosen for leaving in report.found):
        output.line("files from another host are only removed with --other-hosts; make sure that no save is running there")
    if not all(leaving.ours for leaving in report.found):
        output.line("everybody may write to this directory: what another user may have made or changed is never removed")


def _agreed(chosen: list[shardsave.Leaving]) -> bool:
    size = sum(leaving.bytes for leaving in chosen)
    question = f"Remove {count(len(chosen), 'leaving')}{f', {human_bytes(size)}' if size else ''}?"
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # stdin is not a terminal, or it was closed
        click.echo(err=True)
        return False
