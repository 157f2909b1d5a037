"""``shardsave verify``: compares every byte of a checkpoint with the stored checksums."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from shardsave._cli.output import BAD, DIM, GOOD, Output, wants_bar
from shardsave._cli.paths import CHECKPOINT
from shardsave._common.words import count
from shardsave._printable import printable

if TYPE_CHECKING:
    import shardsave


@click.command(
    short_help="Compare every byte with the stored checksums.",
    epilog="""\b
Examples:
  shardsave verify ckpt
  shardsave verify ckpt --quiet || restore-backup
  shardsave verify ckpt --json | jq .damaged

Exit codes: 0 intact, 1 damaged, 2 wrong usage, 3 failed (for example, no checkpoint).""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--quiet", "-q", is_flag=True, help="Print only what is damaged, and whether there are no checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def verify(context: click.Context, directory: str, quiet: bool, as_json: bool) -> None:
    """Read every byte of a checkpoint and compare it with the stored checksums.

    Continues after damage: names every tensor of DIRECTORY that is damaged, and those that are intact. Third-party files have no
    checksums, so only their lengths and headers are checked.
    """
    import shardsave

    try:
        report = shardsave.verify(directory, keep_going=True, progress=wants_bar() and not quiet)
    except shardsave.CorruptCheckpointError as error:  # the index is damaged, and without it nothing else can be checked
        click.echo(printable(f"shardsave: {error}"), err=True)
        context.exit(1)
    if quiet and report.verified is None and not report.damaged:
        words = "only lengths and headers were checked, no checksums stored"
        click.echo(printable(f"shardsave verify: {directory}: {words}"), err=True)
    if as_json:
        click.echo(json.dumps(_as_json(report)))
    else:
        _print(report, Output(), quiet)
    context.exit(1 if report.damaged else 0)


def _print(report: shardsave.VerifyReport, output: Output, quiet: bool) -> None:
    by_shard: dict[str, list[shardsave.Damage]] = {}
    for damage in report.damaged:
        by_shard.setdefault(damage.shard, []).append(damage)
    for shard in sorted({*report.intact, *by_shard}):
        intact = report.intact.get(shard, ())
        if shard in by_shard:
            _print_damaged(shard, by_shard[shard], intact, output, quiet)
        elif not quiet:
            output.line(
                ("intact   ", GOOD) if report.verified is not None or by_shard else ("unchecked  ", DIM),
                shard,
                f"  {count(len(intact), 'tensor')}" if intact else "",
            )
    if not quiet:
        output.line((str(report), BAD if report.damaged else GOOD if report.verified else DIM))


def _print_damaged(shard: str, damages: list[shardsave.Damage], intact: Collection[str], output: Output, quiet: bool) -> None:
    damaged = sum(len(damage.tensors) for damage in damages)
    output.line(("DAMAGED  ", BAD), f"{shard}  {damaged:,} of {count(damaged + len(intact), 'tensor')} damaged")
    for damage in damages:
        output.line(("         ", ""), damage.message)
        for name in damage.tensors:
            output.line(("         damaged  ", BAD), name)
    for name in intact if not quiet else ():
        output.line(("         intact   ", GOOD), name)


def _as_json(report: shardsave.VerifyReport) -> dict[str, object]:
    return {
        "path": report.path,
        "verified": report.verified,
        "bytes": report.bytes,
        "seconds": report.seconds,
        "damaged": [{"shard": d.shard, "tensors": d.tensors, "message": d.message} for d in report.damaged],
        "intact": report.intact,
    }
