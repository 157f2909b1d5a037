"""Freeze flags in an index: how they are encoded. `index_parsing` reads them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

#: Frozen → the word for it in ``flags``; None: the tensor is not a parameter.
FLAG_WORDS: dict[bool | None, str] = {True: "frozen", False: "trainable", None: "none"}

#: Frozen → the word for it in ``module_flags``.
MODULE_FLAG_WORDS = {True: "frozen", False: "trainable"}


def encode_flags(flags: Mapping[str, bool] | None, names: Collection[str]) -> dict[str, Any] | None:
    """``flags`` (name → frozen) of ``names``, compactly: the most frequent word as the default, and lists of all other names.

    None if the flags are unknown: unknown is never written as trainable.
    """
    if flags is None:
        return None
    known = [flags.get(name) for name in names]
    default = max(FLAG_WORDS, key=Counter(known).__getitem__)
    compact: dict[str, Any] = {"default": FLAG_WORDS[default]}
    for name, frozen in zip(names, known):
        if frozen is not default:
            compact.setdefault(FLAG_WORDS[frozen], []).append(name)
    return compact


def encode_module_flags(flags: Mapping[str, bool]) -> dict[str, list[str]]:
    """``flags`` (name in the module → frozen) as a list of names for each word."""
    return {word: [name for name, frozen in flags.items() if frozen == flag] for flag, word in MODULE_FLAG_WORDS.items()}
