"""Runs one operation of one tool, in this process alone. The last line of the output is JSON.

    python worker.py TOOL OPERATION PATH SIZE [--check]

OPERATION is ``save``, ``overwrite`` (a save of the same model with other values, in the place of a saved one) or the name of one of the
tool's ways to load. Only the operation itself is measured, without imports, without building the model, and without the comparison.
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


def save(tool, path: Path, size: int, seed: int) -> dict[str, object]:
    model = models.build(size, seed)
    path.mkdir(parents=True, exist_ok=True)
    gc.collect()
    measure.touch_free_memory(size * 5 // 4)
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


def load(tool, way: str, path: Path, size: int, check: bool) -> dict[str, object]:
    routine = tool.loads[way]
    into = way.startswith("into")
    model = models.build(size, seed=1) if into else None
    gc.collect()
    cached_before = measure.cached_bytes(path)
    measure.touch_free_memory(size * 5 // 4)
    meter = measure.Meter()
    loaded = routine(model, path) if into else routine(path)
    call = meter.read()
    cached_after = measure.cached_bytes(path)
    state = model.state_dict() if into else loaded
    if check and not models.same(models.build(size), state):
        raise RuntimeError("the loaded values differ from the saved values")
    return call | {
        "bytes": sum(tensor.nbytes for tensor in state.values()),
        "cached_before": cached_before[0] if cached_before is not None else None,
        "cached_after": cached_after[0] if cached_after is not None else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("operation")
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--check", action="store_true", help="compare the loaded values with the saved ones")
    options = parser.parse_args()
    tool = TOOLS[options.tool]
    tool.ready()
    if options.operation in ("save", "overwrite"):
        result = save(tool, options.path, options.size, seed=0 if options.operation == "save" else 1)
    else:
        result = load(tool, options.operation, options.path, options.size, options.check)
    sys.stdout.flush()
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
