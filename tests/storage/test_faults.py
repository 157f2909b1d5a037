"""Faults injected beneath libc, where the C++ core, the commit in Python and the portable engine all meet them.

Method: each scenario of ``faults/scenarios.py`` runs in a process of its own with ``faults/beneath.c`` preloaded, and with what
``remembering.py`` changes.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults.beneath import read_record
from faults.running import ENGINES, fates, run_beneath, trials

pytestmark = pytest.mark.slow

SCENARIOS = ("-m", "storage.remembering", "scenarios")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_each_call_of_a_save(beneath: Path, memory: Path, before: str, engine: str) -> None:
    """Catches any call whose failure is swallowed, leaks something, tears a checkpoint, leaves litter or is not reported; and any
    moment at which a kill or Ctrl-C leaves neither the old nor the new checkpoint."""
    every = "save_fails,save_loses_its_disk,save_is_killed,save_is_interrupted"
    some = "slice_fails,save_loses_its_disk,killed_at_each_call,training_is_interrupted"
    scenarios = fates(every, some, whole=(engine, before) == ("native", "overwrite"))
    assert trials(run_beneath(beneath, engine, [*SCENARIOS, scenarios, before, str(memory)])) >= 60


@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_each_call_of_a_save_with_direct_io(beneath: Path, tmp_path: Path, before: str) -> None:
    """Catches the same on a disk, where direct I/O bypasses the page cache; a file system in memory has none."""
    scenarios = fates("direct_save_fails,save_is_killed", "direct_save_fails,killed_at_each_call")
    arguments = [*SCENARIOS, scenarios, before, str(tmp_path)]
    assert trials(run_beneath(beneath, "native", arguments)) >= 60


@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_each_call_of_a_save_with_a_config(beneath: Path, memory: Path, before: str) -> None:
    """Catches the same with a file of a fixed name beside the weights: half of it, the one of a save that was not committed, one of
    another save that no note reports, one of another save that the next save does not replace."""
    some = "slice_fails,save_is_killed,save_is_interrupted" if before == "overwrite" else "slice_fails,killed_at_each_call"
    scenarios = fates("save_fails,save_is_killed,save_is_interrupted", some)
    arguments = [*SCENARIOS, scenarios, before, str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind="config")) >= 60


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_each_call_of_a_save_of_an_adapter(beneath: Path, memory: Path, before: str, engine: str) -> None:
    """Catches weights and config of two different adapters side by side that no note reports, half of one file, the one of a save
    that was not committed, and one that the next save does not replace."""
    every = "slice_fails,save_is_killed,save_is_interrupted"
    scenarios = fates(every, "slice_fails,killed_at_each_call", whole=(engine, before) == ("native", "overwrite"))
    arguments = [*SCENARIOS, scenarios, before, str(memory)]
    assert trials(run_beneath(beneath, engine, arguments, kind="adapter")) >= 60


def test_config_of_a_save_killed_at_each_call(beneath: Path, memory: Path) -> None:
    """Catches a committed config that goes with the staging directory of its dead saver, and an uncommitted one that stays."""
    arguments = [*SCENARIOS, "config_outlives_its_save", "first", str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind="config")) >= 60


def test_killed_at_each_call_over_links(beneath: Path, memory: Path) -> None:
    """Catches a moment at which a kill leaves neither the old checkpoint, whose files are symbolic links, nor the new one, or a link for
    good; and what a link leads to that is changed."""
    arguments = [*SCENARIOS, "killed_after_each_call", "overwrite", str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind="links")) >= 60


@pytest.mark.parametrize(
    ("before", "scenarios"),
    [("first", "killed_at_each_call"), ("overwrite", "training_fails,killed_at_each_call,training_is_interrupted")],
)
def test_each_call_of_a_save_with_a_training_state(beneath: Path, memory: Path, before: str, scenarios: str) -> None:
    """Catches a model and a training state of two saves, one of them without the other, half a directory, one of a save that was not
    committed, and one that the next save does not remove."""
    arguments = [*SCENARIOS, scenarios, before, str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind="training")) >= 120


@pytest.mark.parametrize("kind", ["training-new", "training-gone"])
def test_killed_at_each_call_where_one_of_two_saves_has_a_training_state(beneath: Path, memory: Path, kind: str) -> None:
    """Catches a moment at which a kill leaves a model with the training state of another save, or without its own."""
    arguments = [*SCENARIOS, "killed_at_each_call", "overwrite", str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind=kind)) >= 120


#: A shard that is taken over in the place of its checkpoint; one that is taken from another checkpoint; and the same with clones.
REUSE = [("overwrite", "reuse", ""), ("first", "reuse-step", ""), ("first", "reuse-step", "1")]


@pytest.mark.parametrize(("before", "kind", "clones"), REUSE)
def test_each_call_of_a_save_that_takes_over_a_shard(
    beneath: Path, memory: Path, before: str, kind: str, clones: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failure after which a shard that was not taken over is missing, one that is passed over although the shard may not be
    durable, and any moment at which a kill or Ctrl-C damages either checkpoint, or leaves litter."""
    if clones:
        monkeypatch.setenv("SHARDSAVE_FAULTS_CLONES", clones)
    scenarios = "slice_fails,killed_at_each_call,training_is_interrupted"
    assert trials(run_beneath(beneath, "native", [*SCENARIOS, scenarios, before, str(memory)], kind=kind)) >= 60


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_killed_at_any_moment(beneath: Path, tmp_path: Path, before: str, engine: str) -> None:
    """Catches any moment, whatever the saver's threads are doing, at which a kill tears a checkpoint; and a lock that a forked child
    keeps after its parent was killed."""
    scenarios = "save_is_killed_at_random,save_is_killed_beside_a_live_child"
    assert trials(run_beneath(beneath, engine, [*SCENARIOS, scenarios, before, str(tmp_path)])) >= 10


EARLY = """
import fcntl, sys, torch, shardsave
from pathlib import Path
from faults.beneath import Fate, read_record, recorded

folder = Path(sys.argv[1])
state = {"x": torch.arange(5_000_003)}

def calls(name, number=0, fate=Fate.PASS, durable=True):
    (folder / name).mkdir()
    with recorded(folder / name, folder / f"{name}.record", number, fate):
        report = shardsave.save(state, folder / name / "ckpt", durable=durable, progress=False)
    made = read_record(folder / f"{name}.record")
    return report.direct, [call for call in made if call.path.suffix == ".safetensors" or call.call == "fcntl"]

def started(made):
    return [range(call.a, call.a + call.b) for call in made if call.call == "sync_file_range"]

shardsave.save(state, folder / "warm", progress=False)
direct, made = calls("direct")
if direct:
    assert not started(made)
    record = read_record(folder / "direct.record")
    number = next(n for n, call in enumerate(record, 1) if call.call == "fcntl" and call.a == fcntl.F_SETFL)
    direct, made = calls("refused", number, Fate.FAIL)
assert not direct
names = [call.call for call in made]
written = [(call.a, call.a + call.b) for call in made[: names.index("ftruncate")] if call.call == "pwrite"]
assert len(written) > 4 and "sync_file_range" not in names[names.index("ftruncate") :]
assert all(any(begin in one and end - 1 in one for one in started(made)) for begin, end in written), (written, started(made))
assert not started(calls("in-memory", durable=False)[1])
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_writeback_begins_with_the_first_block(beneath: Path, tmp_path: Path, engine: str) -> None:
    """Catches a durable save through the page cache that leaves all writing to its fsync, which Ctrl-C cannot interrupt; and a save
    that is not durable and starts to write to the disk all the same."""
    run_beneath(beneath, engine, ["-c", EARLY, str(tmp_path)])


#: The kernel's name of a call → the library's.
KERNEL = {
    "pread64": "pread", "pwrite64": "pwrite", "newfstatat": "stat", "fstat": "stat", "lstat": "stat", "fstatat": "stat",
    "fstatfs": "fstatvfs", "closedir": "close", "rename": "renameat", "mkdir": "mkdirat", "unlink": "unlinkat",
    "rmdir": "unlinkat", "open": "openat", "opendir": "openat", "getdents64": "readdir",
}  # fmt: skip

#: Calls whose number differs from the kernel's (it is enough that there are some), or that strace may not know.
UNCOUNTED = {"readdir", "fdopendir", "lseek", "stat", "fcntl", "cachestat"}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("engine", ENGINES)
def test_no_call_is_missed(beneath: Path, tmp_path: Path, engine: str) -> None:
    """Catches an OS call on checkpoint files that the library does not see, and so never fails. strace has the kernel's view."""
    program = (
        "import sys; from pathlib import Path; from faults.beneath import recorded; from faults import savers; import shardsave\n"
        "folder = Path(sys.argv[1])\n"
        "savers.save(0, folder / 'warm')\n"
        "with recorded(folder / 'watched', folder / 'record'):\n"
        "    for generation in (1, 2): savers.save(generation, folder / 'watched' / 'ckpt')\n"
        "    assert savers.generation_in(folder / 'watched' / 'ckpt') == 2\n"
        "    shardsave.load(folder / 'watched' / 'ckpt', mmap=True); shardsave.verify(folder / 'watched' / 'ckpt')\n"
    )
    (tmp_path / "watched").mkdir()
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", "trace=%file,%desc,flock", "-o", str(trace)]
    run_beneath(beneath, engine, ["-c", program, str(tmp_path)], *strace, kind="reuse")
    watched = str(tmp_path / "watched")
    by_kernel: Counter[str] = Counter()
    for line in trace.read_text().splitlines():
        match = re.match(r"\d+ +(?:<\.\.\. )?(\w+)[( ]", line)
        named = re.sub(r"<([^<>]*)>, \"", r'<\1>, "\1/', line.split(" = ")[0])  # a name is relative to the descriptor before it
        ours = re.search(re.escape(watched) + r"[/>\"]", named)
        if match and ours and match[1] not in ("readlinkat", "readlink") and not _is_the_librarys_own(line):
            by_kernel[KERNEL.get(match[1], match[1])] += 1
    by_library = Counter(KERNEL.get(call.call, call.call) for call in read_record(tmp_path / "record"))
    assert by_kernel.keys() - UNCOUNTED == by_library.keys() - UNCOUNTED
    for call in by_kernel.keys() - UNCOUNTED:
        assert by_kernel[call] == by_library[call], call
    assert by_kernel.keys() >= {"openat", "pwrite", "fsync", "renameat", "flock"}


def _is_the_librarys_own(line: str) -> bool:
    """Whether the library itself made the call, to look up the path of a file that it records."""
    return "/proc/self/fd/" in line
