"""The two header readers: a fast one for compact JSON and a slow one for any JSON. The fast one must never return anything else."""

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


def test_both_readers_agree(tmp_path: Path) -> None:
    """Catches a file of shardsave, safetensors or `json.dumps` that the fast reader does not accept, or reads differently."""
    tensors = {"scalar": torch.tensor(1.5), "ünï.{}": torch.ones(2, 3), "empty": torch.empty(0, 4), "": torch.ones(1).half()}
    tensors |= {'"quoted"\n\\': torch.ones(1), "😀]},{": torch.ones(2)}
    shardsave.save(tensors, tmp_path)
    own = next(tmp_path.glob("*.safetensors")).read_bytes()
    foreign = safetensors.numpy.save({"a": np.ones((2, 2)), "b": np.ones(3, np.int8)}, {"format": "np"})
    texts = [
        content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
        for content in (own, foreign, safetensors.numpy.save({"a": np.ones(2)}, {"config": '{"a": {}, "b": [1]}'}))
    ]
    for text in [*texts, *(json.dumps(json.loads(text)).encode() for text in texts)]:
        fast, slow = header._read_compact(text), header._read_any(text, "header")
        assert fast is not None
        assert fast[0] == slow[0] and columns(fast[1]) == columns(slow[1])


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
        f"{{{ONE} ,{TWO}}}",
        f"{{{ONE}, {TWO}, }}",
        f'{{"__metadata__":{{"a":"}}, "}},{ONE}}}',
        f'{{"__metadata__":{{"a":1}},{ONE}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},{ONE}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{}},{ONE}}}',
        f"{{{ONE.replace('x', chr(92) + 'ud800')}}}",
        f"{{{ONE.replace('x', chr(92) + 'x')}}}",
        f"{{{ONE.replace('x', chr(92) + 'u0079')},{TWO}}}",
        f"{{{ONE.replace('x', chr(10))}}}",
        "{}",
    ],
)
def test_headers_that_only_the_slow_reader_takes(text: str) -> None:
    """Catches a fast reader that accepts a bad or doubtful header; `test_attacks` checks the messages of the slow reader."""
    assert header._read_compact(text.encode()) is None
    for good in (ONE, f"{ONE},{TWO}"):
        parsed = header._read_compact(f"{{{good}}}   ".encode())
        assert parsed is not None and list(parsed[1].names) == list(json.loads(f"{{{good}}}"))
