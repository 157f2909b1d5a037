"""Files that hold more than one state: what is converted, what is left out with a note, and what needs a decision of the user.

Method: files as training scripts and libraries write them, each as a file of torch.save and as a distributed checkpoint. Whatever has
tensors is converted, is named in the report, or is named in an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import distributed, same

import shardsave

Write = Callable[[dict[str, Any], Path], None]
BOTH = pytest.mark.parametrize("write", [torch.save, distributed], ids=["torch", "distributed"])

W = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
MORE = {"b.weight": torch.full((4,), 7.0)}
STATS = {"mean": torch.zeros(1), "var": torch.ones(1)}


def optimizer() -> dict[str, Any]:
    model = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    adam.step()
    return adam.state_dict()


def refusal(source: Path, **options: Any) -> str:
    """The message of the refusal to convert ``source``; checks that nothing was written."""
    with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
        shardsave.convert(source, source.with_name("refused"), **options)
    message = str(caught.value)
    assert (
        message.startswith(f"cannot convert {source}: ") and message.endswith("; nothing was written") and "\n" not in message
    )
    assert not source.with_name("refused").exists()
    return message


def converted(source: Path, **options: Any) -> tuple[dict[str, torch.Tensor], shardsave.ConvertReport]:
    target = source.with_name("converted")
    report = shardsave.convert(source, target, durable=False, **options)
    return shardsave.load(target), report


#: What lies beside or among the weights → a part of the refusal, and the ``drop`` that leads to ``W``.
AMBIGUOUS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a dict of statistics among weights": (
        {**W, "running": STATS},
        "it has at its top 'a.weight', 'a.bias' (2 tensors, 32 B), 'running' (2 tensors, 8 B); "
        "leave out what is not wanted with drop='running', or choose one with key='running'",
        "running",
    ),
    "a small dict that is the largest": (
        {"a.bias": W["a.bias"], "big": MORE},
        "it has 'big' (1 tensor, 16 B), at its top 'a.bias' (1 tensor, 8 B); choose one with key='big', or leave out what is not "
        "wanted with drop='a.bias'",
        "",
    ),
    "a scaler among weights": ({**W, "scaler": {"scale": torch.ones(1)}}, "'scaler' (1 tensor, 4 B)", "scaler"),
    "a scaler beside a state": ({"state_dict": W, "scaler": STATS}, "'scaler' (2 tensors, 8 B)", "scaler"),
    "an average": ({"model": W, "ema": MORE, "optimizer": optimizer()}, "'model' (2 tensors, 32 B), 'ema' (1 tensor, 16 B)", "ema"),
    "two models": ({"generator": W, "discriminator": MORE}, "key='generator', or leave", "discr*"),
    "another depth": ({"model": W, "trainer": {"ema": {"w": torch.zeros(2)}}}, "'trainer.ema' (1 tensor, 8 B)", "trainer.ema"),
    "a state in a state": ({"model": {**W, "head": MORE}}, "drop='model.head', or choose one with key='model.head'", "head"),
    "a counter": ({"model": W, "step": torch.tensor(3)}, "not wanted with drop='step'", "step"),
    "a list of averages": ({"model": W, "shadow": [torch.ones(2), torch.ones(1)]}, "'shadow.0', 'shadow.1' (2 tensors", "shadow"),
    "a list of models": ({"model": W, "pool": [MORE, MORE]}, "'pool.0' (1 tensor, 16 B), 'pool.1' (1 tensor, 16 B)", "pool"),
    "deep": ({"model": W, "a": {"b": {"c": {"d": {"e": {"f": {"g": MORE}}}}}}}, "'a.b.c.d.e.f.g' (1 tensor, 16 B)", "a"),
    "callbacks with an average": (
        {"state_dict": W, "callbacks": {"WeightAveraging": {"average": MORE}}, "pytorch-lightning_version": "2.5"},
        "'callbacks.WeightAveraging.average' (1 tensor, 16 B)",
        "callbacks",
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_files(tmp_path: Path, name: str, write: Write) -> None:
    """Catches weights that are left out because something small beside them is a mapping of tensors too."""
    content, words, drop = AMBIGUOUS[name]
    write(content, tmp_path / "x")
    assert words in refusal(tmp_path / "x")
    if drop:
        state, report = converted(tmp_path / "x", drop=drop)
        assert same(state, W) and report.dropped and not any("matched no name" in note for note in report.notes)


@BOTH
def test_every_advice_leads_on(tmp_path: Path, write: Write) -> None:
    """Catches an error whose own advice ends in another error, or converts something else than it says."""
    write({"model": {**W, "stats[0]": STATS}, "ema": MORE}, tmp_path / "x")
    assert "drop='model.stats[0]', or choose one with key='model.stats[0]'" in refusal(tmp_path / "x", drop="ema")
    state, report = converted(tmp_path / "x", drop=["ema", "model.stats[0]"])
    assert same(state, W) and report.dropped == ("model.stats[0]", "ema")
    state, report = converted(tmp_path / "x", key="model.stats[0]")
    assert same(state, STATS)
    assert report.notes == (
        "left out, since not in 'model.stats[0]': 'ema' (dict, 1 tensor, 16 B), 'model.a.weight' (tensor, 24 B), "
        "'model.a.bias' (tensor, 8 B)",
    )
    assert (
        "it has 'stats[0]' (dict, 2 tensors, 8 B) among its tensors, which can be left out with drop='model.stats[0]'"
        in refusal(tmp_path / "x", key="model")
    )
    state, report = converted(tmp_path / "x", key="model", drop="stats[0]")
    assert same(state, W) and report.notes == ("left out, since not in 'model': 'ema' (dict, 1 tensor, 16 B)",)
    assert (
        "at key 'emma' was expected, there is 'model' (2 tensors, 32 B), 'ema' (1 tensor, 16 B), 'model.stats[0]'"
        in refusal(tmp_path / "x", key="emma")
    )


def lightning() -> dict[str, Any]:
    """The content of a Lightning checkpoint, with its usual parts."""
    best = {"best_model_score": torch.tensor(0.1), "best_k_models": {"x.ckpt": torch.tensor(0.1)}, "dirpath": "/x"}
    return {
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.5.0", "state_dict": W,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": best}, "optimizer_states": [optimizer()],
        "lr_schedulers": [{"last_epoch": 3, "base_lrs": [torch.tensor(0.1)]}], "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }  # fmt: skip


def test_training_state_is_named(tmp_path: Path) -> None:
    """Catches training state that keeps a usual checkpoint from being converted, or that is left out without its size in the report."""
    torch.save(lightning(), tmp_path / "x.ckpt")
    state, report = converted(tmp_path / "x.ckpt")
    assert same(state, W)
    assert report.notes == (
        "left out, since not in 'state_dict': 'callbacks' (training state, 2 tensors, 8 B), 'optimizer_states' (training state, "
        "6 tensors, 56 B), 'lr_schedulers' (training state, 1 tensor, 4 B), 'epoch' (int), 'global_step' (int), "
        "'pytorch-lightning_version' (str), 'loops' (training state), 'hparams_name' (str) and 1 more",
    )


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", {"state": {"a.weight": {"exp_avg": torch.ones(2)}}}), ("adam", optimizer()), ("optimizer_G", optimizer()),
        ("optim_state_dict", {"state.a.weight.exp_avg": torch.ones(2)}), ("rng_state", torch.get_rng_state()),
        ("cuda_rng_state_all", [torch.get_rng_state()]), ("rng_states", {"torch": torch.get_rng_state(), "python": 3}),
        ("amp", {"scale": torch.ones(1), "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}),
        ("lr_scheduler", {"last_lr": [torch.tensor(0.1)]}),
    ],
)  # fmt: skip
def test_kinds_of_training_state(tmp_path: Path, name: str, value: Any, write: Write) -> None:
    """Catches a kind of training state that is taken for weights, or is left out without a note."""
    write({"model": W, name: value}, tmp_path / "x")
    state, report = converted(tmp_path / "x")
    (note,) = report.notes
    assert same(state, W) and note.startswith(f"left out, since not in 'model': '{name}' (") and "tensor" in note


@BOTH
def test_training_state_among_weights_and_alone(tmp_path: Path, write: Write) -> None:
    """Catches an optimizer beside top-level weights that hides them, and moments that are converted as if they were weights."""
    write({**W, "optimizer": optimizer()}, tmp_path / "x")
    state, report = converted(tmp_path / "x")
    assert same(state, W)
    assert report.notes == ("left out, since it is training state: 'optimizer' (training state, 6 tensors, 56 B)",)
    write({"optimizer": optimizer(), "rng": torch.get_rng_state()}, tmp_path / "y")
    assert "it has only training state: 'optimizer' (dict, 6 tensors, 56 B), 'rng' (tensor, 5.1 kB)" in refusal(tmp_path / "y")
    state, _ = converted(tmp_path / "y", key="optimizer.state.0", drop="step")
    assert state.keys() == {"exp_avg", "exp_avg_sq"}


def test_names_of_training_state_in_a_state(tmp_path: Path) -> None:
    """Catches weights that are left out since their name or dtype is like that of training state."""
    state = {"rng_state": torch.ones(3, dtype=torch.uint8), "optimizer.weight": torch.ones(2), "callbacks.x": torch.ones(2)}
    torch.save(state, tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt")[0], state)
    torch.save({"model": state, "rng_net": {"weight": torch.ones(2)}}, tmp_path / "y.pt")
    assert "'rng_net' (1 tensor, 8 B)" in refusal(tmp_path / "y.pt")


@BOTH
def test_lists_of_tensors(tmp_path: Path, write: Write) -> None:
    """Catches a list of tensors that is refused or lost, and two tensors that get the same name."""
    write({"model": {**W, "masks": [torch.ones(1), torch.ones(2)]}}, tmp_path / "x")
    state, _ = converted(tmp_path / "x")
    assert same(state, {**W, "masks.0": torch.ones(1), "masks.1": torch.ones(2)})
    state, report = converted(tmp_path / "x", drop="masks.1")
    assert same(state, {**W, "masks.0": torch.ones(1)}) and report.dropped == ("model.masks.1",)
    assert same(converted(tmp_path / "x", key="model.masks")[0], {"0": torch.ones(1), "1": torch.ones(2)})
    torch.save({"model": {"masks.0": torch.ones(1), "masks": [torch.ones(2)]}}, tmp_path / "twice")
    assert "'model.masks.0' is there twice" in refusal(tmp_path / "twice")


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    """Catches a value among the weights that is left out silently, and names that are no strings."""
    torch.save({**W, "version": 3}, tmp_path / "x.pt")
    assert "it has 'version' (int) among its tensors, which can be left out with drop='version'" in refusal(tmp_path / "x.pt")
    state, report = converted(tmp_path / "x.pt", drop=["version"])
    assert same(state, W) and report.dropped == ("version",)
    torch.save([torch.ones(1), torch.ones(2)], tmp_path / "list.pt")
    assert converted(tmp_path / "list.pt")[0].keys() == {"0", "1"}
    torch.save({1: torch.ones(1), "1": torch.ones(2)}, tmp_path / "keys.pt")
    assert "'1' is there twice" in refusal(tmp_path / "keys.pt")
    torch.save(torch.ones(1), tmp_path / "tensor.pt")
    assert "it has none, it is a Tensor" in refusal(tmp_path / "tensor.pt")
    torch.save({"model": W, "metadata": {"_metadata": {"": {"version": 1}}}}, tmp_path / "meta.pt")
    assert converted(tmp_path / "meta.pt")[1].notes == ("left out, since not in 'model': 'metadata' (dict)",)


def test_a_state_dict_as_torch_makes_it(tmp_path: Path) -> None:
    """Catches the ``_metadata`` of a state dict, or a module called ``model``, that is taken for another state."""
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "ema": torch.nn.BatchNorm1d(2)})
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert same(converted(tmp_path / "x.pt")[0], dict(module.state_dict()))


@pytest.mark.parametrize("old", [False, True])
def test_containers_in_themselves(tmp_path: Path, old: bool) -> None:
    """Catches a small file whose containers are in each other so often, or so deeply, that reading it never ends."""
    many: list[Any] = [torch.ones(1)]
    for _ in range(60):
        many = [many, many]
    itself: dict[str, Any] = {"a": torch.ones(1)}
    itself["b"] = itself
    for content in (many, itself):
        torch.save({"model": W, "x": content}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises((shardsave.IncompatibleCheckpointError, shardsave.CorruptCheckpointError), match="too deeply, or "):
            shardsave.convert(tmp_path / "x.pt", tmp_path / "out")


def test_drop_by_path_keeps_a_weight_of_that_name(tmp_path: Path) -> None:
    """Catches a weight that is lost because another part of the file has its name as a path, as the error's own advice has it."""
    content = {"model": {"w": torch.ones(2), "ema": torch.ones(3), "model": torch.ones(1)}, "ema": {"w": torch.zeros(2)}}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="drop='ema'"):
        shardsave.convert(tmp_path / "a.pt", tmp_path / "x")
    for drop, left, dropped in (
        (["ema"], {"w", "ema", "model"}, ("ema",)),
        (["ema", "model.ema"], {"w", "model"}, ("model.ema", "ema")),
        (["ema*"], {"w", "model"}, ("model.ema", "ema")),
        (["ema", "w"], {"ema", "model"}, ("model.w", "ema")),
    ):
        report = shardsave.convert(tmp_path / "a.pt", tmp_path / "x", drop=drop)
        assert (set(shardsave.load(tmp_path / "x")), report.dropped) == (left, dropped)
    torch.save({"model": {"w": torch.ones(2), "ema": {"w": torch.ones(2)}}, "ema": {"w": torch.zeros(2)}}, tmp_path / "b.pt")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'model' .*'model.ema'"):
        shardsave.convert(tmp_path / "b.pt", tmp_path / "x", drop=["ema"])


NET = {"lstm.weight": torch.ones(5)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learned_optimizer", NET), ("text_optimizer", {"weight": torch.ones(5)}), ("optims", NET), ("optimizer", NET),
        ("optim", {"master": NET}), ("net", {"state": {"w": torch.ones(5)}, "param_groups": {"x": 1}}),
        ("net", {"state": {"w": torch.ones(5)}, "param_groups": []}),
        ("net", {"state": {"w": torch.ones(5)}, "param_groups": [{"params": [0]}]}),
        ("q", {"scale": torch.ones(3), "growth_factor": torch.ones(3), "backoff_factor": torch.ones(3)}),
        ("q", {"scale": torch.ones(3), "growth_factor": 1, "backoff_factor": 1, "growth_interval": 1, "_growth_tracker": 1}),
        ("m", {"rng_table": torch.arange(9, dtype=torch.uint8)}), ("m", {"rng": torch.arange(9, dtype=torch.uint8)}),
        ("rng", {"table": torch.arange(9, dtype=torch.uint8)}), ("m", {"rng_table": torch.zeros(16, dtype=torch.uint8)}),
    ],
)  # fmt: skip
def test_what_only_looks_like_training_state(tmp_path: Path, name: str, value: Any) -> None:
    """Catches weights that are left out since their name or keys resemble those of training state: a doubt must lead to a question."""
    torch.save({"model": W, name: value}, tmp_path / "x.pt")
    assert "'model' (2 tensors, 32 B)" in refusal(tmp_path / "x.pt")
    state, _ = converted(tmp_path / "x.pt", drop=name)
    assert same(state, W)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a.b": W, "a": {"b": MORE}}, "['a.b'] and ['a', 'b']"),
        ({"a": {"b": W}, "a.b": [torch.ones(1)]}, "['a', 'b'] and ['a.b']"),
    ],
)
def test_a_key_that_leads_to_two_values(tmp_path: Path, content: dict[str, Any], found: str) -> None:
    """Catches a key with a dot that silently means the first of two mappings."""
    torch.save(content, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt", key="a.b")
    assert f"one mapping at key 'a.b' was expected, it leads to several: {found}; load the file and" in message
