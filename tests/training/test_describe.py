"""A training state as data: what is kept and under which names, and what is refused by its place, before anything else happens."""

from __future__ import annotations

import collections
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import shardsave
from shardsave._training.describe import describe


class Recursive:
    """Its state contains itself."""

    def state_dict(self) -> Any:
        state: dict[str, Any] = {"list": []}
        state["list"].append(state)
        return state

    def load_state_dict(self, state: Any) -> None:
        pass


class Failing:
    def state_dict(self) -> Any:
        raise RuntimeError("not\nnow")

    def load_state_dict(self, state: Any) -> None:
        pass


class Mode(int):
    pass


class Two(torch.Tensor):
    """Consists of other tensors."""

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def with_callable(value: Any) -> Any:
    class Rate:
        def __init__(self) -> None:
            self.value = value

        def __call__(self, step: int) -> float:
            return 1.0

    return LambdaLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), Rate())


def with_sparse_state() -> list[Any]:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step(lambda: layer(torch.ones(2)).sum().backward())
    optimizer.state[layer.weight]["exp_avg"] = torch.eye(2).to_sparse()
    return [optimizer, layer]


def with_sparse_buffer() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("b", torch.eye(2).to_sparse())
    return layer


PLAIN = r"plain data, a tensor or an object with state_dict and load_state_dict was expected, it is "
UNICODE = "text in Unicode was expected, it has half of a surrogate pair"

REFUSED: dict[str, tuple[Any, str]] = {
    "a function": ({"callbacks": [len, print]}, rf"training\['callbacks'\]\[0\]: {PLAIN}a builtin_function_or_method"),
    "a lambda": ({"f": lambda: 1}, rf"training\['f'\]: {PLAIN}a function"),
    "a class with a state": ({"c": nn.Linear}, rf"training\['c'\]: {PLAIN}a type"),
    "an object": ({"a": {"b": (1, object())}}, rf"training\['a'\]\['b'\]\[1\]: {PLAIN}an object"),
    "a subclass of int": ({"mode": Mode(3)}, rf"training\['mode'\]: {PLAIN}a Mode"),
    "a named tuple": ([collections.namedtuple("Point", "x y")(1, 2)], rf"training\[0\]: {PLAIN}a Point"),
    "an array of objects": ({"a": np.array([None])}, r"\"training\['a'\]\": a dtype that torch has was expected, it is object"),
    "a swapped array": ({"a": np.ones(2, ">f4")}, r"training\['a'\]: an array in the byte order of this processor was expected"),
    "a long double": ({"a": np.longdouble(1)}, rf"training\['a'\]: {PLAIN}a longdouble"),
    "a text": ({"a": "\ud800"}, rf"training\['a'\]: {UNICODE}"),
    "a key": ({"\ud800": 1}, rf"training: {UNICODE}"),
    "a key by identity": ({"a": {nn.Linear(1, 1): 1}}, r"training\['a'\]: keys and elements that are numbers"),
    "a set of objects": ({"a": {object()}}, r"training\['a'\]: keys and elements that are numbers"),
    "a number": ({"a": [10**400]}, r"training\['a'\]\[0\]: whole numbers of at most 308 digits were expected"),
    "a depth": (deep(70), r"training(\[0\]){64}: values nested at most 64 levels deep were expected, it is deeper"),
    "a state that contains itself": ({"a": Recursive()}, r"training\['a'\].state_dict\(\)\['list'\]\[0\]: values that do not"),
    "a state that fails": ({"a": Failing()}, r"training\['a'\]: its state was expected, state_dict\(\) raised RuntimeError: not now"),
    "a function in a state": ({"s": with_callable(print)}, r"training\['s'\].state_dict\(\)\['lr_lambdas'\]\[0\]\['value'\]: plain data"),
    "a generator of the system": ({"g": random.SystemRandom()}, r"training\['g'\]: a generator with a state was expected"),
    "two ranks": (shardsave.PerRank([shardsave.PerRank(1)]), r"training\[0\]: PerRank around a value that all ranks would share was"),
    "a meta tensor": ({"t": torch.ones(2, device="meta")}, r"\"training\['t'\]\": a tensor with data was expected, it is on the meta"),
    "a sparse tensor": ({"t": torch.ones(2).to_sparse()}, r"\"training\['t'\]\": a strided tensor was expected, its layout is sparse_coo"),
    "a tensor of tensors": ({"t": torch.ones(2).as_subclass(Two)}, r"training\['t'\]: a plain tensor was expected, it is a Two, which"),
    "in an optimizer": (with_sparse_state(), r"\"training\[0\]\.state\['1/weight'\]\['exp_avg'\]\": a strided tensor was expected"),
    "in a module": ([with_sparse_buffer()], r"\"training\[0\]\.state_dict\(\)\['b'\]\": a strided tensor was expected"),
    "a complex128 tensor": ({"t": torch.ones(2, dtype=torch.complex128)}, r"\"training\['t'\]\": dtype complex128 has no safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_place(name: str) -> None:
    """Catches a value that is pickled, dropped or changed instead of being refused, and a message that does not say where it is."""
    value, message = REFUSED[name]
    model, state = nn.Linear(2, 2), torch.get_rng_state()
    with pytest.raises(
        (shardsave.UnsupportedTrainingError, shardsave.UnsupportedTensorError), match=f"cannot save {message}"
    ) as caught:
        describe(value, model)
    assert str(caught.value).endswith("; nothing was written") and "\n" not in str(caught.value)
    assert torch.equal(state, torch.get_rng_state())


def test_a_structure_that_contains_itself() -> None:
    """Catches endless recursion; and the same object twice, or an optimizer's module that refers back, taken for a cycle."""
    training: dict[str, Any] = {"a": {}}
    training["a"]["again"] = training
    with pytest.raises(
        shardsave.UnsupportedTrainingError, match=r"training\['a'\]\['again'\]: values that do not contain themselves"
    ):
        describe(training, None)
    shared, model = [1, 2], nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step(lambda: model(torch.ones(2)).sum().backward())
    state = describe({"x": shared, "y": shared, "optimizers": [optimizer, optimizer], "m": model}, {})
    first, second = state.shared["dict"]["optimizers"]["list"]
    assert first == second and len(state.entries) == 2 + 6  # each tensor once
    with pytest.raises(shardsave.UnsupportedTrainingError, match=r"training\['m'\]: a module beside the model was expected"):
        describe({"m": nn.DataParallel(model)}, torch.compile(model, backend="eager"))


def test_names_and_document() -> None:
    """Catches other names of tensors than the format says, a document that is no JSON, and members of a rank among the shared ones."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    lone = nn.Parameter(torch.ones(2))
    critic = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(
        [{"params": [*model.parameters(), lone]}, {"params": critic.parameters(), "lr": 0.5}], 0.1, momentum=0.9
    )
    (critic(model(torch.ones(2))).sum() + lone.sum()).backward()
    optimizer.step()
    training = {
        "optimizer": optimizer,
        "critic": critic,
        "rank 0": {"x": torch.ones(1)},
        "epoch": 3,
        "own": shardsave.PerRank({"seen": np.arange(3)}),
    }
    state = describe(training, torch.compile(model, backend="eager"), rng=True, rank=2)
    names = [entry.name for entry in state.entries]
    assert names[:4] == [
        f"optimizer/{name}/momentum_buffer" for name in ("1.weight", "1.bias", "group 0, parameter 4", "critic/weight")
    ]
    assert names[4:6] == ["critic/weight", "shared/rank 0/x (2)"] and all(name.startswith("rank 2/") for name in names[6:])
    assert names[6] == "rank 2/own/seen" and len(set(names)) == len(names)
    assert set(state.leaves) == {"training['own']", "rng"} and state.shared["dict"]["own"] == {"per_rank": "training['own']"}
    assert (
        state.epoch == 3
        and state.warnings == ()
        and state.notes == ("training['optimizer']: 1 parameter of no module, known by group and position",)
    )
    encoded = state.shared["dict"]["optimizer"]["optimizer"]
    assert encoded["class"] == "SGD" and encoded["groups"][1] == {
        "names": ["critic/weight"],
        "shapes": [[1, 1]],
        "options": encoded["groups"][1]["options"],
    }
    assert encoded["groups"][1]["options"]["dict"]["lr"] == 0.5 and "params" not in encoded["groups"][1]["options"]["dict"]
    json.dumps([state.shared, state.leaves], allow_nan=False)


@pytest.mark.alone
def test_many_tensors() -> None:
    """Catches work for each tensor that would make a save wait: 100,000 tensors of an optimizer in less than a second of CPU time."""
    parameters = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(50_000)])
    optimizer = torch.optim.Adam(parameters, foreach=True)
    state = {at: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for at in range(50_000)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    optimizer.state.update(zip(parameters, state.values()))
    started = time.process_time()
    described = describe({"optimizer": optimizer}, parameters)
    assert time.process_time() - started < 1 and len(described.entries) == 100_000


def _usual(state: dict[str, torch.Tensor]) -> None:
    pass


def _shared(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg_sq"] = state["exp_avg"]


def _no_tensor(state: dict[str, Any]) -> None:
    state["step"] = 3


def _several(state: dict[str, Any]) -> None:
    state["history"] = [torch.ones(2), None]


def _transposed(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg"] = torch.ones(2, 4).t()


def _part_of_another(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg"] = state["exp_avg_sq"][1:]


def _empty(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg"] = torch.ones(0)


def _trained(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg"].requires_grad_()


@pytest.mark.parametrize("change", [_usual, _shared, _no_tensor, _several, _transposed, _part_of_another, _empty, _trained])
@pytest.mark.parametrize("key", ["optimizer", "rank 1"])
def test_usual_states_are_stored_like_any_other(change: Any, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a state of which all tensors are examined together, and that is stored otherwise than tensor by tensor."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step(lambda: model(torch.ones(2)).sum().backward())
    change(optimizer.state[model[1].weight])
    training = {key: optimizer, "again": optimizer.state[model[0].weight]["exp_avg"]}
    together = describe(training, model)
    with monkeypatch.context() as apart:
        apart.setattr("shardsave._training.optimizers._usual_states", lambda *_: None)
        one_by_one = describe(training, model)
    assert together.shared == one_by_one.shared
    stored = [
        [(entry.name, entry.source.tensor.data_ptr(), entry.source.dtype, entry.source.shape) for entry in state.entries]
        for state in (together, one_by_one)
    ]
    assert stored[0] == stored[1] and len(stored[0]) >= 10


def test_the_state_of_an_optimizer_that_was_freed() -> None:
    """Catches a state whose memory is gone, and that would be read beyond its end."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step(lambda: model(torch.ones(4)).sum().backward())
    optimizer.state[model.bias]["exp_avg"].untyped_storage().resize_(4)
    with pytest.raises(
        shardsave.UnsupportedTensorError, match=r"exp_avg.*memory for all its elements was expected, its storage"
    ):
        describe({"optimizer": optimizer}, model)


def test_an_optimizer_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a training that saves the optimizer of another model than the one it saves, and says so only in a note."""
    caplog.set_level("INFO", "shardsave")
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    training = {"optimizer": torch.optim.SGD(other.parameters())}
    words = (
        "training['optimizer']: parameters of the model that is saved were expected, this optimizer has none of them; its 2 parameters "
        "of no module are known by group and position"
    )
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        report = shardsave.save(model, tmp_path, training=training, durable=False)
    assert len(caught) == 1 and caught[0].filename == __file__ and report.notes == (words,)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert shardsave.plan_save(model, tmp_path, training=training).notes == (words,)
    for source, state in ((model, {**training, "critic": other}), (dict(model.state_dict()), training)):
        report = shardsave.save(source, tmp_path / "next", training=state, durable=False)
        assert words not in report.notes
