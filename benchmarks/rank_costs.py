"""Measures what very many tensors cost on ranks, where moving their bytes costs nothing. The last line of the output is JSON.

python rank_costs.py DIRECTORY [TENSORS]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rank_jobs import run_job
from rank_pieces import SIZE

TENSORS = 100_000
SAVES = 3


def sharded_module(count: int) -> nn.Module:
    """Parameters of 64 bytes in layers of ten, each sharded by rows over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (SIZE,))
    module = nn.Module()
    for number in range(count // 10):
        layer = nn.Module()
        for place in range(10):
            part = DTensor.from_local(torch.full((16 // SIZE,), float(number)), mesh, [Shard(0)], run_check=False)
            layer.register_parameter(f"weight_{place}", nn.Parameter(part))
        module.add_module(f"layer_{number}", layer)
    return module


def saves(path: Path, count: int, wait_for_all: Callable[[], None]) -> dict[str, Any]:
    """Seconds of several saves of the same module on one rank. ``processor``: of the calling thread, which plans."""
    import shardsave

    module = sharded_module(count)
    wait_for_all()
    figures: dict[str, Any] = {"planning": [], "processor": [], "whole": []}
    for number in range(SAVES):
        began, processor = time.perf_counter(), time.thread_time()
        report = shardsave.save(module, path / str(number), progress=False, reuse=False)
        figures["processor"].append(time.thread_time() - processor)
        figures["whole"].append(time.perf_counter() - began)
        figures["planning"].append(report.phases.plan)
    began = time.perf_counter()
    shardsave.load_model(module, path / "0", progress=False)
    return figures | {"load": time.perf_counter() - began}


def main() -> None:
    path, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else TENSORS
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        ranks, _ = run_job(SIZE, lambda wait_for_all: saves(path, count, wait_for_all))
    finally:
        shutil.rmtree(path, ignore_errors=True)
    result = {
        "tensors": count,
        "first": [rank["processor"][0] for rank in ranks],
        "second": [seconds for rank in ranks for seconds in rank["processor"][1:]],
        "planning": [rank["planning"][0] for rank in ranks],
        "whole": [rank["whole"][0] for rank in ranks],
        "whole_second": [seconds for rank in ranks for seconds in rank["whole"][1:]],
        "load": [rank["load"] for rank in ranks],
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
