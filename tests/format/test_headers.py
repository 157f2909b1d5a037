"""The two ways to read a header: quickly where it is compact JSON, and any; the first may only ever say what the second says."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import shardsave
from shardsave._format import header

ONE = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWO = '"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'


def columns(tensors: header.Tensors) -> list[list[object]]:
    return [list(column) for column in tensors]


def test_quickly_read(tmp_path: Path) -> None:
    """Catches files of ours and of safetensors that are read the slow way, and a quick way that reads other values."""
    tensors = {"scalar": torch.tensor(1.5), "ünï.{}": torch.ones(2, 3), "empty": torch.empty(0, 4), "": torch.ones(1).half()}
    shardsave.save(tensors, tmp_path)
    ours = next(tmp_path.glob("*.safetensors")).read_bytes()
    theirs = safetensors.numpy.save({"a": np.ones((2, 2)), "b": np.ones(3, np.int8)}, {"format": "np"})
    for content in (ours, theirs, safetensors.numpy.save({"a": np.ones(2)})):
        text = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
        quick, slow = header._read_compact(text), header._read_any(text, "header")
        assert quick is not None
        assert quick[0] == slow[0] and columns(quick[1]) == columns(slow[1])


@pytest.mark.parametrize(
    "text",
    [
        f"{{{ONE},{TWO.replace('y', 'x')}}}",
        f"{{{ONE},{TWO.replace('y', '__metadata__')}}}",
        f"{{{ONE},{TWO}",
        f"{{{ONE},{TWO}}}}}",
        f"{{{ONE},{TWO}}}\n",
        f"{{{ONE},{TWO},}}",
        f"{{{ONE}{TWO}}}",
        f"{{{ONE},{TWO.replace('[1]', '[01]')}}}",
        f"{{{ONE},{TWO.replace('[1]', '[1,]')}}}",
        f"{{{ONE},{TWO.replace('[1]', '[2]')}}}",
        f"{{{ONE},{TWO.replace('[4,8]', '[04,8]')}}}",
        f"{{{ONE},{TWO.replace('[4,8]', '[5,9]')}}}",
        f"{{{ONE},{TWO.replace('[4,8]', '[0,4]')}}}",
        f"{{{ONE},{TWO.replace('F32', 'F31')}}}",
        f"{{{TWO},{ONE}}}",
        f"{{{ONE}, {TWO}}}",
        f'{{"__metadata__":{{"a":1}},{ONE}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},{ONE}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{}},{ONE}}}',
        f"{{{ONE.replace('x', chr(92) + 'u0078')}}}",
        f"{{{ONE.replace('x', chr(10))}}}",
        "{}",
    ],
)
def test_left_to_the_slow_way(text: str) -> None:
    """Catches a quick way that accepts what is bad, or what it cannot tell; `test_attacks` sees what the slow way says of it."""
    assert header._read_compact(text.encode()) is None
    for good in (ONE, f"{ONE},{TWO}"):
        read = header._read_compact(f"{{{good}}}   ".encode())
        assert read is not None and list(read[1].names) == list(json.loads(f"{{{good}}}"))
