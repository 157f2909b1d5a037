"""A training state that is saved and resumed: what goes where, what is refused before anything changes, and what the notes name."""

from __future__ import annotations

import copy
import random
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
from support import same_bits, same_state
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
    plan.apply()
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


def test_modules_in_place(tmp_path: Path) -> None:
    """Catches an averaged model whose tensors are replaced, whose tied or integer tensors are lost, or that is cast silently."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    ema = AveragedModel(model)
    ema.update_parameters(model)
    keep(tmp_path, {"ema": nn.DataParallel(ema)}, model)
    assert len(describe({"ema": nn.DataParallel(ema)}, model).entries) == 1 + 2 + 5 + 3
    fresh = AveragedModel(copy.deepcopy(model))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    tensors = [*fresh.parameters(), *fresh.buffers()]
    version = fresh.module[0].weight._version
    restore(tmp_path, {"ema": fresh}, model)
    assert same_state(fresh, ema) and all(a is b for a, b in zip(tensors, [*fresh.parameters(), *fresh.buffers()]))
    assert fresh.module[0].weight._version > version
    half = AveragedModel(copy.deepcopy(model).bfloat16())
    _, notes = restore(tmp_path, {"ema": half}, model)
    assert len(notes) == 1 and "were cast to the dtype in the module" in notes[0]
    assert same_bits(half.module[0].weight, ema.module[0].weight.bfloat16())
    small = AveragedModel(nn.Sequential(nn.Linear(3, 5)))
    refused(tmp_path, {"ema": small}, model, r"'module.0.weight' is \[4, 3\] on disk, \[5, 3\] in the module",
            shardsave.IncompatibleCheckpointError)  # fmt: skip


class Counting(nn.Module):
    """Loads itself: it has extra state that is no tensor."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.weight = count, nn.Parameter(torch.full((2,), float(count)))

    def get_extra_state(self) -> Any:
        return {"count": self.count, "history": (1, torch.tensor(self.count))}

    def set_extra_state(self, state: Any) -> None:
        self.count, self.history = state["count"], state["history"]


def test_modules_that_load_themselves(tmp_path: Path) -> None:
    """Catches extra state that is lost, or that a module never receives."""
    keep(tmp_path, {"ema": nn.Sequential(Counting(5))})
    fresh = nn.Sequential(Counting(0))
    weight = fresh[0].weight
    restore(tmp_path, {"ema": fresh})
    assert fresh[0].count == 5 and fresh[0].history == (1, torch.tensor(5)) and fresh[0].weight is weight and weight[0] == 5


def test_tensors_in_place_that_cannot_be_filled(tmp_path: Path) -> None:
    """Catches bytes that are read through another dtype or shape, into memory that several elements share, or by two readers at once."""
    keep(tmp_path, {"a": torch.ones(4), "b": torch.zeros(4)})
    memory = torch.zeros(6)
    incompatible, unsupported = shardsave.IncompatibleCheckpointError, shardsave.UnsupportedTensorError
    cases: list[tuple[dict[str, Any], str, type[Exception]]] = [
        ({"a": torch.zeros(4, dtype=torch.float64)}, r"it is \[4\] of float32 on disk, \[4\] of float64 here", incompatible),
        ({"a": torch.zeros(5)}, r"it is \[4\] of float32 on disk, \[5\] of float32 here", incompatible),
        ({"a": torch.zeros(1).expand(4)}, "several of its elements share memory", unsupported),
        ({"a": torch.zeros(4, device="meta")}, "it is on the meta device", unsupported),
        ({"a": memory[:4], "b": memory[2:]}, r"it shares some with training\['[ab]'\]", unsupported),
        ({"a": memory[:4], "b": memory[:4]}, r"it shares some with training\['[ab]'\]", unsupported),
    ]
    for training, message, error in cases:
        refused(tmp_path, {"b": torch.zeros(4), **training}, None, message, error)
    array = np.zeros(4, np.float32)
    keep(tmp_path, {"a": array})
    array.flags.writeable = False
    refused(tmp_path, {"a": array}, None, "an array that can be written", unsupported)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Catches the state of one rank in another, and generators that are set to it; both are named."""
    model = net()
    keep(tmp_path, {"loader": shardsave.PerRank(torch.ones(2)), "o": trained(model)}, model, rng=True)
    edit_training(tmp_path, lambda top: top.update(ranks=4))
    training = {"loader": shardsave.PerRank(torch.zeros(2)), "o": trained(model)}
    state = random.getstate()
    _, notes = restore(tmp_path, training, model, rng=True)
    assert random.getstate() == state and not training["loader"].value.any()
    assert notes == (
        "training['loader']: it belongs to a rank and is not filled, since the number of ranks is another one",
        "rng: not set, since 4 ranks saved it",
    )
    refused(
        tmp_path,
        training,
        model,
        "1 ranks were expected, 4 saved it",
        shardsave.IncompatibleCheckpointError,
        on_world_change="raise",
    )
    edit_training(tmp_path, lambda top: top.update(ranks=1))
    restore(tmp_path, training, model, rng=True)
    assert training["loader"].value.all()


def generators(seed: int) -> list[Any]:
    numpy = [np.random.default_rng(seed), np.random.Generator(np.random.MT19937(seed)), np.random.RandomState(seed)]
    return [torch.Generator().manual_seed(seed), random.Random(seed), *numpy]


def draw(own: list[Any]) -> list[float]:
    numbers = [torch.rand(1, generator=own[0]).item(), *(generator.random() for generator in own[1:4]), own[4].rand()]
    return [*numbers, np.random.rand(), random.random(), *torch.rand(2).tolist()]


def test_generators(tmp_path: Path) -> None:
    """Catches a generator that goes on with other numbers, and a state for a generator of another kind."""
    own = generators(1)
    keep(tmp_path, own, rng=True)
    numbers = draw(own)
    assert draw(own) != numbers
    others = generators(9)
    restore(tmp_path, others, rng=True)
    assert draw(others) == numbers
    others[1] = np.random.default_rng()
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"training\[1\]: the checkpoint has the state of random.Random"
    ):
        restore(tmp_path, others)
    others = generators(9)
    others[3] = np.random.Generator(np.random.PCG64(5))
    before = random.getstate(), others[1].getstate()
    with pytest.raises(
        shardsave.CorruptCheckpointError, match=r"training\[3\]: the state of a generator was .*; nothing was changed"
    ):
        restore(tmp_path, others, rng=True)
    assert before == (random.getstate(), others[1].getstate())


class Refusing:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> Any:
        return {"level": 1}

    def load_state_dict(self, state: Any) -> None:
        if self.fails:
            raise KeyError("colour")


def test_an_object_that_refuses_its_state(tmp_path: Path) -> None:
    """Catches an error without the place of the object, and generators that are set although the restore failed."""
    keep(tmp_path, {"policy": Refusing(False)}, rng=True)
    state = random.random()
    assert state != random.random()
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"training\['policy'\] .* it raised KeyError: 'colour'; the"
    ):
        restore(tmp_path, {"policy": Refusing(True)}, rng=True)
    assert state != random.random()


def test_the_same_object_twice(tmp_path: Path) -> None:
    """Catches an object that receives two states, one after the other."""
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    keep(tmp_path, [first, first, second])
    restore(tmp_path, [second, second, first])
    assert second.initial_seed() == 1 and first.initial_seed() == 2
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"training\[2\]: it is also training\[0\], where another state was saved"
    ):
        restore(tmp_path, [first, first, first])


def test_what_a_resumed_training_gets() -> None:
    """Catches a first step that was saved already, and notes that could move a terminal's cursor."""
    resumed = shardsave.Resumed(7, {"epoch": 1}, ("a\x1b[2J",))
    assert (resumed.next_step, shardsave.Resumed(None, None).next_step, shardsave.Resumed(0, None).next_step) == (8, 1, 1)
    assert str(resumed) == r"resumed after step 7; a\x1b[2J" and resumed.notes == (r"a\x1b[2J",)


def test_a_list_for_a_dict(tmp_path: Path) -> None:
    """Catches a message that lists every leaf as missing where the structure is another one, or that does not say which."""
    model = net()
    one, two = trained(model), torch.amp.GradScaler("cpu")
    for saved, live, message in (
        ({"parts": {"a": one, "b": two}}, {"parts": [one, two]},
         r"expected, training\['parts'\]: the checkpoint has a dict of 'a', 'b', here is a list; strict"),
        ({"parts": [one, two]}, {"parts": {"a": one, "b": two}}, 
         r"expected, training\['parts'\]: the checkpoint has a list, here is a dict; strict"),
        ({"parts": (one, 1)}, {"parts": {1: one}}, r"expected, training\['parts'\]: the checkpoint has a tuple, here is a dict; strict"),
        ({"parts": {1: one}}, {"parts": [one]}, r"expected, training\['parts'\]: the checkpoint has a dict, here is a list; strict"),
        ([one], {"a": one}, "expected, training: the checkpoint has a list, here is a dict; strict"),
        ({"a": one}, [one], "expected, training: the checkpoint has a dict of 'a', here is a list; strict"),
        ({"a": {"b": one}}, {"a": []}, r"training\['a'\]: the checkpoint has a dict of 'b', here is a list; strict"),
        ({"a": [torch.ones(1)]}, {"a": {}}, r"training\['a'\]: the checkpoint has a list, here is a dict; strict"),
        ({"a": None}, {"a": [one]}, r"expected, training\['a'\]: the checkpoint has None, here is a list; strict"),
        ({"a": one}, {"a": {"b": one}}, r"expected, training\['a'\]: the checkpoint has an AdamW, here is a dict; strict"),
        ({"a": {"b": one}}, {"a": one}, r"expected, training\['a'\]: the checkpoint has a dict of 'b' for an AdamW; strict"),
        ({"a": torch.ones(1)}, {"a": one}, r"expected, training\['a'\]: the checkpoint has a tensor for an AdamW; strict"),
    ):  # fmt: skip
        keep(tmp_path, saved, model)
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=message) as caught:
            restore(tmp_path, live, model)
        assert str(caught.value).endswith("; strict=False restores what fits; nothing was changed")
        _, notes = restore(tmp_path, live, model, strict=False)
        assert len(notes) == 1 and "the checkpoint has" in notes[0]
    keep(tmp_path, {"a": {"b": one}, "scaler": two}, model)
    assert restore(tmp_path, {"a": [one], "scaler": two}, model, only=["scaler"])[1] == ()
    assert restore(tmp_path, {"a": [one], "scaler": two}, model, skip=["a"])[1] == ()
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"training\['a'\]: the checkpoint has a dict of 'b', here is a list"
    ):
        restore(tmp_path, {"a": [one], "scaler": two}, model, only=["a/0"])
