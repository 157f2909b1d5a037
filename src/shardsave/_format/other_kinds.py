"""Recognises by their first bytes files that are no checkpoints, or checkpoints of another kind, so that errors name what they are."""

from __future__ import annotations

import re
from typing import NamedTuple

#: How many of the first bytes of a file are enough to recognise its kind.
START_BYTES = 512

ZIP = b"PK\3\4"

#: How pickles begin: in every binary protocol in use, and as torch's old format does in the protocols that are text.
_PICKLES = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"L119547037146038801333356L")


class OtherKind(NamedTuple):
    """What a file is, and what to do about it. ``lost``: it is in the place of a file that was not downloaded."""

    words: str
    advice: str
    lost: bool = False


#: How the answer of a server begins: "Entry not found", "Invalid username or password.".
_SENTENCE = re.compile(rb"[A-Z][A-Za-z]+,? [A-Za-z]+[ .,:!]")

_UNPACK = "unpack it, and give the path of what is in it"
_BY_START = {
    b"version https://git-lfs": OtherKind(
        "a pointer of git-lfs and not the file itself", "'git lfs pull' fetches the file", True
    ),
    b"GGUF": OtherKind("a GGUF file", "GGUF is not read here"),
    b"\x1f\x8b": OtherKind("a gzip archive", _UNPACK),
    b"BZh": OtherKind("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ": OtherKind("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": OtherKind("a zstd archive", _UNPACK),
    b"\x93NUMPY": OtherKind("a NumPy array", "load it with numpy.load and save a mapping of names to tensors"),
    b"\x89HDF\r\n\x1a\n": OtherKind("an HDF5 file", "HDF5 is not read here"),
}
_PAGE = OtherKind("a web page, most likely of a failed download", "download the file again", True)
_TEXT = OtherKind("JSON text", "give the path of a file with weights")
_ANSWER = OtherKind("text, most likely the answer to a failed download", "download the file again", True)
_TAR = OtherKind("a tar archive", _UNPACK)


def is_pickle(start: bytes) -> bool:
    return start.startswith(_PICKLES)


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins like one of safetensors: with the length of a header, and its first character."""
    return start[8:9] == b"{" and not start.startswith((ZIP, b"{", b"<"))


def other_kind(start: bytes) -> OtherKind | None:
    """The kind of a file that is neither a safetensors file nor a file of torch.save, from its first bytes; None if it is unknown."""
    if is_safetensors(start):
        return None
    for beginning, kind in _BY_START.items():
        if start.startswith(beginning):
            return kind
    if start[257:262] == b"ustar":
        return _TAR
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<!--")):
        return _PAGE
    if _SENTENCE.match(start) and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return _ANSWER
    return _TEXT if text.startswith((b'{"', b"{\n", b"{ ", b"[{")) else None
