"""The corpus: every checkpoint that a released version wrote opens, and today's code writes the same bytes.

Method: `corpus/write.py` says what is in `corpus/<version>/` and how it was made. Nothing is read or written here but by public verbs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from corpus import models, read, record, write
from support import ROOT, same_bits

CORPUS = ROOT / "tests" / "corpus"
RELEASES = sorted(
    (path.parent for path in CORPUS.glob("*/expected.json")), key=lambda path: [int(part) for part in path.name.split(".")]
)
EXPECTED: dict[str, Any] = {release.name: json.loads((release / "expected.json").read_text()) for release in RELEASES}
NEWEST = RELEASES[-1]
CASES = [(version, case) for version, cases in EXPECTED.items() for case in cases if case != "versions"]

#: PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


def having(member: str) -> list[tuple[str, str]]:
    """The cases of which ``expected.json`` says something under ``member``."""
    return [(version, case) for version, case in CASES if EXPECTED[version][case].get(member)]


def opened(version: str, case: str, tmp_path: Path) -> Path:
    """The path to open; a copy where times matter, which git does not keep."""
    expected, folder = EXPECTED[version][case], CORPUS / version / case
    if "mtimes" in expected:
        folder = Path(shutil.copytree(folder, tmp_path / case))
        for name, mtime in expected["mtimes"].items():
            os.utime(folder / name, ns=(mtime, mtime))
    return folder / expected["file"]


def test_nothing_in_it_was_changed() -> None:
    """Catches a committed file that was edited, lost, added, or whose line ends were changed by a tool."""
    for release in RELEASES:
        folders = {path.name for path in release.iterdir() if path.is_dir()}
        assert folders == EXPECTED[release.name].keys() - {"versions"}
        for case in folders:
            assert record.digests(release / case) == EXPECTED[release.name][case]["files"], (release.name, case)


@pytest.mark.parametrize("version, case", CASES)
def test_opens(version: str, case: str, tmp_path: Path) -> None:
    """Catches a released format that is refused, or of which a bit, a name, a flag, a tie or metadata is lost or made up."""
    expected, path = EXPECTED[version][case], opened(version, case, tmp_path)
    result = read.found_in_torch(path) if path.suffix == ".pt" else read.found(path)
    for member in read.MEMBERS:
        if member in expected:
            assert result[member] == expected[member], member
    assert list(result["tensors"]) == list(expected["tensors"]) or path.suffix


def test_opens_with_the_portable_engine() -> None:
    """Catches an engine that reads the same files otherwise."""
    cases = ["dtypes", "layouts", "shards", "transformers"]
    command = [sys.executable, str(CORPUS / "read.py"), str(NEWEST), *cases]
    done = subprocess.run(
        command, env={**os.environ, "SHARDSAVE_ENGINE": "portable"}, check=True, capture_output=True, text=True
    )
    for case, result in json.loads(done.stdout).items():
        assert result == {member: EXPECTED[NEWEST.name][case][member] for member in read.MEMBERS}
        cases.remove(case)
    assert not cases


def differences(model: nn.Module, wanted: nn.Module, only: str = "") -> list[str]:
    """The names in state dicts of which one has another value than the other, and the names of parameters with another flag."""
    ours, theirs = ({n: v for n, v in module.state_dict().items() if only in n} for module in (model, wanted))
    values = [n for n in ours.keys() | theirs.keys() if not _same(ours.get(n), theirs.get(n))]
    ours, theirs = ({n: p.requires_grad for n, p in module.named_parameters()} for module in (model, wanted))
    return sorted([*values, *(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))])


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return same_bits(left, right)
    return bool(left == right)


def other(name: str) -> nn.Module:
    """The model with other values and the opposite flags."""
    model = models.numbered(getattr(models, name)(), first=1)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    return model


@pytest.mark.parametrize("version, case", having("model"))
def test_fills_a_model(version: str, case: str, tmp_path: Path) -> None:
    """Catches a released checkpoint that no longer goes into the model it was saved from, or leaves a value or flag as it was."""
    expected = EXPECTED[version][case]
    wanted, model = getattr(models, expected["model"])(), other(expected["model"])
    before = differences(model, wanted)
    report = shardsave.load_model(model, opened(version, case, tmp_path), progress=False)
    assert not (report.missing or report.unexpected or report.notes) and report.verified and before
    if expected["flags"] is None:  # then flags are left alone
        for parameter, of_wanted in zip(model.parameters(), wanted.parameters()):
            assert parameter.requires_grad != of_wanted.requires_grad
            parameter.requires_grad_(of_wanted.requires_grad)
    assert differences(model, wanted, only="lora_" if "adapter_config.json" in expected.get("companions", ()) else "") == []


@pytest.mark.parametrize("version, case", having("build"))
def test_builds_a_model(version: str, case: str) -> None:
    """Catches a released architecture or config by which no model is built any more, or one that computes something else."""
    expected = EXPECTED[version][case]
    model = shardsave.build_model(CORPUS / version / case, trust=expected["build"], progress=False)
    wanted = getattr(models, expected["model"])()
    assert differences(model, wanted) == []
    if "result" in expected:
        assert write.plain_result(model) == expected["result"]
    if expected["model"] == "values":
        assert repr(model.values) == repr(wanted.values) and model.method() == 41 and model.function is models.double
        assert model.conv.weight.stride() == wanted.conv.weight.stride() and model.listed[1] is model.pruned.bias


@pytest.mark.parametrize("version, case", having("program"))
def test_runs_a_program(version: str, case: str) -> None:
    """Catches a released program that is refused, or computes something else."""
    expected = EXPECTED[version][case]
    program = shardsave.load_program(CORPUS / version / case, progress=False)
    assert write.plain_result(program) == expected["result"]
    flags = {name: not parameter.requires_grad for name, parameter in program.named_parameters()}
    assert sorted(name for name, frozen in flags.items() if frozen) == expected["flags"]["frozen"]


@pytest.fixture(scope="module")
def all_written() -> Iterator[dict[str, Path]]:
    """The corpus as today's code writes it, by engine: at the same time, in processes that keep sets in another order."""
    engines = ["portable"] if importlib.util.find_spec("shardsave._native") is None else ["native", "portable"]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        written = {engine: Path(folder) / engine for engine in engines}
        running = []
        for engine, path in written.items():
            environment = {**os.environ, "SHARDSAVE_ENGINE": engine, "PYTHONHASHSEED": str(len(engine))}
            command = [sys.executable, str(CORPUS / "write.py"), str(path), NEWEST.name]
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate()[1] for process in running]
        assert [process.returncode for process in running] == [0] * len(running), "\n".join(errors)
        yield written


@pytest.fixture(params=["native", "portable"])
def written(request: pytest.FixtureRequest, all_written: dict[str, Path]) -> Path:
    if request.param not in all_written:
        pytest.skip("the C++ engine was not built")
    return all_written[request.param]


def test_the_same_cases_are_written(written: Path) -> None:
    """Catches a case that was added, renamed or taken away, and the committed corpus not."""
    assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in NEWEST.iterdir())


@pytest.mark.parametrize("case", write.CASES)
def test_the_same_bytes_are_written(written: Path, case: str) -> None:
    """Catches a change of what is written, by a byte or a file name, that nobody meant."""
    there, here = EXPECTED[NEWEST.name]["versions"], write.versions()
    for package in write.CASES[case].needs:
        if here[package] != there[package]:
            pytest.skip(f"its bytes depend on {package}: written with {there[package]}, this is {here[package]}")
    ours, theirs = ({path.name: path.read_bytes() for path in (side / case).iterdir()} for side in (written, NEWEST))
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert ours[name] == theirs[name], name
    assert json.loads((written / "expected.json").read_text())[case] == EXPECTED[NEWEST.name][case]
