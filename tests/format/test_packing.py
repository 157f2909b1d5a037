"""How tensors are packed into shards if there are so many that the header of one shard would be too long to read, and how the packing
stays stable from save to save.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch

import shardsave
from shardsave._format.header import MAX_HEADER_BYTES, encode_header
from shardsave._format.packing import MAX_SHARD_HEADER_BYTES, Shard, StoredTensor, pack
from shardsave._saving.packings import plan_shards
from shardsave._state.module import read_state


def many(number: int, name: str = "layers.{}.mlp.experts.gate_proj.weight", **more: bool) -> list[StoredTensor]:
    return [StoredTensor(name.replace("{}", str(at)), "F8_E4M3FNUZ", (1 << 40, 0), 0, **more) for at in range(number)]


@pytest.mark.parametrize("name", ["layers.{}.mlp.experts.gate_proj.weight", 'é"\\{}\x1f' * 12])
def test_a_header_that_would_be_too_long(name: str) -> None:
    """Catches a shard whose header safetensors or the Hub refuses, tensors that are lost where it is cut, and cuts that are too many."""
    tensors = many(200_000, name)
    shards = pack(tensors, 1 << 60)
    headers = [len(encode_header(shard)) for shard in shards]
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    assert max(headers) <= MAX_SHARD_HEADER_BYTES and all(length > 0.6 * MAX_SHARD_HEADER_BYTES for length in headers[:-1])
    assert len(shards) > 1 and len(pack(tensors, None)) == 1


def test_a_header_of_usual_length() -> None:
    """Catches a limit for headers that changes how models of a usual size are packed."""
    tensors = many(60_000)
    assert [len(shard.tensors) for shard in pack(tensors, 1 << 60)] == [60_000]
    frozen = [*tensors[:1000], *many(1000, "frozen.{}", frozen=True)]
    assert [len(shard.tensors) for shard in pack(frozen, 1 << 60)] == [1000, 1000]


@pytest.mark.slow
def test_a_model_with_headers_in_several_shards(tmp_path: Path) -> None:
    """Catches a model of very many tensors that cannot be saved, or that does not come back."""
    stem = "a_module_with_a_long_name." * 17
    values = torch.arange(60_000, dtype=torch.int32)
    state = {f"{stem}{at}": tensor for at, tensor in enumerate(values)}
    report = shardsave.save(state, tmp_path / "x", durable=False)
    assert report.shards > 1 and report.tensors == len(state)
    for file in (tmp_path / "x").glob("*.safetensors"):
        with file.open("rb") as opened:
            assert int.from_bytes(opened.read(8), "little") <= MAX_SHARD_HEADER_BYTES < MAX_HEADER_BYTES
    loaded = shardsave.load(tmp_path / "x")
    assert torch.equal(torch.stack([loaded[name] for name in state]), values)


LAYERS, LAYER_BYTES = 80, 1600


def tensors_of(trainable: Collection[str] = ()) -> list[StoredTensor]:
    """80 layers of nine tensors, between an embedding and a head; frozen but for those whose first part is in ``trainable``."""
    sizes = {"q": 200, "k": 50, "v": 50, "o": 200, "gate": 365, "up": 365, "down": 366, "norm1": 2, "norm2": 2}
    named = [("embed.weight", 900), *((f"layers.{n}.{part}", size) for n in range(LAYERS) for part, size in sizes.items())]
    named.append(("head.weight", 900))
    return [StoredTensor(name, "BF16", (size // 2,), size, layer_of(name) not in trainable) for name, size in named]


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


class Saves:
    """Saves in a row, with a stand-in for the comparison of checksums: ``changed`` names the layers that differ from the save before."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self.shards: Sequence[Shard] = ()

    def save(self, changed: Collection[str], trainable: Collection[str] = ()) -> int:
        """Returns how many bytes are written."""
        tensors = tensors_of(trainable)
        kept = [shard for shard in self.shards if not any(layer_of(tensor.name) in changed for tensor in shard.tensors)]
        self.shards = pack(tensors, self._bound, kept)
        assert sorted(t.name for shard in self.shards for t in shard.tensors) == sorted(t.name for t in tensors)
        assert list(self.shards[: len(kept)]) == kept
        new = self.shards[len(kept) :]
        assert all(shard.data_bytes <= self._bound or len(shard.tensors) == 1 for shard in new)
        assert all(len({tensor.frozen for tensor in shard.tensors}) == 1 for shard in new)
        return sum(shard.data_bytes for shard in new)

    def bytes_with(self, layer: str) -> int:
        """The bytes of the shards that hold a tensor of ``layer``."""
        return sum(s.data_bytes for s in self.shards if any(layer_of(tensor.name) == layer for tensor in s.tensors))


#: A layer in several shards, in one, and four in one.
BOUNDS = [600, 2000, 7000]


@pytest.mark.parametrize("bound", BOUNDS)
def test_thawing_one_layer_rewrites_its_shard_alone(bound: int) -> None:
    """Catches a packing in which one thawed layer moves tensors of other shards, so that frozen bytes are written again."""
    for layer in [f"layers.{number}" for number in range(LAYERS)]:
        saves = Saves(bound)
        saves.save(())
        before = saves.bytes_with(layer)
        assert saves.save([layer], [layer]) == before <= LAYER_BYTES + 2 * bound
        assert saves.save([layer], [layer]) == LAYER_BYTES  # from the second save on, that layer alone


@pytest.mark.parametrize("bound", BOUNDS)
def test_flags_rewrite_nothing(bound: int) -> None:
    """Catches a shard that is written again because a flag of a tensor in it changed, though no byte did."""
    saves = Saves(bound)
    saves.save(())
    before = saves.shards
    for trainable in (["layers.7"], [f"layers.{number}" for number in range(LAYERS)], []):
        assert saves.save((), trainable) == 0 and [*saves.shards] == [*before]


@pytest.mark.parametrize("bound", BOUNDS)
def test_many_saves_with_layers_that_take_turns(bound: int) -> None:
    """Catches shards that become more and more, or smaller and smaller, when other layers are trained after each save; and a tensor that
    two shards hold, or none."""
    saves = Saves(bound)
    chance = random.Random(1)
    total = saves.save(())
    first = len(saves.shards)
    for _ in range(300):
        trained = ["head", *(f"layers.{number}" for number in chance.sample(range(LAYERS), 2))]
        touched = sum(map(saves.bytes_with, trained))
        written = saves.save(trained, trained)
        assert written <= touched and written < total
    assert len(saves.shards) <= 2 * first + 10


def test_a_header_that_is_too_long_is_refused_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a header that is encoded, and refused, only when a save in the background has begun to write."""
    entries = read_state({f"weight {n}": torch.ones(1) for n in range(100)}).entries
    monkeypatch.setattr("shardsave._format.header.MAX_HEADER_BYTES", 5000)
    with pytest.raises(ValueError, match="one file of 100 tensors needs a header of 8184 bytes, the format allows 5000"):
        plan_shards(entries, None)
