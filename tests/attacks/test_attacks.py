"""Method: every bad checkpoint of the corpus meets every verb. Each refuses it with exactly the error and the whole message that
the table says, soon, without asking for the memory that its numbers speak of, and with the module unchanged.
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
from tampering import LONE, Case, Net

import shardsave
from support import same_bits

CASES = [*HEADERS, *INDEXES, *FILES]

#: What a refusal may ask for, in bytes: the largest header, and room to parse it.
MEMORY = 320 << 20


def load_model(path: Path) -> None:
    """Loads into a module, and sees that nothing about it has changed."""
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
    """No more address space than there is now and `MEMORY`: what is asked for on top of that fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_names_of_cases_are_unique() -> None:
    """Catches a case that hides another in a report, and a corpus that has shrunk."""
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    """Catches a bad file that is loaded, a message that helps nobody, an error of Python's own, a hang, and memory asked for on
    the word of a file."""
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
