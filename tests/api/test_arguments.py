"""Wrong arguments raise TypeError or ValueError before anything happens; unusual but valid ones have their documented effect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from shardsave._api.background import InBackground
from shardsave._api.save import How
from shardsave._api.save_contents import What
from shardsave._cli.convert import convert

WRONG_EVERYWHERE = [3, None, b"ckpt", ""]

WRONG: dict[str, list[tuple[str, Any]]] = {
    "save": [
        *(("max_shard_size", size) for size in ("5 gigs", "-1GB", "0", 0, -5, "", "GB", "1e9", "5GB5", "nan")),
        *(("max_shard_size", size) for size in ("9" * 400, f"{'9' * 400}GB", f"{'9' * 308}TiB", f"{'9' * 5000}.5MB")),
        *(("max_shard_size", size) for size in (5.0, None, True, b"5GB", [5])),
        *(("durable", value) for value in (0, 1, None, "yes")),
        *(
            ("metadata", value)
            for value in ("text", [("a", 1)], {1: 2}, {"a": {1: 2}}, {"a": [{"b": ({3: 4},)}]}, {"a": {None: 1}})
        ),
        *(
            ("metadata", {"a": value})
            for value in (float("nan"), float("inf"), object(), b"x", {1, 2}, torch.ones(1), "\ud800")
        ),
        ("metadata", {"a": functools.reduce(lambda inner, _: [inner], range(500), [])}),
        *(("progress", value) for value in (3, "yes", [])),
        *(("lock_timeout", value) for value in ("1", None, True, -1, float("nan"), 10**400)),
    ],
    "load": [
        *(("device", value) for value in ("nonsense", "cuda:99", 3.5, True, b"cpu", "meta", torch.device("meta"), [])),
        *(("names", value) for value in ("one", b"one", 3, [b"x"], [1], [None])),
        *(("prefix", value) for value in (None, 3, b"x", ["x"])),
        *(("verify", value) for value in (0, 1, None, "no")),
        *(("mmap", value) for value in (0, 1, None, "cpu")),
        ("progress", 3),
    ],
    "load_model": [
        *(("device", value) for value in ("nonsense", "cuda:99", 3.5, True, "meta")),
        *(("prefix", value) for value in (None, 3)),
        *(("strict", value) for value in (0, None, "no")),
        *(("restore_frozen", value) for value in (0, None, "no")),
        *(("verify", value) for value in (0, None, "no")),
        ("progress", 3),
    ],
    "verify": [("progress", 3)],
}

CALLS: dict[str, Callable[..., Any]] = {
    "save": functools.partial(shardsave.save, {"x": torch.ones(2)}),
    "load": shardsave.load,
    "load_model": lambda path, **options: shardsave.load_model(nn.Linear(2, 2), path, **options),
    "inspect": shardsave.inspect,
    "verify": shardsave.verify,
}


@pytest.mark.parametrize(("verb", "name", "value"), [(verb, *case) for verb, cases in WRONG.items() for case in cases])
def test_wrong_values(tmp_path: Path, verb: str, name: str, value: object) -> None:
    """Catches a wrong argument that is accepted, or refused only later: there is no checkpoint yet, and none may be created."""
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[verb](tmp_path / "ckpt", **{name: value})
    assert not (tmp_path / "ckpt").exists() and str(caught.value)


@pytest.mark.parametrize("path", WRONG_EVERYWHERE, ids=repr)
@pytest.mark.parametrize("verb", CALLS)
def test_wrong_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, path: object) -> None:
    """Catches an empty path that means the current directory, and an error that does not speak of the path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match="the path of a checkpoint must"):
        CALLS[verb](path)
    assert not list(tmp_path.iterdir())


def test_wrong_sources_and_models(tmp_path: Path) -> None:
    """Catches a source or a model of a wrong type that is accepted."""
    for source in ([torch.ones(1)], torch.ones(1), "model", None, 3, nn.Linear):
        with pytest.raises(TypeError, match="an nn.Module or a mapping"):
            shardsave.save(source, tmp_path / "ckpt")  # type: ignore[arg-type]
    for model in ({}, None, nn.Linear, "model"):
        with pytest.raises(TypeError, match="model must be an nn.Module"):
            shardsave.load_model(model, tmp_path / "ckpt")  # type: ignore[arg-type]
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("size", "shards"),
    [
        (40, 10),
        ("40", 10),
        ("40B", 10),
        ("80 b", 5),
        ("0.08KB", 5),
        ("0.08kb", 5),
        (" 1GB ", 1),
        ("2GiB", 1),
        ("1TB", 1),
        (10**30, 1),
    ],
)
def test_shard_sizes(tmp_path: Path, size: int | str, shards: int) -> None:
    """Catches a unit with another value than its name says."""
    state = {f"t{n}": torch.ones(10) for n in range(10)}
    report = shardsave.save(state, tmp_path, max_shard_size=size)
    assert report.shards == shards == len(shardsave.inspect(tmp_path).shards)


def test_binary_and_decimal_units(tmp_path: Path) -> None:
    """Catches a MiB that counts as a MB: one mebibyte of tensors fits one shard of 1 MiB, but needs two of 1 MB."""
    state = {"a": torch.zeros(2**20 - 1, dtype=torch.uint8), "b": torch.zeros(1, dtype=torch.uint8)}
    assert shardsave.save(state, tmp_path, max_shard_size="1MiB").shards == 1
    assert shardsave.save(state, tmp_path, max_shard_size="1MB").shards == 2


def test_the_default_size() -> None:
    """Catches two functions, or the command, that make shards of different sizes: a reshard would rewrite every shard."""
    defaults = [inspect.signature(verb).parameters["max_shard_size"].default for verb in (shardsave.save, shardsave.convert)]
    defaults += [option.default for option in convert.params if option.name == "max_shard_size"]
    assert defaults == ["2GB"] * 3


def test_an_infinite_timeout(tmp_path: Path) -> None:
    """Catches an infinite timeout that is refused."""
    assert shardsave.save({"x": torch.ones(1)}, tmp_path, lock_timeout=float("inf")).tensors == 1


@pytest.mark.slow
def test_too_many_shards(tmp_path: Path) -> None:
    """Catches a directory that is created for a save that is refused."""
    with pytest.raises(ValueError, match="at most 99999 shards can be numbered, 100000 would be needed; raise max_shard_size"):
        shardsave.save({str(n): torch.empty(1) for n in range(100_000)}, tmp_path / "ckpt", max_shard_size=4)
    assert not (tmp_path / "ckpt").exists()


def test_metadata_comes_back(tmp_path: Path) -> None:
    """Catches metadata that change, except that tuples become lists."""
    metadata = {"a": [1, 2.5, None, True, "ü\n\"'\\\0"], "b": {"c": {}, "": []}, "big": 2**70, "small": -1e-300, "t": (1, (2,))}
    shardsave.save({}, tmp_path, metadata=metadata)
    assert shardsave.inspect(tmp_path).metadata == metadata | {"t": [1, [2]]}
    shardsave.save({}, tmp_path)
    assert shardsave.inspect(tmp_path).metadata == {}


def test_names_and_prefix_together(tmp_path: Path) -> None:
    """Catches a filter that undoes the other, an iterator that is consumed twice, and a name that is silently left out."""
    shardsave.save({"a.x": torch.ones(1), "a.y": torch.ones(2), "b.x": torch.ones(3)}, tmp_path)
    assert shardsave.load(tmp_path, names=(name for name in ["a.y", "b.x"])).keys() == {"a.y", "b.x"}
    assert shardsave.load(tmp_path, names=["a.y"], prefix="a.").keys() == {"y"}
    assert shardsave.load(tmp_path, names=[]) == {} == shardsave.load(tmp_path, names=set(), prefix="a.")
    assert shardsave.load(tmp_path, names={"a.x": 1}).keys() == {"a.x"}
    with pytest.raises(ValueError, match=r"'b.x' does not begin with prefix 'a.'"):
        shardsave.load(tmp_path, names=["a.y", "b.x"], prefix="a.")
    closest = r"'a.z' was asked for \(the closest is 'a.[xy]'\), the checkpoint has no tensor of that name"
    cases = (((), ""), (("a.zz",), ", nor 1 other asked for"), (("a.zz", "a.zzz"), ", nor 2 others asked for"))
    for other_names, ending in cases:
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=f"{closest}{ending}$"):
            shardsave.load(tmp_path, names=["a.z", *other_names], prefix="a.")


def test_a_prefix_of_no_name(tmp_path: Path) -> None:
    """Catches an error that does not show where the prefix differs, or that suggests no similar one."""
    names = ["encoder.layer.0.weight", "encoder.layer.1.weight", "encoder.norm.bias", "head.weight", "scale"]
    shardsave.save({name: torch.ones(1) for name in names}, tmp_path)
    first, below = (
        "the checkpoint's names begin with encoder, head, scale",
        "the checkpoint's names that begin with 'encoder.' continue with",
    )
    cases = {
        "encoder.layr.": f"{below} layer, norm (the closest is 'encoder.layer.')",
        "encoder.layr": f"{below} layer, norm (the closest is 'encoder.layer.')",
        "encoder.layer.2.": "the checkpoint's names that begin with 'encoder.layer.' continue with 0, 1",
        "encodr.layer.": f"{first} (the closest is 'encoder.')",
        "xyz.": first,
        ".": first,
    }
    for prefix, words in cases.items():
        for verb in (shardsave.load, functools.partial(shardsave.load_model, nn.Linear(1, 1))):
            with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
                verb(tmp_path, prefix=prefix)
            assert str(caught.value) == (
                f"cannot load from {tmp_path}: names that begin with {prefix!r} were asked for, {words}"
            )
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"1 not in the module: \.weight; a name begins with a dot, because"
    ):
        shardsave.load_model(nn.Linear(1, 1), tmp_path, prefix="head")


def test_without_names_no_shard_is_read(tmp_path: Path) -> None:
    """Catches a shard that is opened although none of its tensors was selected."""
    shardsave.save({"x": torch.ones(1)}, tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"damaged")
    assert shardsave.load(tmp_path, names=[]) == {}


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), torch.device("cpu", 0)])
def test_devices(tmp_path: Path, device: Any) -> None:
    """Catches a way of naming a device that torch accepts and shardsave does not."""
    shardsave.save({"x": torch.ones(1)}, tmp_path)
    for mmap in (False, True):
        assert shardsave.load(tmp_path, device=device, mmap=mmap)["x"].device.type == "cpu"
    module = nn.Module()
    module.register_buffer("x", torch.zeros(1))
    before = module.x
    shardsave.load_model(module, tmp_path, device=device)
    assert module.x == 1 and module.x is before


@pytest.mark.parametrize("mmap", [False, True])
def test_ties_share_one_storage(tmp_path: Path, mmap: bool) -> None:
    """Catches tied names that are loaded as two tensors, in memory or mapped."""
    weight = torch.arange(5.0)
    shardsave.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path)
    loaded = shardsave.load(tmp_path, mmap=mmap)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    assert shardsave.load(tmp_path, names=["b"], mmap=mmap)["b"].tolist() == weight.tolist()


def test_mapped_tensors_are_private_and_not_read(tmp_path: Path) -> None:
    """Catches writes that reach the file, and a mapping that verifies its bytes: here they are damaged."""
    shardsave.save({"x": torch.ones(1000)}, tmp_path)
    path = tmp_path / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    mapped = shardsave.load(tmp_path, mmap=True)["x"]
    assert mapped[0] == 1 and mapped[-1] == -1
    mapped.fill_(5)
    assert path.read_bytes() == content and shardsave.load(tmp_path, mmap=True)["x"][0] == 1
    with pytest.raises(shardsave.CorruptCheckpointError):
        shardsave.load(tmp_path)


def test_mapped_tensors_outlive_the_files(tmp_path: Path) -> None:
    """Catches a mapping whose data a later save replaces."""
    shardsave.save({"x": torch.ones(100_000)}, tmp_path)
    mapped = shardsave.load(tmp_path, mmap=True)["x"]
    shardsave.save({"x": torch.zeros(100_000)}, tmp_path)
    assert mapped.sum() == 100_000 and shardsave.load(tmp_path, mmap=True)["x"].sum() == 0


def test_keywords_of_saves() -> None:
    """Catches a keyword of a save that nothing below receives, and one that two named tuples take."""
    below = [*What._fields, *(set(How._fields) - {"locked"})]
    assert len(below) == len({*below})
    for verb, own in (
        (shardsave.save, []),
        (shardsave.save_async, InBackground._fields),
        (shardsave.plan_save, ["keep_last"]),
    ):
        keywords = set(inspect.signature(verb).parameters) - {"source", "directory"}
        assert keywords == {*below, *own}, verb
