"""Attacks on the files of a directory: cut, swapped or missing files, and things that are not regular files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from tampering import (
    FIRST,
    INDEX,
    KEY,
    LONE,
    SECOND,
    Case,
    crc,
    edit_header,
    edit_index,
    entry,
    foreign,
    read_index,
    replace_shard,
    rewrite,
    saved,
    shard_bytes,
)

import shardsave

Create = Callable[[Path], object]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder_there(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def unix_socket(path: Path) -> None:
    home = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(home)


def special(name: str, file_type: str, create: Create, where: str, kind: str) -> Case:
    """Something that is not a regular file, under the name of a shard, of the index, or of a lone file."""

    def make(folder: Path) -> None:
        if where != LONE:
            saved(folder)
            (folder / where).unlink()
        create(folder / where)

    return Case(
        name, f"corrupt {kind} {where}: $DIR/{where}: a regular file was expected, it is {file_type}; it was not read", make
    )


SPECIALS: list[tuple[str, str, Create]] = [
    ("a FIFO", "a FIFO", fifo),
    ("an endless device", "a character device", endless_device),
    ("a directory", "a directory", folder_there),
    ("a socket", "a socket", unix_socket),
    ("a link to itself", "a link that leads to itself", link_to_itself),
]


def path_of_special(name: str, file_type: str, create: Create) -> Case:
    """The path to load is that of something that is not a regular file."""

    def make(folder: Path) -> Path:
        create(folder / "one.safetensors")
        return folder / "one.safetensors"

    return Case(
        name,
        f"corrupt shard one.safetensors: $DIR/one.safetensors: a regular file was expected, it is {file_type}; it was not read",
        make,
    )


def of_shard(name: str, refusal: str, damage: Callable[[Path], object], shard: str = FIRST) -> Case:
    """A good checkpoint of shardsave, damaged."""

    def make(folder: Path) -> None:
        saved(folder)
        damage(folder)

    return Case(name, f"corrupt shard {shard}: {refusal}", make)


def header_changed(name: str, checksum: str, damage: Callable[[Path], object]) -> Case:
    """A header whose checksum is not the recorded one."""
    return of_shard(
        name,
        f"the index says a header with checksum 71ace2c210f62bc9, the file has {checksum}; the file was changed after it was "
        f"saved, or belongs to another save",
        damage,
    )


def other_tensors(name: str, refusal: str, damage: Callable[[Path], object]) -> Case:
    return of_shard(name, f"{refusal}; index and shard belong to different saves", damage)


def others(name: str, message: str, damage: Callable[[Path], object]) -> Case:
    """A sharded checkpoint as other libraries write it, damaged."""

    def make(folder: Path) -> None:
        foreign(folder)
        damage(folder)

    return Case(name, message, make)


def missing(name: str, message: str, make: Callable[[Path], Path | None]) -> Case:
    return Case(name, message, make, shardsave.CheckpointNotFoundError)


def flip_bits(path: Path, at: int, bits: int) -> None:
    """Flips bits in place. A file that was written anew would be flushed to disk each time it is closed."""
    with path.open("r+b", buffering=0) as file:
        old = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([old ^ bits]), at)


def flip(path: Path, at: int) -> None:
    flip_bits(path, at, 1)


def grow(path: Path, by: int) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * by)


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def shard_of_another_save(folder: Path) -> None:
    saved(folder / "other", seed=5)
    rewrite(folder / FIRST, (folder / "other" / FIRST).read_bytes())


def swap(folder: Path) -> None:
    """Swaps the two shards, and records each under the name of the other."""
    first, second = (folder / FIRST).read_bytes(), (folder / SECOND).read_bytes()
    replace_shard(folder, FIRST, second)
    replace_shard(folder, SECOND, first)


def without_our_record(folder: Path) -> None:
    index = read_index(folder)
    del index["shardsave"]
    rewrite(folder / INDEX, json.dumps(index).encode())


def without_our_key(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    edit_header(folder, FIRST, KEY.encode(), b"another-key-64bits!!"[: len(KEY)].ljust(len(KEY), b"_"))
    assert (folder / FIRST).read_bytes() != content


def lone_of_another_save(folder: Path) -> None:
    (folder / LONE).write_bytes(shard_bytes(f'{{"x":{entry()}}}', b"\0" * 4))


def half_a_header(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    edit_index(folder, lambda index: index["shardsave"]["shards"].update({FIRST: [len(content), 2048, crc(content[:2048])]}))


def index_of_more_tensors(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"new.weight": FIRST}))


def index_of_fewer_tensors(folder: Path) -> None:
    edit_index(folder, lambda index: (index["weight_map"].pop("base.bias"), index["shardsave"].update(flags=None)))


def both_gone(folder: Path) -> Path:
    folder.joinpath("config.json").write_text("{}")
    folder.joinpath("other.safetensors").write_bytes(shard_bytes("{}"))
    return folder


def pickled(name: str, kind: str, make: Callable[[Path], object], file: str, in_index: bool = False) -> Case:
    """A file as torch.save writes it. It is the path to load, or is named by an index."""

    def put(folder: Path) -> Path | None:
        if in_index:
            foreign(folder)
            (folder / file).unlink()
        make(folder / file)
        return None if in_index else folder / file

    return Case(
        name,
        f"cannot read $DIR/{file}: a safetensors file was expected, it is {kind}, as torch.save writes; no pickle is read here, "
        f"since that can run code: shardsave convert $DIR/{file} DST makes a checkpoint of it; the file is as it was",
        put,
        shardsave.IncompatibleCheckpointError,
    )


def other(kind: str, content: bytes, advice: str) -> Case:
    """A file of another kind under the name of a safetensors file."""
    return Case(
        f"it is {kind}",
        f"cannot read $DIR/x.safetensors: a safetensors file was expected, it is {kind}; {advice}; the file is as it was",
        lambda folder: ((folder / "x.safetensors").write_bytes(content), folder / "x.safetensors")[1],
        shardsave.IncompatibleCheckpointError,
    )


def lost(name: str, file: str, expected: str, start: str, content: bytes, words: str, advice: str) -> Case:
    """Something that was downloaded in the place of a file of a checkpoint."""
    message = f"{start} {file}: $DIR/{file}: {expected} was expected, it is {words}; {advice}"
    return Case(f"lost: {name}", message, lambda folder: (saved(folder), rewrite(folder / file, content))[0])


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4128\n"
UNPACK = "unpack it, and give the path of what is in it"
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("x"))
OTHER_KINDS = [
    other("a GGUF file", b"GGUF\3\0\0\0" + bytes(64), "GGUF is not read here"),
    other("a gzip archive", gzip.compress(b"x" * 64), UNPACK),
    other("a bzip2 archive", bz2.compress(b"x" * 64), UNPACK),
    other("an xz archive", lzma.compress(b"x" * 64), UNPACK),
    other("a tar archive", TAR.getvalue(), UNPACK),
    other("a NumPy array", b"\x93NUMPY\1\0" + bytes(64), "load it with numpy.load and save a mapping of names to tensors"),
    other("an HDF5 file", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5 is not read here"),
    other("JSON text", b'{"error": "Repository not found"}', "give the path of a file with weights"),
]

ANSWER = "text, most likely the answer to a failed download"
NO_PICKLE = "no pickle is read here, since that can run code: shardsave convert SRC DST makes a checkpoint of it"
PART = "the checkpoint was copied or downloaded in part"
CUT = "it was cut, half copied or half downloaded, or it belongs to another save"
GROWN = "something was appended to it, or it belongs to another save"

FILES = [
    *(special(f"shard is {word}", file_type, create, SECOND, "shard") for word, file_type, create in SPECIALS),
    *(special(f"index is {word}", file_type, create, INDEX, "index") for word, file_type, create in SPECIALS),
    *(special(f"lone file is {word}", file_type, create, LONE, "shard") for word, file_type, create in SPECIALS),
    path_of_special("path of a FIFO", "a FIFO", fifo),
    path_of_special("path of an endless device", "a character device", endless_device),
    missing("path of nothing", "no checkpoint at $DIR/gone: No such file or directory", lambda folder: folder / "gone"),
    missing("path below a file", "no checkpoint at $DIR/a.safetensors/x: Not a directory",
            lambda folder: (foreign(folder), folder / "a.safetensors" / "x")[1]),
    missing("path of a link to itself", "no checkpoint at $DIR/loop: Too many levels of symbolic links",
            lambda folder: ((folder / "loop").symlink_to("loop"), folder / "loop")[1]),
    missing("neither index nor lone file",
            f"no checkpoint at $DIR: neither {INDEX} nor {LONE} is there; to read another file, give its path: other.safetensors",
            both_gone),
    Case("index is a link to nothing",
         f"corrupt index {INDEX}: $DIR/{INDEX}: a regular file was expected, it is a link to nothing; {PART}",
         lambda folder: (foreign(folder), (folder / INDEX).unlink(), link_to_nothing(folder / INDEX))[2]),
    Case("lone file is a link to nothing", f"corrupt checkpoint $DIR: {LONE} was expected, it is a link to nothing; {PART}",
         lambda folder: link_to_nothing(folder / LONE)),
    others("shard is a link to nothing",
           f"corrupt checkpoint $DIR: the index names b.safetensors, it is a link to nothing; {PART}",
           lambda folder: ((folder / "b.safetensors").unlink(), link_to_nothing(folder / "b.safetensors"))),
    others("shard of others missing", f"corrupt checkpoint $DIR: the index names b.safetensors, there is no such file; {PART}",
           lambda folder: (folder / "b.safetensors").unlink()),
    Case("half downloaded: a shard missing", f"corrupt checkpoint $DIR: the index names {SECOND}, there is no such file; {PART}",
         lambda folder: (saved(folder), (folder / SECOND).unlink())[1]),
    of_shard("half copied: a shard cut", f"the index says 4128 bytes, the file has 4116; {CUT}",
             lambda folder: cut(folder / FIRST, 12)),
    of_shard("shard cut in its header", f"the index says 4128 bytes, the file has 100; {CUT}",
             lambda folder: os.truncate(folder / FIRST, 100)),
    of_shard("shard emptied", f"the index says 4128 bytes, the file has 0; {CUT}", lambda folder: os.truncate(folder / FIRST, 0)),
    of_shard("shard with bytes after its end", f"the index says 4128 bytes, the file has 4129; {GROWN}",
             lambda folder: grow(folder / FIRST, 1)),
    of_shard("shard grown to a terabyte", f"the index says 4128 bytes, the file has 1099511627776; {GROWN}",
             lambda folder: os.truncate(folder / FIRST, 1 << 40)),
    header_changed("shard of zeros, of the right length", "6482d367eb22b64e",
                   lambda folder: (os.truncate(folder / FIRST, 0), os.truncate(folder / FIRST, 4128))),
    header_changed("byte of a header flipped", "1b783d1008bb8802", lambda folder: flip(folder / FIRST, 200)),
    header_changed("padding of a header flipped", "4d89bd9cacb76fea", lambda folder: flip(folder / FIRST, 4000)),
    header_changed("shard of another save with the same layout", "65f1a75d93c3ffa7", shard_of_another_save),
    of_shard("record of half a header",
             "header: 4088 bytes of header expected, 2040 are there; nothing else was read from it", half_a_header),
    other_tensors("two shards swapped, and recorded so", "the index says that it holds 'base.bias', it does not", swap),
    other_tensors("name in the index and not in the shard", "the index says that it holds 'new.weight', it does not",
                  index_of_more_tensors),
    other_tensors("name in the shard and not in the index", "the index does not say that it holds 'base.bias', it does",
                  index_of_fewer_tensors),
    others("shards of others swapped",
           "corrupt shard b.safetensors: the index says that it holds 'y', it does not; index and shard belong to different "
           "saves",
           lambda folder: rewrite(folder / "b.safetensors", (folder / "a.safetensors").read_bytes())),
    others("shard of others is no safetensors file",
           "corrupt shard b.safetensors: header: at most 100000000 bytes of header expected, it says 2333181762011690089, as no "
           "safetensors file does; nothing else was read from it",
           lambda folder: rewrite(folder / "b.safetensors", b"it is a text\0")),
    Case("lone file is empty",
         f"corrupt shard {LONE}: $DIR/{LONE}: a safetensors file was expected, it is empty; {PART}",
         lambda folder: (folder / LONE).touch()),
    *OTHER_KINDS,
    lost("our shard", FIRST, "a safetensors file", "corrupt shard", GIT_LFS, "a pointer of git-lfs and not the file itself",
         "'git lfs pull' fetches the file"),
    lost("index", INDEX, "an index", "corrupt index", GIT_LFS, "a pointer of git-lfs and not the file itself",
         "'git lfs pull' fetches the file"),
    lost("web page as index", INDEX, "an index", "corrupt index", b"\n<!DOCTYPE html>\n<html>", "a web page, most likely of a failed "
         "download", "download the file again"),
    lost("answer as our shard", SECOND, "a safetensors file", "corrupt shard", b"Entry not found", ANSWER, "download the file again"),
    lost("answer as index", INDEX, "an index", "corrupt index", b"Invalid username or password.\n", ANSWER, "download the file again"),
    lost("web page as our shard", SECOND, "a safetensors file", "corrupt shard", b"<html><head>", "a web page, most likely of a failed "
         "download", "download the file again"),
    pickled("path of a file of torch.save", "a zip archive", lambda file: torch.save({"x": torch.ones(1)}, file), "saved.pt"),
    pickled("path of an old file of torch.save", "a pickle",
            lambda file: torch.save({"x": torch.ones(1)}, file, _use_new_zipfile_serialization=False), "saved.pth"),
    pickled("path of a pickle", "a pickle", lambda file: file.write_bytes(pickle.dumps({"x": 1})), "saved.ckpt"),
    pickled("shard of others is a file of torch.save", "a zip archive", lambda file: torch.save({"y": torch.ones(1)}, file),
            "b.safetensors", in_index=True),
    missing("directory with a file of torch.save",
            f"no checkpoint at $DIR: neither {INDEX} nor {LONE} is there; pytorch_model.bin has the name of a file of torch.save, "
            f"and {NO_PICKLE}",
            lambda folder: (torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin"), folder)[1]),
    missing("directory with many files",
            f"no checkpoint at $DIR: neither {INDEX} nor {LONE} is there; to read another file, give its path: 0.safetensors, "
            "1.safetensors, 2.safetensors and 2 more",
            lambda folder: ([(folder / f"{n}.safetensors").touch() for n in range(5)], folder)[1]),
    Case("our record stripped from the index",
         f"corrupt index {INDEX}: a record of {FIRST} expected, since shardsave wrote that file, it has none; one of the two was changed "
         "or replaced after it was saved",
         lambda folder: (saved(folder), without_our_record(folder))[1]),
    of_shard("our key stripped from a shard",
             "checksums of its tensors expected, as the index has a record of it, its header has none; the file was changed after "
             "it was saved", without_our_key),
    Case("lone file of another save beside our index",
         f"cannot tell which checkpoint is meant: $DIR: one of {INDEX} and {LONE} was expected, both are there, and the index does "
         "not record that it replaced the file; give the path of the one to load, or remove the other",
         lambda folder: (saved(folder), lone_of_another_save(folder))[1], shardsave.IncompatibleCheckpointError),
]  # fmt: skip
