"""Runs one operation of one tool, in this process alone. The last line of the output is JSON.

    python worker.py TOOL OPERATION PATH SIZE [--check] [--training]

OPERATION is ``save``, ``overwrite`` (a save of the same model with other values, in the place of a saved one) or the name of one of
the tool's ways to load. With ``--training``, what is saved is a model with its optimizer. Only the operation itself is measured,
without imports, without building the model, and without the comparison.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import measure
import model as models
from rivals import TOOLS
from rivals.training import TRAINING


def save(tool, build, path: Path, size: int, seed: int) -> dict[str, object]:
    model = build(size, seed)
    path.mkdir(parents=True, exist_ok=True)
    gc.collect()
    measure.touch_free_memory(models.tensor_bytes(model) * 5 // 4)
    meter = measure.Meter()
    result = tool.save(model, path)
    call = meter.read()
    tool.finish(result)
    finished = meter.read()
    cached = measure.cached_bytes(path)
    measure.sync_files(path)
    synced = meter.read()
    return call | {
        "bytes": models.tensor_bytes(model),
        "unwritten": cached[1] if cached is not None else None,
        "wall_synced": call["wall"] + synced["wall"] - finished["wall"],
        "cpu_synced": call["cpu"] + synced["cpu"] - finished["cpu"],
        "wall_finished": finished["wall"],
        "disk": measure.disk_bytes(path),
    }


def load(tool, build, way: str, path: Path, size: int, check: bool) -> dict[str, object]:
    routine = tool.loads[way]
    into = way.startswith("into")
    model = (
        None if not into else models.Training(size, seed=1, stepped=False) if build is models.Training else build(size, seed=1)
    )
    there = models.tensor_bytes(model) if into else 0
    gc.collect()
    cached_before = measure.cached_bytes(path)
    measure.touch_free_memory(measure.disk_bytes(path) * 5 // 4)
    meter = measure.Meter()
    loaded = routine(model, path) if into else routine(path)
    call = meter.read()
    cached_after = measure.cached_bytes(path)
    state = model.state_dict() if into else loaded
    if check and not models.same(build(size), state):
        raise RuntimeError("the loaded values differ from the saved values")
    nbytes = sum(tensor.nbytes for tensor in state.values())
    return call | {
        "bytes": nbytes,
        "new_bytes": nbytes - there,
        "cached_before": cached_before[0] if cached_before is not None else None,
        "cached_after": cached_after[0] if cached_after is not None else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("operation")
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--check", action="store_true", help="compare the loaded values with the saved ones")
    parser.add_argument("--training", action="store_true", help="a model and its AdamW, instead of a model")
    options = parser.parse_args()
    tool = (TRAINING if options.training else TOOLS)[options.tool]
    build = models.Training if options.training else models.build
    tool.ready()
    if options.operation in ("save", "overwrite"):
        result = save(tool, build, options.path, options.size, seed=0 if options.operation == "save" else 1)
    else:
        result = load(tool, build, options.operation, options.path, options.size, options.check)
    sys.stdout.flush()
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
