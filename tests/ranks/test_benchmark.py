"""The benchmark of ranks on a model of a few megabytes. No value is judged, only that all of them are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, Compile
from warm_scripts import WarmScripts, last_line

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
MODULES = (
    *("ranks", "rank_zero", "rank_costs", "report", "transformers.models.llama.modeling_llama", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "shardsave._ranks.save_job", "shardsave._ranks.session"),
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[WarmScripts]:
    """The scripts of the benchmark, in processes that need not import anything."""
    warm = WarmScripts(BENCHMARKS, *MODULES)
    yield warm
    warm.close()


@pytest.mark.parametrize("tool", ["shardsave", "DCP, .distcp"])
def test_ranks_that_save_and_load(tmp_path: Path, tool: str, scripts: WarmScripts) -> None:
    """Catches a tool that fails on ranks or loads other values than it saved, and figures that are missing or cannot be true."""
    saved = last_line(scripts.run("ranks.py", tool, "save", tmp_path / "saved", 8_000_000))
    loaded = last_line(scripts.run("ranks.py", tool, "load", tmp_path / "saved", 8_000_000, "--ranks", 2, "--check"))
    assert saved["bytes"] == loaded["bytes"] > 7_000_000 and sum(saved["parts"]) == sum(loaded["parts"]) == saved["bytes"]
    assert saved["disk"] >= saved["bytes"] and saved["written"] >= saved["bytes"] and 0 < saved["wall"] <= saved["wall_synced"]
    assert len(saved["peaks"]) == 4 and len(loaded["peaks"]) == 2 and saved["cpu"] > 0


def test_saves_in_the_background(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches a stall that is not measured on every rank."""
    figures = last_line(scripts.run("ranks.py", "shardsave", "stall", tmp_path / "saved", 8_000_000))
    assert len(figures["stall"]) == len(figures["memcpy"]) == 12 and min(figures["stall"] + figures["memcpy"]) > 0


def test_processes_that_measure_a_limit(tmp_path: Path, compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that do not work at the same time, and bytes that are not counted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rank_pieces import together

    raw = str(compiled("raw", [BENCHMARKS / "raw.c"], "-pthread"))
    commands = [[raw, "write", str(tmp_path / f"{rank}.bin"), "1000000", "1"] for rank in range(3)]
    figures = together(commands)
    assert figures["bytes"] == 3_000_000 and 0 < figures["wall"] < 60 and figures["cpu"] > 0
    assert together([["/bin/false"], ["/bin/true"]])["failed"]


def test_rank_zero_of_many(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches a simulation whose messages are no longer those of a real save, and one that counts nothing."""
    figures = last_line(scripts.run("rank_zero.py", tmp_path / "saved", 50, "--seconds", 1, "--layers", 1))["50"]
    assert figures["tensors"] == 11 and figures["shards"] > 1 and "11 tensors" in figures["report"]
    assert 5_000 < figures["received"] < 100_000 and figures["sent"] > 5_000 and 0 < figures["processor"] < figures["wall"]


def test_very_many_tensors(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches a measurement of many tensors on ranks that fails."""
    figures = last_line(scripts.run("rank_costs.py", tmp_path / "saved", 100))
    assert figures["tensors"] == 100 and len(figures["first"]) == 4 and len(figures["second"]) == 8 and min(figures["load"]) > 0


def recorded(tool: str, operation: str, turn: int, wall: float, **changes: Any) -> dict[str, Any]:
    sample = {"piece": "ranks", "turn": turn, "size": 10**9, "tool": tool, "operation": operation, "wall": wall, "cpu": 1.0}
    sample |= {"wall_synced": wall, "unwritten": 0, "bytes": 10**9, "written": 10**9, "between_ranks": 7.5e8, "peak_extra": 1e8}
    return sample | {"read_from_disk": 10**9} | changes


def test_the_report_of_ranks(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches ratios of different turns, samples of ranks that are taken for those of one process, and a failure that is hidden."""
    samples = []
    for turn, wall in enumerate((1.0, 2.0, 4.0)):
        samples.append(recorded("shardsave", "save", turn, wall))
        samples += [recorded("limit", operation, turn, wall / 2, threads=1) for operation in ("write", "read")]
        samples.append(recorded("shardsave", "load on 4 ranks", turn, wall * 0.55, cache="cold"))
        samples.append(recorded("shardsave", "load of replicas", turn, wall, cache="cold", read_from_disk=2 * 10**9))
    samples += [recorded("shardsave", "stall", turn, 0.2, stall=[0.1, 0.2], memcpy=[0.1, 0.1]) for turn in range(3)]
    samples += [recorded("DCP, .distcp", "save", turn, 3.0, piece="ranks, DCP, .distcp") for turn in range(3)]
    samples += [recorded("shardsave", "save", turn, 2.7, piece="ranks, DCP, .distcp") for turn in range(2)]
    samples.append(recorded("torch_checkpointing", "save", 0, 0.0) | {"failed": "no module"})
    pieces: dict[str, Any] = {}
    for sample in samples:
        pieces.setdefault(sample["piece"], {"minutes": 1, "samples": []})["samples"].append(sample)
    machine = {"processor": "", "cores": 2, "memory": 2**34, "file_system": "", "kernel": "", "python": "", "packages": {}}
    costs = {
        "ranks": {"tensors": 100_000, "first": [0.9, 0.9], "second": [0.4, 0.4], "whole": [1.0]},
        "rank zero": {"1000": {"received": 5e5, "processor": 0.1}, "10000": {"received": 11e6, "processor": 1.0}},
    }
    results = {"size": 10**9, "small": 0, "ranks": 10**9, "turns": 3, "ways": None, "not_run": {}, "left": [], "bytes": 10**9}
    (tmp_path / "results.json").write_text(json.dumps(results | {"costs": costs, "machine": machine, "pieces": pieces}))
    report = tmp_path / "RESULTS.md"
    scripts.run("report.py", tmp_path / "results.json", "--to", report)
    text = report.read_text()
    processes = "by the same number of processes"
    for row in (
        f"4 ranks: durable save, wall | ≤ 1.15 × raw O_DIRECT write {processes} | 2 × (2.70 s against 1.00 s) | **missed**",
        "4 ranks: durable save, wall | ≤ 1.1 × DCP, .distcp | measured in only 2 of 3 turns | not measured",
        f"4 ranks: cold load, wall | ≤ 1.15 × raw O_DIRECT read {processes} | 1.1 × (1.10 s against 1.00 s) | reached",
        "load of replicas: read from disk | ≤ 1.05 × the model | 2 × the model | **missed**",
        "4 ranks: memory of a rank above its part | ≤ 256 MB | 100 MB | reached",
        "100,000 tensors on 4 ranks: planning of the next save | ≤ 0.3 s of a processor | 0.4 s of a processor | **missed**",
        "simulation of 1,000 ranks: rank 0 receives in a save | ≤ 10 MB | 0.5 MB | reached",
        "simulation of 10,000 ranks: rank 0 receives in a save | ≤ 10 MB | 11 MB | **missed**",
        "torch_checkpointing | failed: no module",
        "4 ranks: save_async, snapshot: stall | ≤ 1.2 × copy of what the rank has | 1.50 × (150.0 ms against 100.0 ms) | **missed**",
    ):
        assert f"| {row} |" in text, row
    assert "| durable save, wall | ≤ 1.1 × raw O_DIRECT write | not measured | not measured |" in text  # that of one process
    assert "## Ranks" in text
