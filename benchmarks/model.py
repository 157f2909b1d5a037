"""The benchmark's models: a Llama of any size with random weights, filled without its own initialisation, which takes minutes; a
transformer with its AdamW; and one that really trains.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

_BF16 = 2


def config(size: int):
    """The configuration of a Llama of about ``size`` bytes in bfloat16."""
    from transformers import LlamaConfig

    hidden, vocabulary = (2048, 32_000) if size >= 400_000_000 else (256, 8_000)
    intermediate, heads, key_heads = hidden * 11 // 4, hidden // 64, max(1, hidden // 512)
    layer = 2 * hidden * hidden + 2 * hidden * 64 * key_heads + 3 * hidden * intermediate
    layers = max(1, round((size / _BF16 - 2 * vocabulary * hidden) / layer))
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def build(size: int, seed: int = 0) -> nn.Module:
    """A LlamaForCausalLM in bfloat16 on the CPU, with every page written; the same ``seed`` produces the same bits."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config(size)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    random = np.random.Generator(np.random.SFC64(seed))
    for tensor in model.parameters():
        _fill(tensor.detach(), random)
    for buffer in model.buffers():  # no library saves these, the rotary frequencies, but they must be finite
        buffer.zero_()
    return model.eval()


class Training:
    """A transformer of torch and its AdamW, in bfloat16; a third of the bytes is the model. Both together have half of ``size``, and no
    import of transformers is needed: otherwise the comparison of trainings would take as long as those of three other rivals.
    """

    def __init__(self, size: int, seed: int = 0, *, stepped: bool = True) -> None:
        """``stepped``: the optimizer has a state, as after a step. Otherwise it is new."""
        width = 1024 if size >= 400_000_000 else 256
        layers = max(1, round(size / 2 / 3 / _BF16 / (12 * width * width)))
        with torch.device("meta"):
            layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dtype=torch.bfloat16)
            self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.model.to_empty(device="cpu")
        random = np.random.Generator(np.random.SFC64(seed))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            _fill(parameter.detach(), random)
            if stepped:
                moments = {name: torch.empty_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
                for moment in moments.values():
                    _fill(moment, random)
                self.optimizer.state[parameter] = {"step": torch.tensor(float(seed + 1)), **moments}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor of both by its name."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{key} of {names[parameter]}": tensor
            for parameter, state in self.optimizer.state.items()
            for key, tensor in state.items()
        }
        return {**self.model.state_dict(), **moments}


class LiveTraining(Training):
    """A transformer of torch in float32 and its fused AdamW, which really train: forward, backward and a step of the optimizer, all in
    memory that exists already. Both together have ``size`` bytes; a third of them is the model.
    """

    TOKENS = 16  # so few that a step of a few hundred megabytes takes about 0.1 s on one core

    def __init__(self, size: int, seed: int = 0, device: str = "cpu") -> None:
        width = 512 if size >= 100_000_000 else 256
        layers = max(1, round(size / 3 / 4 / (12 * width * width)))
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, device=device)
        self.device = device
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self._input, self._wanted = torch.randn(2, self.TOKENS, 1, width, device=device)
        self.step(nullcontext())  # makes the gradients and the optimizer's state

    def step(self, guard: AbstractContextManager[object]) -> None:
        """One step, until the device is done with it; ``guard`` as in `update`."""
        self.optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(self.model(self._input), self._wanted)
        loss.backward()
        self.update(guard)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def update(self, guard: AbstractContextManager[object]) -> None:
        """A step of the optimizer alone, with the gradients that are there, inside ``guard``."""
        with guard:
            self.optimizer.step()


def _fill(tensor: torch.Tensor, random: np.random.Generator) -> None:
    """Fills ``tensor`` with random bits; the top bit of the exponent is cleared, so all numbers are finite and below 2."""
    bits = tensor.view(torch.int16).numpy().reshape(-1)
    step = 1 << 22  # elements per step, few enough to stay in the processor's cache
    for at in range(0, bits.size, step):
        part = bits[at : at + step]
        part[:] = random.integers(0, 1 << 64, -(-part.size // 4), np.uint64).view(np.int16)[: part.size] & 0x3FFF


def tensor_bytes(model: nn.Module | Training) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def same(model: nn.Module | Training, state) -> bool:
    """Whether ``state`` has every tensor of ``model``, bit for bit."""
    expected = model.state_dict()
    return expected.keys() == state.keys() and all(torch.equal(_bits(expected[name]), _bits(state[name])) for name in expected)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int16)
