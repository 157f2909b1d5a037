"""The options of an optimizer's groups in a checkpoint: what an optimizer could not take is refused, and what it can take is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardsave
from training_state import edit_training

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "tensor lr": (torch.optim.Adam, {"lr": torch.tensor(0.1)}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "LBFGS": (torch.optim.LBFGS, {}),
    "Rprop": (torch.optim.Rprop, {}),
}

#: The optimizer, the option, its value in the document, what the message says of it.
WRONG = [
    ("AdamW", "lr", None, "a number, the checkpoint has null"),
    ("AdamW", "lr", "0.1", "a number, the checkpoint has '0.1'"),
    ("AdamW", "lr", True, "a number, the checkpoint has true"),
    ("AdamW", "lr", {"list": [0.1]}, r"a number, the checkpoint has \[0.1\]"),
    ("AdamW", "lr", {"dict": {}}, r"a number, the checkpoint has \{\}"),
    ("AdamW", "lr", {"complex": [0.1, 0.0]}, "a number, the checkpoint has a complex"),
    ("AdamW", "lr", {"tensor": "x"}, r"a number, the checkpoint has a tensor of \[3\]"),
    ("AdamW", "betas", "ab", "a tuple of 2, the checkpoint has 'ab'"),
    ("AdamW", "betas", 0.9, "a tuple of 2, the checkpoint has 0.9"),
    ("AdamW", "betas", {"tuple": [0.9]}, r"a tuple of 2, the checkpoint has \(0.9,\)"),
    ("AdamW", "betas", {"tuple": [0.9, None]}, r"a tuple of 2, the checkpoint has \(0.9, None\)"),
    ("AdamW", "amsgrad", None, "True or False, the checkpoint has null"),
    ("AdamW", "amsgrad", 0.5, "True or False, the checkpoint has 0.5"),
    ("AdamW", "maximize", "no", "True or False, the checkpoint has 'no'"),
    ("SGD", "momentum", {"set": [1]}, "a number, the checkpoint has a set"),
    ("SGD", "initial_lr", None, "a number, the checkpoint has null"),
    ("tensor lr", "lr", "0.1", "a number, the checkpoint has '0.1'"),
    ("Adafactor", "eps", {"tuple": [None, "x"]}, r"a tuple of 2, the checkpoint has \(None, 'x'\)"),
    ("Adafactor", "eps", None, "a tuple of 2, the checkpoint has null"),
    ("LBFGS", "max_iter", "many", "a number, the checkpoint has 'many'"),
    ("Rprop", "etas", {"tuple": []}, r"a tuple of 2, the checkpoint has \(\)"),
]


def make(name: str, **more: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    kind, options = OPTIMIZERS[name]
    return model, kind(model.parameters(), **{**options, **more})


def step(model: nn.Module, optimizer: Any) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(2, 3)).pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)


def put(folder: Path, option: str, value: Any) -> None:
    """Replaces an option of the first group in the document of the training state in ``folder``."""
    edit_training(
        folder,
        lambda document: document["shared"]["dict"]["optimizer"]["optimizer"]["groups"][0]["options"]["dict"].update(
            {option: value}
        ),
    )


@pytest.mark.parametrize(("name", "option", "value", "message"), WRONG)
def test_an_option_of_another_kind(tmp_path: Path, name: str, option: str, value: Any, message: str) -> None:
    """Catches an option that is taken and fails only in a later step, in the middle of a training."""
    model, optimizer = make(name)
    step(model, optimizer)
    shardsave.save(model, tmp_path, training={"optimizer": optimizer, "x": torch.ones(3)}, durable=False)
    put(tmp_path, option, value)
    model, optimizer = make(name)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    training = {"optimizer": optimizer, "x": torch.zeros(3)}
    with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
        shardsave.resume(tmp_path, model, training=training)
    assert caught.match(rf"training\['optimizer'\], group 0: the option '{option}' was expected to be {message}; strict=False")
    assert str(caught.value).endswith("; nothing was changed")
    assert repr((model.state_dict(), optimizer.state_dict())) == repr(before) and not training["x"].any()
    resumed = shardsave.resume(tmp_path, model, training=training, strict=False)
    assert len(resumed.notes) == 1 and f"the option '{option}'" in resumed.notes[0] and training["x"].all()
    assert repr(optimizer.state_dict()) == repr(before[1])


def set_group(**options: Any) -> Any:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def warm_up(optimizer: Any) -> None:
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)


#: The optimizer; its arguments and changes when it is saved; its arguments and changes when it is resumed.
ACCEPTED: list[tuple[str, dict[str, Any], Any, dict[str, Any], Any]] = [
    ("AdamW", {"lr": 1}, None, {"lr": 0.5}, None),
    ("AdamW", {"lr": torch.tensor(0.1)}, None, {"lr": 0.5}, None),
    ("AdamW", {"lr": 0.1}, None, {"lr": torch.tensor(0.5)}, None),
    ("AdamW", {}, set_group(lr=np.float32(0.1)), {}, None),
    ("AdamW", {}, set_group(lr=np.float64(0.1), amsgrad=np.bool_(False)), {"amsgrad": True}, None),
    ("AdamW", {}, set_group(lr=np.array(0.1)), {}, None),
    ("AdamW", {}, None, {}, set_group(lr=np.float16(0.1), eps=np.array([1e-8]))),
    ("AdamW", {}, None, {}, set_group(weight_decay=torch.tensor([0.1]))),
    ("AdamW", {}, set_group(betas=[0.5, 0.9]), {}, None),
    ("AdamW", {}, None, {"betas": [0.5, 0.9]}, None),
    ("AdamW", {"betas": (torch.tensor(0.5), torch.tensor(0.9))}, None, {}, None),
    ("AdamW", {}, set_group(amsgrad=1), {}, None),
    ("AdamW", {"foreach": True}, None, {"foreach": False}, None),
    ("AdamW", {"foreach": True}, None, {}, None),
    ("AdamW", {}, None, {"foreach": True}, None),
    ("AdamW", {"fused": True}, None, {"foreach": False}, None),
    ("AdamW", {}, warm_up, {}, None),
    ("AdamW", {}, None, {}, warm_up),
    ("AdamW", {}, set_group(name="decoder", layers=[1, 2]), {}, set_group(name=None, layers=3)),
    ("SGD", {"momentum": 0}, None, {"momentum": 0.9}, None),
    ("Adafactor", {"eps": (1e-30, 1e-3)}, None, {}, None),
    ("Adafactor", {}, None, {"eps": (1e-30, 1e-3)}, None),
    ("Adafactor", {"eps": (1e-30, 1e-3)}, None, {"eps": (None, 1)}, None),
    ("LBFGS", {"line_search_fn": "strong_wolfe"}, None, {}, None),
    ("LBFGS", {}, None, {"line_search_fn": "strong_wolfe"}, None),
    ("LBFGS", {"max_eval": 5}, None, {}, None),
    ("LBFGS", {}, set_group(max_eval=None), {"max_eval": 5}, None),
]


@pytest.mark.parametrize(("name", "saved", "before_save", "resumed", "before_resume"), ACCEPTED)
def test_options_that_may_change(
    tmp_path: Path, name: str, saved: dict[str, Any], before_save: Any, resumed: dict[str, Any], before_resume: Any
) -> None:
    """Catches a training that cannot go on because an option is a number of another type, or None where that is allowed."""
    model, optimizer = make(name, **saved)
    if before_save is not None:
        before_save(optimizer)
    expected = copy.deepcopy(optimizer.state_dict()["param_groups"][0])
    shardsave.save(model, tmp_path, training={"optimizer": optimizer}, durable=False)
    model, optimizer = make(name, **resumed)
    if before_resume is not None:
        before_resume(optimizer)
    assert not shardsave.resume(tmp_path, model, training={"optimizer": optimizer}).notes
    loaded = optimizer.state_dict()["param_groups"][0]
    assert {key: repr(loaded[key]) for key in expected} == {key: repr(value) for key, value in expected.items()}


class Running(torch.optim.SGD):
    """Keeps numbers of its own in its groups, as some third-party optimizers do, and has an option of no kind that is known here."""

    def __init__(self, parameters: Any, lr: float = 0.1, policy: Any = torch.float32) -> None:
        super().__init__(parameters, lr)
        self.param_groups[0].update(k=0, best=None, policy=policy)


def test_options_of_third_parties(tmp_path: Path) -> None:
    """Catches an optimizer of a third party that cannot be resumed because what it keeps in a group has changed its kind."""
    model = nn.Linear(3, 2)
    optimizer = Running(model.parameters(), policy=torch.bfloat16)
    optimizer.param_groups[0].update(k=torch.ones(4), best=(1, 2))
    shardsave.save(model, tmp_path, training={"optimizer": optimizer}, durable=False)
    again = Running(model.parameters())
    assert not shardsave.resume(tmp_path, model, training={"optimizer": again}).notes
    group = again.param_groups[0]
    assert torch.equal(group["k"], torch.ones(4)) and group["best"] == (1, 2) and group["policy"] is torch.bfloat16


def test_options_of_groups_in_another_order(tmp_path: Path) -> None:
    """Catches options that are compared with those of another group, and a group that keeps its options but is refused."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(model, (0.1, 0.2))]
    shardsave.save(model, tmp_path, training={"optimizer": torch.optim.SGD(groups)}, durable=False)
    put(tmp_path, "lr", None)
    for reverse in (False, True):
        ordered = [{"params": part.parameters()} for part in (reversed([*model]) if reverse else model)]
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=f"group {int(reverse)}: the option 'lr' was expected"):
            shardsave.resume(tmp_path, model, training={"optimizer": torch.optim.SGD(ordered)})
    resumed = shardsave.resume(tmp_path, model, training={"optimizer": torch.optim.SGD(model.parameters())})
    assert "keeps its options" in resumed.notes[0]
