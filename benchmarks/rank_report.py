"""The text, the tables and the goals about ranks that save and load one model together."""

from __future__ import annotations

import textwrap
from statistics import median
from typing import Any

from goals import Goal, against, at_most, at_most_of
from rank_pieces import LOADS, SIZE
from results import Results, Sample, largest, median_of, ratio
from rivals.ranks import DCP, GLOO, OURS, RANKS
from tables import mb, table, times, wall

FIRST = OURS[0]
ON_ALL, ON_TWO = list(LOADS)[:2]
MOST_RANK_MEMORY = 256  # MB


def ranks_parts(results: Results) -> list[str]:
    """The section; nothing, if it was not measured."""
    measured = [sample["bytes"] for sample in results.samples if sample["tool"] != "limit" and "bytes" in sample]
    if not measured:
        return []
    sentences = [
        f"{SIZE} processes, connected by gloo, save one Llama of {max(measured) / 1e9:.2f} GB in bfloat16, which FSDP2 has sharded:",
        "by rows, and every fourth matrix by columns.",
        "Files have at most a tenth of the bytes, where a tool has that choice.",
        "The limits are of as many processes, which begin at the same moment; each writes, or reads, its part of the bytes.",
        "All files are cold before a load.",
    ]
    text = textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)
    tables = [_limits(results), _saves(results), _loads(results)]
    return ["## Ranks", text, *tables]


def _limits(results: Results) -> str:
    rows = []
    for operation in ("write", "read"):
        for threads, samples in results.limits(operation).items():
            best = " (the limit)" if samples == results.limit(operation) else ""
            name = f"raw {operation}, {SIZE} processes of {threads} thread{'s' * (threads > 1)}{best}"
            rows.append([name, wall(samples, "wall"), f"{median_of(samples, 'cpu'):.2f}"])
    return table(["limit", "wall, s", "processor, s"], rows)


def _saves(results: Results) -> str:
    rows = []
    raw, ours = results.limit("write"), results.of(FIRST, "save")
    for name, tool in RANKS.items():
        samples = results.of(name, "save")
        if not samples:
            if reason := results.failure(name, "save"):
                rows.append([name, f"failed: {reason}", *[""] * 9])
            continue
        unwritten = max(sample["unwritten"] or 0 for sample in samples)
        rows.append(
            [
                name,
                wall(samples, "wall"),
                wall(samples, "wall_synced"),
                times(ratio(samples, raw, "wall_synced", "wall")),
                times(ratio(samples, ours, "wall_synced")),
                f"{median_of(samples, 'cpu'):.2f}",
                times(_share(samples, "written")),
                times(_share(samples, "between_ranks")),
                mb(largest(samples, lambda sample: sample["peak_extra"])),
                "all on disk" if unwritten == 0 else f"{mb(unwritten)} MB in memory only",
                tool.files,
            ]
        )
    head = ["save", "wall, s", "wall to disk, s", "× raw write", "× ours", "processor, s", "written, × model"]
    head += ["between ranks, × model", "memory of a rank above its part, MB", "when it returns", "files for"]
    return table(head, rows)


def _loads(results: Results) -> str:
    rows = []
    raw = results.limit("read")
    for load in LOADS:
        for name in RANKS:
            samples = results.of(name, load, "cold")
            if not samples:
                if reason := results.failure(name, load, "cold"):
                    rows.append([f"{name}: {load}", f"failed: {reason}", *[""] * 6])
                continue
            rows.append(
                [
                    f"{name}: {load}",
                    wall(samples, "wall"),
                    times(ratio(samples, raw, "wall")),
                    times(ratio(samples, results.of(FIRST, load, "cold"), "wall")),
                    f"{median_of(samples, 'cpu'):.2f}",
                    times(_share(samples, "read_from_disk")),
                    times(_share(samples, "between_ranks")),
                    mb(largest(samples, lambda sample: sample["peak_extra"])),
                ]
            )
    head = ["cold load", "wall, s", "× raw read", "× ours", "processor, s", "read from disk, × model", "between ranks, × model"]
    return table([*head, "memory of a rank above its part, MB"], rows)


def _share(samples: list[Sample], key: str) -> float:
    """The median of ``key``, relative to the bytes of the model."""
    return median(sample[key] / sample["bytes"] for sample in samples)


def rank_goals(results: Results, costs: dict[str, Any]) -> list[Goal]:
    save, load = results.of(FIRST, "save"), results.of(FIRST, ON_ALL, "cold")
    by_gloo, distcp = results.of(GLOO, "save"), results.of(DCP, "save")
    raw_write, raw_read = results.limit("write"), results.limit("read")
    ours = [sample for sample in results.samples if sample["tool"] == FIRST and "peak_extra" in sample]
    written = _share(save, "written") if save else None
    memory = largest(ours, lambda sample: sample["peak_extra"]) / 1e6 if ours else None
    other = "raw O_DIRECT write by the same number of processes"
    goals = [
        against(f"{SIZE} ranks: durable save, wall", 1.15, save, raw_write, "wall", "wall", other),
        against(f"{SIZE} ranks: durable save, wall", 1.1, save, distcp, "wall", "wall", DCP),
        against(f"{SIZE} ranks: durable save over gloo alone, wall", 1.25, by_gloo, distcp, "wall", "wall", DCP),
        at_most(f"{SIZE} ranks: written by a save", 1.01, written, "× the model"),
        at_most(f"{SIZE} ranks: memory of a rank above its part", MOST_RANK_MEMORY, memory, "MB"),
        against(f"{SIZE} ranks: cold load, wall", 1.15, load, raw_read, "wall", "wall", other.replace("write", "read")),
        *(_read_once(results, way) for way in LOADS if way != ON_TWO),
        at_most_of(
            f"{SIZE} ranks: save_async, snapshot: stall",
            1.2,
            [pair for sample in results.of(FIRST, "stall") for pair in zip(sample["stall"], sample["memcpy"])],
            1e3,
            "ms",
            "copy of what the rank has",
        ),
    ]
    return goals + _planning(costs.get("ranks", {})) + _rank_zero(costs.get("rank zero", {}))


def _read_once(results: Results, way: str) -> Goal:
    samples = results.of(FIRST, way, "cold")
    return at_most(f"{way}: read from disk", 1.05, _share(samples, "read_from_disk") if samples else None, "× the model")


def _planning(measured: dict[str, Any]) -> list[Goal]:
    """100,000 small tensors on ranks."""
    if "first" not in measured:
        return []
    first, second = (median(measured[key]) for key in ("first", "second"))
    what = f"{measured['tensors']:,} tensors on {SIZE} ranks"
    whole = f"the whole call {median(measured['whole']):.2f} s, all ranks on one machine"
    return [
        at_most(f"{what}: planning of a save on a rank", 1, first, "s of a processor", whole),
        at_most(f"{what}: planning of the next save", 0.3, second, "s of a processor"),
    ]


def _rank_zero(measured: dict[str, Any]) -> list[Goal]:
    """What a simulation says about rank 0 of large jobs."""
    goals = []
    for ranks, figures in measured.items():
        if ranks != "failed":
            what = f"simulation of {int(ranks):,} ranks: rank 0"
            goals.append(at_most(f"{what} receives in a save", 10, figures["received"] / 1e6, "MB"))
            goals.append(at_most(f"{what} computes in a save", 2, figures["processor"], "s"))
    return goals
