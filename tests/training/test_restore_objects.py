"""Modules, tensors, generators and objects of the user in a training state that is resumed: they are filled where they are."""

from __future__ import annotations

import copy
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_restore import keep, net, refused, restore, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

import shardsave
from shardsave._training.describe import describe
from support import same_bits, same_state
from training_state import edit_training


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


@pytest.mark.parametrize("at", [-1, 5, 625, 2**30])
def test_generators_that_would_read_beside_their_numbers(tmp_path: Path, at: int) -> None:
    """Catches a state that numpy takes, and with which the next number that is drawn comes from somewhere in memory."""
    twister: Any = np.random.RandomState(1).get_state(legacy=False)
    twister["state"]["pos"] = at
    philox = np.random.Philox(1).state | {"buffer_pos": at}
    own = [np.random.Generator(np.random.MT19937()), np.random.Generator(np.random.Philox()), np.random.RandomState()]
    own[0].bit_generator.state, own[1].bit_generator.state = twister, philox
    own[2].set_state(twister)
    for name, generator in enumerate(own):
        keep(tmp_path / str(name), [generator])
        with refusal(at, most=4 if name == 1 else 624):
            restore(tmp_path / str(name), [copy.deepcopy(generator)])
    process = np.random.get_state(legacy=False)
    try:
        np.random.set_state(twister)
        keep(tmp_path / "process", {}, rng=True)
    finally:
        np.random.set_state(process)
    try:
        with refusal(at, most=624):
            restore(tmp_path / "process", {}, rng=True)
    finally:
        np.random.set_state(process)


def refusal(at: int, *, most: int) -> AbstractContextManager[Any]:
    if 0 <= at <= most:
        return nullcontext()
    return pytest.raises(shardsave.CorruptCheckpointError, match=f"at 0 to {most}, not at {at}; nothing was changed")


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
