"""Reads a case of the corpus through public verbs, and returns its content in the form of ``expected.json``.

Method: ``python tests/corpus/read.py FOLDER CASE…`` prints it as JSON, by case; another process can have another engine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shardsave
from corpus.record import Json, tensor_record

#: The members that `read_checkpoint` shares with ``expected.json``.
MEMBERS = ("tensors", "ties", "flags", "metadata", "durable", "parts", "companions")


def read_checkpoint(path: Path) -> Json:
    """Verifies every checksum of the directory or safetensors file at ``path`` and returns what it contains, by `MEMBERS`."""
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


def read_torch_file(path: Path) -> Json:
    """The same for a file of torch.save, which is converted first: no verb loads one."""
    with tempfile.TemporaryDirectory() as folder:
        shardsave.convert(path, Path(folder) / "ckpt", progress=False, durable=False)
        return read_checkpoint(Path(folder) / "ckpt")


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    print(json.dumps({case: read_checkpoint(corpus / case) for case in sys.argv[2:]}))
