"""Which tensors count as the same memory: one definition for ties in a save, extra tensors, and names of a live module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from shardsave._common.memory import address, memory_key, shared_names

BASE = torch.arange(12, dtype=torch.float32).reshape(3, 4)
COMPLEX = torch.zeros(4, dtype=torch.complex64)
EMPTY, META = torch.empty(0), torch.empty(2, device="meta")

TENSORS = {
    "base": BASE, "view": BASE.view(3, 4), "parameter": nn.Parameter(BASE), "transposed": BASE.t(), "row": BASE[0],
    "other dtype": BASE.view(torch.int32), "copy": BASE.clone(), "later row": BASE[1],
    "complex": COMPLEX, "conjugate": COMPLEX.conj(), "negative": torch._neg_view(COMPLEX), "conjugate again": COMPLEX.conj(),
    "empty": EMPTY, "empty again": EMPTY, "meta": META, "sparse": torch.eye(2).to_sparse(),
}  # fmt: skip


def test_which_names_share_memory() -> None:
    """Catches views of one address with other values (conjugate, negative, transposed) that count as one tensor."""
    wanted = {"view": "base", "parameter": "base", "conjugate again": "conjugate"}
    assert shared_names(TENSORS, map(address, TENSORS.values())) == wanted
    begins = [address(tensor) or id(tensor) for tensor in TENSORS.values()]
    assert shared_names(TENSORS, begins) == {**wanted, "empty again": "empty"}
    for name, tensor in TENSORS.items():
        same = {other for other, there in TENSORS.items() if memory_key(there) == memory_key(tensor)}
        assert (name in wanted or name == "empty again") <= (len(same) > 1), name


class Aliased(nn.Module):
    """Two buffers in one memory, the second one with the first one's values or with their conjugates."""

    def __init__(self, *, conjugate: bool) -> None:
        super().__init__()
        values = torch.tensor([1 + 2j, 3 + 4j])
        self.register_buffer("first", values)
        self.register_buffer("second", values.conj() if conjugate else values)


def test_a_conjugate_view_is_not_a_tie(tmp_path: Path) -> None:
    """Catches a load that takes a conjugate view for the tensor itself: one stored tensor cannot be the value of both."""
    shardsave.save(Aliased(conjugate=False), tmp_path / "tied")
    assert shardsave.inspect(tmp_path / "tied").ties == {"second": "first"}
    shardsave.save(Aliased(conjugate=True), tmp_path / "apart")
    assert shardsave.inspect(tmp_path / "apart").ties == {}
    module = Aliased(conjugate=True)
    module.first.zero_()
    for checkpoint in ("tied", "apart"):
        with pytest.raises(shardsave.UnsupportedTensorError, match="'second'.*shares a part of it with 'first'"):
            shardsave.load_model(module, tmp_path / checkpoint)
    assert module.first.tolist() == [0, 0]
