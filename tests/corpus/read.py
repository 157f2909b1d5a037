"""What public verbs find in a case of the corpus, in the words of `expected.json`; as a program for an engine of its own.

Method: ``python tests/corpus/read.py FOLDER CASE…`` prints it as JSON, by case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shardsave
from corpus.record import Json, tensor_record

#: What `found` has and `expected.json` too.
MEMBERS = ("tensors", "ties", "flags", "metadata", "durable", "parts", "companions")


def found(path: Path) -> Json:
    """What is at ``path``, a directory or a safetensors file, after every checksum was compared; members as in `MEMBERS`."""
    report = shardsave.verify(path, progress=False)
    assert report.verified is True and report.notes == (), report
    tensors, info = shardsave.load(path, progress=False), shardsave.inspect(path)
    flags = None
    if info.parameters is not None and info.frozen is not None:
        flags = {"parameters": sorted(info.parameters), "frozen": sorted(info.frozen)}
    return {
        "tensors": {name: tensor_record(tensor) for name, tensor in tensors.items()},
        "ties": dict(info.ties),
        "flags": flags,
        "metadata": dict(info.metadata),
        "durable": info.durable,
        "parts": dict(info.parts),
        "companions": sorted(info.companions),
    }


def found_in_torch(path: Path) -> Json:
    """What `convert` makes of a file of torch."""
    with tempfile.TemporaryDirectory() as folder:
        shardsave.convert(path, Path(folder) / "ckpt", progress=False, durable=False)
        return found(Path(folder) / "ckpt")


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    print(json.dumps({case: found(corpus / case) for case in sys.argv[2:]}))
