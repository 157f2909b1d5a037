"""Saving and loading on a real GPU, through the public API. Skipped if torch sees no GPU.

These tests show what a fake driver cannot: that the real driver orders, pins and captures as `csrc/cuda.cpp` expects.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from shardsave._format.dtypes import BY_TORCH
from support import SmallModel, same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DEVICE = "cuda:0"
#: About 0.2 s of work on a stream. A copy that does not wait for this work is finished before it.
BUSY_CYCLES = 400_000_000


@pytest.fixture(autouse=True)
def finished() -> Iterator[None]:
    """Waits for all work after each test, so that an asynchronous failure belongs to the test that caused it."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def _bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A tensor of random bits, with every pattern that its dtype has (NaN payloads, negative zeros)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw &= 1
    return raw.to(device).view(dtype).reshape(shape)


def _save(what: nn.Module | dict[str, torch.Tensor], folder: Path) -> shardsave.SaveReport:
    report = shardsave.save(what, folder, durable=False, progress=False)
    if report.engine == "native":
        assert report.pinned, report
    return report


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    return shardsave.load(folder, device="cpu", progress=False)


class Holder(nn.Module):
    """A module with one large parameter."""

    def __init__(self, elements: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(elements, device=device))


@contextmanager
def _current(kind: str) -> Iterator[None]:
    """Makes torch's current stream the default stream, or another one."""
    if kind == "default":
        yield
        return
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


streams = pytest.mark.parametrize("kind", ["default", "other"])


def test_every_dtype_bit_for_bit(folder: Path) -> None:
    """Catches a dtype, a size or an offset that the device path moves wrongly, in either direction."""
    shapes = ((), (0, 3), (1,), (3, 5, 7), (1000, 1025))
    packed = torch.float4_e2m1fn_x2  # two elements in a byte, so it has no scalars

    def state_on(device: str) -> dict[str, torch.Tensor]:
        return {
            f"{dtype}.{shape}": _bits(shape, dtype, seed, device)
            for seed, dtype in enumerate(BY_TORCH)
            for shape in shapes[1 if dtype == packed else 0 :]
        }

    state = state_on("cpu")
    _save(state_on(DEVICE), folder)
    for device in ("cpu", DEVICE):
        loaded = shardsave.load(folder, device=device, progress=False)
        assert loaded.keys() == state.keys()
        for name, tensor in loaded.items():
            assert tensor.device == torch.device(device)
            assert same_bits(tensor, state[name]), name
    assert shardsave.verify(folder, progress=False).verified is True


@pytest.mark.parametrize(("source", "target"), [(DEVICE, "cpu"), ("cpu", DEVICE), (DEVICE, DEVICE)])
def test_a_model_moves_between_devices(source: str, target: str, folder: Path) -> None:
    """Catches a load that changes a tensor's device, loses a flag, or unties weights."""
    saved, loaded = SmallModel(seed=1).to(source), SmallModel(seed=2).to(target)
    loaded.requires_grad_(True)
    _save(saved, folder)
    report = shardsave.load_model(loaded, folder, progress=False)
    assert report.verified is True
    for name, tensor in loaded.state_dict().items():
        assert tensor.device == torch.device(target)
        assert same_bits(tensor, saved.state_dict()[name]), name
    flags = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in saved.named_parameters()}
    assert loaded.head.weight is loaded.embed.weight


@streams
def test_work_in_flight_before_a_save(kind: str, folder: Path) -> None:
    """Catches a save that reads tensors which the current stream is still computing."""
    content = _bits((16 << 20,), torch.float32)
    source, target = content.to(DEVICE), torch.zeros(content.shape, device=DEVICE)
    torch.cuda.synchronize()
    with _current(kind):
        torch.cuda._sleep(BUSY_CYCLES)
        target.copy_(source)
        _save({"weight": target}, folder)
    assert same_bits(_saved(folder)["weight"], content)


@streams
def test_memory_in_use_before_a_load(kind: str, folder: Path) -> None:
    """Catches a load into memory that the allocator handed out again while earlier work still writes to it."""
    content = _bits((16 << 20,), torch.float32)
    _save({"weight": content.to(DEVICE)}, folder)
    torch.cuda.synchronize()
    with _current(kind):
        earlier = torch.empty(content.shape, device=DEVICE)
        address = earlier.data_ptr()
        torch.cuda._sleep(BUSY_CYCLES)
        earlier.fill_(7)
        del earlier
        module = Holder(content.numel(), DEVICE)
        assert module.weight.data_ptr() == address, "the allocator did not hand the memory out again"
        shardsave.load_model(module, folder, progress=False)
        doubled = module.weight.detach().view(torch.int32) ^ -1  # queued work sees what was loaded
    torch.cuda.synchronize()
    assert same_bits(module.weight, content)
    assert same_bits(doubled, content.view(torch.int32) ^ -1)


@streams
def test_memory_in_use_before_a_load_to_a_new_dict(kind: str, folder: Path) -> None:
    """Catches the same error in `load`, which allocates the memory itself."""
    content = _bits((16 << 20,), torch.float32)
    _save({"weight": content.to(DEVICE)}, folder)
    torch.cuda.synchronize()
    with _current(kind):
        earlier = torch.empty(content.shape, device=DEVICE)
        torch.cuda._sleep(BUSY_CYCLES)
        earlier.fill_(7)
        del earlier
        loaded = shardsave.load(folder, device=DEVICE, progress=False)
    torch.cuda.synchronize()
    assert same_bits(loaded["weight"], content)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda base: base.t(),
    "every other row": lambda base: base[::2],
    "every third column": lambda base: base[:, 1::3],
    "expanded": lambda base: base[:1].expand(300, -1),
    "slice of a larger storage": lambda base: base[5:77],
    "one column": lambda base: base[:, 3],
}


@streams
@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous_tensors(view: str, kind: str, folder: Path) -> None:
    """Catches a device tensor that is saved as if it were contiguous, or gathered without waiting for the current stream."""
    content = _bits((3000, 1001), torch.float32)
    source, base = content.to(DEVICE), torch.zeros(content.shape, device=DEVICE)
    torch.cuda.synchronize()
    with _current(kind):
        torch.cuda._sleep(BUSY_CYCLES)
        base.copy_(source)
        _save({"weight": VIEWS[view](base)}, folder)
    assert same_bits(_saved(folder)["weight"], VIEWS[view](content).contiguous())


def test_loading_into_a_non_contiguous_parameter(folder: Path) -> None:
    """Catches a device tensor that is filled as if it were contiguous."""
    content = _bits((1001, 3000), torch.float32)
    _save({"weight": content}, folder)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3000, 1001, device=DEVICE).t())
    shardsave.load_model(module, folder, progress=False)
    assert same_bits(module.weight, content) and module.weight.stride() == (1, 1001)


def test_casting_into_the_modules_dtype(folder: Path) -> None:
    """Catches a load onto the device that casts values differently from ``load_state_dict``."""
    content = torch.randn(1000, 1000)
    _save({"weight": content.to(DEVICE)}, folder)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(1000, 1000, device=DEVICE, dtype=torch.bfloat16))
    shardsave.load_model(module, folder, progress=False)
    assert same_bits(module.weight, content.to(torch.bfloat16))


def test_a_model_larger_than_the_ring(folder: Path) -> None:
    """Catches a slot that is reused too early, and memory that grows with the model, on the host or on the device."""
    state = {f"layers.{number}.weight": torch.randn(64 << 20, device=DEVICE) for number in range(5)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    saved = _save(state, folder)
    assert saved.bytes == 5 << 28 and saved.staging_bytes <= 256_000_000
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
    loaded = shardsave.load(folder, device=DEVICE, progress=False)
    assert torch.cuda.max_memory_allocated() - before <= saved.bytes + (64 << 20)
    for name, tensor in loaded.items():
        assert torch.equal(tensor.view(torch.int32), state[name].view(torch.int32)), name


def test_a_meta_model_is_made_on_the_device(folder: Path) -> None:
    """Catches a parameter that stays on meta or is created on another device, and a forgotten buffer."""
    saved = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50), nn.Linear(50, 10)).to(DEVICE)
    saved[0].requires_grad_(False)
    _save(saved, folder)
    with torch.device("meta"):
        loaded = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50), nn.Linear(50, 10))
    shardsave.load_model(loaded, folder, device=DEVICE, progress=False)
    for name, tensor in loaded.state_dict().items():
        assert tensor.device == torch.device(DEVICE), name
        assert same_bits(tensor, saved.state_dict()[name]), name
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [False, False, True, True, True, True]
    rows = torch.randn(8, 100, device=DEVICE)
    assert torch.equal(loaded.eval()(rows), saved.eval()(rows))


def test_a_capture_on_another_thread_stays_whole(folder: Path, tmp_path: Path) -> None:
    """Catches a call of ours, such as pinning, that invalidates a CUDA graph that another thread is capturing."""
    module = Holder(16 << 20, DEVICE)
    with torch.no_grad():
        module.weight.normal_()
    _save(module, tmp_path / "warm")  # so that torch allocates nothing during the capture
    shardsave.load_model(module, tmp_path / "warm", progress=False)
    if hasattr(shardsave, "_native"):
        shardsave._native.release_ring()  # so that the ring is pinned again during the capture
    expected = module.weight.detach().clone()
    values, graph = torch.arange(1000.0, device=DEVICE), torch.cuda.CUDAGraph()
    result = torch.zeros_like(values)
    begun, go_on, problems = threading.Event(), threading.Event(), []

    def capture() -> None:
        try:
            with torch.cuda.graph(graph):
                result.copy_(values * 2)
                begun.set()
                go_on.wait()
                result.add_(1)
        except BaseException as error:
            problems.append(error)
        finally:
            begun.set()

    torch.cuda.synchronize()
    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait()
    try:
        _save(module, folder)
        shardsave.load_model(module, folder, progress=False)
    finally:
        go_on.set()
        thread.join()
    assert problems == []
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, values * 2 + 1)
    assert same_bits(module.weight, expected)


def test_a_save_within_a_capture_is_refused(folder: Path) -> None:
    """Catches copies that become part of the caller's own graph."""
    weight, graph = torch.zeros(1000, device=DEVICE), torch.cuda.CUDAGraph()
    _save({"weight": weight}, folder)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        weight.add_(1)
        with pytest.raises(shardsave.SaveNotCommittedError, match="captured into a CUDA graph"):
            _save({"weight": weight}, folder)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(weight, torch.ones(1000, device=DEVICE))
    assert torch.equal(_saved(folder)["weight"], torch.zeros(1000))


FORKING = """
import os, sys, torch, shardsave
folder = sys.argv[1]
state = {"weight": torch.arange(1000.0, device="cuda:0")}
shardsave.save(state, folder, durable=False, progress=False)
pid = os.fork()
if pid == 0:
    try:
        shardsave.save(state, folder, durable=False, progress=False)
    except (shardsave.ShardSaveError, RuntimeError) as error:
        os._exit(0 if "fork" in str(error) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
loaded = shardsave.load(folder, device="cuda:0", progress=False)
assert torch.equal(loaded["weight"], state["weight"])
state["weight"] += 1
shardsave.save(state, folder, durable=False, progress=False)
assert torch.equal(shardsave.load(folder, device="cpu", progress=False)["weight"], state["weight"].cpu())
"""


def test_a_forked_child_is_refused(folder: Path) -> None:
    """Catches a save in a forked child that hangs, crashes or writes wrong bytes, and a parent that cannot save or load afterwards."""
    done = subprocess.run([sys.executable, "-c", FORKING, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")
def test_a_model_on_two_devices(folder: Path) -> None:
    """Catches a copy on the wrong device's stream."""
    contents = [_bits((4 << 20,), torch.float32, seed) for seed in range(4)]
    targets = []
    for number, content in enumerate(contents):
        with torch.cuda.device(number % 2):
            source = content.to(f"cuda:{number % 2}")
            target = torch.zeros_like(source)
            torch.cuda._sleep(BUSY_CYCLES)
            target.copy_(source)
            targets.append(target)
    _save({str(number): target for number, target in enumerate(targets)}, folder)
    for number, content in enumerate(contents):
        assert same_bits(_saved(folder)[str(number)], content)


def test_a_live_model_moves_with_its_ties_and_gradients(folder: Path) -> None:
    """Catches a move after which two parameters no longer share memory or only one is filled, and gradients left on the old device."""

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(4))
            self.b = nn.Parameter(self.a.data)
            self.c = nn.Linear(2, 2)
            self.register_buffer("alias", self.a.data)
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    source = Sharing()
    with torch.no_grad():
        source.a.fill_(3)
    _save(source, folder)
    moved = Sharing()
    moved.c.weight.grad = torch.ones(2, 2)
    identities = [id(parameter) for parameter in moved.parameters()]
    shardsave.load_model(moved, folder, device=DEVICE, progress=False)
    assert [id(parameter) for parameter in moved.parameters()] == identities
    assert moved.a.data_ptr() == moved.b.data_ptr() == moved.alias.data_ptr() and moved.b.tolist() == [3] * 4
    assert all(tensor.is_cuda for tensor in (*moved.parameters(), *moved.buffers(), moved.c.weight.grad))
    assert moved.scratch.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_casts_on_the_way_to_disk(tmp_path: Path, dtype: str) -> None:
    """Catches values that a cast on the device rounds otherwise than one on the host, and one that does not wait for the stream."""
    model = SmallModel()
    shardsave.save(model, tmp_path / "host", dtype=dtype, durable=False)
    on_device = SmallModel().to(DEVICE)
    large = torch.zeros(10_000_000, device=DEVICE)
    torch.cuda._sleep(BUSY_CYCLES)
    large.add_(1 / 3)
    shardsave.save(on_device, tmp_path / "device", dtype=dtype, durable=False)
    shardsave.save({"large": large, "strided": large.view(1000, -1).t()}, tmp_path / "large", dtype=dtype, durable=False)
    host, device = _saved(tmp_path / "host"), _saved(tmp_path / "device")
    assert host.keys() == device.keys() and all(same_bits(host[name], device[name]) for name in host)
    wanted = torch.full((10_000_000,), 1 / 3, dtype=torch.float32).to(getattr(torch, dtype))
    assert all(same_bits(tensor.reshape(-1), wanted) for tensor in _saved(tmp_path / "large").values())
