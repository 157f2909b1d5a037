"""State of parameters, schedulers and scalers in a checkpoint: what could not go on from it is refused, before anything is changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import shardsave
from shardsave._training.optimizer_states import _form_of
from training_state import edit_training, training_directory

#: Each optimizer of torch, and its arguments.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {}, "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {}, "Adamax": {}, "LBFGS": {},
    "Muon": {}, "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.9, "centered": True}, "Rprop": {}, "SGD": {"momentum": 0.9},
}  # fmt: skip


def net(name: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2, bias=name != "Muon", dtype=dtype), nn.Linear(2, 1, bias=name != "Muon", dtype=dtype))


def trained(name: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    kind: Any = getattr(torch.optim, name)
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **{**OPTIMIZERS[name], **more})

    def loss() -> Any:
        optimizer.zero_grad()
        value = sum(parameter.abs().pow(2).sum() for parameter in model.parameters())
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(loss)
    return optimizer


def leaf(document: Any, name: str = "optimizer") -> Any:
    return next(iter(document["shared"]["dict"][name].values()))


def in_document(folder: Path, name: str = "optimizer") -> Any:
    return leaf(json.loads((training_directory(folder) / "index.json").read_bytes()), name)


def refused(folder: Path, model: nn.Module, training: dict[str, Any], message: str) -> None:
    """Asserts that a resume is refused with ``message`` before anything is changed, and that ``strict=False`` keeps the wrong leaf."""
    before = repr((model.state_dict(), [copy.deepcopy(value.state_dict()) for value in training.values()]))
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=message) as caught:
        shardsave.resume(folder, model, training=training)
    assert str(caught.value).endswith("; strict=False restores what fits; nothing was changed"), caught.value
    assert repr((model.state_dict(), [value.state_dict() for value in training.values()])) == before
    notes = shardsave.resume(folder, model, training=training, strict=False).notes
    assert any(note.endswith("; it keeps the state that it has") for note in notes), notes


def test_every_optimizer_of_torch_is_known() -> None:
    """Catches a class that a new torch has, of whose state nothing is known."""
    kinds = {
        name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert kinds - {"Optimizer"} == {*OPTIMIZERS, "SparseAdam"}
    assert all(_form_of(getattr(torch.optim, name)) is not None for name in kinds - {"Optimizer"})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_another_kind(tmp_path: Path, name: str) -> None:
    """Catches a value in the state of a parameter that is taken, and fails only in a later step, in the middle of a training."""
    model = net(name)
    shardsave.save(model, tmp_path, training={"optimizer": trained(name, model), "x": nn.Embedding(5, 5)}, durable=False)
    whole = in_document(tmp_path)["state"]
    needed_by = "" if name in ("LBFGS", "SGD", "Muon") else "step"
    values = whole["0.weight"]
    assert values
    for key in values:
        of_another_shape = {"tensor": "x/weight"}
        for wrong in ("x", of_another_shape):
            edit_training(tmp_path, lambda document: leaf(document)["state"]["0.weight"].update({key: wrong}))
            fresh = net(name)
            refused(
                tmp_path,
                fresh,
                {"optimizer": trained(name, fresh), "x": nn.Embedding(5, 5)},
                rf"'{key}' of '0.weight' was expected to be a (number|tensor of .*|list, each a .*), the checkpoint has ",
            )
        edit_training(tmp_path, lambda document: leaf(document)["state"].update(whole))
    if needed_by:
        edit_training(tmp_path, lambda document: leaf(document)["state"]["0.weight"].pop(needed_by))
        fresh = net(name)
        message = rf"'{needed_by}' of '0.weight' was expected to be a number, the checkpoint has none"
        refused(tmp_path, fresh, {"optimizer": trained(name, fresh), "x": nn.Embedding(5, 5)}, message)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("exp_avg", {"tensor": "codes/weight"}, r"\[2, 3\] of floating numbers, the checkpoint has a tensor of \[2, 3\] of int64"),
        ("exp_avg", None, r"a tensor of \[2, 3\] of floating numbers, the checkpoint has none"),
        ("exp_avg_sq", {"list": [{"tensor": "x"}]}, "the checkpoint has a list of 1 with tensors"),
        ("step", {"list": [3]}, r"a number, the checkpoint has \[3\]"),
        ("step", True, "a number, the checkpoint has true"),
        ("max_exp_avg_sq", "none", r"a tensor of \[2, 3\] of floating numbers, the checkpoint has 'none'"),
    ],
)  # fmt: skip
def test_the_message_names_the_value(tmp_path: Path, key: str, wrong: Any, message: str) -> None:
    """Catches a message that does not say what was wanted and what was found."""
    model = net()
    codes = {"weight": torch.ones(2, 3, dtype=torch.int64)}
    training = {"optimizer": trained("AdamW", model), "codes": codes, "x": torch.ones(1)}
    shardsave.save(model, tmp_path, training=training, durable=False)
    edit_training(tmp_path, lambda document: leaf(document)["state"]["0.weight"].update({key: wrong}))
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=f"'{key}' of '0.weight' was expected to be .*{message}"):
        shardsave.resume(tmp_path, model, training=training)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_honest_states(tmp_path: Path, name: str) -> None:
    """Catches an honest state that is refused: of complex parameters, of one without elements or dimensions, of a number that is NaN."""
    dtype = torch.float32 if name in ("Muon", "Adafactor") else torch.complex64
    model = net(name, dtype)
    if name not in ("Muon", "Adafactor"):
        model.register_parameter("scalar", nn.Parameter(torch.ones(())))
        model.register_parameter("empty", nn.Parameter(torch.ones(0, 2)))
    lr = {"lr": torch.tensor(0.01)} if name in ("Adam", "AdamW") else {}
    optimizer = trained(name, model, **lr)
    shardsave.save(model, tmp_path, training={"optimizer": optimizer}, durable=False)
    edit_training(tmp_path, lambda document: leaf(document)["groups"][0]["options"]["dict"].update(lr={"float": "nan"}))
    resumed = trained(name, model)
    assert shardsave.resume(tmp_path, model, training={"optimizer": resumed}).notes == ()
    assert resumed.param_groups[0]["lr"] != resumed.param_groups[0]["lr"]
    assert repr(resumed.state_dict()["state"]) == repr(optimizer.state_dict()["state"])


def test_an_optimizer_with_another_step(tmp_path: Path) -> None:
    """Catches a class of the user's that is refused, since it keeps something else under the names of its base."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["momentum_buffer"] = {"mean": parameter.detach().mean(), "kind": "own"}

    model = net()
    optimizer = Own(model.parameters(), 0.1)
    optimizer.step()
    shardsave.save(model, tmp_path, training=[optimizer], durable=False)
    resumed = Own(model.parameters(), 0.1)
    assert shardsave.resume(tmp_path, model, training=[resumed]).notes == ()
    assert resumed.state[model[0].weight]["momentum_buffer"]["kind"] == "own"  # type: ignore[index]


def test_options_that_are_missing(tmp_path: Path) -> None:
    """Catches an option that silently stays as it is here, because the checkpoint lacks it; and a flag of a newer torch that is missed."""

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any, **options: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, **options})

    model = net()
    optimizer, own = trained("AdamW", model), Own(model.parameters())
    shardsave.save(model, tmp_path, training={"optimizer": optimizer, "own": own}, durable=False)
    options = in_document(tmp_path)["groups"][0]["options"]["dict"]
    edit_training(tmp_path, lambda document: leaf(document)["groups"][0]["options"]["dict"].pop("foreach"))
    training = {"optimizer": trained("AdamW", model), "own": Own(model.parameters(), new=0.5, more=None)}
    assert shardsave.resume(tmp_path, model, training=training).notes == (
        "training['own']: group 0 keeps the options 'new', which were not saved",
    )
    for name in ("lr", "betas", "weight_decay"):
        edit_training(tmp_path, lambda document: leaf(document)["groups"][0]["options"]["dict"].pop(name))
        refused(tmp_path, model, training, rf"group 0: the option '{name}' was expected, the checkpoint has none")
        edit_training(tmp_path, lambda document: leaf(document)["groups"][0]["options"].update(dict=dict(options)))


def test_a_parameter_that_is_named_twice(tmp_path: Path) -> None:
    """Catches a parameter in two groups, one of which would be believed."""
    model = net()
    training = {"optimizer": trained("SGD", model)}
    shardsave.save(model, tmp_path, training=training, durable=False)
    edit_training(tmp_path, lambda document: leaf(document)["groups"].append(leaf(document)["groups"][0]))
    with pytest.raises(shardsave.CorruptCheckpointError, match="groups in which each parameter is once were expected"):
        shardsave.resume(tmp_path, model, training=training)


#: Each scheduler of torch, made for an optimizer.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 2), schedulers.ExponentialLR(o, 0.9)], o),
    "ConstantLR": schedulers.ConstantLR,
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 0.2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "LinearLR": schedulers.LinearLR,
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=9),
    "PolynomialLR": schedulers.PolynomialLR,
    "ReduceLROnPlateau": schedulers.ReduceLROnPlateau,
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
}

#: Values that are None here, so that nothing is known of them.
UNKNOWN = {"_scale_fn_custom"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tmp_path: Path, name: str) -> None:
    """Catches a value that a scheduler of torch takes, whatever it is, and that fails or means nothing in a later step."""
    model = net()
    optimizer = trained("SGD", model)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(4):
        optimizer.step()
        scheduler.step(*([1.0 + step] if name == "ReduceLROnPlateau" else []))
    shardsave.save(model, tmp_path, training={"scheduler": scheduler, "optimizer": optimizer}, durable=False)

    def made() -> dict[str, Any]:
        optimizer = trained("SGD", model)
        return {"scheduler": SCHEDULERS[name](optimizer), "optimizer": optimizer}

    training = made()
    assert shardsave.resume(tmp_path, model, training=training).notes == ()
    assert repr(training["scheduler"].state_dict()) == repr(scheduler.state_dict())
    (whole,) = in_document(tmp_path, "scheduler")["state"].values()

    def put(state: Any) -> None:
        edit_training(tmp_path, lambda document: leaf(document, "scheduler").update(state={"dict": state}))

    for key in whole.keys() - UNKNOWN:
        put({**whole, key: {"list": [{"list": []}, "x", None]}})
        refused(tmp_path, model, made(), rf"training\['scheduler'\](\['{key}'\])?: .* was expected, the checkpoint has ")
    for key in ("step", "optimizer", "get_lr"):
        put({**whole, key: 5})
        refused(tmp_path, model, made(), f"the state of a scheduler was expected, the checkpoint has a value for '{key}'")
    for key in whole.keys() & {"last_epoch", "base_lrs", "lr_lambdas", "_schedulers"}:
        put({other: value for other, value in whole.items() if other != key})
        refused(tmp_path, model, made(), f"'{key}' was expected, the checkpoint has none")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"dict": {}}, "it is enabled, the checkpoint has the state of a disabled one"),
        ({"list": []}, r"a dict was expected, the checkpoint has \[\]"),
        ({"dict": {"scale": 2.0}}, "'growth_factor', 'backoff_factor', 'growth_interval' and 1 more was expected, the checkpoint has none"),
    ],
)  # fmt: skip
def test_scalers(tmp_path: Path, state: Any, message: str) -> None:
    """Catches a scaler that raises when the model has been filled already."""
    model = net()
    shardsave.save(model, tmp_path, training={"scaler": torch.amp.GradScaler("cpu")}, durable=False)
    edit_training(tmp_path, lambda document: leaf(document, "scaler").update(state=state))
    refused(tmp_path, model, {"scaler": torch.amp.GradScaler("cpu")}, rf"training\['scaler'\]: {message}")
    assert shardsave.resume(tmp_path, model, training={"scaler": torch.amp.GradScaler("cpu", enabled=False)}).notes == ()


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    """Catches a scale that is text: it would be taken, and fail in the next step."""
    model = net()
    shardsave.save(model, tmp_path, training={"scaler": torch.amp.GradScaler("cpu")}, durable=False)
    edit_training(tmp_path, lambda document: leaf(document, "scaler")["state"]["dict"].update(scale="x"))
    refused(
        tmp_path, model, {"scaler": torch.amp.GradScaler("cpu")}, r"\['scale'\]: a number was expected, the checkpoint has 'x'"
    )
