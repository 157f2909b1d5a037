"""Method: a short part of ``make fuzz``. Almost valid headers and indexes from a grammar, and mutations of valid and invalid files, go
to our parser and to safetensors' own reader. The inputs are the same in each run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import seeds
import targets
from grammar import indexes, shards
from hypothesis import HealthCheck, given, settings
from mutation import Mutator

pytestmark = pytest.mark.slow

SLICE = settings(
    max_examples=1500, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@SLICE
@given(shards())
def test_headers_by_grammar(content: bytes) -> None:
    """Catches a header that crashes the parser, that only safetensors refuses, or that safetensors reads differently."""
    targets.fuzz_header(content)


@SLICE
@given(indexes())
def test_indexes_by_grammar(content: bytes) -> None:
    """Catches an index that crashes the parser, or that is accepted although it contradicts itself."""
    targets.fuzz_index(content)


@pytest.mark.parametrize(
    "make_seeds, target, tally, places",
    [(seeds.shards, targets.fuzz_header, targets.headers, 16), (seeds.indexes, targets.fuzz_index, targets.indexes, 25)],
    ids=["headers", "indexes"],
)
def test_mutations(
    make_seeds: Callable[[], list[bytes]], target: Callable[[bytes], None], tally: targets.Tally, places: int
) -> None:
    """Catches the same for mutated files, and a fuzzer that no longer gets past the first checks."""
    mutator = Mutator(make_seeds(), seed=1)
    for _ in range(15_000):
        target(mutator.next())
    assert tally.accepted > 150 and len(tally.refusals) >= places, (tally, tally.refusals)
