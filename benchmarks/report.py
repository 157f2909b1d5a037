"""Writes RESULTS.md and its pictures from the JSON of a run. The text that is written by hand comes from notes.md.

python benchmarks/report.py bench-out/results.json --to benchmarks/RESULTS.md
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import plots  # noqa: E402
from goals import all_goals  # noqa: E402
from loop_results import LoopResults  # noqa: E402
from loop_table import loops_table, loops_text  # noqa: E402
from rank_report import rank_goals, ranks_parts  # noqa: E402
from results import LOOP, RANKS, Results, extra_memory, median_of, ratio  # noqa: E402
from results import TRAINING as TRAINING_PIECE  # noqa: E402
from rivals import OURS, TOOLS  # noqa: E402
from rivals.tool import Tool  # noqa: E402
from rivals.training import TRAINING  # noqa: E402
from tables import mb, table, times, wall  # noqa: E402

_REACHED = {True: "reached", False: "**missed**", None: "not measured"}


def goals_table(results: Results, training: Results, loops: LoopResults, ranks: Results) -> str:
    goals = all_goals(results, training, loops) + rank_goals(ranks, results.all["costs"])
    rows = [[goal.what, goal.wanted, goal.measured, _REACHED[goal.reached]] for goal in goals]
    return table(["goal", "wanted", "measured", "result"], rows)


def limits_table(results: Results) -> str:
    names = {
        "write": "raw write: O_DIRECT, fallocate, one copy, fsync",
        "read": "raw read: O_DIRECT, one copy",
        "fresh": "raw read into new memory",
        "warm": "warm pread",
        "memcpy": "memcpy",
    }
    rows = []
    for operation, name in names.items():
        for threads, samples in results.limits(operation).items():
            best = " (the limit)" if samples == results.limit(operation) else ""
            rows.append(
                [
                    f"{name}, {threads} thread{'s' * (threads > 1)}{best}",
                    wall(samples, "wall"),
                    f"{median_of(samples, 'cpu'):.2f}",
                ]
            )
    return table(["limit", "wall, s", "processor, s"], rows)


def saves_table(results: Results, tools: Mapping[str, Tool] = TOOLS) -> str:
    rows = []
    raw = results.limit("write")
    for name, tool in tools.items():
        samples = results.of(name, "save")
        if tool.save is None or not (samples or results.failure(name, "save")):
            continue
        if not samples:
            rows.append([name, f"failed: {results.failure(name, 'save')}", *[""] * 10])
            continue
        unwritten = max(sample["unwritten"] or 0 for sample in samples)
        rows.append(
            [
                name,
                wall(samples, "wall"),
                wall(samples, "wall_synced"),
                times(ratio(samples, raw, "wall_synced", "wall")),
                times(ratio(samples, results.of(_ours(tool), "save"), "wall_synced")),
                f"{median_of(samples, 'cpu'):.2f}",
                f"{median_of(samples, 'cpu_synced'):.2f}",
                mb(max(map(extra_memory, samples))),
                mb(samples[0]["disk"]),
                "all on disk" if unwritten == 0 else f"{mb(unwritten)} MB in memory only",
                tool.atomic,
                tool.checked,
            ]
        )
    head = ["save", "wall, s", "wall to disk, s", "× raw write", "× ours", "processor, s", "processor to disk, s"]
    return table([*head, "extra memory, MB", "on disk, MB", "when it returns", "atomic", "flipped bit found by"], rows)


def overwrites_table(results: Results, tools: Mapping[str, Tool] = TOOLS) -> str:
    rows = []
    raw = results.limit("write")
    for name, tool in tools.items():
        samples = results.of(name, "overwrite")
        if not samples:
            if reason := results.failure(name, "overwrite"):
                rows.append([name, f"failed: {reason}", *[""] * 6])
            continue
        rows.append(
            [
                name,
                wall(samples, "wall"),
                wall(samples, "wall_synced"),
                times(ratio(samples, raw, "wall_synced", "wall")),
                times(ratio(samples, results.of(name, "save"), "wall_synced")),
                times(ratio(samples, results.of(_ours(tool), "overwrite"), "wall_synced")),
                wall(samples, "wall_finished"),
                tool.atomic,
            ]
        )
    head = [
        "overwrite",
        "wall, s",
        "wall to disk, s",
        "× raw write",
        "× first save",
        "× ours",
        "until the old files are gone, s",
    ]
    return table([*head, "atomic"], rows)


def _ours(tool: Tool) -> str:
    """The tool of ours with which ``tool`` is compared; for one of ours, itself."""
    return tool.name if tool.name in OURS else tool.compared_with[0]


def loads_table(results: Results, cache: str, tools: Mapping[str, Tool] = TOOLS) -> str:
    raw = results.limit("read" if cache == "cold" else "memcpy")
    rows = []
    for name, tool in tools.items():
        for way in sorted(tool.loads):
            samples = results.of(name, way, cache)
            label = f"{name}: {_WAYS[way]}"
            if not samples:
                if reason := results.failure(name, way, cache):
                    rows.append([label, f"failed: {reason}", *[""] * 6])
                continue
            mapped = way in tool.mapped
            rows.append(
                [
                    label,
                    wall(samples, "wall"),
                    "(maps)" if mapped else times(ratio(samples, raw, "wall")),
                    "(maps)" if mapped else times(ratio(samples, results.of(_ours(tool), way, cache), "wall")),
                    f"{median_of(samples, 'cpu'):.2f}",
                    "(maps)" if mapped else mb(max(map(extra_memory, samples))) + " mapped" * (way in tool.through_map),
                    mb(max(sample["read_from_disk"] for sample in samples)),
                    mb(max(sample["cached_after"] or 0 for sample in samples)),
                ]
            )
    limit = "raw read" if cache == "cold" else "memcpy"
    head = [f"{cache} load", "wall, s", f"× {limit}", "× ours", "processor, s", "extra memory, MB", "read from disk, MB"]
    return table([*head, "in the page cache afterwards, MB"], rows)


def training_parts(results: Results) -> list[str]:
    """The tables of models with their optimizers; none, if that piece was not measured."""
    measured = [sample["bytes"] for sample in results.samples if "bytes" in sample]
    if not measured:
        return []
    text = f"A transformer in bfloat16 and its AdamW, {max(measured) / 1e9:.2f} GB in all, against limits of the same bytes, in turns."
    tables = [limits_table(results)]
    tables += [make(results, TRAINING) for make in (saves_table, overwrites_table)]
    tables += [loads_table(results, cache, TRAINING) for cache in ("cold", "warm")]
    return ["## Training state", text, *tables]


def loop_parts(loops: LoopResults, folder: Path) -> list[str]:
    """The table and the picture of the training loops; none, if that piece was not measured."""
    if not loops.measured():
        return []
    title, picture = plots.draw_loops(loops, folder)
    return ["## Beside a training loop", loops_text(loops), f"![{title}](plots/{picture.name})", loops_table(loops)]


_WAYS = {
    "into": "into the model",
    "into, mapped": "mapped, then into the model",
    "new": "new tensors",
    "new, mapped": "new tensors, mapped",
}


def costs_text(results: Results) -> str:
    costs = results.all["costs"]
    parts = []
    if checksums := costs.get("checksums"):
        rows = [
            [name, _seconds(times["with"]), _seconds(times["without"])] for name, times in checksums.items() if name != "failed"
        ]
        parts.append(table(["engine alone", "with checksums, s", "without, s"], rows))
    if many := costs.get("many"):
        rows = [[name, _seconds(t["planning"]), _seconds(t["whole"])] for name, t in many.items() if name != "failed"]
        parts.append(table(["100,000 tensors of 64 bytes", "planning, header and index, s", "the whole call, s"], rows))
    if "tensors" in (optimizer := dict(costs.get("optimizer", {}))):
        head = f"a model, and its AdamW of {optimizer.pop('tensors'):,} tensors"
        parts.append(table([head, "the whole call, s"], [[name, _seconds(seconds)] for name, seconds in optimizer.items()]))
    return "\n\n".join(parts)


def machine_text(results: Results) -> str:
    machine = results.all["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    text = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB of memory, {machine['file_system']} on "
        f"one disk, Linux {machine['kernel']}, Python {machine['python']}; {packages}. "
        f"A Llama of {results.nbytes / 1e9:.2f} GB in bfloat16; {results.all['turns']} turns of each comparison, "
        f"{sum(piece['minutes'] for piece in results.all['pieces'].values()):.0f} minutes in all."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _seconds(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.2f} (min {min(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    results = Results(options.results)
    training = Results(options.results, only=TRAINING_PIECE)
    loops = LoopResults(Results(options.results, only=LOOP))
    ranks = Results(options.results, only=RANKS)
    pictures = plots.draw(results, options.to.parent / "plots")
    shown = "\n\n".join(f"![{title}](plots/{path.name})" for title, path in pictures)
    reasons = {
        **results.all["not_run"],
        **dict.fromkeys(results.all.get("left", ()), "not measured yet: run `make bench` again"),
    }
    not_run = "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())
    parts = [
        "# What was measured",
        "`make bench` writes this page. Figures are medians, with the best in brackets. Each rival was measured in turns\n"
        "with shardsave and the limits, and ratios are taken within each turn. Smaller is always better.",
        machine_text(results),
        "## Goals",
        goals_table(results, training, loops, ranks),
        shown,
        "## Limits",
        limits_table(results),
        "## Saving",
        saves_table(results),
        "## Overwriting",
        overwrites_table(results),
        "## Loading",
        loads_table(results, "cold"),
        loads_table(results, "warm"),
        *training_parts(training),
        *loop_parts(loops, options.to.parent / "plots"),
        *ranks_parts(ranks),
        "## What each part costs",
        costs_text(results),
        "## Not measured",
        not_run,
        (HERE / "notes.md").read_text().strip(),
    ]
    options.to.write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"wrote {options.to} and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
