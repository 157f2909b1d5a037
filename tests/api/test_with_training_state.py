"""`save(step=, metrics=)`, and what the other verbs make of a checkpoint with a training state."""

from __future__ import annotations

import json
import math
import random
import re
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shardsave
from shardsave._cli.main import cli
from shardsave._common.strict_json import glimpse
from training_state import INDEX, edit_training, names_of_training, save_with_training, training_directory, training_generation

X = {"x": torch.ones(3)}


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.output


def test_step_and_metrics(tmp_path: Path) -> None:
    """Catches a number that `inspect` returns with another value or type, and an index that is no JSON because of one."""
    metrics = {
        "loss": torch.tensor([0.25], requires_grad=True),
        "accuracy": np.float32(0.5),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "tokens": 10**20,
        "count": np.array([3]),
        "share": Fraction(1, 4),
        "nan": float("nan"),
        "lowest": -math.inf,
        "highest": np.inf,
    }
    before = datetime.now(timezone.utc).replace(microsecond=0)
    shardsave.save(X, tmp_path, step=np.int64(100), metrics=metrics)
    info = shardsave.inspect(tmp_path)
    assert info.step == 100 and type(info.step) is int and info.ranks == 1 and info.epoch is None and info.created is not None
    assert math.isnan(info.metrics["nan"])
    assert {name: value for name, value in info.metrics.items() if name != "nan"} == {
        "loss": 0.25, "accuracy": 0.5, "half": 0.5, "tokens": 10**20, "count": 3, "share": 0.25, "lowest": -math.inf, "highest": math.inf,
    }  # fmt: skip
    assert {type(value) for value in info.metrics.values()} == {int, float}
    record = json.loads((tmp_path / INDEX).read_bytes(), parse_constant=lambda name: pytest.fail(name))["shardsave"]
    assert record["metrics"]["nan"] == "nan" and record["metrics"]["lowest"] == "-inf" and record["requires"] == []
    moment = datetime.strptime(info.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert before <= moment <= before + timedelta(minutes=1)


def test_a_save_without_them_is_as_before(tmp_path: Path) -> None:
    """Catches a member of the index that every save has since then, so that files are no longer the same to the byte."""
    shardsave.save(X, tmp_path)
    record = json.loads((tmp_path / INDEX).read_bytes())["shardsave"]
    assert not record.keys() & {"step", "epoch", "metrics", "ranks", "created"}
    info = shardsave.inspect(tmp_path)
    assert (info.step, info.epoch, info.metrics, info.ranks, info.created, info.part_bytes) == (None, None, {}, None, None, {})
    shardsave.save(X, tmp_path, metrics={}, reuse=False)
    assert json.loads((tmp_path / INDEX).read_bytes())["shardsave"].keys() - record.keys() == {"ranks", "created"}


NUMBER = "must be a real number, or a tensor or array with one, not "
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"step": True}, TypeError, "step must be an int, not a bool"),
    ({"step": 1.0}, TypeError, "step must be an int, not a float"),
    ({"step": "1"}, TypeError, "step must be an int, not a str"),
    ({"step": -1}, ValueError, "step must be at least 0, not -1"),
    ({"step": 10**308}, ValueError, f"step must have at most 308 digits, not {glimpse(10**308)}"),
    ({"metrics": [("loss", 1)]}, TypeError, "metrics must be a mapping of names to numbers, not a list"),
    ({"metrics": {1: 1}}, TypeError, "the names of metrics must be strings, not 1"),
    (
        {"metrics": {"\ud800": 1}},
        ValueError,
        "the names of metrics must be text in Unicode, '\\ud800' has half of a surrogate pair",
    ),
    ({"metrics": {"loss": "1"}}, TypeError, f"metrics['loss'] {NUMBER}a str"),
    ({"metrics": {"loss": True}}, TypeError, f"metrics['loss'] {NUMBER}a bool"),
    ({"metrics": {"loss": np.True_}}, TypeError, f"metrics['loss'] {NUMBER}a bool"),
    ({"metrics": {"loss": 1j}}, TypeError, f"metrics['loss'] {NUMBER}a complex"),
    ({"metrics": {"loss": torch.ones(2)}}, TypeError, f"metrics['loss'] {NUMBER}a Tensor"),
    ({"metrics": {"loss": torch.ones(1, device="meta")}}, TypeError, f"metrics['loss'] {NUMBER}a Tensor"),
    ({"metrics": {"loss": 10**308}}, ValueError, "metrics['loss'] must have at most 308 digits"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_wrong_arguments(options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    """Catches an argument that is refused only when something was written, or that makes an index which no reader accepts."""
    with pytest.raises(kind) as caught:
        shardsave.save(X, tmp_path / "ckpt", **options)
    assert str(caught.value) == message and not (tmp_path / "ckpt").exists()


def test_inspect_shows_it(tmp_path: Path) -> None:
    """Catches a training state that is shown without its size, or with that of its document alone; and JSON with NaN in it."""
    save_with_training(X, tmp_path, durable=False)
    size = sum(path.stat().st_size for path in training_directory(tmp_path).iterdir())
    info = shardsave.inspect(tmp_path)
    assert info.part_bytes == {"training state": size}
    assert info.parts == {"training state": f"{training_directory(tmp_path).name}/index.json"}
    assert str(info).splitlines()[1:] == [
        "  step 1, loss 0.5, saved 2026-11-30T05:40:00Z by 1 rank", f"  training state: {size / 1000:.1f} kB"
    ]  # fmt: skip
    code, printed = command("inspect", str(tmp_path))
    assert code == 0 and "\nstep 1, loss 0.5, saved 2026-11-30T05:40:00Z by 1 rank\n" in printed
    assert re.search(rf"^training state +training-\w+/index.json +{size / 1000:.1f} kB$", printed, re.MULTILINE)
    shardsave.save(X, tmp_path, step=7, metrics={"loss": math.nan})
    values = json.loads(command("inspect", "--json", str(tmp_path))[1], parse_constant=lambda name: pytest.fail(name))
    assert values["step"] == 7 and values["metrics"] == {"loss": "nan"} and values["parts"] == {}


def test_verify_reads_all_of_it(tmp_path: Path) -> None:
    """Catches a file of the training state that `verify` does not read."""
    save_with_training(X, tmp_path, durable=False)
    report = shardsave.verify(tmp_path)
    assert report.verified and report.tensors == 3 and set(report.intact) >= names_of_training(tmp_path) and not report.notes


def test_diff_compares_it(tmp_path: Path) -> None:
    """Catches a difference between training states that goes unnoticed, or that is taken for one of the models."""
    a, b, c = (tmp_path / name for name in "abc")
    save_with_training(X, a, 1, durable=False)
    save_with_training(X, b, 2, durable=False)
    report = shardsave.diff(a, b)
    assert report.equal == ("x",) and not report.changed and not report.same
    assert report.training is not None and report.training.values == ("training['generation']", "loader")
    assert report.training.changed["optimizer/m1"].max_absolute == 1 and not report.training.equal
    assert (
        "training state: 0 equal, 2 changed (optimizer/m0, optimizer/m1), 0 added, 0 removed, "
        "2 other values changed (training['generation'], loader); "
    ) in str(report)
    code, printed = command("diff", str(a), str(b))
    assert code == 1 and "\n~ training['generation']\n~ loader\n" in printed
    assert json.loads(command("diff", "--json", str(a), str(b))[1])["training"]["values"] == [
        "training['generation']",
        "loader",
    ]
    save_with_training(X, c, 1, durable=False, tensors={"optimizer/m0": torch.full((700,), 1.0), "new": torch.ones(1)})
    report = shardsave.diff(a, c)
    assert report.training is not None and not report.training.values
    assert (report.training.equal, report.training.added, report.training.removed) == (
        ("optimizer/m0",),
        ("new",),
        ("optimizer/m1",),
    )
    values = json.loads(command("diff", str(a), str(c), "--json")[1])
    assert values["training"]["added"] == ["new"] and values["only_training"] is None and values["same"] is False


def test_diff_of_one_training_state(tmp_path: Path) -> None:
    """Catches a training state that one of the two checkpoints lacks, and which does not count as a difference."""
    a, b = tmp_path / "a", tmp_path / "b"
    save_with_training(X, a, durable=False)
    shardsave.save(X, b, durable=False)
    for left, right, only in ((a, b, "a"), (b, a, "b")):
        report = shardsave.diff(left, right)
        assert not report.same and report.training is None and report.only_training == only and report.equal == ("x",)
        assert f"only {a} has a training state" in str(report)
        code, printed = command("diff", str(left), str(right))
        assert code == 1 and f"only {a} has a training state" in printed
    assert shardsave.diff(a, a).same and shardsave.diff(a, a).only_training is None


def test_diff_names_the_values(tmp_path: Path) -> None:
    """Catches a difference that nobody can find: an option, a counter, a list, a generator or a value that only one side has."""

    def save(folder: Path, rate: float, **more: Any) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": rate}], 0.1)
        training = {
            "optimizer": optimizer,
            "schedulers": [torch.optim.lr_scheduler.StepLR(optimizer, 5)],
            "own": shardsave.PerRank({"seen": 3, "by_number": {1: "a", 2: rate}}),
            "losses": [1.0, rate],
            "parts": [{"rate": rate}, torch.ones(1)],
            **more,
        }
        shardsave.save(model, folder, training=training, rng=True, durable=False)

    save(tmp_path / "a", 0.5)
    save(tmp_path / "b", 0.5)
    assert shardsave.diff(tmp_path / "a", tmp_path / "b").same
    save(tmp_path / "b", 0.25, epoch=2)
    random.random()
    save(tmp_path / "c", 0.5)
    report = shardsave.diff(tmp_path / "a", tmp_path / "b")
    assert report.training is not None and report.training.values == (
        "training['optimizer'].state_dict()['param_groups'][1]['lr']",
        "training['optimizer'].state_dict()['param_groups'][1]['initial_lr']",
        "training['schedulers'][0].state_dict()['base_lrs']",
        "training['schedulers'][0].state_dict()['_last_lr']",
        "training['losses']",
        "training['parts'][0]['rate']",
        "training['epoch']",
        "training['own']['by_number'][2]",
    )
    report = shardsave.diff(tmp_path / "a", tmp_path / "c")
    assert report.training is not None and report.training.values == ("rng['python'][1]",)
    save(tmp_path / "b", 0.5, many=dict.fromkeys(map(str, range(100)), 1))
    save(tmp_path / "c", 0.5, many=dict.fromkeys(map(str, range(100)), 2))
    report = shardsave.diff(tmp_path / "b", tmp_path / "c")
    assert report.training is not None and len(report.training.values) == 100 and "and 97 more)" in str(report)
    printed = command("diff", str(tmp_path / "b"), str(tmp_path / "c"))[1].splitlines()
    assert printed[23:25] == ["~ training['many']['23']", "… 76 more values of the training state; --json has all"]


def test_diff_of_hostile_documents(tmp_path: Path) -> None:
    """Catches an exception that is none of ours, or a difference that is overlooked, where a document has another form than ours."""
    model = torch.nn.Linear(2, 2)
    training = {
        "optimizer": torch.optim.SGD(model.parameters()),
        "module": torch.nn.Linear(1, 1),
        "scaler": torch.amp.GradScaler("cpu"),
    }
    for name in ("a", "b"):
        shardsave.save(model, tmp_path / name, training=training, durable=False)
    whole = json.loads((training_directory(tmp_path / "a") / "index.json").read_bytes())["shared"]
    nested: Any = 1
    for _ in range(150):
        nested = {"list": [nested]}
    wrong = (
        None,
        1,
        [],
        {},
        {"dict": 1},
        {"list": [1]},
        {"pairs": [1]},
        {"optimizer": []},
        {"optimizer": {"class": 1}},
        nested,
    )
    for leaf, inner in (("optimizer", "groups"), ("optimizer", "state"), ("module", "tensors"), ("scaler", "state")):
        tag = next(iter(whole["dict"][leaf]))
        for value in wrong:
            changed = json.loads(json.dumps(whole))
            changed["dict"][leaf][tag][inner] = value
            edit_training(tmp_path / "b", lambda document: document.update(shared=changed))
            difference = shardsave.diff(tmp_path / "a", tmp_path / "b").training
            assert difference is not None and difference.same == (changed == whole)
            assert all(f"training['{leaf}']" in place for place in difference.values)


def test_convert_keeps_it(tmp_path: Path) -> None:
    """Catches a training state that a conversion loses, changes, or leaves in its old files."""
    save_with_training(X, tmp_path / "a", durable=False)
    report = shardsave.convert(tmp_path / "a", tmp_path / "b", max_shard_size="1MB")
    assert training_generation(tmp_path / "b") == 1 and report.notes == () and report.dropped == () and report.verified
    assert len(names_of_training(tmp_path / "b")) == 3  # its tensors fit into one file
    a, b = shardsave.inspect(tmp_path / "a"), shardsave.inspect(tmp_path / "b")
    assert (a.step, a.metrics, a.created, a.ranks) == (b.step, b.metrics, b.created, b.ranks) and b.step == 1
    assert shardsave.diff(tmp_path / "a", tmp_path / "b").same and shardsave.verify(tmp_path / "b").verified


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("b", {"rename": [("x", "y")]}, "it refers to the saved names and dtypes"),
        ("b", {"dtype": "bfloat16"}, "it refers to the saved names and dtypes"),
        ("b.safetensors", {"to": "safetensors"}, "a single file cannot hold it"),
        ("b.pt", {"to": "torch"}, "a single file cannot hold it"),
    ],
)
def test_convert_leaves_it_out(tmp_path: Path, to: str, options: dict[str, Any], reason: str) -> None:
    """Catches a training state that goes unsaid, or that refers to tensors of other names."""
    save_with_training(X, tmp_path / "a", durable=False)
    report = shardsave.convert(tmp_path / "a", tmp_path / to, **options)
    assert f"the training state was left out: {reason}" in report.notes
    if to == "b":
        info = shardsave.inspect(tmp_path / to)
        assert not info.parts and info.step == 1 and not [path for path in (tmp_path / to).iterdir() if path.is_dir()]


NAMED = {"training": torch.ones(1), "training.weight": torch.ones(2), "training state": torch.ones(3)}


def test_convert_drops_it(tmp_path: Path) -> None:
    """Catches ``drop="training"`` that leaves out tensors with such names, or that means the training state where there is none."""
    save_with_training(NAMED, tmp_path / "a", durable=False)
    report = shardsave.convert(tmp_path / "a", tmp_path / "b", drop="training")
    assert report.dropped == () and report.notes == ("the training state was left out: drop='training' asks for that",)
    info = shardsave.inspect(tmp_path / "b")
    assert set(info.names) == {*NAMED} and not info.parts and info.step == 1
    report = shardsave.convert(tmp_path / "b", tmp_path / "c", drop="training")
    assert report.dropped == ("training",) and report.notes == ()
    report = shardsave.convert(tmp_path / "a", tmp_path / "d", drop=["training", "training.weight", "nothing"])
    assert report.dropped == ("training.weight",) and "drop='nothing' matched no name" in report.notes
    report = shardsave.convert(tmp_path / "a", tmp_path / "e", drop="training.*")
    assert report.dropped == ("training.weight",)
    assert report.notes == ("the training state was left out: it refers to the saved names and dtypes",)


def test_the_command_drops_it(tmp_path: Path) -> None:
    """Catches a command that has another meaning than the function, or words its note for Python."""
    save_with_training(X, tmp_path / "a", durable=False)
    code, printed = command("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--drop", "training")
    assert code == 0 and "the training state was left out: --drop 'training' asks for that" in printed
    assert training_generation(tmp_path / "b") is None
