"""Method: every verb is called with every bad checkpoint of the tables. It must raise exactly the error and the message in the table: soon,
without allocating the memory that the numbers in the file would need, and with the module unchanged.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_cases import FILES
from header_cases import HEADERS
from index_cases import INDEXES
from rank_cases import RANKS
from tampering import LONE, Case, Net

import shardsave
from support import same_bits

CASES = [*HEADERS, *INDEXES, *FILES, *RANKS]

#: How much memory a refusal may allocate, in bytes: the largest header, and room to parse it.
MEMORY = 320 << 20


def load_model(path: Path) -> None:
    """Loads into a module, and checks that nothing in it has changed."""
    model = Net(seed=1)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        shardsave.load_model(model, path)
    finally:
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert same_bits(tensor, before[name][0]) and tensor._version == before[name][1]
        assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


VERBS: list[Callable[[Path], object]] = [
    shardsave.inspect,
    shardsave.load,
    lambda path: shardsave.load(path, mmap=True),
    lambda path: shardsave.load(path, verify=False),
    shardsave.verify,
    load_model,
]


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Limits the address space to its current size plus `MEMORY`, so that larger allocations fail."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_names_of_cases_are_unique() -> None:
    """Catches two cases with the same name, which a report would not tell apart, and a corpus that has become smaller."""
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    """Catches a bad file that is loaded, an unclear message, an error of Python itself, a hang, a leaked descriptor, and memory that is
    allocated because a file says so."""
    path = case.make(tmp_path) or tmp_path
    paths = [path, path / LONE] if case in HEADERS else [path]
    descriptors = len(os.listdir("/proc/self/fd"))
    for verb, path in itertools.product(VERBS, paths):
        with bounded_memory(), pytest.raises(shardsave.ShardSaveError) as caught:
            verb(path)
        assert str(caught.value) == case.message.replace("$DIR", str(tmp_path))
        assert type(caught.value) is case.error
    del caught
    assert len(os.listdir("/proc/self/fd")) == descriptors
