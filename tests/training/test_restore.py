"""A training state that is saved and resumed: what goes where, what is refused before anything changes, and what the notes name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

import shardsave
from shardsave._training.describe import describe
from shardsave._training.restore import StoredTraining, plan_restore
from support import same_bits
from training_state import edit_training


def keep(folder: Path, training: Any, model: Any = None, **options: Any) -> None:
    shardsave.save({} if model is None else model, folder, training=training, durable=False, **options)


def restore(folder: Path, training: Any, model: Any = None, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """Resumes from ``folder``. Returns the values and the notes."""
    resumed = shardsave.resume(folder, model, training=training, **options)
    return resumed.values, resumed.notes


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def trained(model: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, *optimizers: Any) -> None:
    model(torch.ones(2, 3)).pow(2).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def refused(folder: Path, training: Any, model: Any, message: str, error: type[Exception], **options: Any) -> None:
    """Asserts that the plan raises ``error`` with ``message``, and that nothing in ``training`` changes."""
    before = copy.deepcopy([leaf.state_dict() for leaf in training.values() if hasattr(leaf, "state_dict")])
    with pytest.raises(error, match=message) as caught:
        restore(folder, training, model, **options)
    assert "nothing was changed" in str(caught.value) or isinstance(caught.value, ValueError)
    after = [leaf.state_dict() for leaf in training.values() if hasattr(leaf, "state_dict")]
    assert repr(before) == repr(after)


def test_plain_values(tmp_path: Path) -> None:
    """Catches a value that comes back as another type or changed, a key that is lost, and leaves that are replaced instead of filled."""
    values = {
        "none": None, "yes": True, "whole": 2**70, "real": -0.0, "nan": float("nan"), "infinite": [float("inf"), float("-inf")],
        "complex": complex(1, float("nan")), "text": "naïve\n", "bytes": b"\x00\xff", "tuple": (1, (2.5, [None])), "set": {1, "a", (2, 3)},
        "dict": {1: "one", (2, "b"): {None: 0}}, "empty": [{}, [], (), ""], "dtype": torch.bfloat16, "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]), "scalars": [np.float32(0.1), np.int8(-3), np.bool_(True), np.complex64(1j), np.float64("nan")],
    }  # fmt: skip
    tensors = {
        "tensor": torch.randn(3, 2).t(),
        "array": np.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    keep(tmp_path, {**values, **tensors, "epoch": 4})
    fresh = {name: torch.zeros_like(t) if isinstance(t, torch.Tensor) else np.zeros_like(t) for name, t in tensors.items()}
    got, notes = restore(tmp_path, {"epoch": 0, **dict.fromkeys(values), **fresh})
    assert got.pop("set") == values.pop("set")
    assert repr({name: got[name] for name in values}) == repr(values) and got["epoch"] == 4 and notes == ()
    assert [type(value) for value in got["scalars"]] == [type(value) for value in values["scalars"]]  # type: ignore[attr-defined]
    assert all(got[name] is tensor for name, tensor in fresh.items())
    assert (
        torch.equal(fresh["tensor"], tensors["tensor"]) and (fresh["array"] == tensors["array"]).all() and fresh["half"].all()
    )


def test_structure_of_plain_values(tmp_path: Path) -> None:
    """Catches lists of data compared item by item, and data that only the checkpoint has and that is dropped."""
    keep(tmp_path, {"losses": [3.0, 2.0], "best": {"loss": 2.0, "step": 7}, "note": "a", "mixed": [torch.ones(1), 5]})
    got, notes = restore(tmp_path, {"losses": [], "best": None, "mixed": [torch.zeros(1), 0]})
    assert got["losses"] == [3.0, 2.0] and got["best"] == {"loss": 2.0, "step": 7} and got["note"] == "a" and notes == ()
    assert got["mixed"][1] == 5 and got["mixed"][0] == 1


def test_words_of_the_format_as_data(tmp_path: Path) -> None:
    """Catches plain data that is taken for a leaf, because its keys are words that the document uses."""
    values = {
        "config": {"optimizer": "adamw"},
        "tensor": {"tensor": "x", "on": "cpu"},
        "list": [{"list": [1]}, {"per_rank": "k"}],
    }
    keep(tmp_path, {**values, "object": torch.amp.GradScaler("cpu")})
    got, notes = restore(tmp_path, {**dict.fromkeys(values), "object": torch.amp.GradScaler("cpu")})
    assert {name: got[name] for name in values} == values and notes == ()


def test_missing_and_unexpected(tmp_path: Path) -> None:
    """Catches a leaf that silently keeps its state or is silently unused, and an error after something has changed."""
    model = net()
    keep(tmp_path, {"optimizer": trained(model), "ema": AveragedModel(model), "scaler": torch.amp.GradScaler("cpu")}, model)
    optimizer = trained(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    training = {"optimizer": optimizer, "second": trained(model), "rate": 0.1, "scaler": None}
    refused(
        tmp_path,
        training,
        model,
        r"training\['optimizer'\]: the checkpoint has the state of AdamW, this is SGD; "
        r"training\['second'\]: the checkpoint has nothing for an AdamW; training\['rate'\]: it was not saved; "
        r"training\['scaler'\]: the checkpoint has a GradScaler, here is a NoneType; "
        r"training\['ema'\]: the checkpoint has an AveragedModel, here is nothing; strict=False restores what fits; nothing was changed",
        shardsave.IncompatibleCheckpointError,
    )
    before = copy.deepcopy(optimizer.state_dict())
    got, notes = restore(tmp_path, training, model, strict=False)
    assert len(notes) == 5 and repr(optimizer.state_dict()) == repr(before) and got["rate"] == 0.1
    _, notes = restore(tmp_path, {"optimizer": trained(model)}, model, only=["optimizer"])
    assert notes == ()
    got, notes = restore(tmp_path, training, model, skip=["optimizer", "second", "rate", "scaler", "ema"])
    assert notes == ("training['optimizer']: skipped",)
    refused(tmp_path, training, model, "only must name parts of the training state, 'optimiser' is none; similar: 'optimizer'",
            ValueError, only=["optimiser"])  # fmt: skip
    with pytest.raises(TypeError, match=r"skip must be a collection of names such as \['optimizer'\], not 'ema'"):
        restore(tmp_path, training, model, skip="ema")
    refused(
        tmp_path,
        {},
        model,
        "rng: the checkpoint has no random generators",
        shardsave.IncompatibleCheckpointError,
        rng=True,
        only=["rng"],
    )


def test_parameters_frozen_thawed_added(tmp_path: Path) -> None:
    """Catches state that is silently dropped or silently missing, and options of one group in another."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 0.5}]
    )
    step(model, optimizer)
    keep(tmp_path, {"optimizer": optimizer}, model)
    assert len(describe({"optimizer": optimizer}, model).entries) == 12
    again = net()
    again[2].requires_grad_(False)
    more = nn.Parameter(torch.ones(1))
    again.register_parameter("more", more)
    resumed = torch.optim.Adam([{"params": [*again[0].parameters(), *again[1].parameters()]}, {"params": [more], "lr": 0.25}])
    _, notes = restore(tmp_path, {"optimizer": resumed}, again, strict=False, restore_frozen=False)
    assert notes == (
        "training['optimizer']: group 0 keeps its options, since its parameters were in groups with different ones",
        "training['optimizer']: group 1 is new and keeps its options",
        "training['optimizer']: the state of 2 parameters is unused, they are no longer stepped: '2.weight', '2.bias'",
        "training['optimizer']: 3 parameters without saved state start fresh: '0.weight', '0.bias', 'more'",
    )
    assert [group["lr"] for group in resumed.param_groups] == [1e-3, 0.25]
    assert same_bits(resumed.state[again[1].weight]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"])
    assert set(resumed.state) == set(again[1].parameters())
    optimizer = torch.optim.Adam(model.parameters())
    model[2].requires_grad_(False)
    _, notes = restore(tmp_path, {"optimizer": optimizer}, model, restore_frozen=False)
    assert "2 parameters with saved state are frozen: '2.weight', '2.bias'" in notes[-1]
    model.requires_grad_(True)
    _, notes = restore(tmp_path, {"optimizer": optimizer}, model)  # which restores the flags first
    assert not any("are frozen:" in note or "fresh" in note for note in notes) and not model[0].weight.requires_grad


def test_parameters_frozen_when_they_were_saved(tmp_path: Path) -> None:
    """Catches a note about what is as it was saved: a parameter that was stepped once and frozen before the save."""
    model = net()
    optimizer = trained(model)
    model[0].requires_grad_(False)
    keep(tmp_path, {"o": optimizer}, model)
    again = net()
    again[0].requires_grad_(False)
    assert restore(tmp_path, {"o": torch.optim.AdamW(again.parameters())}, again)[1] == ()


def test_parameters_thawed_and_frozen_again(tmp_path: Path) -> None:
    """Catches parameters that were thawed for this training, and that a resume freezes again without a word."""

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    model = net()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    keep(tmp_path, {"optimizer": optimizer}, model)
    thawed = net()
    _, notes = restore(tmp_path, {"optimizer": optimizer_of(thawed)}, thawed)
    assert any("2 parameters were trainable and are frozen now, as they were saved: '0.weight', '0.bias'; " in n for n in notes)
    assert not thawed[0].weight.requires_grad
    keep(tmp_path, {"optimizer": torch.optim.AdamW(model.parameters())}, model)
    thawed = net()
    _, notes = restore(tmp_path, {"optimizer": torch.optim.AdamW(thawed.parameters())}, thawed)
    assert (
        any("2 parameters were trainable and are frozen now" in note for note in notes) and not thawed[0].weight.requires_grad
    )
    thawed = net()
    _, notes = restore(tmp_path, {"optimizer": optimizer_of(thawed)}, thawed, restore_frozen=False)
    assert not any("frozen now" in note for note in notes) and thawed[0].weight.requires_grad


def test_shapes_and_names_of_parameters(tmp_path: Path) -> None:
    """Catches state of another shape or of another model's parameters, which would fail or be wrong only in the next step."""
    model = net()
    keep(tmp_path, {"optimizer": trained(model)}, model)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    refused(tmp_path, {"optimizer": trained(other)}, other, r"'2.weight' had the shape \[2, 4\], it has \[5, 4\]",
            shardsave.IncompatibleCheckpointError)  # fmt: skip
    renamed = nn.ModuleDict({"model": net()})
    optimizer = torch.optim.AdamW(renamed.parameters())
    refused(tmp_path, {"optimizer": optimizer}, renamed, "none of which is a parameter of this optimizer",
            shardsave.IncompatibleCheckpointError)  # fmt: skip
    on_meta = torch.optim.AdamW(net().to("meta").parameters())
    with pytest.raises(shardsave.UnsupportedTensorError, match="'group 0, parameter 0' is on the meta device"):
        restore(tmp_path, {"optimizer": on_meta})
    lbfgs = torch.optim.LBFGS(model.parameters())
    keep(tmp_path, {"optimizer": lbfgs}, model)
    swapped = torch.optim.LBFGS([*reversed([*model.parameters()])])
    refused(tmp_path, {"optimizer": swapped}, model, "one vector of all parameters, which were others or had another order",
            shardsave.IncompatibleCheckpointError)  # fmt: skip


def test_no_memory_is_shared_and_no_step_is_run(tmp_path: Path) -> None:
    """Catches state that aliases another optimizer's, or the files; a step or a hook that a restore runs; lost strides."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.ones(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    keep(tmp_path, {"optimizers": [optimizer, optimizer]}, model)
    pair = [torch.optim.Adam(model.parameters()) for _ in range(2)]
    calls: list[Any] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *a: calls.append(a)),
        *(o.register_step_post_hook(calls.append) for o in pair),
    ]
    with torch.inference_mode():
        restore(tmp_path, {"optimizers": pair}, model)
    for hook in hooks:
        hook.remove()
    assert not calls and all(p.grad is not None for p in model.parameters())
    weight = model[0].weight
    ours = [o.state[weight]["exp_avg"] for o in pair]
    assert len({t.data_ptr() for t in [*ours, optimizer.state[weight]["exp_avg"]]}) == 3 and not ours[0].is_inference()
    assert all(t.stride() == weight.stride() and same_bits(t, optimizer.state[weight]["exp_avg"]) for t in ours)
    assert pair[0].param_groups[0]["fused"] is True and pair[0].state[weight]["step"].device.type == "cpu"


def test_state_of_sparse_gradients_and_from_another_device(tmp_path: Path) -> None:
    """Catches state that only some optimizers have, and tensors of an object that were on a device which is not here."""
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    keep(tmp_path, {"optimizer": optimizer, "own": Recording(torch.ones(2))}, embedding)
    edit_training(tmp_path, lambda top: top["shared"]["dict"]["own"]["object"]["state"].update(on="cuda"))
    fresh, own = torch.optim.SparseAdam(embedding.parameters()), Recording(None)
    restore(tmp_path, {"optimizer": fresh, "own": own}, embedding)
    assert own.state.is_cuda if torch.cuda.is_available() else own.state.is_cpu
    for key, value in optimizer.state[embedding.weight].items():
        loaded = fresh.state[embedding.weight][key]
        assert same_bits(loaded, value) if isinstance(value, torch.Tensor) else loaded == value


class Recording:
    """Its state is one value."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_accelerates_wrappers(tmp_path: Path) -> None:
    """Catches an optimizer or a scheduler that accelerate wraps on one side only, and groups that change places within."""
    accelerate = pytest.importorskip("accelerate")
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[1:].parameters(), "lr": 0.25},
    ]
    optimizer = torch.optim.AdamW([{**group, "params": [*group["params"]]} for group in groups])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer, scheduler)
    keep(tmp_path, {"optimizer": wrapped[0], "scheduler": wrapped[1]}, model)
    swapped = torch.optim.AdamW(
        [{"params": [*model[1:].parameters()], "lr": 9.0}, {"params": [*model[0].parameters()], "lr": 9.0}]
    )
    again = torch.optim.lr_scheduler.ExponentialLR(swapped, 0.5)
    _, notes = restore(tmp_path, {"optimizer": swapped, "scheduler": again}, model)
    assert notes == () and again.base_lrs == [0.25, 0.5] == [group["lr"] for group in swapped.param_groups]
    wrapped = accelerate.Accelerator(cpu=True).prepare(swapped, again)
    restore(tmp_path, {"optimizer": wrapped[0], "scheduler": wrapped[1]}, model)
    assert again.base_lrs == [0.25, 0.5]


def test_many_parameters_take_linear_time() -> None:
    """Catches torch's search through a list of numbers for each value of the state: as many lookups as parameters, squared."""
    parameters = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(50)])
    optimizer = trained_on(parameters)
    described = describe({"o": optimizer}, parameters)
    stored = {entry.name: Like(entry.tensor) for entry in described.entries}
    plan = plan_restore({"o": optimizer}, parameters, StoredTraining("x", described.shared, {}, stored, 1))
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append(state["param_groups"][0]["params"]))
    plan.apply(flags_restored=True)
    assert seen == [range(50)] and optimizer.param_groups[0]["params"] == [*parameters]


class Like:
    """A stored tensor like a given one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape, self.nbytes = "F32", tuple(tensor.shape), tensor.nbytes


def trained_on(parameters: nn.ParameterList) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    optimizer.step()
    return optimizer
