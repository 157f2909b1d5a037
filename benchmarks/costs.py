"""Measures what shardsave costs besides moving bytes: checksums, very many tensors, also in an optimizer, frozen weights, the import.

python costs.py checksums DIRECTORY SIZE | frozen DIRECTORY SIZE | many DIRECTORY | optimizer DIRECTORY | import
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import measure
import model as models

TENSORS = 100_000
PAIRS = 7

#: Saves of a model of which 99 of 100 equal parts are frozen.
SAVES = 10


def checksums(path: Path, size: int) -> dict[str, object]:
    """Runs the engine with and without checksums, in turn, on the same memory and file; returns the seconds of both in each case."""
    from shardsave._common.sources import TensorSource
    from shardsave._engine import engine
    from shardsave._engine.blocks import blocks
    from shardsave._engine.transfer import BLOCK_BYTES, Access

    model = models.build(size)
    tensors = [tensor for tensor in model.state_dict().values()]
    pieces = [TensorSource.of(tensor) for tensor in tensors]
    extents, end = [], 4096
    for piece in pieces:
        extents.append((0, end, piece.nbytes, 1))
        end += piece.nbytes
    plan = blocks(np.array(extents), BLOCK_BYTES)
    file = path / "checksums.bin"

    def write(durable: bool, checksum: bool) -> float:
        file.unlink(missing_ok=True)
        os.sync()
        fd = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            began = time.perf_counter()
            os.posix_fallocate(fd, 0, -(-end // 4096) * 4096)
            access: Access = "direct" if durable else "buffered"
            engine.write([fd], plan, pieces, access=access, start_writeback=durable, checksum=checksum, tick=lambda _: None)
            if durable:
                os.fsync(fd)
            return time.perf_counter() - began
        finally:
            os.close(fd)

    def read(cold: bool, checksum: bool) -> float:
        (measure.make_cold if cold else measure.make_warm)(file)
        fd = os.open(file, os.O_RDONLY)
        try:
            began = time.perf_counter()
            engine.read([fd], plan, pieces, checksum=checksum, tick=lambda _: None)
            return time.perf_counter() - began
        finally:
            os.close(fd)

    cases: dict[str, Callable[[bool], float]] = {
        "save durable": lambda checksum: write(True, checksum),
        "save to cache": lambda checksum: write(False, checksum),
        "load cold": lambda checksum: read(True, checksum),
        "load warm": lambda checksum: read(False, checksum),
    }
    seconds: dict[str, object] = {}
    for name, case in cases.items():
        case(True)
        # Runs with and without checksums alternate, and their order changes each time, so that a drift of the machine affects both.
        pairs = [[case(True), case(False)] if n % 2 else list(reversed([case(False), case(True)])) for n in range(PAIRS)]
        seconds[name] = {"with": [pair[0] for pair in pairs], "without": [pair[1] for pair in pairs]}
    return seconds


class _Many(nn.Module):
    """Small parameters in layers of ten, as in a model with very many layers or experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for number in range(count // 10):
            layer = nn.Module()
            for place in range(10):
                layer.register_parameter(f"weight_{place}", nn.Parameter(torch.full((16,), float(number))))
            self.add_module(f"layer_{number}", layer)


def many(path: Path) -> dict[str, object]:
    """Runs each call three times on 100,000 tensors of 64 bytes, where moving the bytes costs nothing; returns seconds.

    ``whole``: the whole call. ``planning``: the call without the time in which the engine moves bytes and a save syncs its shards.
    What remains is planning, headers, index, and creating tensors.
    """
    import shardsave
    from shardsave._common.backend import native

    state = {f"model.layers.{n // 10}.block.weight_{n % 10}": torch.full((16,), float(n)) for n in range(TENSORS)}
    model = _Many(TENSORS)
    seconds: dict[str, dict[str, list[float]]] = {}
    assert native is not None, "the extension is needed"
    moving = 0.0

    def run(**tables: Any) -> Any:
        nonlocal moving
        began = time.perf_counter()
        try:
            return original_run(**tables)
        finally:
            moving += time.perf_counter() - began

    def timed(name: str, action: Callable[[], object]) -> None:
        nonlocal moving
        moving = 0.0
        began = time.perf_counter()
        report = action()
        whole = time.perf_counter() - began
        if isinstance(report, shardsave.SaveReport):
            moving += report.phases.sync
        times = seconds.setdefault(name, {"whole": [], "planning": []})
        times["whole"].append(whole)
        times["planning"].append(whole - moving)

    original_run, native.run = native.run, run
    try:
        for _ in range(3):
            shutil.rmtree(path / "many", ignore_errors=True)
            timed("save a mapping", lambda: shardsave.save(state, path / "many", progress=False))
            timed("load a mapping", lambda: shardsave.load(path / "many", progress=False))
            shutil.rmtree(path / "many", ignore_errors=True)
            timed("save a module", lambda: shardsave.save(model, path / "many", progress=False))
            timed("load into a module", lambda: shardsave.load_model(model, path / "many", progress=False))
            timed("inspect", lambda: shardsave.inspect(path / "many"))
    finally:
        native.run = original_run
    return seconds


def optimizer(path: Path) -> dict[str, object]:
    """Saves a model alone and with an AdamW that has 100,000 tensors, and loads both, three times in turns; returns the seconds of
    whole calls."""
    import shardsave

    model = _Many(TENSORS // 3)  # AdamW has three tensors for each parameter
    adam = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        adam.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(16), "exp_avg_sq": torch.ones(16)}
    training = {"optimizer": adam}

    def resume(name: str, fresh: torch.optim.Optimizer) -> None:
        shardsave.resume(path / name, model, training={"optimizer": fresh}, progress=False)

    cases: dict[str, Callable[[], object]] = {
        "save the model": lambda: shardsave.save(model, path / "alone", progress=False),
        "save both": lambda: shardsave.save(model, path / "both", training=training, progress=False),
        "load the model": lambda: shardsave.load_model(model, path / "both", progress=False),
        "resume both": lambda: resume("both", torch.optim.AdamW(model.parameters())),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(3):
        for name in ("alone", "both"):
            shutil.rmtree(path / name, ignore_errors=True)
        os.sync()
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - began)
    return {"tensors": sum(len(state) for state in adam.state.values()), **seconds}


def frozen(path: Path, size: int) -> dict[str, object]:
    """Saves a model of ``size`` bytes, 99 % of it frozen, ten times after one step each; returns seconds of whole calls, and bytes.

    ``full``: durable saves that write everything. ``pass``: one checksum of every byte in memory. ``saves``: into a new directory each,
    with the shards of the one before; ``assumed``: the same with ``assume_frozen_unchanged``. ``written``: by ``saves`` in all.
    """
    import shardsave
    from shardsave._common.sources import TensorSource
    from shardsave._engine import engine
    from shardsave._engine.blocks import blocks
    from shardsave._engine.transfer import BLOCK_BYTES

    model = nn.ParameterList(nn.Parameter(torch.full((size // 400,), float(n)), requires_grad=n == 99) for n in range(100))
    pieces = [TensorSource.of(parameter.data) for parameter in model]
    plan = blocks(np.array([(0, n * piece.nbytes, piece.nbytes, 1) for n, piece in enumerate(pieces)]), BLOCK_BYTES)

    def timed(action: Callable[[], object]) -> float:
        os.sync()
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    def save(name: str, **options: Any) -> Any:
        with torch.no_grad():
            model[99].add_(1)
        return shardsave.save(model, path / name, max_shard_size=size // 20, progress=False, **options)

    def saves(**options: Any) -> tuple[list[float], int]:
        shutil.rmtree(path / "0", ignore_errors=True)
        save("0", **options)
        seconds, written = [], 0
        for n in range(1, SAVES + 1):
            reports: list[Any] = []
            seconds.append(timed(lambda n=n, reports=reports: reports.append(save(str(n), reuse=path / str(n - 1), **options))))
            shutil.rmtree(path / str(n - 1))
            written += reports[0].bytes_written
        return seconds, written

    full = []
    for _ in range(4):
        shutil.rmtree(path / "full", ignore_errors=True)
        full.append(timed(lambda: save("full", reuse=False)))
    sums = [timed(lambda: engine.gather(plan, pieces, tick=lambda _: None)) for _ in range(PAIRS)]
    seconds, written = saves()
    assumed, _ = saves(assume_frozen_unchanged=True)
    return {"bytes": size, "full": full[1:], "pass": sums, "saves": seconds, "assumed": assumed, "written": written}


def imports() -> dict[str, object]:
    """Seconds that ``import shardsave`` adds after ``import torch``, in new processes, with compiled bytecode as when installed.

    Includes `save` and `load_model`, which are imported at their first use.
    """
    used = "import shardsave; shardsave.save; shardsave.load_model"
    script = f"import time, torch; a = time.perf_counter(); {used}; print(time.perf_counter() - a)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
        return float(done.stdout)

    once()
    seconds = [once() for _ in range(9)]
    return {"seconds": seconds, "median": statistics.median(seconds)}


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    path = Path(arguments[0]) if arguments else None
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
    try:
        if what == "checksums" and path is not None:
            result = checksums(path, int(arguments[1]))
        elif what == "frozen" and path is not None:
            result = frozen(path, int(arguments[1]))
        elif what == "many" and path is not None:
            result = many(path)
        elif what == "optimizer" and path is not None:
            result = optimizer(path)
        else:
            result = imports()
    finally:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
