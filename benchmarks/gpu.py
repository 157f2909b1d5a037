"""Device to host and host to device: shardsave on a CUDA device against the bandwidth of a pinned copy.

    python gpu.py DIRECTORY SIZE

The limit is torch's own copy between the device and one pinned buffer of 256 MiB, repeated. A save to the page cache and a load
from it stand beside the durable save and the cold load: the first two show the way between device and memory, the others
that the disk alone is the limit.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import measure
import model as models


def bandwidth(to_device: bool, repeat: int = 16) -> float:
    """Bytes per second of a pinned copy in one direction, the best of three."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    target, source = (device, host) if to_device else (host, device)
    target.copy_(source)

    def copies() -> None:
        for _ in range(repeat):
            target.copy_(source, non_blocking=True)

    return repeat * host.nbytes / min(_seconds(copies) for _ in range(3))


def _seconds(action: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_all(path: Path, size: int) -> dict[str, object]:
    import shardsave

    model = models.build(size).cuda()
    nbytes = models.tensor_bytes(model)
    shardsave.save({"warm": torch.zeros(1, device="cuda")}, path / "first", progress=False)  # pins the ring
    meter = measure.Meter()
    found: dict[str, object] = {"device": torch.cuda.get_device_name(), "bytes": nbytes}
    found["device_to_host"], found["host_to_device"] = bandwidth(False), bandwidth(True)
    for name, durable in (("save_to_cache", False), ("save_durable", True)):
        shutil.rmtree(path / name, ignore_errors=True)
        found[name] = nbytes / _seconds(lambda d=durable, n=name: shardsave.save(model, path / n, durable=d, progress=False))
    measure.make_warm(path / "save_durable")
    found["load_warm"] = nbytes / _seconds(lambda: shardsave.load_model(model, path / "save_durable", progress=False))
    measure.make_cold(path / "save_durable")
    found["load_cold"] = nbytes / _seconds(lambda: shardsave.load_model(model, path / "save_durable", progress=False))
    return found | {"peak_extra": meter.read()["peak_extra"]}


def main() -> None:
    path = Path(sys.argv[1])
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "not run on a GPU: torch sees no CUDA device here"}))
        return
    shutil.rmtree(path, ignore_errors=True)
    try:
        print(json.dumps(measure_all(path, int(sys.argv[2]))))
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
