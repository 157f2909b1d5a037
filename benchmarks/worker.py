"""One operation of one tool, in a process of its own. Prints one line of JSON, the last of its output.

    python worker.py TOOL OPERATION PATH SIZE [--check]

OPERATION is ``save`` or the name of one of the tool's ways to load. Whatever is not the operation itself (imports, building
the model, comparing) is outside of what is measured.
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


def save(tool, path: Path, size: int) -> dict[str, object]:
    model = models.build(size)
    path.mkdir(parents=True, exist_ok=True)
    gc.collect()
    measure.touch_free_memory(size * 5 // 4)
    meter = measure.Meter()
    tool.save(model, path)
    found = meter.read()
    there = measure.cached_bytes(path)
    measure.sync_files(path)
    after = meter.read()
    return found | {
        "bytes": models.tensor_bytes(model),
        "unwritten": there[1] if there is not None else None,
        "wall_synced": after["wall"],
        "cpu_synced": after["cpu"],
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
    got = routine(model, path) if into else routine(path)
    found = meter.read()
    cached_after = measure.cached_bytes(path)
    if check and not models.same(models.build(size), model.state_dict() if into else got):
        raise RuntimeError("what was loaded is not what was saved")
    result = model.state_dict() if into else got
    return found | {
        "bytes": sum(tensor.nbytes for tensor in result.values()),
        "cached_before": cached_before[0] if cached_before is not None else None,
        "cached_after": cached_after[0] if cached_after is not None else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("operation")
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--check", action="store_true", help="compare what was loaded with what was saved")
    asked = parser.parse_args()
    tool = TOOLS[asked.tool]
    tool.ready()
    if asked.operation == "save":
        found = save(tool, asked.path, asked.size)
    else:
        found = load(tool, asked.operation, asked.path, asked.size, asked.check)
    sys.stdout.flush()
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
