"""How torchao says in ``__metadata__`` of safetensors files which tensors are the parts of a quantised one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from shardsave._common.strict_json import NotJSON, parse_object
from shardsave._format.header import CHECKSUM_KEY

#: The entry that lists the names of all tensors, quantised or not.
TENSOR_NAMES = "tensor_names"

#: The entry of a tensor that is not quantised.
PLAIN = '{"_type": "Tensor"}'


def part_name(name: str, key: str) -> str:
    """The name under which the part ``key`` of the quantised tensor ``name`` is stored."""
    start, dot, own = name.rpartition(".")
    return f"{start}{dot}_{own}_{key}"


def torchao_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of ``metadata`` that are torchao's; none, if the file was not written in its layout."""
    if not metadata.get(TENSOR_NAMES, "").startswith("["):
        return {}
    own = ("format", CHECKSUM_KEY)
    return {
        name: text
        for name, text in metadata.items()
        if name == TENSOR_NAMES or (text.startswith('{"_type":') and name not in own)
    }


def without(entries: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """``entries`` of a file whose metadata says something else about ``names``."""
    left = {name: text for name, text in entries.items() if name not in names and name != TENSOR_NAMES}
    return {**left, TENSOR_NAMES: json.dumps(list(left))} if left else {}


def forms_of_parts(entries: Mapping[str, str]) -> dict[str, Any]:
    """Name of a part → torchao's JSON of the tensor that it belongs to. What is no such JSON is left out."""
    forms = {}
    for name, text in entries.items():
        if name == TENSOR_NAMES or text == PLAIN:
            continue
        try:
            form = parse_object(text.encode())
        except (NotJSON, UnicodeEncodeError):
            continue
        keys = form.get("_tensor_data_names")
        for key in keys if isinstance(keys, list) else ():
            forms[part_name(name, str(key))] = form
    return forms
