"""Mutates valid files: flips bits; deletes, duplicates and splices ranges; replaces numbers and tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63,
            (1 << 64) - 1, 1 << 64, 10**19, 10**30, 10**308, 10**309, -(1 << 63), 100_000_000, 100_000_001]  # fmt: skip

_TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"{}", b"[]", b"null", b"true", b"false", b"NaN", b"-0", b"-0.0", b"1.0",
           b"1e0", b"1E400", b"01", b"1.", b".5", b"+1", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\\u00e9", b"\xff", b"\xed\xa0\x80",
           b"\xef\xbb\xbf", b" ", b"\n", b"\t", b"\x0b", b"\xc2\xa0", b"//", b"/**/", b"[[[[[[[[", b"]]]]]]]]", b"__metadata__", b"dtype",
           b"shape", b"data_offsets", b"shardsave.crc64nvme", b"F4", b"F64", b"BOOL", b"F6_E2M3", b"frozen", b"trainable", b"none",
           b"default", b"..", b"weight_map", b"shardsave", b"ties", b'"x":', b'"", ', b"1" * 700]  # fmt: skip

_NUMBER = re.compile(rb"-?[0-9]+")
_TOKEN = re.compile(rb'"[^"]*"|[\[\]{},:]|[^\s\[\]{},:"]+')


class Mutator:
    """An endless stream of variations of ``seeds``, most of them invalid; the same ``seed`` gives the same stream."""

    def __init__(self, seeds: Sequence[bytes], seed: int) -> None:
        self._seeds = list(seeds)
        self._random = random.Random(seed)
        self._ways: list[Callable[[bytes], bytes]] = [
            self._flip, self._insert, self._delete, self._double, self._splice, self._number, self._number, self._swap, self._token,
            self._token, self._pad, self._length,
        ]  # fmt: skip

    def next(self) -> bytes:
        content = self._random.choice(self._seeds)
        for _ in range(self._random.choice((1, 1, 1, 2, 3, 6))):
            content = self._random.choice(self._ways)(content)
        return content

    def _at(self, content: bytes) -> int:
        """A random offset, mostly before the padding."""
        end = len(content.rstrip(b" \0")) if self._random.random() < 0.9 else len(content)
        return self._random.randrange(end + 1)

    def _flip(self, content: bytes) -> bytes:
        if not content:
            return content
        at = min(self._at(content), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << self._random.randrange(8)]) + content[at + 1 :]

    def _insert(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + self._random.randbytes(self._random.choice((1, 1, 2, 8))) + content[at:]

    def _delete(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + content[at + self._random.choice((1, 1, 2, 8, 100, 5000)) :]

    def _double(self, content: bytes) -> bytes:
        at, length = self._at(content), self._random.choice((1, 2, 8, 60, 200))
        return content[: at + length] + content[at:]

    def _splice(self, content: bytes) -> bytes:
        other = self._random.choice(self._seeds)
        return content[: self._at(content)] + other[self._at(other) :]

    def _number(self, content: bytes) -> bytes:
        return self._replace(content, _NUMBER, lambda old: self._other_number(old))

    def _other_number(self, old: bytes) -> bytes:
        if self._random.random() < 0.5:
            return str(int(old[:300]) + self._random.choice((-8, -4, -1, 1, 4, 8))).encode()
        return str(self._random.choice(_NUMBERS)).encode()

    def _token(self, content: bytes) -> bytes:
        if self._random.random() < 0.3:
            at = self._at(content)
            return content[:at] + self._random.choice(_TOKENS) + content[at:]
        return self._replace(content, _TOKEN, lambda old: self._random.choice(_TOKENS))

    def _swap(self, content: bytes) -> bytes:
        """Replaces a token by another token of ``content``."""
        tokens = _TOKEN.findall(content)
        if not tokens:
            return content
        chosen = self._random.choice(tokens)
        return self._replace(content, _TOKEN, lambda old: chosen)

    def _replace(self, content: bytes, pattern: re.Pattern[bytes], other: Callable[[bytes], bytes]) -> bytes:
        matches = list(pattern.finditer(content))
        if not matches:
            return content
        match = self._random.choice(matches)
        return content[: match.start()] + other(match[0]) + content[match.end() :]

    def _pad(self, content: bytes) -> bytes:
        return content + self._random.choice((b" ", b"\n", b"\0", b"}", b"x")) * self._random.choice((1, 4, 4096))

    def _length(self, content: bytes) -> bytes:
        """Replaces the first eight bytes, the header's length, by another number."""
        return (self._random.choice(_NUMBERS) & (1 << 64) - 1).to_bytes(8, "little") + content[8:]
