"""Generates headers and indexes from the grammar of JSON and of the formats, with a few errors that flipping bits would not find."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from shardsave._format.crc64 import crc64
from shardsave._format.dtypes import BY_NAME

#: JSON to be written. An object is a `Pairs`, so that a key can appear twice; a `Raw` is written unchanged.
Node = Any


class Raw(str):
    """Text that is written unchanged, JSON or not."""


class Pairs(list[tuple[Node, Node]]):
    """A JSON object."""


def write(node: Node) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{write(key)}:{write(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(write, node)) + "]"
    return json.dumps(node)


def pairs(value: Node) -> Node:
    """Turns parsed JSON into nodes."""
    if isinstance(value, dict):
        return Pairs((key, pairs(inner)) for key, inner in value.items())
    return [pairs(inner) for inner in value] if isinstance(value, list) else value


names = st.text(max_size=6) | st.sampled_from(
    ["x", "y", "weight", "__metadata__", "", "a.b", "é", "\x00", "\ud800", "\U0001f600"]
)

numbers = st.sampled_from(
    [0, 1, -1, 2, 4, 8, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**40, -(1 << 63)]
)

strange = st.one_of(
    numbers,
    names,
    st.integers(-3, 300),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from(
        [
            Raw(text)
            for text in (
                "-0",
                "1E400",
                "01",
                "1.",
                "NaN",
                "[" * 200 + "]" * 200,
                "{}",
                "[]",
                '"\\ud800"',
                '"\n"',
                "1" * 700,
                "",
            )
        ]
    ),
    st.lists(st.integers(0, 9), max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn, tree: Node, most: int) -> Node:
    """``tree`` with up to ``most`` of its nodes replaced, removed, duplicated or renamed."""
    for _ in range(draw(st.integers(0, most))):
        places = list(_places(tree))
        if not places:
            return tree
        holder, at = draw(st.sampled_from(places))
        way = draw(st.sampled_from(["value", "value", "value", "key", "remove", "double", "add"]))
        if way == "remove":
            del holder[at]
        elif way == "double":
            holder.append(holder[at])
        elif isinstance(holder, Pairs):
            key, value = holder[at]
            if way == "value":
                holder[at] = (key, draw(strange))
            elif way == "key":
                holder[at] = (draw(names), value)
            else:
                holder.append((draw(names), draw(strange)))
        else:
            holder[at] = draw(strange)
    return tree


def _places(node: Node) -> Any:
    if isinstance(node, list):
        for at, inner in enumerate(node):
            yield node, at
            yield from _places(inner[1] if isinstance(node, Pairs) else inner)


spaces = st.sampled_from(["", "", "", " ", " " * 9, "\n", "\t", "\r", "\0", "x", "{}", "\x0b", "\xa0"])


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A whole file with valid tensors, and then a few errors."""
    tree, at = Pairs(), 0
    for name in draw(st.lists(names, max_size=4)):
        dtype = draw(st.sampled_from([*BY_NAME, "F6_E2M3", "F31"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = BY_NAME[dtype].bits if dtype in BY_NAME else 6
        for size in shape:
            bits *= size
        end = at + bits // 8
        tree.append((name, Pairs([("dtype", dtype), ("shape", list(shape)), ("data_offsets", [at, end])])))
        at = end
    if draw(st.booleans()):
        count = draw(st.sampled_from([len(tree), len(tree), 0, 1]))
        values = st.sampled_from(["pt", "0" * 16 * count, "f" * 16 * count, "F" * 16, ""])
        keys = st.sampled_from(["format", "shardsave.crc64nvme", "x"])
        tree.insert(0, ("__metadata__", Pairs(draw(st.lists(st.tuples(keys, values), max_size=2)))))
    tree = Pairs(draw(st.permutations(tree)))
    text = write(draw(damaged(tree, 2))).encode(errors="surrogatepass") + draw(spaces).encode()
    if draw(st.integers(0, 9)) == 0:
        text = draw(spaces).encode() + text
    length = len(text) + draw(st.sampled_from([0] * 12 + [1, -1, 1 << 62]))
    data = bytes(max(0, at + draw(st.sampled_from([0] * 12 + [1, -1]))))
    return (length & (1 << 64) - 1).to_bytes(8, "little") + text + data


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """An index of shardsave or of another library with a few errors, and with a valid checksum."""
    stored = draw(st.lists(names, unique=True, max_size=4))
    file = st.sampled_from(["a.safetensors", "b.safetensors"])
    weight_map = Pairs((name, draw(file)) for name in stored)
    tree = Pairs([("metadata", Pairs([("total_size", draw(st.integers(0, 99)))])), ("weight_map", weight_map)])
    foreign = draw(st.integers(0, 3)) == 0
    if not foreign:
        ties = Pairs((name, draw(st.sampled_from(stored))) for name in draw(st.lists(names, max_size=2)) if stored)
        every = [*stored, *(name for name, _ in ties)]
        words = ["frozen", "trainable", "none"]
        listed = draw(st.lists(st.sampled_from(every), unique=True, max_size=3)) if every else []
        flags: Node = Pairs([("default", draw(st.sampled_from(words))), (draw(st.sampled_from(words)), listed)])
        shard = [8 + draw(st.integers(0, 9)), 8, "0123456789abcdef"]
        record = Pairs(
            [
                ("version", 2),
                ("requires", []),
                ("durable", draw(st.booleans())),
                ("flags", draw(st.sampled_from([None, flags]))),
                ("ties", ties),
                ("metadata", pairs({"run": [1, {"a": 2.5}]})),
                ("shards", Pairs([("a.safetensors", shard), ("b.safetensors", list(shard))])),
                ("supersedes", draw(st.sampled_from([None, Pairs([("size", 5), ("mtime_ns", 6)])]))),
            ]
        )
        tree.append(("shardsave", record))
    text = write(draw(damaged(tree, 2))).encode(errors="surrogatepass")
    if foreign or not text.endswith(b"}}"):
        return text + draw(spaces).encode()
    body = text[:-2] + b', "crc64nvme": "'
    return body + f"{crc64(body):016x}".encode() + b'"}}\n'
