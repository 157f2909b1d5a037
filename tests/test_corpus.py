"""The corpus: every checkpoint of every version opens and is replaced, and today's code writes the same bytes as the newest version.

Method: `corpus/write.py` wrote `corpus/<version>/`, and describes each case there. These tests read and write through public verbs only.
"""

from __future__ import annotations

import json
import os
import re
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

#: PEFT calls transformers by a deprecated name.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")]


def having(member: str) -> list[tuple[str, str]]:
    """The cases that have ``member`` in ``expected.json``."""
    return [(version, case) for version, case in CASES if EXPECTED[version][case].get(member)]


def path_of(version: str, case: str, tmp_path: Path) -> Path:
    """The path to open. Git stores no modification times, so a case that needs them is copied and its times are set."""
    expected, folder = EXPECTED[version][case], CORPUS / version / case
    if "mtimes" in expected:
        folder = Path(shutil.copytree(folder, tmp_path / case))
        for name, mtime in expected["mtimes"].items():
            os.utime(folder / name, ns=(mtime, mtime))
    return folder / expected["file"]


def test_committed_files_are_unchanged() -> None:
    """Catches a committed file that was edited, lost or added, or whose line endings a tool changed."""
    for release in RELEASES:
        folders = {path.name for path in release.iterdir() if path.is_dir()}
        assert folders == EXPECTED[release.name].keys() - {"versions"}
        for case in folders:
            assert record.digests(release / case) == EXPECTED[release.name][case]["files"], (release.name, case)


@pytest.mark.parametrize("version, case", CASES)
def test_opens(version: str, case: str, tmp_path: Path) -> None:
    """Catches a released checkpoint that is refused, or that loads with another bit, name, flag, tie or metadata than was saved."""
    expected, path = EXPECTED[version][case], path_of(version, case, tmp_path)
    result = read.read_torch_file(path) if path.suffix == ".pt" else read.read_checkpoint(path)
    for member in read.MEMBERS:
        if member in expected:
            assert result[member] == expected[member], member
    assert list(result["tensors"]) == list(expected["tensors"]) or path.suffix


def test_opens_with_the_portable_engine() -> None:
    """Catches a portable engine that reads other values from the same files."""
    cases = ["dtypes", "layouts", "shards", "transformers"]
    command = [sys.executable, str(CORPUS / "read.py"), str(NEWEST), *cases]
    done = subprocess.run(
        command, env={**os.environ, "SHARDSAVE_ENGINE": "portable"}, check=True, capture_output=True, text=True
    )
    for case, result in json.loads(done.stdout).items():
        assert result == {member: EXPECTED[NEWEST.name][case][member] for member in read.MEMBERS}
        cases.remove(case)
    assert not cases


def renamed(name: str) -> str:
    """The name in version 2 of the format of a file in version 1."""
    return re.sub(r"\A(extra-[0-9a-f]{8})\.safetensors\Z", r"\1.tensors", name)


@pytest.mark.parametrize("case", sorted(EXPECTED["0.1.0"].keys() - {"versions"}))
def test_what_version_2_changed(case: str) -> None:
    """Catches another difference between the versions than those that CHANGELOG.md tells: the index has another version and writer, and
    extra tensors another name. Shards are the same to the byte, as they must be for a save that links unchanged ones."""
    old, new = (
        {path.name: path.read_bytes() for path in (CORPUS / version / case).iterdir()} for version in ("0.1.0", "0.2.0")
    )
    old_index, new_index = (json.loads(files.pop(record.INDEX, b"{}")) for files in (old, new))
    assert {renamed(name): content for name, content in old.items()} == new
    if old_index:
        ours = old_index["shardsave"]
        assert (ours["version"], ours["requires"]) == (1, [])
        assert ours.pop("crc64nvme") != new_index["shardsave"].pop("crc64nvme")
        ours.update(version=2, writer="shardsave 0.2.0")
        if "extra tensors" in ours.get("parts", ()):
            ours["parts"]["extra tensors"][0] = renamed(ours["parts"]["extra tensors"][0])
    assert old_index == new_index


@pytest.mark.parametrize("version, case", having("parts"))
def test_is_replaced(version: str, case: str, tmp_path: Path) -> None:
    """Catches a file of a released checkpoint that a save in its place leaves behind: nothing would ever remove it."""
    folder = Path(shutil.copytree(CORPUS / version / case, tmp_path / case))
    old = {path.name for path in folder.iterdir()} - {record.INDEX}
    report = shardsave.save({"x": torch.ones(2)}, folder, durable=False, progress=False)
    assert set(report.removed) == old and report.leftovers == ()
    (shard,) = shardsave.inspect(folder).shards
    assert sorted(path.name for path in folder.iterdir()) == sorted([shard, record.INDEX])


def differences(model: nn.Module, wanted: nn.Module, only: str = "") -> list[str]:
    """The names whose value or freeze flag differs; only values with ``only`` in their name are compared."""
    left, right = ({n: v for n, v in module.state_dict().items() if only in n} for module in (model, wanted))
    values = [n for n in left.keys() | right.keys() if not _same(left.get(n), right.get(n))]
    left, right = ({n: p.requires_grad for n, p in module.named_parameters()} for module in (model, wanted))
    return sorted([*values, *(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))])


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
    """Catches a released checkpoint that its model no longer accepts, or that leaves a value or flag of it unchanged."""
    expected = EXPECTED[version][case]
    wanted, model = getattr(models, expected["model"])(), other(expected["model"])
    before = differences(model, wanted)
    report = shardsave.load_model(model, path_of(version, case, tmp_path), progress=False)
    assert not (report.missing or report.unexpected or report.notes) and report.verified and before
    if expected["flags"] is None:  # then the load does not change flags
        for parameter, of_wanted in zip(model.parameters(), wanted.parameters()):
            assert parameter.requires_grad != of_wanted.requires_grad
            parameter.requires_grad_(of_wanted.requires_grad)
    assert differences(model, wanted, only="lora_" if "adapter_config.json" in expected.get("companions", ()) else "") == []


@pytest.mark.parametrize("version, case", having("build"))
def test_builds_a_model(version: str, case: str) -> None:
    """Catches a released architecture or config that no longer builds its model, or builds one that computes something else."""
    expected = EXPECTED[version][case]
    asked = shardsave.inspect(CORPUS / version / case, architecture=True).architecture
    trust = [
        *expected["build"],
        *(asked.trust if asked is not None else ()),
    ]  # the packages are in ``build``, exact names are not
    model = shardsave.build_model(CORPUS / version / case, trust=trust, progress=False)
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
    """Engine → the corpus that today's code writes with it, in a process that orders sets differently (PYTHONHASHSEED)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        current_engine = shardsave.save({}, Path(folder) / "empty", durable=False).engine
        written = {engine: Path(folder) / engine for engine in (current_engine, "portable")}
        processes = []
        for engine, path in written.items():
            environment = {**os.environ, "SHARDSAVE_ENGINE": engine, "PYTHONHASHSEED": str(len(engine))}
            command = [sys.executable, str(CORPUS / "write.py"), str(path), NEWEST.name]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)
        yield written


@pytest.fixture(params=["native", "portable"])
def written(request: pytest.FixtureRequest, all_written: dict[str, Path]) -> Path:
    if request.param not in all_written:
        pytest.skip("the C++ engine is missing, or another was requested")
    return all_written[request.param]


def test_the_same_cases_are_written(written: Path) -> None:
    """Catches a case that was added, renamed or removed in the writer but not in the committed corpus."""
    assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in NEWEST.iterdir())


@pytest.mark.parametrize("case", write.CASES)
def test_the_same_bytes_are_written(written: Path, case: str) -> None:
    """Catches an unintended change of the written files: a byte, or a file name."""
    corpus, installed = EXPECTED[NEWEST.name]["versions"], write.versions()
    for package in write.CASES[case].needs:
        if installed[package] != corpus[package]:
            pytest.skip(f"the bytes depend on {package}: the corpus has {corpus[package]}, installed is {installed[package]}")
    actual, committed = ({path.name: path.read_bytes() for path in (side / case).iterdir()} for side in (written, NEWEST))
    assert sorted(actual) == sorted(committed)
    for name in actual:
        assert actual[name] == committed[name], name
    assert json.loads((written / "expected.json").read_text())[case] == EXPECTED[NEWEST.name][case]
