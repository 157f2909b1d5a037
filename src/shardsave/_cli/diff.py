"""``shardsave diff``: the differences between two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from shardsave._cli.output import BAD, DIM, FROZEN, GOOD, TRAINABLE, Cell, Output, wants_bar
from shardsave._cli.paths import CHECKPOINT
from shardsave._common.words import count

if TYPE_CHECKING:
    import shardsave

#: How many values of a training state that differ are named.
_MOST_VALUES = 24


@click.command(
    short_help="Show the differences between two checkpoints.",
    epilog="""\b
Examples:
  shardsave diff ckpt-1000 ckpt-2000
  shardsave diff ckpt model.safetensors --json | jq '.changed | keys'

Exit codes: 0 equal, or only metadata differs, 1 different, 2 wrong usage, 3 failed.""",
)
@click.argument("a", type=CHECKPOINT)
@click.argument("b", type=CHECKPOINT)
@click.option("--json", "as_json", is_flag=True, help="Print all names and numbers as JSON.")
@click.pass_context
def diff(context: click.Context, a: str, b: str, as_json: bool) -> None:
    """Show the differences between the checkpoints A and B.

    Tensors with equal checksums are equal and are not read. For a changed tensor the largest absolute difference is shown, and the
    largest relative difference, |a - b| / max(|a|, |b|); "NaN" counts values that are NaN on one side only.
    """
    import shardsave

    report = shardsave.diff(a, b, progress=wants_bar())
    if as_json:
        click.echo(json.dumps(_as_json(report)))
    else:
        _print(report, Output())
    context.exit(0 if report.same else 1)


def _print(report: shardsave.DiffReport, output: Output) -> None:
    _print_tensors(report, output, "changed")
    for name, (before, after) in (report.flags or {}).items():
        output.line(("* ", FROZEN), f"{name}: {_flag(before)} → {_flag(after)}")
    for name, ties in report.ties.items():
        output.line(
            ("= ", TRAINABLE), f"{name}: {' → '.join(f'shares {tie}' if tie is not None else 'its own' for tie in ties)}"
        )
    for key, values in report.metadata.items():
        old, new = ("nothing" if value is None else _short(json.dumps(value, ensure_ascii=False)) for value in values)
        output.line(("metadata ", DIM), f"{key}: {old} → {new}")
    if report.training is not None:
        _print_tensors(report.training, output, "changed in the training state")
        places = report.training.values
        for place in places[:_MOST_VALUES]:
            output.line(("~ ", TRAINABLE), place)
        if len(places) > _MOST_VALUES:
            output.line((f"… {count(len(places) - _MOST_VALUES, 'more value')} of the training state; --json has all", DIM))
    output.line((str(report), GOOD if report.same else DIM))


def _print_tensors(report: shardsave.DiffReport | shardsave.TrainingDiff, output: Output, title: str) -> None:
    if report.changed:
        rows = [[("~", TRAINABLE), name, *_figures(change)] for name, change in report.changed.items()]
        titles = ["", title, "shape", "dtype", "differing", "max |a-b|", "max relative", "NaN"]
        output.table(titles, rows, numbers=(4, 5, 6, 7))
    for sign, style, names in (("+", GOOD, report.added), ("-", BAD, report.removed)):
        for name in names:
            output.line((f"{sign} ", style), name)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _flag(frozen: bool | None) -> str:
    return {True: "frozen", False: "trainable", None: "no parameter"}[frozen]


def _figures(change: shardsave.TensorChange) -> Iterable[Cell]:
    yield _both("×".join(map(str, shape)) or "scalar" for shape in change.shape)
    yield _both(str(dtype).removeprefix("torch.") for dtype in change.dtype)
    if change.elements is None:
        yield from ("", "", "", "")
    else:
        yield f"{change.elements:,}"
        yield from (f"{figure:.3g}" for figure in (change.max_absolute or 0.0, change.max_relative or 0.0))
        yield f"{change.nans:,}" if change.nans else ""


def _both(words: Iterable[str]) -> str:
    before, after = words
    return before if before == after else f"{before} → {after}"


def _as_json(report: shardsave.DiffReport) -> dict[str, object]:
    return {
        "a": report.a,
        "b": report.b,
        "same": report.same,
        **_tensors_as_json(report),
        "flags": report.flags,
        "ties": report.ties,
        "metadata": report.metadata,
        "training": _tensors_as_json(report.training) | {"values": report.training.values}
        if report.training is not None
        else None,
        "only_training": report.only_training,
        "shared": list(report.shared),
        "bytes": report.bytes,
        "seconds": report.seconds,
    }


def _tensors_as_json(report: shardsave.DiffReport | shardsave.TrainingDiff) -> dict[str, object]:
    return {
        "equal": report.equal,
        "changed": {
            name: {
                "dtype": [str(dtype).removeprefix("torch.") for dtype in change.dtype],
                "shape": change.shape,
                "elements": change.elements,
                "nans": change.nans,
                "max_absolute": _number(change.max_absolute),
                "max_relative": _number(change.max_relative),
            }
            for name, change in report.changed.items()
        },
        "added": report.added,
        "removed": report.removed,
    }


def _number(figure: float | None) -> float | str | None:
    """``figure`` for JSON, which has no infinity."""
    return str(figure) if figure == float("inf") else figure
