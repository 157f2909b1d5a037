"""``shardsave clean``: what crashed saves left, shown, and removed when that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shardsave._cli.output import DIM, GOOD, TRAINABLE, Cell, Output
from shardsave._cli.paths import CHECKPOINT
from shardsave._common.words import count, human_bytes

if TYPE_CHECKING:
    import shardsave

#: How long a save that is at work is waited for, in seconds: a person does that better.
_PATIENCE = 5.0


@click.command(
    short_help="Remove what crashed saves left, after showing it.",
    epilog="""\b
Examples:
  shardsave clean ckpt
  shardsave clean ckpt --yes
  shardsave clean ckpt --dry-run && echo tidy

Exit codes: 0 nothing is left, 1 something is, 2 wrong usage, 3 failed (a save at work, or an index that cannot be read).""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--yes", "-y", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", "-n", is_flag=True, help="Show only.")
@click.option(
    "--other-hosts", is_flag=True, help="Remove also what saves of other hosts left. Make sure that none is at work there."
)
@click.pass_context
def clean(context: click.Context, directory: str, yes: bool, dry_run: bool, other_hosts: bool) -> None:
    """Remove what crashed saves left in DIRECTORY, after showing it.

    The checkpoint, and files that no save wrote, stay as they are. What another host left is only shown, since nobody here can
    know whether that save is still at work.
    """
    import shardsave

    output = Output()
    report = shardsave.clean(directory, remove=False, lock_timeout=_PATIENCE)
    chosen = [leaving for leaving in report.found if leaving.dead or other_hosts]
    _print(report, chosen, output)
    if chosen and not dry_run and (yes or _agreed(chosen)):
        report = shardsave.clean(directory, other_hosts=other_hosts, lock_timeout=_PATIENCE)
        output.line((str(report), GOOD if not report.left else TRAINABLE))
    context.exit(1 if report.left else 0)


def _print(report: shardsave.CleanReport, chosen: list[shardsave.Leaving], output: Output) -> None:
    if not report.found:
        output.line((str(report), GOOD))
        return
    rows: list[list[Cell]] = []
    for leaving in report.found:
        whose = "dead" if leaving.dead else ("of another host", TRAINABLE)
        rows.append([leaving.name, count(len(leaving.files), "file"), human_bytes(leaving.bytes), whose])
    output.table(["left behind", "files", "size", "owner"], rows, numbers=(1, 2))
    for leaving in report.found:
        for name in leaving.files:
            output.line(("  " + name, DIM))
    if len(chosen) < len(report.found):
        output.line("of another host: only removed with --other-hosts; make sure that no save is at work there")


def _agreed(chosen: list[shardsave.Leaving]) -> bool:
    question = f"Remove {count(len(chosen), 'leaving')}, {human_bytes(sum(leaving.bytes for leaving in chosen))}?"
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # nobody is there to answer
        click.echo(err=True)
        return False
