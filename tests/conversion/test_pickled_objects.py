"""Pickled objects with tensors that are no plain state: attributes, subclasses, whole modules, optimizers, pickles of other writers.

Method: torch and pickle write the files. Nothing with tensors is lost unnamed, and what a message advises is then done and leads on.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_convert import same
from test_torch_files import converted
from torch import nn

import shardsave

W = {"a": torch.ones(2)}


class Subclass(torch.Tensor):
    """A subclass without code of its own."""


class Net(nn.Module):
    """A module as training scripts define them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


NET = [f"{__name__}.Net", "torch.nn.modules.linear.Linear"]


def refusal(path: Path, kind: type[Exception] = shardsave.IncompatibleCheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        converted(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.clone], ids=["parameter", "tensor"])
def test_attributes_of_tensors(tmp_path: Path, kind: Any, protocol: int) -> None:
    """Catches tensors that are attributes of a tensor and are left out without a word, or that become weights."""
    tensor = kind(torch.ones(2))
    tensor.more, tensor.tag = torch.ones(3), "x"
    torch.save({"w": tensor}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert "it has 'w.more' (tensor, 12 B) among its tensors, which can be left out with drop='w.more'" in refusal(
        tmp_path / "x.pt"
    )
    state, notes = converted(tmp_path / "x.pt", drop="w.more")
    assert same(state, {"w": torch.ones(2)}) and notes == ("left out, since an attribute of a tensor: 'w.tag' (str)",)
    del tensor.more
    torch.save({"l": [tensor, tensor], "optimizer": {"a.b": tensor}}, tmp_path / "y.pt", pickle_protocol=protocol)
    assert "'optimizer' (1 tensor, 8 B)" in refusal(tmp_path / "y.pt")  # names with dots are those of a network
    state, (note,) = converted(tmp_path / "y.pt", drop="optimizer")
    assert same(state, {"l.0": torch.ones(2), "l.1": torch.ones(2)}) and "'l.0.tag' (str), 'l.1.tag' (str)" in note


def test_tensors_of_subclasses(tmp_path: Path) -> None:
    """Catches an advice about the inner parts of a tensor's pickle, and such a tensor that is lost beside a state."""
    name = f"{__name__}.Subclass"
    special = torch.ones(3).as_subclass(Subclass)
    torch.save({**W, "w": special}, tmp_path / "x.pt")
    assert f"allow='{name}' reads" in refusal(tmp_path / "x.pt", shardsave.UntrustedCodeError)
    message = refusal(tmp_path / "x.pt", allow=name)
    assert (
        f"it has 'w' (tensor of class {name}, 1 tensor, 12 B) among its tensors, which can be left out with drop='w'; "
        in message
    )
    assert same(converted(tmp_path / "x.pt", allow=name, drop="w")[0], W)
    torch.save({"model": W, "ema": {"w": special}}, tmp_path / "y.pt")
    assert "'ema' (1 tensor, 12 B)" in refusal(tmp_path / "y.pt", allow=name)


def test_whole_modules(tmp_path: Path) -> None:
    """Catches an advice to allow the classes of a pickled module, after which its weights can never be taken as a whole."""
    advice = "load the file where its classes are, with torch.load(…, weights_only=False), and save its state_dict()"
    torch.save(Net(), tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt", shardsave.UntrustedCodeError)
    assert (
        f"asks for {', '.join(NET)}; nothing of it was run, and it is a whole module, not a state: {advice}; nothing" in message
    )
    assert f"it is a whole module ({NET[0]}, 2 tensors, 24 B); {advice}; nothing" in refusal(tmp_path / "x.pt", allow=NET)
    torch.save({"model": Net(), "best": W}, tmp_path / "y.pt")
    message = refusal(tmp_path / "y.pt", shardsave.UntrustedCodeError)
    assert f"a whole module is in it: {advice}; for the rest of the file, allow={NET} reads such objects" in message
    for key in (None, "model", "model.layer", "model._modules.layer._parameters"):
        message = refusal(tmp_path / "y.pt", allow=NET, key=key)
        assert (
            f"it has a whole module: 'model' ({NET[0]}, 2 tensors, 24 B); {advice}, or leave it out with drop='model'"
            in message
        )
    assert same(converted(tmp_path / "y.pt", allow=NET, drop="model")[0], W)
    state, (note,) = converted(tmp_path / "y.pt", allow=NET, key="best")
    assert same(state, W) and f"'model' ({NET[0]}, 2 tensors, 24 B)" in note


def test_state_of_an_optimizer(tmp_path: Path) -> None:
    """Catches a message about training state with an empty name, or one that does not say which key leads on."""
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    net.layer(torch.ones(2)).sum().backward()
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert "it has only training state: dict, 6 tensors, 56 B; choose a mapping in it with key='state.0'; nothing" in message
    assert "'1' (dict, 3 tensors, 20 B); choose one with key='state.0'; nothing" in refusal(tmp_path / "x.pt", key="state")
    assert set(converted(tmp_path / "x.pt", key="state.0")[0]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.save({"optimizer": adam.state_dict()}, tmp_path / "y.pt")
    assert "'optimizer' (dict, 6 tensors, 56 B); choose a mapping in it with key='optimizer.state.0'" in refusal(
        tmp_path / "y.pt"
    )


@pytest.mark.parametrize(
    "content", [Net().state_dict(), Net(), {"w": np.ones(2)}, Net, 3], ids=["state", "module", "arrays", "class", "int"]
)
def test_pickles_that_torch_did_not_write(tmp_path: Path, content: Any) -> None:
    """Catches a sound pickle that is called corrupt, and an advice to allow a name after which it is called corrupt."""
    for protocol in range(6):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content, protocol))
        for allow in ((), ["torch.storage._load_from_bytes", *NET]):
            message = refusal(tmp_path / "x.pt", allow=allow)
            assert (
                "it is a pickle that torch.save did not write; if you trust the file, load it with pickle.load and save"
                in message
            )


def test_allowed_names_that_are_not_there(tmp_path: Path) -> None:
    """Catches a mistyped name that is allowed without a word."""
    torch.save({"model": W, "net": Subclass}, tmp_path / "x.pt")
    name = f"{__name__}.Subclass"
    assert converted(tmp_path / "x.pt", allow=[name, "my.Confg"], drop="net")[1] == ("allow='my.Confg' matched no name",)
    shardsave.save(W, tmp_path / "ckpt")
    assert converted(tmp_path / "ckpt", allow=name)[1] == (f"allow='{name}' matched no name",)
