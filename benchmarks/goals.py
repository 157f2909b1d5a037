"""The goals, each with the figure that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from loop_results import LoopResults
from results import ENOUGH_TURNS, Results, extra_memory, largest, median_of, ratios
from rivals.background import CHECKPOINTING, DCP_PROCESS, DCP_THREAD, RING, SNAPSHOT


@dataclass(frozen=True)
class Goal:
    """A goal and its measured figure, as text. ``reached`` is None if nothing was measured."""

    what: str
    wanted: str
    measured: str
    reached: bool | None


def at_most(what: str, bound: float, value: float | None, unit: str, detail: str = "") -> Goal:
    wanted = f"≤ {bound:g} {unit}"
    if value is None:
        return Goal(what, wanted, "not measured", None)
    digits = f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return Goal(what, wanted, f"{digits} {unit}{f' ({detail})' if detail else ''}", value <= bound)


def against(what: str, bound: float, above: list, below: list, key: str, key_below: str, other: str) -> Goal:
    """The median of the ratios within each turn; a comparison of too few turns counts as not measured."""
    values = ratios(above, below, key, key_below)
    if 0 < len(values) < ENOUGH_TURNS:
        return Goal(what, f"≤ {bound:g} × {other}", f"measured in only {len(values)} of {ENOUGH_TURNS} turns", None)
    value = median(values) if values else None
    detail = f"{median_of(above, key):.2f} s against {median_of(below, key_below):.2f} s" if above and below else ""
    goal = at_most(what, bound, value, "×", detail)
    return Goal(goal.what, f"{goal.wanted} {other}", goal.measured, goal.reached)


def all_goals(results: Results, training: Results, loops: LoopResults) -> list[Goal]:
    save, to_cache = results.of("shardsave", "save"), results.of("shardsave, durable=False", "save")
    cold, warm = results.of("shardsave", "into", "cold"), results.of("shardsave", "into", "warm")
    cold_new = results.of("shardsave", "new", "cold")
    overwrite = results.of("shardsave", "overwrite")
    torch_save, torch_overwrite = (results.of("torch.save, state dict", operation) for operation in ("save", "overwrite"))
    raw_write, raw_read, memcpy = results.limit("write"), results.limit("read"), results.limit("memcpy")
    goals = [
        against("durable save, wall", 1.1, save, raw_write, "wall", "wall", "raw O_DIRECT write"),
        against("durable save, processor time", 1.5, save, raw_write, "cpu", "cpu", "raw O_DIRECT write with its one copy"),
        against("durable save, wall", 0.333, save, torch_save, "wall", "wall_synced", "torch.save + fsync"),
        against("durable save, processor time", 0.333, save, torch_save, "cpu", "cpu_synced", "torch.save + fsync"),
        against("durable overwrite, wall", 1.05, overwrite, save, "wall", "wall", "first save"),
        against("durable overwrite, wall", 1.1, overwrite, raw_write, "wall", "wall", "raw O_DIRECT write"),
        against("durable overwrite, wall", 0.333, overwrite, torch_overwrite, "wall", "wall_synced", "torch.save + fsync"),
        against("save to the page cache, wall", 1, to_cache, results.of("safetensors", "save"), "wall", "wall", "safetensors"),
        against("cold load into a model, wall", 1.1, cold, raw_read, "wall", "wall", "raw direct read"),
        against("cold load to new tensors, wall", 1.1, cold_new, raw_read, "wall", "wall", "raw direct read"),
        against(
            "cold load to new tensors, wall", 1.1, cold_new, results.limit("fresh"), "wall", "wall", "raw read into new memory"
        ),
        against(
            "warm load into a model, wall", 1, warm, results.of("safetensors", "into", "warm"), "wall", "wall", "safetensors"
        ),
        against("warm load into a model, wall", 1.5, warm, memcpy, "wall", "wall", "memcpy"),
        *(
            against(
                f"{cache} load to new tensors, wall",
                1,
                results.of("shardsave", "new", cache),
                results.of("safetensors", "new", cache),
                "wall",
                "wall",
                "safetensors and a copy",
            )
            for cache in ("cold", "warm")
        ),
    ]
    goals += _whole_modules(results)
    goals += _training(training)
    goals += _loops(loops)
    goals.append(_no_cold_buffered(results))
    goals += _memory(results)
    goals += _costs(results.all["costs"])
    goals += _gpu(results.all["costs"].get("gpu", {}), save)
    return goals


def _whole_modules(results: Results) -> list[Goal]:
    shardsave, torch_save = "shardsave, whole module", "torch.save, whole module"
    return [
        against(
            "whole module: durable save, wall",
            1,
            results.of(shardsave, "save"),
            results.of(torch_save, "save"),
            "wall",
            "wall_synced",
            "torch.save + fsync",
        ),
        *(
            against(
                f"whole module: {cache} load, wall",
                1,
                results.of(shardsave, "new", cache),
                results.of(torch_save, "new", cache),
                "wall",
                "wall",
                "torch.load",
            )
            for cache in ("cold", "warm")
        ),
    ]


def _training(results: Results) -> list[Goal]:
    """The goals of a model with its AdamW. A new optimizer has no state, so two thirds of what `resume` fills is new memory."""
    save, overwrite = results.of("shardsave", "save"), results.of("shardsave", "overwrite")
    cold, warm = results.of("shardsave", "into", "cold"), results.of("shardsave", "into", "warm")
    torch_save = results.of("torch.save, state dict", "save")
    raw_write = results.limit("write")
    goals = [
        against("model + AdamW: durable save, wall", 1.1, save, raw_write, "wall", "wall", "raw O_DIRECT write"),
        against("model + AdamW: durable overwrite, wall", 1.1, overwrite, raw_write, "wall", "wall", "raw O_DIRECT write"),
        against("model + AdamW: durable save, wall", 0.333, save, torch_save, "wall", "wall_synced", "torch.save + fsync"),
    ]
    for limit, other in (("read", "raw direct read"), ("fresh", "raw read into new memory")):
        goals.append(against("model + AdamW: cold resume, wall", 1.1, cold, results.limit(limit), "wall", "wall", other))
    goals.append(against("model + AdamW: warm resume, wall", 1.1, warm, results.limit("warm"), "wall", "wall", "warm pread"))
    for cache, samples in (("cold", cold), ("warm", warm)):
        rival = results.of("torch.save, state dict", "into", cache)
        goals.append(against(f"model + AdamW: {cache} resume, wall", 1, samples, rival, "wall", "wall", "torch.load"))
    return goals


def _no_cold_buffered(results: Results) -> Goal:
    cold = results.of("shardsave", "into", "cold") + results.of("shardsave", "new", "cold")
    known = [sample for sample in cold if sample.get("cached_after") is not None]
    value = largest(known, lambda sample: sample["cached_after"]) / 1e6 if known else None
    return at_most("data of the files in the page cache after a cold load", 1, value, "MB")


def _memory(results: Results) -> list[Goal]:
    goals = []
    for size in dict.fromkeys((results.all["small"], results.size)):
        if size:
            operations = [("shardsave", "save", None), ("shardsave, durable=False", "save", None)]
            operations += [("shardsave", way, cache) for way in ("into", "new") for cache in ("cold", "warm")]
            samples = [s for tool, way, cache in operations for s in results.of(tool, way, cache, size)]
            value = largest(samples, extra_memory) / 1e6 if samples else None
            goals.append(at_most(f"extra memory of saves and loads, CPU, {size / 1e9:g} GB", 256, value, "MB"))
    return goals


def _loops(loops: LoopResults) -> list[Goal]:
    """The goals of saves from a training loop; the first save of each process does not count."""
    snapshots, rings = loops.later(SNAPSHOT), loops.later(RING)
    goals = [
        at_most_of(
            "save_async, snapshot: stall",
            1.2,
            [(save["stall"], save["memcpy"]) for save in snapshots],
            1e3,
            "ms",
            "memcpy of the state",
        ),
        at_most_of(
            "save_async, ring: stall",
            1,
            [(save["stall"], 5e-3 + 4e-6 * save["tensors"] + 1.2 * save["memcpy_copied"]) for save in rings],
            1e3,
            "ms",
            "(5 ms + 4 ms per 1,000 tensors + 1.2 × memcpy of what is copied)",
        ),
        at_most_of(
            "save_async, ring: extra memory",
            1,
            [(save["peak_extra"], save["ring"] + save["copied"]) for save in rings],
            1e-6,
            "MB",
            "(the ring + what is copied)",
        ),
    ]
    for way in (SNAPSHOT, RING):
        for rival in (DCP_THREAD, DCP_PROCESS, CHECKPOINTING):
            values = loops.ratios(way, rival, "lost")
            what, wanted = f"{way.replace('shardsave', 'save_async')}: training lost per save", f"≤ 0.2 × {rival}"
            if len(values) < ENOUGH_TURNS:
                goals.append(Goal(what, wanted, f"measured in only {len(values)} of {ENOUGH_TURNS} turns", None))
                continue
            lost = [median_of(loops.later(name), "lost") * 1e3 for name in (way, rival)]
            measured = f"{median(values):.2f} × ({lost[0]:.0f} ms against {lost[1]:.0f} ms)"
            goals.append(Goal(what, wanted, measured, median(values) <= 0.2))
    return goals


def at_most_of(what: str, bound: float, pairs: list[tuple[float, float]], factor: float, unit: str, other: str) -> Goal:
    """The median of ratios whose two values were measured at the same save. ``factor``: what makes such a value ``unit``."""
    wanted = f"≤ {bound:g} × {other}"
    if not pairs:
        return Goal(what, wanted, "not measured", None)
    ratio = median(above / below for above, below in pairs)
    above, below = (median(values) * factor for values in zip(*pairs))
    return Goal(what, wanted, f"{ratio:.2f} × ({above:.1f} {unit} against {below:.1f} {unit})", ratio <= bound)


def _costs(costs: dict) -> list[Goal]:
    failed = [(what, result["failed"]) for what, result in costs.items() if "failed" in result and what != "gpu"]
    goals = [Goal(f"costs.py {what}", "", f"failed: {reason}", None) for what, reason in failed]
    for name, times in costs.get("checksums", {}).items():
        if name != "failed":
            value = median(a / b for a, b in zip(times["with"], times["without"])) * 100 - 100
            goals.append(at_most(f"checksums, {name}", 5, value, "% of the wall time", f"{median(times['with']):.2f} s in all"))
    for name, times in costs.get("many", {}).items():
        if name not in ("failed", "inspect"):
            whole = f"the whole call {median(times['whole']):.2f} s"
            goals.append(
                at_most(f"100,000 tensors, {name}: planning, header and index", 1, median(times["planning"]), "s", whole)
            )
    both = costs.get("optimizer", {})
    if "save both" in both:
        value = median(a - b for a, b in zip(both["save both"], both["save the model"]))
        whole = f"the whole call {median(both['save both']):.2f} s"
        goals.append(at_most(f"an AdamW of {both['tensors']:,} tensors: added to a save", 1, value, "s", whole))
    frozen = costs.get("frozen", {})
    if "saves" in frozen:
        full, once = median(frozen["full"]), median(frozen["pass"])
        share = frozen["written"] / (len(frozen["saves"]) * frozen["bytes"]) * 100
        compared = f"a full durable save takes {full:.2f} s, one checksum of all bytes {once:.2f} s"
        goals.append(at_most("99 % frozen, ten saves: written", 1.5, share, "% of the bytes"))
        goals.append(at_most("99 % frozen: a save", max(full / 10, 1.2 * once), median(frozen["saves"]), "s", compared))
        goals.append(at_most("the same, frozen parameters assumed to be unchanged", full / 20, median(frozen["assumed"]), "s"))
    if "median" in costs.get("import", {}):
        goals.append(
            at_most(
                "`import shardsave`, `save` and `load_model` looked up, after `import torch`",
                30,
                costs["import"]["median"] * 1e3,
                "ms",
            )
        )
    return goals


def _gpu(gpu: dict, save: list) -> list[Goal]:
    directions = (
        ("device to host (save to the page cache)", "save_to_cache", "device_to_host"),
        ("host to device (warm load)", "load_warm", "host_to_device"),
    )
    if "device" not in gpu:
        reason = gpu.get("skipped") or gpu.get("failed") or "not measured"
        return [Goal(what, "≥ 90 % of the pinned copy bandwidth", reason, None) for what, _, _ in directions]
    goals = []
    for what, rate, limit in directions:
        share = gpu[rate] / gpu[limit]
        measured = f"{share * 100:.0f} % ({gpu[rate] / 1e9:.1f} of {gpu[limit] / 1e9:.1f} GB/s, {gpu['device']})"
        goals.append(Goal(what, "≥ 90 % of the pinned copy bandwidth", measured, share >= 0.9))
    goals.append(at_most("extra memory, CUDA", 256, gpu["peak_extra"] / 1e6, "MB"))
    if save:
        disk = save[0]["bytes"] / median_of(save, "wall")
        measured = f"{gpu['save_durable'] / 1e9:.2f} GB/s, from the CPU {disk / 1e9:.2f} GB/s"
        goals.append(
            Goal("durable save from the GPU", "limited by the disk alone", measured, gpu["save_durable"] >= 0.9 * disk)
        )
    return goals
