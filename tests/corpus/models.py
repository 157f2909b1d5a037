"""The models in the corpus.

The committed architectures name these classes, so a class here keeps its name and its attributes for good. A model for a new case
is a new class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.utils.prune
from torch import nn


def numbered(module: nn.Module, first: int = 0) -> nn.Module:
    """Fills every tensor of ``module`` with small whole numbers: every sum of products in a forward is then exact everywhere."""
    state = module.state_dict()
    for number, tensor in enumerate(value for value in state.values() if isinstance(value, torch.Tensor)):
        values = (torch.arange(tensor.numel()) * 7 + number + first) % 11 - 5
        with torch.no_grad():
            tensor.copy_(values.reshape(tensor.shape))
    return module


def sequential() -> nn.Module:
    """A frozen layer, and one that is trained."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return numbered(model)


def wrapped() -> nn.Module:
    """A compiled module: its names have no ``_orig_mod``."""
    compiled = torch.compile(sequential(), backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


class Tied(nn.Module):
    """A frozen embedding that is the head's weight too, and a buffer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(self.norm(self.embed(tokens))))
        return result


def tied() -> nn.Module:
    return numbered(Tied())


def frozen() -> nn.Module:
    """Nothing is trained; buffers of two dtypes."""
    return numbered(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).requires_grad_(False)


class Parts(nn.Module):
    """Tensors that no state dict has: a buffer that is not persistent, and a constant. Exact in its forward, in any order of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.out = nn.Linear(3, 2)
        self.out.bias.requires_grad_(False)
        self.register_buffer("shift", torch.tensor([1.0, -2.0, 3.0]), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.scale = torch.tensor([2.0])
        self.options = {"widths": [4, 3, 2], "name": "naïve ☃", ("a", 1): (None, 1.5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out((self.layer(x) * self.scale + self.shift).relu())
        return result


def parts() -> nn.Module:
    return numbered(Parts()).eval()


#: What `Parts` is called with.
NUMBERS = torch.arange(8.0).reshape(2, 4)


class Mode(enum.Enum):
    FAST = 1
    EXACT = "two"


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: Any


@dataclasses.dataclass
class Config:
    width: int = 4
    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])


class Settings(dict):
    """Its items are its attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Stack(list):
    limit = 3


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Values(nn.Module):
    """Every kind of value that FORMAT.md has for an attribute; computed, strided and shared tensors. Sets have one element that is
    text at most: another process keeps them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.pruned = numbered(nn.Linear(2, 2))  # what is computed from it is stored too
        nn.utils.prune.l1_unstructured(self.pruned, "weight", 0.5)
        self.listed = nn.ParameterList([nn.Parameter(torch.zeros(2)), self.pruned.bias])
        self.register_module("absent", None)
        self.register_parameter("no_parameter", None)
        self.register_buffer("no_buffer", None)
        shared = [1, 2]
        self.values = {
            "plain": (None, True, 10**300, "naïve ☃", -0.0, float("nan"), float("-inf"), 1 - 2.5j, b"\x00\xff", ...),
            "sets": ({1, 2}, {"a"}, frozenset({(2, 3)})),
            "dicts": (OrderedDict(b=1, a=2), defaultdict(list, {"k": [1]}), Counter("aab"), {1: {None: [2]}, (3, 4): 3.0}),
            "sequences": (deque([1, 2], maxlen=5), slice(1, None, 2), range(0, 10, 3), Stack([1, shared])),
            "torch": (torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 3]), torch.strided, torch.channels_last),
            "numpy": (np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(0.5)),
            "objects": (
                Path("some/where"),
                Mode.EXACT,
                Access.READ | Access.WRITE,
                Point(1, [2]),
                Config(5),
                Settings(width=3),
            ),
            "names": (torch.nn.functional.gelu, torch.tanh, nn.LayerNorm, Mode),
            "partial": functools.partial(nn.LayerNorm, eps=1e-6),
            "shared": (shared, {"it": shared}),
            "tensor": torch.arange(3.0),
        }
        self.function = double
        self.method = self.helper

    def helper(self) -> int:
        return 41


def values() -> nn.Module:
    model = Values()
    for part in (model.conv, model.normed, model.listed):
        numbered(part)
    return model


class Steps(nn.Module):
    """A program with sizes that vary, a branch, a buffer that is written to, a keyword, and results by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> dict[str, Any]:
        self.steps.add_(1)
        y = self.layer(x)
        y = torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y,))
        return {"y": y, "pair": (y.sum() * x.shape[0], [x.shape[0]]), "steps": self.steps.clone()}


def steps() -> nn.Module:
    return numbered(Steps()).eval()


class Remembers(nn.Module):
    """Extra state: of plain data in one part, a tensor in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.history = History()
        self.scales = Scales()


class History(nn.Module):
    seen: Any = None

    def get_extra_state(self) -> Any:
        return {"seen": 7, "losses": [1.5, None], "name": "run"} if self.seen is None else self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.tensor([1.0, 2.0, 4.0])

    def get_extra_state(self) -> torch.Tensor:
        return self.kept

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.kept = state.clone()


def remembers() -> nn.Module:
    model = Remembers()
    numbered(model.layer)
    return model


SMALL = {"vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}


def _quiet() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _alternately_frozen(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


def bert() -> nn.Module:
    """A transformers model with ties and two configs."""
    transformers = _quiet()
    config = transformers.BertConfig(**SMALL, max_position_embeddings=8)
    return _alternately_frozen(numbered(transformers.BertForMaskedLM(config)))


def llama() -> nn.Module:
    transformers = _quiet()
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
    return numbered(transformers.LlamaForCausalLM(config))


def mixtral() -> nn.Module:
    """A mixture of experts: one tensor in memory is several on disk."""
    transformers = _quiet()
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, num_local_experts=2
    )
    return _alternately_frozen(numbered(transformers.MixtralForCausalLM(config)))


def adapter() -> nn.Module:
    """A LoRA adapter. One target alone: PEFT keeps targets as a set, which has another order in every process."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return numbered(model)
