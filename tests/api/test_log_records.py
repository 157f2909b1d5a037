"""The records of Python's logging: one for each finished call, with the fields of its report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from faults.dying import die_before_the_commit, killed
from shardsave._common import memory_errors
from shardsave._common.free_memory import FreeMemory
from support import SmallModel
from warm_python import warm_python


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Collects the records of logger ``shardsave``, which the user has switched on."""
    handler, logger = Collector(), logging.getLogger("shardsave")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return record.shardsave  # type: ignore[attr-defined, no-any-return]


def test_a_record_for_each_call(tmp_path: Path, collector: Collector) -> None:
    """Catches a call that logs nothing or twice, another message than the report, a missing field, and values that JSON does not know."""
    model = SmallModel()
    saved = shardsave.save(model, tmp_path / "a", durable=False)
    again = shardsave.save(model, tmp_path / "a", durable=False)
    loaded = shardsave.load_model(SmallModel(), tmp_path / "a")
    shardsave.load(tmp_path / "a", prefix="encoder.")
    shardsave.load(tmp_path / "a", mmap=True)
    converted = shardsave.convert(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert [fields(record)["event"] for record in collector.records] == [
        "save", "save", "delete", "load", "load", "load", "convert"
    ]  # fmt: skip
    for record, report in zip([collector.records[n] for n in (0, 1, 3, 6)], (saved, again, loaded, converted)):
        assert record.getMessage() == str(report) and (record.levelno, record.name) == (logging.INFO, "shardsave")
        assert {f.name for f in dataclasses.fields(report)} | {"event"} == fields(record).keys()
        assert all(fields(record)[name] == getattr(report, name) for name in ("path", "bytes", "seconds", "notes"))
        assert fields(record)["phases"]["transfer"] == report.phases.transfer
        assert record.pathname == __file__
    json.dumps([fields(record) for record in collector.records])
    deletion = collector.records[2]
    assert fields(deletion) == {"event": "delete", "path": str(tmp_path / "a"), "removed": again.removed, "leftovers": ()}
    assert deletion.getMessage() == f"{tmp_path / 'a'}: removed or replaced {', '.join(again.removed)}"
    plain, mapped = (fields(record) for record in collector.records[4:6])
    assert (plain["tensors"], plain["verified"], plain["engine"]) == (9, True, saved.engine)
    assert (mapped["bytes"], mapped["verified"], mapped["engine"]) == (saved.bytes, False, "mmap")


def test_records_of_whole_models(tmp_path: Path, collector: Collector) -> None:
    """Catches a build and a loaded program that nobody sees in the log."""
    shardsave.save(nn.Linear(4, 2), tmp_path, architecture=True, program=((torch.ones(1, 4),), {}))
    shardsave.build_model(tmp_path)
    shardsave.load_program(tmp_path)
    assert [fields(record)["event"] for record in collector.records] == ["save", "load", "load"]
    assert all(fields(record)["bytes"] == 40 and fields(record)["path"] == str(tmp_path) for record in collector.records)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_was_left_behind(tmp_path: Path, collector: Collector) -> None:
    """Catches a cleaning that is not logged, with the names of what it removed."""
    killed(tmp_path, die_before_the_commit)
    report = shardsave.clean(tmp_path)
    (record,) = collector.records
    assert (fields(record)["event"], fields(record)["removed"]) == ("delete", report.removed) and len(report.removed) == 1
    shardsave.clean(tmp_path)
    assert len(collector.records) == 1


def test_what_needs_attention(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches notes that matter at a level which nobody reads, and everyday records that alarm somebody."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.warns(UserWarning, match="stay in"):
        shardsave.save({"x": torch.zeros(20_000_000)}, tmp_path, durable=False)
    with pytest.warns(UserWarning, match="no tensor is saved"):
        shardsave.save(nn.ReLU(), tmp_path / "empty", durable=False)
    monkeypatch.setattr(memory_errors, "free_memory", lambda: FreeMemory(1, 10**9, "this machine"))
    shardsave.load(tmp_path)
    shardsave.load_model(nn.Linear(2, 2), tmp_path, strict=False)
    levels = [record.levelname for record in collector.records if fields(record)["event"] != "delete"]
    assert levels == ["WARNING"] * 4
    assert "a part may be swapped" in fields(collector.records[-2])["notes"][0]


SILENT = """
import logging, sys, torch, shardsave
folder, handler = sys.argv[1], logging.StreamHandler(sys.stdout)
shardsave.save({"x": torch.ones(1)}, folder)
for name in ("adapter_config.json", "adapter_model.safetensors"):
    open(f"{folder}/{name}", "w").close()
shardsave.save({"x": torch.ones(1)}, folder)  # what it says matters
assert not logging.getLogger().handlers and not logging.getLogger("shardsave").handlers
print("now", flush=True)
logging.getLogger("shardsave").addHandler(handler)
words = shardsave.SaveReport.__str__
shardsave.SaveReport.__str__ = lambda self: 1 / 0
shardsave.save({"x": torch.ones(1)}, folder + "/other")  # nobody wants records of level INFO
shardsave.SaveReport.__str__ = words
shardsave.save({"x": torch.ones(1)}, folder)
"""


@pytest.mark.slow
def test_silence_unless_asked(tmp_path: Path) -> None:
    """Catches a handler that the library installs, output of Python's handler of last resort, and formatting that nobody asked for."""
    done = warm_python().run(["-c", SILENT, tmp_path], action="ignore")
    now, line = done.stdout.splitlines()
    assert (done.returncode, done.stderr, now) == (0, "", "now")
    assert line.startswith(f"saved {tmp_path}: ") and "adapter_model.safetensors stay in" in line
