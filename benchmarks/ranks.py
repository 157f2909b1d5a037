"""Saves or loads a sharded model with one tool, in several processes of one job on this machine. The last line of the output is JSON.

    python ranks.py TOOL save|load|stall DIRECTORY SIZE [--ranks 4] [--layout mixed] [--check]

``stall``: how long `shardsave.save_async` stops its caller, and how long a copy of what a rank has takes.

Layouts: ``rows`` is FSDP2's own; in ``mixed`` every fourth matrix is sharded by columns, in ``columns`` all are; ``replicas`` is ``mixed``
on half of the ranks, with a second copy on the other half (HSDP).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import measure
import model as models
from rank_jobs import run_job
from rivals.ranks import RANKS, RankTool

LAYOUTS = ("mixed", "rows", "columns", "replicas")
STALLS = 3  # saves in the background that count
SHARDS = 10  # a model has about so many files, so that all ranks own some


def sharded(size: int, layout: str, seed: int = 0) -> nn.Module:
    """The Llama of `model.build`, sharded over all ranks by FSDP2. No rank has more than one whole tensor at a time; the values depend
    on ``seed`` alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from transformers import LlamaForCausalLM

    ranks = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        if layout == "replicas"
        else init_device_mesh("cpu", (ranks,))
    )
    matrices = 0

    def place(parameter: nn.Parameter) -> Shard:
        nonlocal matrices
        matrices += parameter.dim() == 2
        columns = layout == "columns" or (layout != "rows" and matrices % 4 == 1)
        return Shard(1) if parameter.dim() == 2 and columns else Shard(0)

    with torch.device("meta"):
        model = LlamaForCausalLM(models.config(size)).to(torch.bfloat16)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        assert isinstance(parameter, DTensor)
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        models._fill(whole, np.random.Generator(np.random.SFC64([seed, number])))
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.detach().to_local().copy_(part.to_local())
    for buffer in model.buffers():
        buffer.zero_()
    return model.eval()


def local_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to_local() for name, parameter in model.named_parameters()}


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether this rank's parts of both are equal, bit for bit."""
    mine, wanted = local_parts(model), local_parts(other)
    return all(torch.equal(models._bits(mine[name]), models._bits(wanted[name])) for name in wanted)


def measured(tool: RankTool, options: argparse.Namespace, wait_for_all: Callable[[], None]) -> dict[str, Any]:
    """One rank's figures."""
    saves = options.operation == "save"
    model = sharded(options.size, options.layout, seed=0 if saves else 1)
    part = sum(tensor.nbytes for tensor in local_parts(model).values())
    gc.collect()
    measure.touch_free_memory(part * 5 // 4)
    wait_for_all()
    sent, meter, begin = tool.sent(), measure.Meter(), time.monotonic()
    report = tool.save(model, options.path, options.size // SHARDS) if saves else tool.load(model, options.path)
    figures = meter.read() | {"begin": begin, "end": time.monotonic(), "sent": tool.sent() - sent, "part": part}
    figures["bytes"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if options.check and not saves and not same(model, sharded(options.size, options.layout)):
        raise RuntimeError("the loaded values differ from the saved values")
    figures["report"] = str(report) if report is not None else ""
    return figures


def stalls(options: argparse.Namespace, wait_for_all: Callable[[], None]) -> dict[str, Any]:
    """Seconds that saves in the background stop one rank, but for the first, which takes new memory; and those of a plain copy."""
    import shardsave

    model = sharded(options.size, options.layout)
    parts = [*local_parts(model).values()]
    copies = [torch.zeros_like(part) for part in parts]
    figures: dict[str, Any] = {"stall": [], "memcpy": []}
    wait_for_all()
    for number in range(STALLS + 1):
        dist.barrier()
        began = time.perf_counter()
        for copy, part in zip(copies, parts):
            copy.copy_(part)
        copied = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        pending = shardsave.save_async(model, options.path / str(number), staging="snapshot", progress=False)
        stall = time.perf_counter() - began
        pending.wait()
        if number:
            figures["stall"].append(stall)
            figures["memcpy"].append(copied)
    return figures


def summary(ranks: list[dict[str, Any]], loopback: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the job."""
    figures = {
        "wall": max(rank["end"] for rank in ranks) - min(rank["begin"] for rank in ranks),
        "cpu": sum(rank["cpu"] for rank in ranks),
        "peak_extra": max(rank["peak_extra"] for rank in ranks),
        "peaks": [rank["peak_extra"] for rank in ranks],
        "parts": [rank["part"] for rank in ranks],
        "bytes": ranks[0]["bytes"],
        "read_from_disk": sum(rank["read_from_disk"] for rank in ranks),
        "written": sum(rank["written"] for rank in ranks),
        "between_ranks": loopback + sum(rank["sent"] for rank in ranks),
        "report": ranks[0]["report"],
    }
    if options.operation == "save":
        cached = measure.cached_bytes(options.path)
        began = time.perf_counter()
        measure.sync_files(options.path)
        figures |= {
            "wall_synced": figures["wall"] + time.perf_counter() - began,
            "unwritten": cached[1] if cached is not None else None,
            "disk": measure.disk_bytes(options.path),
            "files": len(measure.files_below(options.path)),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=list(RANKS))
    parser.add_argument("operation", choices=["save", "load", "stall"])
    parser.add_argument("path", type=Path, metavar="DIRECTORY")
    parser.add_argument("size", type=int, help="bytes of the model")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layout", choices=LAYOUTS, default="mixed")
    parser.add_argument("--check", action="store_true", help="compare the loaded values with the saved ones")
    options = parser.parse_args()
    import transformers.models.llama.modeling_llama  # noqa: F401  before the ranks are forked

    tool = RANKS[options.tool]
    tool.ready()
    options.path.mkdir(parents=True, exist_ok=True)
    if options.operation == "stall":
        ranks, _ = run_job(options.ranks, lambda wait_for_all: stalls(options, wait_for_all))
        figures = {key: [seconds for rank in ranks for seconds in rank[key]] for key in ("stall", "memcpy")}
        figures["wall"] = max(figures["stall"])
    else:
        ranks, loopback = run_job(options.ranks, lambda wait_for_all: measured(tool, options, wait_for_all))
        figures = summary(ranks, loopback, options)
    sys.stdout.flush()
    print("\n" + json.dumps(figures))


if __name__ == "__main__":
    main()
