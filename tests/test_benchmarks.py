"""The benchmark on a model of a few megabytes. No value is judged, only that all of them are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, Compile

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"


def test_the_cpu_benchmark_and_its_report(tmp_path: Path, compiled: Compile) -> None:
    """Catches a benchmark that fails or hides a failed operation, and a report that does not match the JSON."""
    raw = compiled("raw", [BENCHMARKS / "raw.c"], "-pthread")
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(BENCHMARKS / "run.py"),
        "--raw",
        str(raw),
        "--out",
        str(out),
        "--size",
        "20MB",
        "--small",
        "0",
    ]
    command += ["--turns", "1", "--loads", "into"]
    for piece in ("limits", "torch.save, state dict"):
        subprocess.run([*command, "--pieces", piece], check=True, capture_output=True)
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
    subprocess.run([sys.executable, str(BENCHMARKS / "report.py"), str(out / "results.json"), "--to", str(report)], check=True)
    text = report.read_text()
    assert "- safetensors: not measured yet" in text
    assert "| import shardsave" not in text  # not measured here, so not reported
    assert "| durable save, wall | ≤ 1.1 × raw O_DIRECT write | measured in only 2 of 3 turns | not measured |" in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"save.png", "load.png", "cost.png"}
    assert all(f"plots/{path.name}" in text for path in (tmp_path / "plots").iterdir())


def measured(size: int, tool: str, operation: str, folder: Path, *options: str) -> dict[str, Any]:
    """What ``worker.py`` measures."""
    command = [sys.executable, str(BENCHMARKS / "worker.py"), tool, operation, str(folder), str(size), "--training", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("tool", ["shardsave", "torch.save, state dict", "DCP"])
def test_the_trainings(tmp_path: Path, tool: str) -> None:
    """Catches a tool that does not bring the optimizer back, and bytes of it that are not counted."""
    saved = measured(20_000_000, tool, "save", tmp_path / "saved")
    loaded = measured(20_000_000, tool, "into", tmp_path / "saved", "--check")
    assert saved["bytes"] == loaded["bytes"] > 9_000_000 and loaded["bytes"] / 2 < loaded["new_bytes"] < loaded["bytes"]


STAND_IN = """
import sys, torch, gpu
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_name = lambda: "a processor"
gpu.DEVICE, gpu.bandwidth = "cpu", lambda to_device: 1e9
gpu.main()
"""


def test_the_gpu_benchmark(tmp_path: Path) -> None:
    """Catches a benchmark that would fail on a GPU, which the CPU stands in for, and a directory that is not removed."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-c", STAND_IN, str(tmp_path / "scratch"), "20000000", "--to", str(file)]
    done = subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    values = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(file.read_text()) == values
    rates = {"device_to_host", "host_to_device", "save_to_cache", "load_warm", "save_durable", "load_cold"}
    assert values.keys() == rates | {"device", "bytes", "peak_extra"} and min(values[rate] for rate in rates) > 0
    assert 0 < values["peak_extra"] < 256_000_000
    assert not list((tmp_path / "scratch").iterdir())


def test_whole_models(tmp_path: Path) -> None:
    """Catches a model of torch.nn or transformers that is not built as it was saved."""
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--only", "torch", "--only", "transformers"]
    subprocess.run([*command, "--to", str(tmp_path / "models.md")], check=True, capture_output=True)
    table = (tmp_path / "models.md").read_text()
    assert "10 of 10 are equal." in table and "19 of 19 are equal." in table, table
