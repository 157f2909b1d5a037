"""Models of which this process does not have all the data: a save and a load name the tensor and the way out."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import same_state


class ZeroParamStatus(enum.Enum):
    """As in DeepSpeed's ``runtime/zero/partition_parameters.py``."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(parameter: Any) -> None:
    """Makes ``parameter`` what ``zero.Init`` makes of it: `_convert_to_deepspeed_param`, then `free_param`."""
    parameter.ds_shape, parameter.ds_numel, parameter.ds_id = parameter.shape, parameter.numel(), 0
    parameter.ds_tensor = parameter.data.flatten().clone()
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def gather(parameter: Any) -> None:
    parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
    parameter.ds_status = ZeroParamStatus.AVAILABLE


def test_partitioned_parameters(tmp_path: Path) -> None:
    """Catches placeholders of ZeRO-3 that are saved as the model, 0 bytes of it, or that a load skips or fills."""
    plain, model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    shardsave.save(plain, tmp_path / "plain")
    for parameter in model.parameters():
        partition(parameter)
    way_out = (
        r"DeepSpeed's ZeRO-3 has partitioned its \[8, 4\]; gather it with deepspeed.zero.GatheredParameters, .*zero_to_fp32"
    )
    for source in (model, dict(model.named_parameters()), model.state_dict(keep_vars=True)):
        with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot save '0.weight': .*{way_out}; nothing was written"):
            shardsave.save(source, tmp_path / "ckpt")
    for strict in (True, False):
        with pytest.raises(
            shardsave.UnsupportedTensorError, match=f"cannot fill '0.weight': .*{way_out}; the module is unchanged"
        ):
            shardsave.load_model(model, tmp_path / "plain", strict=strict)
    for parameter in model.parameters():
        gather(parameter)
    shardsave.save(model, tmp_path / "ckpt")
    model[0].weight.ds_status = ZeroParamStatus.INFLIGHT
    with pytest.raises(shardsave.UnsupportedTensorError, match="cannot save '0.weight'"):
        shardsave.save(model, tmp_path / "ckpt")
    gather(model[0].weight)
    shardsave.load_model(model, tmp_path / "plain")
    assert same_state(model, plain)


#: Modules of torch, each with one tensor of it that cannot be empty.
FILLED: dict[str, Callable[[], nn.Module]] = {
    "weight": lambda: nn.Linear(4, 8),
    "bias": lambda: nn.Linear(4, 8),
    "weight of Bilinear": lambda: nn.Bilinear(2, 3, 4),
    "weight of Embedding": lambda: nn.Embedding(4, 2),
    "weight of EmbeddingBag": lambda: nn.EmbeddingBag(4, 2),
    "weight of Conv2d": lambda: nn.Conv2d(1, 2, 3),
    "bias of ConvTranspose1d": lambda: nn.ConvTranspose1d(1, 2, 3),
    "weight of LayerNorm": lambda: nn.LayerNorm((2, 3)),
    "weight of RMSNorm": lambda: nn.RMSNorm(4),
    "bias of GroupNorm": lambda: nn.GroupNorm(2, 4),
    "running_mean of BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "num_batches_tracked of BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "weight of PReLU": lambda: nn.PReLU(),
    "in_proj_weight of MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "out_proj.weight of MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "weight_hh_l0_reverse of LSTM": lambda: nn.LSTM(2, 3, bidirectional=True),
    "weight_ih of GRUCell": lambda: nn.GRUCell(2, 3),
}


@pytest.mark.parametrize("case", FILLED)
def test_emptied_tensors(tmp_path: Path, case: str) -> None:
    """Catches a tensor whose data was taken away, and that is saved with 0 bytes."""
    model, name = nn.Sequential(FILLED[case]()), f"0.{case.split()[0]}"
    tensor = model.state_dict(keep_vars=True)[name]
    tensor.data = torch.empty(0)
    words = f"cannot save '{name}': the elements of .* were expected, it has none: .* full state dict .*; nothing was written"
    with pytest.raises(shardsave.UnsupportedTensorError, match=words):
        shardsave.save(model, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_freed_storage(tmp_path: Path) -> None:
    """Catches a storage of no bytes, as FSDP leaves it, under a tensor that has elements."""
    model = nn.Linear(4, 8)
    shardsave.save(model, tmp_path / "ckpt")
    model.weight.untyped_storage().resize_(0)
    words = "'weight'.*: memory for all its elements was expected, its storage was freed or made smaller"
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot save {words}; nothing was written"):
        shardsave.save(model, tmp_path / "again")
    with pytest.raises(shardsave.UnsupportedTensorError, match=f"cannot fill {words}; the module is unchanged"):
        shardsave.load_model(model, tmp_path / "ckpt")


class OwnEmpty(nn.Linear):
    """Has an empty parameter that torch's class does not have."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.mask = nn.Parameter(torch.empty(0))


EMPTY: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(0, 3),
    lambda: nn.Linear(3, 0),
    lambda: nn.Embedding(0, 4),
    lambda: nn.Embedding(4, 0),
    lambda: nn.Bilinear(2, 0, 3),
    lambda: nn.LayerNorm(0),
    lambda: nn.BatchNorm1d(0),
    lambda: nn.PReLU(0),
    OwnEmpty,
    lambda: nn.ParameterList([torch.empty(0), torch.empty(2, 0)]),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("build", EMPTY)
def test_tensors_that_are_empty_by_right(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    """Catches a tensor that is empty because of its module's sizes, or in a module of another kind, and that is refused."""
    model = build()
    shardsave.save(model, tmp_path)
    shardsave.load_model(model, tmp_path)
