"""``shardsave list``, and commands and functions that are given a run instead of a step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import shardsave
from shardsave._cli.main import cli
from shardsave._runs.recorded import RECORD_NAME

INDEX = "model.safetensors.index.json"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def make_run(folder: Path, last: int, **options: object) -> None:
    """Every tenth step of a training."""
    with shardsave.CheckpointManager(folder, save_every=10, durable=False, progress=False, **options) as manager:  # type: ignore[arg-type]
        for step in range(10, last + 1, 10):
            manager.step(step, {"x": torch.ones(1000)}, metrics={"loss": 100 / step, "nan": float("nan")})


@pytest.fixture
def folder(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(memory)
    return Path("run")


def test_the_table(folder: Path) -> None:
    """Catches a step without its state, size, metrics or reason; and a policy other than the one that the manager recorded."""
    make_run(folder, 40, keep_last=2, keep_best=("loss", "max", 1))
    make_run(folder / ".." / "other", 10)
    shared = next(Path(folder, "step-00000030").glob("*.safetensors"))
    target = next(Path(folder, "step-00000040").glob("*.safetensors"))
    target.unlink()
    os.link(shared, target)
    result = run("list", folder)
    lines = [re.sub(r"\d+ s ", "… s ", line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0 and not result.stderr
    assert [line.split() for line in lines[0:1]] == [["step", "age", "size", "new", "shared", "metrics", "state", "kept"]]
    assert "8.6 kB  8.6 kB     0 B  loss 10, nan nan" in lines[1] and lines[1].endswith("committed  best loss, 1 of 1")
    assert lines[2].lstrip().startswith("30") and lines[2].endswith("last 2")
    assert re.search(r"8\.6 kB +\d\d\d B  8\.1 kB  loss 2.5", lines[3]) and lines[3].endswith("latest; last 2")
    assert lines[5].startswith("run: 3 steps, ") and lines[5].endswith("policy: keep_last=2, keep_best=('loss', 'max', 1)")
    assert "policy: every step stays" in run("list", "other").stdout


def test_another_policy(folder: Path) -> None:
    """Catches options that are ignored, and steps that a command removes."""
    make_run(folder, 40)
    result = run("list", folder, "--keep-last", "1", "--keep-every", "20", "--keep-best", "loss:min:1")
    kept = [line.split("committed")[1].strip() for line in result.stdout.splitlines()[1:5]]
    assert kept == [
        "no, goes after the next save",
        "every 20",
        "no, goes after the next save",
        "latest; last 1; every 20; best loss, 1 of 1",
    ]
    assert len(list(folder.glob("step-*"))) == 4
    for wrong in (
        ["--keep-best", "loss"],
        ["--keep-best", "loss:least:1"],
        ["--keep-last", "0"],
        ["--keep-best", "loss:min:x"],
    ):
        assert run("list", folder, *wrong).exit_code == 2


def test_own_policy(folder: Path) -> None:
    """Catches a table that says what a function of the program keeps, which it cannot ask."""
    make_run(folder, 20, policy=lambda steps: [info.step for info in steps])
    lines = run("list", folder).stdout.splitlines()
    assert lines[1].endswith("if the program's own policy keeps it") and "<lambda>" in lines[-1]
    assert re.split(r"\s{2,}", lines[2].strip())[-1] == "latest"


def test_states(folder: Path) -> None:
    """Catches a step in a bad state that is not named, and an exit code that says that all is well."""
    make_run(folder, 40)
    os.truncate(next(Path(folder, "step-00000010").glob("*.safetensors")), 100)
    os.truncate(Path(folder, "step-00000020", INDEX), 100)
    Path(folder, "step-00000030", INDEX).rename(Path(folder, "step-00000030", f"{INDEX}.removed"))
    Path(folder, "step-00000050").mkdir()
    result = run("list", folder)
    states = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()[1:6]]
    assert result.exit_code == 1
    assert "corrupt" in states[0] and "was expected to have" in states[0][-1]
    assert "corrupt" in states[1] and states[2] == ["30", "removing"] and "committed" in states[3]
    assert states[4] == ["50", "unfinished"]


def test_json(folder: Path) -> None:
    """Catches JSON that other programs cannot read, or that lacks what the table shows."""
    make_run(folder, 30, keep_last=2)
    result = run("list", folder, "--json")
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (found["path"], found["latest"]) == ("run", 30) and found["policy"]["keep_last"] == 2
    last = found["steps"][-1]
    assert last["metrics"] == {"loss": 100 / 30, "nan": "nan"} and last["kept"] == ["latest", "last 2"]
    assert last["state"] == "committed" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", last["created"])
    assert [step["step"] for step in found["steps"]] == [20, 30]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b'{"format": "shardsave-run", "version": 2}'])
def test_a_record_that_cannot_be_read(folder: Path, content: bytes) -> None:
    """Catches a command that fails because of a file that only describes."""
    make_run(folder, 10)
    (folder / RECORD_NAME).write_bytes(content)
    result = run("list", folder)
    assert result.exit_code == 0 and result.stdout.endswith("no policy was recorded\n")


@pytest.mark.parametrize("wrong", [-1, True, "3", [1], {"a": 1}])
def test_a_record_of_nonsense(folder: Path, wrong: object) -> None:
    """Catches values of the record that are taken as they are."""
    make_run(folder, 10)
    record = {
        "format": "shardsave-run",
        "version": 1,
        "keep_last": wrong,
        "keep_every": wrong,
        "keep_best": wrong,
        "own": wrong,
    }
    (folder / RECORD_NAME).write_text(json.dumps(record))
    assert run("list", folder).exit_code == 0
    for best in (["loss", "min"], ["loss", "least", 1], [1, "min", 1], ["loss", "min", wrong if wrong != 1 else 0]):
        (folder / RECORD_NAME).write_text(json.dumps({**record, "keep_best": best}))
        assert run("list", folder).exit_code == 0


def test_no_run(folder: Path) -> None:
    """Catches an empty table where there is no run, and one message for all reasons."""
    make_run(folder, 10)
    (folder / "empty").mkdir()
    shardsave.save({"x": torch.ones(1)}, folder / "whole", durable=False)
    said = {
        "nothing": "there is no such directory",
        "run/empty": "there is none in this directory",
        "run/step-00000010": "it is a step itself; `shardsave inspect` shows it",
        "run/whole": "it is a checkpoint itself; `shardsave inspect` shows it",
    }
    for path, words in said.items():
        result = run("list", path)
        assert result.exit_code == 3
        assert f"no run at {path}: directories such as step-00001000 were expected, {words}" in result.stderr


def test_inspect_takes_the_latest(folder: Path) -> None:
    """Catches an `inspect` of a run that shows another step than the latest, or does not say which; and no whole step at all."""
    make_run(folder, 30)
    os.truncate(Path(folder, "step-00000030", INDEX), 100)
    result = run("inspect", folder)
    assert result.exit_code == 0 and result.stdout.startswith("run/step-00000020: 4.0 kB, 1 tensor")
    assert result.stderr == "shardsave inspect: run has 3 steps, this is the latest: run/step-00000020\n"
    for step in (10, 20):
        Path(folder, f"step-{step:08d}", INDEX).unlink()
    assert run("inspect", folder).exit_code == 3


def test_verbs_name_the_latest_step(folder: Path) -> None:
    """Catches an error that leaves people searching for the step."""
    make_run(folder, 30)
    Path(folder, "step-00000040").mkdir()
    model = torch.nn.Linear(1, 1)
    for verb in (
        shardsave.load,
        shardsave.verify,
        shardsave.inspect,
        shardsave.open,
        lambda path: shardsave.load_model(model, path),
    ):
        with pytest.raises(
            shardsave.CheckpointNotFoundError, match=r"it is a run with 4 steps, the latest is .*run/step-00000030"
        ):
            verb(folder)
    assert "the latest is" in run("verify", folder).stderr


def test_list_needs_no_torch(folder: Path) -> None:
    """Catches an import of torch, which takes a second, by a command that only reads names and indexes."""
    make_run(folder, 20)
    program = "import sys; from shardsave._cli.main import cli\ntry: cli(['list', sys.argv[1]])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "committed" in done.stdout


def test_convert_takes_the_latest(folder: Path) -> None:
    """Catches a `convert` of a run that fails, converts another step than the latest, or does not say which."""
    make_run(folder, 30)
    os.truncate(Path(folder, "step-00000030", INDEX), 100)
    result = run("convert", folder, "converted")
    assert result.exit_code == 0 and "run/step-00000020" in result.stdout and shardsave.inspect("converted").step == 20
    assert result.stderr == "shardsave convert: run has 3 steps, this is the latest: run/step-00000020\n"
    with pytest.raises(shardsave.CheckpointNotFoundError, match=r"it is a run with 3 steps, the latest is .*run/step-000000"):
        shardsave.convert(folder, "other")
    torch.save({"y": torch.ones(1)}, folder / "pytorch_model.bin")
    result = run("convert", folder, "other")
    assert (result.exit_code, result.stderr, [*shardsave.load("other")]) == (0, "", ["y"])
    (folder / "pytorch_model.bin").unlink()
    for step in (10, 20):
        Path(folder, f"step-{step:08d}", INDEX).unlink()
    assert run("convert", folder, "none").exit_code == 3 and not Path("none").exists()
