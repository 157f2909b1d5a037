"""How tensors are packed into shards if there are so many that the header of one shard would be too long to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardsave
from shardsave._format.header import MAX_HEADER_BYTES, encode_header
from shardsave._format.packing import MAX_SHARD_HEADER_BYTES, StoredTensor, pack


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
