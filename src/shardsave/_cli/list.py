"""``shardsave list``: the steps of a run, their states, and what the policy keeps and why."""

from __future__ import annotations

import calendar
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from shardsave._cli.output import BAD, DIM, GOOD, TRAINABLE, Cell, Output
from shardsave._cli.paths import CHECKPOINT
from shardsave._common.words import count, human_bytes
from shardsave._runs.no_run import why_no_run
from shardsave._runs.policies import kept
from shardsave._runs.recorded import RecordedPolicy, read_policy
from shardsave._runs.steps import Run, StepInfo

_STYLES = {"committed": GOOD, "saving": TRAINABLE, "corrupt": BAD, "unreadable": BAD, "newer": BAD}


class _Best(click.ParamType[tuple[str, str, int]]):
    """``loss:min:2``."""

    name = "METRIC:min|max:COUNT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str, int]:
        metric, _, rest = str(value).partition(":")
        mode, _, number = rest.partition(":")
        if not metric or mode not in ("min", "max") or not number.isascii() or not number.isdigit() or int(number) < 1:
            self.fail(f"it must be like loss:min:2, not {value}", param, ctx)
        return metric, mode, int(number)


@click.command(
    name="list",
    short_help="Show the steps of a run, and which of them a policy keeps.",
    epilog="""\b
Examples:
  shardsave list run
  shardsave list run --keep-last 2 --keep-best loss:min:1
  shardsave list run --json | jq .latest

Exit codes: 0 done, 1 a step is corrupt or cannot be read, 2 wrong usage, 3 failed (no run).""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--keep-last", type=click.IntRange(1), metavar="COUNT", help="Show what a policy would keep: the last steps.")
@click.option("--keep-every", type=click.IntRange(1), metavar="STEPS", help="The same: one step for each multiple.")
@click.option(
    "--keep-best", type=_Best(), metavar="METRIC:min|max:COUNT", help="The same: the steps with the best values of a metric."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def list_steps(
    context: click.Context,
    directory: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: tuple[str, str, int] | None,
    as_json: bool,
) -> None:
    """Show the steps of the run in DIRECTORY: age, size, metrics, state, and which steps the policy keeps and why.

    The policy is the one that the run's CheckpointManager recorded, or that of the options. Nothing is removed. "new" is the size of
    the files that no earlier step shares, "shared" that of the others: their bytes are on the disk once. Only indexes and names are read.
    """
    steps = Run(directory).steps()
    if not steps:
        raise why_no_run(directory)
    asked = RecordedPolicy(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    policy = asked if asked.keeps() else read_policy(directory)
    reasons = _reasons(steps, policy) if policy is not None else {}
    latest = next((info.step for info in reversed(steps) if info.committed), None)
    if as_json:
        content = {
            "path": directory,
            "latest": latest,
            "policy": policy._asdict() if policy is not None else None,
            "steps": [_as_json(info, reasons) for info in steps],
        }
        click.echo(json.dumps(content))
    else:
        _print(directory, steps, policy, reasons)
    context.exit(1 if any(info.state in ("corrupt", "unreadable", "newer") for info in steps) else 0)


def _reasons(steps: tuple[StepInfo, ...], policy: RecordedPolicy) -> dict[int, tuple[str, ...]]:
    """Why steps stay, as far as it is known without the program's own policy: then only that a step is the latest, or pinned."""
    keeps = policy.keeps()
    return kept(steps, keeps if keeps or policy.own is None else [lambda steps: {}])


def _print(
    directory: str, steps: tuple[StepInfo, ...], policy: RecordedPolicy | None, reasons: Mapping[int, tuple[str, ...]]
) -> None:
    output = Output()
    rows: list[list[Cell]] = []
    now = time.time()
    for info in steps:
        state: Cell = (info.state, _STYLES.get(info.state, DIM))
        metrics = ", ".join(f"{name} {value:g}" for name, value in info.metrics.items())
        age = _age(info.created, now) if info.created else ""
        sizes = [human_bytes(size) if info.committed else "" for size in (info.bytes, info.new_bytes, info.shared_bytes)]
        rows.append([f"{info.step:,}", age, *sizes, metrics, state, _why(info, policy, reasons)])
    output.table(["step", "age", "size", "new", "shared", "metrics", "state", "kept"], rows, numbers=(0, 1, 2, 3, 4))
    output.line()
    total = human_bytes(sum(info.new_bytes for info in steps))
    output.line(f"{directory}: {count(len(steps), 'step')}, {total}, {_described(policy)}")


def _as_json(info: StepInfo, reasons: Mapping[int, tuple[str, ...]]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such a metric is a string."""
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in info.metrics.items()}
    return {**asdict(info), "shared_bytes": info.shared_bytes, "metrics": metrics, "kept": list(reasons.get(info.step, ()))}


def _why(info: StepInfo, policy: RecordedPolicy | None, reasons: Mapping[int, tuple[str, ...]]) -> str:
    if info.problem:
        return info.problem
    if not info.committed or policy is None:
        return "pinned" if info.pinned else ""
    if info.step in reasons:
        return "; ".join(reasons[info.step])
    return "if the program's own policy keeps it" if policy.own is not None else "no, goes after the next save"


def _described(policy: RecordedPolicy | None) -> str:
    if policy is None:
        return "no policy was recorded"
    named = {
        "keep_last": policy.keep_last,
        "keep_every": policy.keep_every,
        "keep_best": policy.keep_best,
        "policy": policy.own,
    }
    words = [f"{name}={value!r}" for name, value in named.items() if value is not None]
    return f"policy: {', '.join(words)}" if words else "policy: every step stays"


def _age(created: str, now: float) -> str:
    """``5 min``, from a time such as ``2026-11-30T05:40:00Z``; "" if it is none."""
    try:
        seconds = max(0.0, now - calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
