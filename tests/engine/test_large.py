"""A tensor larger than 4 GiB. Method: ``make test-large``; about 4.5 GB of disk and 9 GB of memory, not in the normal run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shardsave

ELEMENTS = 2**30 + 12_345  # of four bytes each: more bytes than 32 bits can count

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed at once: pytest would keep the last few."""
    yield tmp_path / "ckpt"
    shutil.rmtree(tmp_path)


def test_larger_than_four_gibibytes(folder: Path) -> None:
    """Catches an offset or a length that is cut to 32 bits, and a tensor that is split because it exceeds the bound."""
    from safetensors import safe_open

    large = torch.arange(ELEMENTS, dtype=torch.int32)
    state = {"before": torch.ones(3), "large": large, "behind": torch.full((5,), 7, dtype=torch.uint8)}
    report = shardsave.save(state, folder, max_shard_size="1GB")
    assert report.shards == 3 and report.bytes == 4 * ELEMENTS + 17 and report.staging_bytes <= 256 << 20
    assert shardsave.verify(folder).verified is True
    info = shardsave.inspect(folder)
    assert info.tensors["large"].nbytes == 4 * ELEMENTS
    with safe_open(folder / info.tensors["large"].shard, "pt") as opened:
        rows = opened.get_slice("large")
        for start in (0, 2**29 - 3, 2**30 - 3, ELEMENTS - 6):
            assert torch.equal(rows[start : start + 6], large[start : start + 6])
    mapped = shardsave.load(folder, names=["large"], mmap=True)["large"]
    assert mapped[-1] == ELEMENTS - 1 and mapped[2**30] == 2**30
    del mapped, state
    large.zero_()
    module = torch.nn.Module()
    module.register_buffer("large", large)
    loaded = shardsave.load_model(module, folder, strict=False)
    assert loaded.verified is True and loaded.bytes == 4 * ELEMENTS
    step = 1 << 24
    for start in range(0, ELEMENTS, step):
        stop = min(start + step, ELEMENTS)
        assert torch.equal(large[start:stop], torch.arange(start, stop, dtype=torch.int32)), start


def test_many_small_beside_one_large(folder: Path) -> None:
    """Catches wrong offsets beyond 4 GiB inside one shard, for tensors that follow a large one."""
    from safetensors import safe_open

    state = {"large": torch.zeros(2**30 + 1, dtype=torch.int32), **{f"s{n}": torch.full((3,), n).byte() for n in range(50)}}
    shardsave.save(state, folder, max_shard_size="1TB", durable=False)
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as opened:
        assert opened.get_tensor("s49").tolist() == [49] * 3
    small = shardsave.load(folder, names=[f"s{n}" for n in range(50)])
    assert all(tensor.tolist() == [int(name[1:])] * 3 for name, tensor in small.items())
