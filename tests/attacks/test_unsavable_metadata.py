"""Method: `save` gets metadata that no load could read back, although Python's JSON accepts it. It must refuse before the commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import Net, saved

import shardsave
from shardsave._format import index
from shardsave._saving import contents


def nested(levels: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(levels - 1):
        metadata = {"a": metadata}
    return metadata


CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = CIRCLE

JSON = "metadata must be JSON values that can be read back: metadata"
DEEP = "metadata must be nested at most 64 levels deep, since deeper JSON cannot be read back: metadata"
DEEP = f"{DEEP}{(64 * '[a]').replace('a', repr('a'))[:72]}… is deeper"
METADATA: list[tuple[str, str, Mapping[str, Any]]] = [
    ("deep", DEEP, nested(65)),
    ("very deep", DEEP, nested(100_000)),
    ("circular", DEEP, CIRCLE),
    ("key twice", f"{JSON}['a'] has the key 1, which is no string", {"a": {1: "x", "1": "y"}}),
    ("long number", f"{JSON}['a'] has more than 308 digits", {"a": 10**308}),
    ("very long number", f"{JSON}['a'] has more than 308 digits", {"a": -(10**10_000)}),
    ("half of a surrogate pair", f"{JSON}['a'] has half of a surrogate pair", {"a": "\ud800"}),
    ("half of a surrogate pair in a key", f"{JSON[:-8]}the key '\\ud800' of metadata has half of a surrogate pair", {"\ud800": 1}),
    ("a tensor", f"{JSON}['run'][1]['loss'] is a Tensor", {"ok": 1, "run": [0, {"loss": torch.ones(1)}]}),
    ("not a number", f"{JSON}['losses'][2] is nan", {"losses": (1.0, 2.0, float("nan"))}),
]  # fmt: skip


@pytest.mark.parametrize("message, metadata", [case[1:] for case in METADATA], ids=[case[0] for case in METADATA])
def test_refused(message: str, metadata: Mapping[str, Any], tmp_path: Path) -> None:
    """Catches a checkpoint that is saved and that every reader then calls corrupt."""
    with pytest.raises(TypeError) as caught:
        shardsave.save({"x": torch.ones(1)}, tmp_path / "ckpt", metadata=metadata)
    assert str(caught.value) == message and not (tmp_path / "ckpt").exists()


def test_metadata_at_the_limits(tmp_path: Path) -> None:
    """Catches a limit that refuses metadata which can be read."""
    metadata = {"deep": nested(63), "long": [10**307, -(10**307)], "float": 1.7e308, "é\U0001f600": None}
    shardsave.save({"x": torch.ones(1)}, tmp_path, metadata=metadata)
    assert shardsave.inspect(tmp_path).metadata == metadata


@pytest.mark.parametrize("early", [True, False])
def test_index_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """Catches an index that is committed although it is too large to be read, or that is refused after all shards were written.

    The limit is lowered, because large files are slow.
    """
    saved(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(index, "MAX_INDEX_BYTES", 1000)
    monkeypatch.setattr(contents, "MAX_INDEX_BYTES", 0 if early else 100_000_000)
    written: list[int] = []
    words = r"^5 names and the metadata need an index of \d+ bytes, at most 1000 would be read again; nothing was committed$"
    with pytest.raises(ValueError, match=words):
        shardsave.save(Net(seed=1), tmp_path, metadata={"note": "x" * 1000}, progress=lambda done, total: written.append(done))
    assert bool(written) is not early
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert shardsave.load(tmp_path)["base.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (["\x01" * 100_000 + str(number) for number in range(170)], {}),
        (["é\U0001f600" * 200_000 + str(number) for number in range(90)], {}),
        (["x"], {"long": "x" * 99_999_900}),
    ],
    ids=["escapes", "wide", "metadata"],
)
def test_nothing_is_written_for_an_index_that_is_too_large(tmp_path: Path, names: list[str], metadata: dict[str, Any]) -> None:
    """Catches an estimate of the index that is too small: a save of a large model that fails when all of it is written."""
    with pytest.raises(ValueError, match="nothing was committed"):
        shardsave.save({name: torch.ones(1) for name in names}, tmp_path / "x", metadata=metadata)
    assert not (tmp_path / "x").exists()


def test_the_longest_index_is_an_upper_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part of the index that the estimate leaves out: everything that a save can write is in it."""
    lengths: list[int] = []
    encode = index.encode_index

    def noted(made: index.Index) -> bytes:
        data = encode(made)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(contents, "encode_index", noted)
    monkeypatch.setattr(contents, "MAX_INDEX_BYTES", 0)
    model = Net(seed=1)
    for options in ({}, {"architecture": True, "metadata": {"a": 1}}, {"max_shard_size": 1}):
        shardsave.save(model, tmp_path, durable=False, **options)  # type: ignore[arg-type]
        assert lengths[-1] >= (tmp_path / "model.safetensors.index.json").stat().st_size
