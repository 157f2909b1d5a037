"""CRC-64/NVME: numpy, the C++ core and a third-party implementation agree."""

from __future__ import annotations

import awscrt.checksums
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsave._common.backend import native
from shardsave._format import crc64


def test_check_value() -> None:
    """Catches a wrong polynomial, bit order or initial value."""
    data = np.frombuffer(b"123456789", np.uint8)
    assert crc64.finish(crc64.raw(data), 9) == 0xAE8B14860A799888
    assert crc64.crc64(b"123456789") == 0xAE8B14860A799888


@settings(max_examples=40, deadline=None)
@given(length=st.integers(0, 700_000), begin=st.integers(0, 17), seed=st.integers(0, 10**6))
def test_agrees_with_another_implementation(length: int, begin: int, seed: int) -> None:
    """Catches lengths and alignments at which lanes or folds are joined wrongly."""
    data = np.random.default_rng(seed).integers(0, 256, begin + length, dtype=np.uint8)[begin:]
    expected = awscrt.checksums.crc64nvme(data.tobytes())
    assert crc64.finish(crc64.raw(data), length) == expected
    assert crc64.crc64(data) == expected


@settings(max_examples=30, deadline=None)
@given(left=st.binary(max_size=3000), right=st.binary(max_size=3000))
def test_is_linear(left: bytes, right: bytes) -> None:
    """Catches a shift by the wrong distance: sums over blocks depend on it."""
    parts = [crc64.raw(np.frombuffer(part, np.uint8)) for part in (left, right, left + right)]
    assert crc64.shift(parts[0], len(right)) ^ parts[1] == parts[2]


def test_many_are_shifted_as_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numpy or the C++ core, where sums are shifted by a wrong distance: none, a long one, several."""
    sums = np.random.default_rng(0).integers(0, 2**64, 60, dtype=np.uint64)
    nbytes = np.array([0, 1, 8, 4096, 12_345_678, 2**45 + 3] * 10, np.int64)
    expected = [crc64.shift(one, length) for one, length in zip(sums.tolist(), nbytes.tolist())]
    raw = [crc64.finish(one, length) for one, length in zip(sums.tolist(), nbytes.tolist())]  # is its own inverse
    for _ in range(2):
        assert crc64.shifted(sums, nbytes).tolist() == expected
        assert crc64.raw_sums_of(sums, nbytes).tolist() == raw
        monkeypatch.setattr(crc64, "native", None)


@pytest.mark.parametrize("name", ["vpclmulqdq", "pclmulqdq", "pmull", "table"])
def test_every_implementation_of_this_processor(name: str) -> None:
    """Catches a mistake in an implementation that is only chosen on other processors."""
    if native is None:
        pytest.skip("the extension is not in use")
    best = native.crc64_implementation()
    data = np.random.default_rng(0).integers(0, 256, 100_003, dtype=np.uint8)
    try:
        if not native.crc64_force_implementation(name):
            pytest.skip(f"this processor has no {name}")
        assert crc64.crc64(data[3:]) == awscrt.checksums.crc64nvme(data[3:].tobytes())
    finally:
        native.crc64_force_implementation(best)
