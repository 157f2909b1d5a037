"""The benchmark's harness on a model of a few megabytes: not a figure is judged, only that all of them are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, Compile

BENCHMARKS = ROOT / "benchmarks"


def test_measures_and_reports(tmp_path: Path, compiled: Compile) -> None:
    """Catches a harness that no longer runs, that loses a failed operation, or a report that no longer follows its JSON."""
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
    subprocess.run(
        [*command, "--repeat", "1", "--no-costs", "--only", "shardsave", "--loads", "into"], check=True, capture_output=True
    )
    results = json.loads((out / "results.json").read_text())
    assert not [sample for sample in results["samples"] if "failed" in sample]
    measured = {(sample["tool"], sample["operation"], sample.get("cache")) for sample in results["samples"]}
    limits = {("limit", operation, None) for operation in ("write", "read", "fresh", "warm", "memcpy")}
    loads = {("shardsave", "into", cache) for cache in ("cold", "warm")}
    assert measured >= limits | loads | {("shardsave", "save", None)}
    cold = [sample for sample in results["samples"] if sample.get("cache") == "cold"]
    assert all(sample["cached_before"] == 0 and sample["read_from_disk"] >= results["bytes"] for sample in cold)
    assert not (out / "data").exists()

    report = tmp_path / "RESULTS.md"
    subprocess.run([sys.executable, str(BENCHMARKS / "report.py"), str(out / "results.json"), "--to", str(report)], check=True)
    text = report.read_text()
    assert "| durable save, wall | ≤ 1.1 × raw O_DIRECT write |" in text
    assert "| import shardsave" not in text  # not measured here, so not claimed
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"save.png", "load.png", "cost.png"}
    assert all(f"plots/{path.name}" in text for path in (tmp_path / "plots").iterdir())


def test_whole_models_come_back(tmp_path: Path) -> None:
    """Catches a model of torch.nn or transformers that is built otherwise than it was saved."""
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--only", "torch", "--only", "transformers"]
    subprocess.run([*command, "--to", str(tmp_path / "models.md")], check=True, capture_output=True)
    table = (tmp_path / "models.md").read_text()
    assert "10 of 10 are equal." in table and "19 of 19 are equal." in table, table
