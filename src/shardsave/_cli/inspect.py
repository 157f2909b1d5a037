"""``shardsave inspect``: the contents of a checkpoint, from its index and headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fnmatch import translate
from itertools import islice
from re import compile as compile_pattern
from typing import TYPE_CHECKING, Any

import click

from shardsave._api.findings import counted_once, moment_words
from shardsave._cli.output import DIM, FROZEN, TRAINABLE, Cell, Output
from shardsave._cli.paths import CHECKPOINT
from shardsave._cli.runs import latest_of_run
from shardsave._cli.tree import Sums, guides, module_tree, rows
from shardsave._common.gc_pause import gc_paused
from shardsave._common.words import build_arguments, count, human_bytes
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._format.index import Moment, encode_number
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.open_checkpoint import open_checkpoint

if TYPE_CHECKING:
    from shardsave._api.findings import ArchitectureInfo

#: How many modules, shards and ties are shown without ``--all``.
_MOST = 24

_KINDS: dict[bool | None, Cell] = {True: ("frozen", FROZEN), False: ("trainable", TRAINABLE), None: ("buffer", DIM)}


@click.command(
    short_help="Show modules, sizes, dtypes, freeze flags, ties and shards.",
    epilog="""\b
Examples:
  shardsave inspect ckpt
  shardsave inspect ckpt --depth 4 --all
  shardsave inspect ckpt --tensors 'encoder.*.weight'
  shardsave inspect ckpt --json | jq .shards
  shardsave inspect ckpt --architecture

Exit codes: 0 done, 1 no tensor matches or no architecture, 2 wrong usage, 3 failed.""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--depth", type=click.IntRange(0, 100), default=2, show_default=True, help="Levels of modules to show.")
@click.option(
    "--all", "everything", is_flag=True, help=f"Show every module, shard and tie, not only the first {_MOST} of each."
)
@click.option("--tensors", "pattern", metavar="PATTERN", help="List the tensors whose names match (*, ?, [abc]).")
@click.option(
    "--architecture", is_flag=True, help="List what build_model would import and use, and what it needs to be trusted."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, with all tensors (or all that match).")
@click.pass_context
def inspect(
    context: click.Context,
    directory: str,
    depth: int,
    everything: bool,
    pattern: str | None,
    architecture: bool,
    as_json: bool,
) -> None:
    """Show the contents of a checkpoint: modules, sizes, dtypes, frozen parameters, ties and shards.

    Reads the index and the headers of DIRECTORY, but no tensor data. A bar shows which share of a module's parameters is frozen, in
    bytes. With --architecture, nothing that the architecture names is imported. If DIRECTORY is a run, its latest step is shown.
    """
    directory = latest_of_run("inspect", directory)
    asked: ArchitectureInfo | None = None
    with gc_paused(), open_checkpoint(directory, parts=["architecture"] if architecture else []) as checkpoint:
        names = _names(checkpoint, pattern)
        if architecture:
            from shardsave._api.inspect import architecture_info  # imports torch

            asked = architecture_info(checkpoint)
            if asked is None:
                click.echo(f"shardsave inspect: {directory}: the checkpoint has no architecture", err=True)
        if as_json:
            content = _as_json(directory, checkpoint, names) | (
                {"architecture": asked and asdict(asked)} if architecture else {}
            )
            click.echo(json.dumps(content, ensure_ascii=True))
        else:
            if asked is not None:
                _print_architecture(asked)
            if asked is not None and names and pattern is not None:
                click.echo()
            if pattern is not None:
                _print_matches(directory, checkpoint, names, pattern)
            elif not architecture:
                _print_tree(directory, checkpoint, depth, None if everything else _MOST)
        for note in checkpoint.notes():
            click.echo(f"shardsave inspect: {directory}: {note}", err=True)
    context.exit(1 if (pattern is not None and not names) or (architecture and asked is None) else 0)


def _names(checkpoint: Checkpoint, pattern: str | None) -> dict[str, str]:
    """Each name that matches → the name under which its bytes are stored."""
    known = {name: name for name in checkpoint.stored_names} | dict(checkpoint.ties)
    if pattern is None:
        return known
    matches: Callable[[str], object] = compile_pattern(translate(pattern)).match
    return {name: stored for name, stored in known.items() if matches(name)}


def _print_tree(directory: str, checkpoint: Checkpoint, depth: int, most: int | None) -> None:
    output = Output()
    root = module_tree(checkpoint, depth)
    output.line(_headline(directory, checkpoint, root.sums))
    if words := moment_words(checkpoint.moment):
        output.line(words)
    lines: list[list[Cell]] = [["(all)", *_figures(root.sums, output)]]
    for row in rows(root, most):
        lines.append([guides(row, output.terminal) + row.name, *_figures(row.sums, output)])
    output.line()
    output.table(["module", "tensors", "size", "dtypes", "frozen", ""], lines, numbers=(1, 2, 5))
    output.line()
    shards = _shard_sums(checkpoint)
    shown = [[shard, *_figures(sums, output)] for shard, sums in _first(shards.items(), most)]
    output.table(["shard", "tensors", "size", "dtypes", "frozen", ""], shown, numbers=(1, 2, 5))
    _more(output, len(shards), most, "shard")
    if parts := _parts(checkpoint):
        output.line()
        lines = [[role, part["file"], human_bytes(part["bytes"])] for role, part in parts.items()]
        output.table(["beside the weights", "file", "size"], lines, numbers=(2,))
    if checkpoint.ties:
        output.line()
        output.table(["tied name", "shares the bytes of"], _first(checkpoint.ties.items(), most))
        _more(output, len(checkpoint.ties), most, "tied name")
    if checkpoint.metadata:
        output.line()
        output.line(("metadata  ", DIM), json.dumps(checkpoint.metadata, ensure_ascii=False))


def _headline(directory: str, checkpoint: Checkpoint, sums: Sums) -> str:
    words = [
        f"{directory}: {human_bytes(sums.bytes)}",
        f"{count(sums.tensors, 'tensor')} in {count(len(checkpoint.shards), 'shard')}",
    ]
    if checkpoint.ties:
        words.append(f"{len(checkpoint.ties):,} tied")
    flags = checkpoint.flags
    names = counted_once(flags or (), checkpoint.ties)
    words.append(
        "freeze flags unknown"
        if flags is None
        else f"{sum(map(flags.__getitem__, names)):,} of {count(len(names), 'parameter')} frozen"
    )
    if checkpoint.record is not None:
        words.append("durable" if checkpoint.record.durable else "not durable")
        if checkpoint.record.shared:
            words.append(f"{count(len(checkpoint.record.shared), 'shard')} taken over from an earlier checkpoint")
    return ", ".join(words)


def _figures(sums: Sums, output: Output) -> list[Cell]:
    dtypes = [BY_NAME[dtype].torch_name for dtype, _ in sums.dtypes.most_common()]
    tied = [f"{sums.tied:,} tied"] if sums.tied else []
    return [f"{sums.tensors:,}", human_bytes(sums.bytes), ", ".join([*dtypes, *tied]), *output.bar(sums.frozen_share)]


def _shard_sums(checkpoint: Checkpoint) -> dict[str, Sums]:
    flags = checkpoint.stored_flags or {}
    sums = {shard: Sums() for shard in checkpoint.shards}
    for name, tensor in checkpoint.tensors.items():
        for place in tensor.places:
            sums[place.shard].add(place, flags.get(name))
    return sums


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    return {role: {"file": part.file, "bytes": checkpoint.part_bytes(part)} for role, part in checkpoint.parts.items()}


def _moment(moment: Moment) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such metrics are strings."""
    return moment._asdict() | {"metrics": {name: encode_number(value) for name, value in moment.metrics.items()}}


def _first(items: Iterable[Any], most: int | None) -> list[Any]:
    return list(islice(items, most))


def _more(output: Output, total: int, most: int | None, noun: str) -> None:
    if most is not None and total > most:
        output.line((f"… {count(total - most, f'more {noun}')}; --all shows every one", DIM))


def _print_architecture(asked: ArchitectureInfo) -> None:
    output = Output()
    lines = [
        [
            name,
            ", ".join(uses),
            asked.versions[name] or "",
            "classes=" if name in asked.script_classes else asked.needs.get(name, ""),
        ]
        for name, uses in asked.uses.items()
    ]
    output.table(["name", "used as", "saved with", "needs trust in"], lines)
    if asked.trust or asked.script_classes:
        output.line()
        output.line(f"build with {build_arguments(asked.trust, asked.script_classes)}")
        output.line("A class whose own code would run needs its exact name too; build_model names each.")


def _print_matches(directory: str, checkpoint: Checkpoint, names: dict[str, str], pattern: str) -> None:
    if names:
        _print_tensors(checkpoint, names)
    else:
        click.echo(f"shardsave inspect: {directory}: no name matches {pattern!r}", err=True)


def _print_tensors(checkpoint: Checkpoint, names: dict[str, str]) -> None:
    output, flags = Output(), checkpoint.stored_flags
    lines: list[Sequence[Cell]] = []
    for name, stored in names.items():
        t = checkpoint.tensors[stored]
        kind = _KINDS[flags.get(name)] if flags is not None else ""
        tie = f"= {stored}" if stored != name else ""
        shape = "×".join(map(str, torch_shape(t.dtype, t.shape))) or "scalar"
        lines.append([name, BY_NAME[t.dtype].torch_name, shape, human_bytes(t.nbytes), kind, t.shard, tie])
    output.table(["tensor", "dtype", "shape", "size", "kind", "shard", "tied"], lines, numbers=(2, 3))


def _as_json(directory: str, checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Any]:
    flags = checkpoint.stored_flags
    tensors = {}
    for name, stored in names.items():
        t = checkpoint.tensors[stored]
        tensors[name] = {
            "dtype": BY_NAME[t.dtype].torch_name,
            "shape": torch_shape(t.dtype, t.shape),
            "bytes": t.nbytes,
            "shard": t.shard,
            "parameter": name in flags if flags is not None else None,
            "frozen": flags.get(name) if flags is not None else None,
            "tied_to": stored if stored != name else None,
        }
    return {
        "path": directory,
        "bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "durable": checkpoint.record.durable if checkpoint.record is not None else None,
        "metadata": checkpoint.metadata,
        **_moment(checkpoint.moment),
        "shards": {shard: {"tensors": sums.tensors, "bytes": sums.bytes} for shard, sums in _shard_sums(checkpoint).items()},
        "shared": list(checkpoint.record.shared) if checkpoint.record is not None else [],
        "parts": _parts(checkpoint),
        "tensors": tensors,
    }
