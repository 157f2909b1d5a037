"""The benchmark on a model of a few megabytes. No value is judged, only that all of them are there."""

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
    *("shardsave", "rivals.training", "rivals.background", "report", "models", "gpu", "torch._dynamo"),
    *("torch.distributed.checkpoint", "transformers.models.llama.modeling_llama"),
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[WarmScripts]:
    """The scripts of the benchmark, in processes that need not import anything."""
    warm = WarmScripts(BENCHMARKS, *MODULES)
    yield warm
    warm.close()


def test_the_cpu_benchmark_and_its_report(tmp_path: Path, compiled: Compile, scripts: WarmScripts) -> None:
    """Catches a benchmark that fails or hides a failed operation, and a report that does not match the JSON."""
    raw = compiled("raw", [BENCHMARKS / "raw.c"], "-pthread")
    out = tmp_path / "out"
    options = ["--raw", raw, "--out", out, "--size", "20MB", "--small", "0", "--turns", "1", "--loads", "into"]
    for piece in ("limits", "torch.save, state dict"):
        scripts.run("run.py", *options, "--pieces", piece)
    results = json.loads((out / "results.json").read_text())
    samples = [sample for piece in results["pieces"].values() for sample in piece["samples"]]
    assert not [sample for sample in samples if "failed" in sample]
    measured = {(sample["tool"], sample["operation"], sample.get("cache")) for sample in results["pieces"]["limits"]["samples"]}
    limits = {("limit", operation, None) for operation in ("write", "read", "fresh", "warm", "memcpy")}
    loads = {("shardsave", "into", cache) for cache in ("cold", "warm")}
    assert measured >= limits | loads | {("shardsave", "save", None), ("shardsave", "overwrite", None)}
    assert [
        sample["tool"] for sample in results["pieces"]["torch.save, state dict"]["samples"] if sample["operation"] == "save"
    ] == [
        "torch.save, state dict",
        "shardsave",
    ]
    cold = [sample for sample in samples if sample.get("cache") == "cold"]
    assert all(sample["cached_before"] == 0 and sample["read_from_disk"] >= results["bytes"] for sample in cold)
    assert not (out / "data").exists()

    report = tmp_path / "RESULTS.md"
    scripts.run("report.py", out / "results.json", "--to", report)
    text = report.read_text()
    assert "- safetensors: not measured yet" in text
    assert "| import shardsave" not in text  # not measured here, so not reported
    assert "| durable save, wall | ≤ 1.1 × raw O_DIRECT write | measured in only 2 of 3 turns | not measured |" in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"save.png", "load.png", "cost.png"}
    assert all(f"plots/{path.name}" in text for path in (tmp_path / "plots").iterdir())


@pytest.mark.parametrize("tool", ["shardsave", "torch.save, state dict", "DCP"])
def test_the_trainings(tmp_path: Path, tool: str, scripts: WarmScripts) -> None:
    """Catches a tool that does not bring the optimizer back, and bytes of it that are not counted."""

    def measured(operation: str, *options: str) -> dict[str, Any]:
        printed = scripts.run("worker.py", tool, operation, tmp_path / "saved", 20_000_000, "--training", *options)
        figures: dict[str, Any] = last_line(printed)
        return figures

    saved, loaded = measured("save"), measured("into", "--check")
    assert saved["bytes"] == loaded["bytes"] > 9_000_000 and loaded["bytes"] / 2 < loaded["new_bytes"] < loaded["bytes"]


@pytest.mark.parametrize("way", ["shardsave, ring", "torch.save on a thread"])
def test_a_training_loop(tmp_path: Path, way: str, scripts: WarmScripts) -> None:
    """Catches a way to save that fails beside a training, or that saves another moment than that of the call."""
    options = ["--steps", "2", "--saves", "2", "--check"]
    result = last_line(scripts.run("loop.py", way, tmp_path / "loop", 12_000_000, *options))
    assert result["bytes"] > 9_000_000 and len(result["saves"]) == 2
    for save in result["saves"]:
        assert 0 < save["stall"] <= save["staged"] <= save["finished"] <= save["total"] and len(save["steps"]) >= 2
        assert save["memcpy"] > 0 and save["peak_extra"] > -1_000_000
    assert not (tmp_path / "loop").exists()


def recorded(way: str, turn: int, lost: float, **changes: Any) -> dict[str, Any]:
    """A sample of a training loop with a first save and two others, whose calls stop the training for 8 ms."""
    later = {"stall": 0.008, "staged": 0.2, "finished": 0.5, "lost": lost, "total": 1.0, "step": 0.1, "tensors": 250}
    later |= {"cpu_call": 0.01, "cpu_background": 0.2, "peak_extra": 70e6, "memcpy": 0.01, "memcpy_copied": 0.0005}
    later |= {
        "ring": 67e6,
        "copied": 1e6,
        "before": [[-0.1, 0.0]],
        "steps": [[0.1 * n + 0.01, 0.1 * n + 0.1] for n in range(8)],
    }
    later |= changes
    saves = [{**later, "stall": 9.0, "lost": 9.0, "peak_extra": 9e9}, later, later]
    sample = {"piece": "loop", "turn": turn, "tool": way, "operation": "loop", "bytes": 250_000_000, "tensors": 250}
    return sample | {"durable": not way.startswith("torch_"), "keeps": "a copy", "wall": 1.0, "saves": saves}


def test_the_report_of_training_loops(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches first saves that count, ratios of different turns, a failure that is hidden, and a missed goal that is called reached."""
    samples = [recorded("shardsave, ring", turn, lost, peak_extra=67e6) for turn, lost in enumerate((0.1, 0.2, 0.4))]
    samples += [recorded("DCP async_save, thread", turn, lost) for turn, lost in enumerate((1.0, 1.0, 4.0))]
    samples += [recorded("shardsave, snapshot", turn, 0.3, stall=0.013) for turn in range(3)]
    samples += [recorded("torch_checkpointing", turn, 1.0) for turn in range(2)]
    samples.append({"piece": "loop", "turn": 0, "tool": "torchsnapshot async_take", "operation": "loop", "failed": "no module"})
    results = {"size": 10**9, "small": 0, "turns": 3, "ways": None, "not_run": {}, "left": [], "bytes": 10**9, "costs": {}}
    results |= {
        "machine": {"processor": "", "cores": 2, "memory": 2**34, "file_system": "", "kernel": "", "python": "", "packages": {}}
    }
    results |= {"pieces": {"loop": {"minutes": 1, "samples": samples}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    report = tmp_path / "RESULTS.md"
    scripts.run("report.py", tmp_path / "results.json", "--to", report)
    rows = {line.split(" | ")[0].lstrip("| "): line for line in report.read_text().splitlines() if line.startswith("| ")}
    assert "1.21 × (8.0 ms against 6.6 ms)" in rows["save_async, ring: stall"]
    text = report.read_text()
    assert (
        "save_async, ring: training lost per save | ≤ 0.2 × DCP async_save, thread | 0.10 × (200 ms against 1000 ms) | reached"
        in text
    )
    assert (
        "save_async, snapshot: training lost per save | ≤ 0.2 × DCP async_save, thread | 0.30 × (300 ms against 1000 ms) | **missed**"
        in text
    )
    assert "≤ 0.2 × torch_checkpointing | measured in only 2 of 3 turns | not measured" in text
    assert (
        "| save_async, snapshot: stall | ≤ 1.2 × memcpy of the state | 1.30 × (13.0 ms against 10.0 ms) | **missed** |" in text
    )
    assert "0.99 × (67.0 MB against 68.0 MB) | reached" in rows["save_async, ring: extra memory"]
    assert "8.0 (9000)" in rows["shardsave, ring"] and "not durable" in rows["torch_checkpointing"]
    assert "failed: no module" in rows["torchsnapshot async_take"]
    assert (
        "![Training steps beside a save](plots/loop.png)" in text and (tmp_path / "plots" / "loop.png").stat().st_size > 10_000
    )


STAND_IN = """
import torch, gpu
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_name = lambda: "a processor"
gpu.DEVICE, gpu.bandwidth, gpu.WAYS = "cpu", lambda to_device: 1e9, ["no save"]
gpu.main()
"""


def test_the_gpu_benchmark(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches a benchmark that would fail on a GPU, which the CPU stands in for, and a directory that is not removed."""
    file, program = tmp_path / "figures.json", tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    values = last_line(scripts.run(str(program), tmp_path / "scratch", 20_000_000, "--to", file, "--loop"))
    assert json.loads(file.read_text()) == values
    rates = {"device_to_host", "host_to_device", "save_to_cache", "load_warm", "save_durable", "load_cold"}
    assert values["loop"]["no save"]["step"] > 0
    assert values.keys() == rates | {"device", "bytes", "peak_extra", "loop"} and min(values[rate] for rate in rates) > 0
    assert 0 < values["peak_extra"] < 256_000_000
    assert not list((tmp_path / "scratch").iterdir())


def test_whole_models(tmp_path: Path, scripts: WarmScripts) -> None:
    """Catches a model of torch.nn or transformers that is not built as it was saved."""
    scripts.run("models.py", "--only", "torch", "--only", "transformers", "--to", tmp_path / "models.md")
    table = (tmp_path / "models.md").read_text()
    assert "10 of 10 are equal." in table and "19 of 19 are equal." in table, table
