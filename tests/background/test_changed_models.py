"""A model that is deleted, moved, resized or filled anew while it is saved: the checkpoint is of the call, or the save names the tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from background.held import Held, value_in
from shardsave._background.failures import take_failures
from shardsave._storage.transaction import Transaction


def halve(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.half()


def resize(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As `resize_token_embeddings` does: with a new Parameter."""
    net.register_parameter("weight", nn.Parameter(torch.zeros(9, 9)))


def assign(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.get_parameter("weight").data = torch.zeros(700, 700)


def fill(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.load_state_dict({name: torch.zeros_like(value) for name, value in net.state_dict().items()})


def load(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.load_state_dict({name: torch.zeros_like(value) for name, value in net.state_dict().items()}, assign=True)


def empty(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.clear()
    optimizer.state.clear()


#: What is done, and whether the ring may not survive it: it changes memory that is still to be read, or what the memory belongs to.
CHANGES: dict[str, tuple[Callable[[nn.Module, torch.optim.Optimizer], None], bool]] = {
    "halve": (halve, True),
    "resize": (resize, False),
    "assign": (assign, True),
    "fill": (fill, True),
    "load": (load, False),
    "empty": (empty, False),
}


def net_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Linear(700, 700, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    return net, torch.optim.SGD(net.parameters(), 0.1)


@pytest.mark.parametrize("staging", ["snapshot", "ring"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change(memory: Path, change: str, staging: Any) -> None:
    """Catches a checkpoint of the changed model, or of a part of it, and a process that crashes."""
    action, harms = CHANGES[change]
    net, optimizer = net_and_optimizer()
    # The save waits for the lock of its directory, so it has read nothing when the model changes.
    with Transaction(memory / "ckpt", durable=False, lock_timeout=5):
        pending = shardsave.save_async(net, memory / "ckpt", training={"o": optimizer}, staging=staging, durable=False)
        action(net, optimizer)
    if staging == "ring" and harms:
        with pytest.raises(shardsave.SaveNotCommittedError, match="cannot save 'weight' while training goes on"):
            pending.wait(30)
        assert value_in(memory / "ckpt") is None
    else:
        assert pending.wait(30).staging == staging and value_in(memory / "ckpt") == 1
    take_failures()


@pytest.mark.parametrize("staging", ["snapshot", "ring"])
def test_a_deleted_model(memory: Path, staging: Any) -> None:
    """Catches a crash after the model is gone, and a model that stays in memory after its save."""
    net, optimizer = net_and_optimizer()
    alive = weakref.ref(net.get_parameter("weight"))
    held = Held()
    pending = shardsave.save_async(
        net, memory / "ckpt", training={"o": optimizer}, staging=staging, durable=False, progress=held
    )
    del net, optimizer
    gc.collect()
    assert staging == "ring" or alive() is None
    held.go.set()
    pending.wait(30)
    gc.collect()
    assert alive() is None and value_in(memory / "ckpt") == 1
