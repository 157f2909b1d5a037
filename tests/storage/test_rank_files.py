"""Files that several ranks wrote with torch's HuggingFaceStorageWriter and did not consolidate: assembled by every verb, or refused.

Method: torch's own writer makes the files, and its own reader and its own consolidation say what they hold.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardsave
from jobs import run_ranks
from rank_files import cut, save_ranks
from shardsave._cli.main import cli
from shardsave._storage.cleanup import Cleaner
from support import same_bits

INFERRED = "whole shapes are not recorded in files of ranks, but inferred"
pytestmark = pytest.mark.filterwarnings(f"ignore:{INFERRED}")


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rows = nn.Linear(6, 9)
        self.columns = nn.Linear(7, 5).to(torch.bfloat16)
        self.boxes = nn.Parameter(torch.randn(5, 4, 3))
        self.register_buffer("whole", torch.arange(4))
        self.register_buffer("scalar", torch.tensor(seed))
        self.register_buffer("small", torch.randn(3, 2).to(torch.float8_e4m3fn))
        self.register_buffer("empty", torch.empty(0, 3))


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(same_bits(actual[name], expected[name]) for name in expected)


def written(folder: Path, files: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Writes the state of a model as rank files; returns it."""
    state = Net(3).state_dict()
    dims = {"rows.weight": (0,), "rows.bias": (0,), "columns.weight": (1,), "boxes": (0, 1), "small": (0,), "empty": (0,)}
    save_ranks(folder, state, {name: cut(tensor, *dims.get(name, ())) for name, tensor in state.items()}, files)
    return dict(state)


@pytest.mark.parametrize("split", [False, True])
def test_every_verb_reads_all_ranks(tmp_path: Path, split: bool) -> None:
    """Catches the slice of one rank in the place of the whole tensor, and a verb that does not find the files."""
    names = Net(3).state_dict().keys()
    state = written(tmp_path / "x", {name: 1 + at % 3 for at, name in enumerate(names)} if split else None)
    assert same(shardsave.load(tmp_path / "x"), state)
    assert same(shardsave.load(tmp_path / "x", mmap=True), state)
    assert same(shardsave.load(tmp_path / "x", prefix="rows."), {n: state[f"rows.{n}"] for n in ("weight", "bias")})
    model = Net(4)
    report = shardsave.load_model(model, tmp_path / "x")
    assert same(dict(model.state_dict()), state)
    assert report.tensors == len(state) and report.verified is None and report.bytes == sum(t.nbytes for t in state.values())
    with shardsave.open(tmp_path / "x") as opened:
        assert same(dict(opened), state) and same_bits(opened.slice("boxes")[1:4, 2:], state["boxes"][1:4, 2:])
    info = shardsave.inspect(tmp_path / "x")
    assert {name: (t.shape, t.dtype) for name, t in info.tensors.items()} == {n: (t.shape, t.dtype) for n, t in state.items()}
    assert len(info.shards) == len(list((tmp_path / "x").iterdir())) and info.bytes == report.bytes
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "x"), "--json"])
    shown = json.loads(result.stdout)
    assert shown["bytes"] == report.bytes == sum(shard["bytes"] for shard in shown["shards"].values())
    checked = shardsave.verify(tmp_path / "x")
    assert checked.verified is None and checked.tensors == len(state)
    shardsave.save(state, tmp_path / "y")
    assert shardsave.diff(tmp_path / "x", tmp_path / "y").same
    changed = shardsave.diff(tmp_path / "x", shardsave.save({**state, "boxes": state["boxes"] + 1}, tmp_path / "z").path)
    assert changed.changed["boxes"].max_absolute == pytest.approx(1) and len(changed.changed) == 1


@pytest.mark.parametrize("to", ["shardsave", "safetensors", "torch"])
def test_conversion(tmp_path: Path, to: str) -> None:
    """Catches a conversion that writes one rank's slice, or keeps metadata that say so."""
    state = written(tmp_path / "x")
    report = shardsave.convert(tmp_path / "x", tmp_path / "out", to=to)
    assert report.kind == "safetensors" and report.tensors == len(state)
    if to == "torch":
        assert same(torch.load(tmp_path / "out", weights_only=True), state)
        return
    assert same(shardsave.load(tmp_path / "out"), state) and shardsave.inspect(tmp_path / "out").metadata == {}
    if to == "safetensors":
        with safe_open(tmp_path / "out", "pt") as file:
            assert "DCP_SHARDING_INFO" not in file.metadata()
        half = shardsave.convert(tmp_path / "x", tmp_path / "half", dtype="float16", drop=["small"], rename=[("^", "m.")])
        assert half.cast == 6
        wanted = {f"m.{n}": t.half() if t.is_floating_point() else t for n, t in state.items() if n != "small"}
        assert same(shardsave.load(tmp_path / "half"), wanted)


def test_as_torch_reads_them(tmp_path: Path) -> None:
    """Catches another tensor than torch's own reader and torch's own consolidation return."""
    state = written(tmp_path / "x")
    state = {name: state[name] for name in ("rows.weight", "columns.weight", "boxes", "columns.bias")}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = distributed_checkpoint.HuggingFaceStorageReader(str(tmp_path / "x"))
        distributed_checkpoint.load(loaded, storage_reader=reader)
    ours = shardsave.load(tmp_path / "x", names=state)
    assert same(loaded, state) and same(ours, state)
    shutil.rmtree(tmp_path / "x")
    save_ranks(tmp_path / "x", state, {name: cut(tensor, 0) for name, tensor in state.items()})
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    (tmp_path / "y").mkdir()
    consolidate_safetensors_files(str(tmp_path / "x"), str(tmp_path / "y"), dict.fromkeys(state, 1))
    (file,) = (tmp_path / "y").glob("*.safetensors")
    assert same(load_file(file), state) and same(shardsave.load(file), state) and same(shardsave.load(tmp_path / "x"), state)


def test_the_file_of_one_rank(tmp_path: Path) -> None:
    """Catches one rank's slice that is loaded as the whole tensor: the path of its file is refused, whatever its name is."""
    written(tmp_path / "x")
    first, second, *_ = sorted((tmp_path / "x").iterdir())
    second.rename(tmp_path / "model.safetensors")
    model = Net(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verbs: list[Callable[[Path], object]] = [
        shardsave.load, shardsave.open, shardsave.inspect, shardsave.verify, lambda path: shardsave.load_model(model, path),
        lambda path: shardsave.load_model(model, path, strict=False), lambda path: shardsave.convert(path, tmp_path / "out"),
    ]  # fmt: skip
    for path in (first, tmp_path / "model.safetensors", tmp_path):
        for verb in verbs:
            with pytest.raises(
                shardsave.IncompatibleCheckpointError, match="it has the chunks of one rank of several"
            ) as caught:
                verb(path)
            folder = path if path.is_dir() else path.parent
            assert str(caught.value).endswith(f"to read all ranks, give the path of their directory: {folder}")
    assert same(dict(model.state_dict()), before) and not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli, ["inspect", str(first)])
    assert result.exit_code == 3


def test_whole_tensors_of_the_same_writer(tmp_path: Path) -> None:
    """Catches a consolidated file, or one of a single process, that is refused since it has the same metadata."""
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    info = json.dumps({name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in state.items()})
    save_file(state, tmp_path / "model.safetensors", metadata={"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0", "format": "pt"})
    assert same(shardsave.load(tmp_path), state) and same(shardsave.load(tmp_path / "model.safetensors"), state)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_verify_goes_on(tmp_path: Path, damage: str) -> None:
    """Catches a verification that ends at the first bad file, or that calls the chunks that are there intact tensors."""
    written(tmp_path / "x")
    second = sorted((tmp_path / "x").iterdir())[1]
    if damage == "gone":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:-1])
    report = shardsave.verify(tmp_path / "x", keep_going=True)
    assert report.verified is False and len(report.damaged) == 1 and report.intact
    assert report.damaged[0].shard == ("shard-*.safetensors" if damage == "gone" else second.name)


def save_sharded(rank: int, folder: Path) -> None:
    line = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    a, b = torch.randn(7, 5), torch.randn(6, 9)
    state = {
        "rows": distribute_tensor(a, line, [Shard(0)]),
        "columns": distribute_tensor(b, line, [Shard(1)]),
        "copies": distribute_tensor(a, line, [Replicate()]),
        "plain": b,
        "short": distribute_tensor(a[:1], line, [Shard(0)]),
    }
    writer = distributed_checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    distributed_checkpoint.save(state, storage_writer=writer)


@pytest.mark.slow
def test_files_of_two_processes(tmp_path: Path) -> None:
    """Catches a difference between files of one process that plays two ranks, and files of two ranks."""
    run_ranks(2, save_sharded, tmp_path / "x")
    torch.manual_seed(0)
    a, b = torch.randn(7, 5), torch.randn(6, 9)
    assert same(shardsave.load(tmp_path / "x"), {"rows": a, "columns": b, "copies": a, "plain": b, "short": a[:1]})


def full(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((6, 4), float(value)), "b": torch.full((5,), float(value))}


def ranks_into(folder: Path, value: float = 7) -> list[str]:
    """Puts the files of two ranks into ``folder``, which may exist already; returns their names."""
    state, source = full(value), folder.parent / f"{folder.name}-ranks"
    files = save_ranks(source, state, {name: cut(tensor, 0) for name, tensor in state.items()})
    folder.mkdir(exist_ok=True)
    return [Path(shutil.move(file, folder / file.name)).name for file in files]


@pytest.mark.parametrize("beside", ["index", "model.safetensors"])
def test_beside_another_checkpoint(tmp_path: Path, beside: str) -> None:
    """Catches the old checkpoint that is read, without a word, after several ranks have saved a new one into its directory."""
    folder = tmp_path / "x"
    if beside == "index":
        shardsave.save(full(1), folder)
        beside = "model.safetensors.index.json"
    else:
        folder.mkdir()
        save_file(full(1), folder / beside)
    ranks = ranks_into(folder)
    model = nn.ParameterDict(full(0))
    verbs: list[Callable[[Path], object]] = [
        shardsave.load, shardsave.open, shardsave.inspect, shardsave.verify, lambda path: shardsave.load_model(model, path),
        lambda path: shardsave.convert(path, tmp_path / "out"), lambda path: shardsave.verify(path, keep_going=True),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
            verb(folder)
        assert all(words in str(caught.value) for words in ("cannot tell which checkpoint is meant", beside, *ranks))
    assert same(dict(model.state_dict()), full(0)) and not (tmp_path / "out").exists()
    assert same(shardsave.load(folder / beside), full(1))  # the way out that the error names
    (folder / ranks[0]).write_bytes(b"")
    (folder / ranks[1]).write_bytes(b"")
    assert same(shardsave.load(folder), full(1))  # nothing that could be meant


@pytest.mark.parametrize("verb", ["save", "convert"])
def test_replaced_by_a_save(tmp_path: Path, verb: str) -> None:
    """Catches replaced files of ranks that stay, and a new checkpoint that cannot be read beside them; only such files are removed."""
    folder = tmp_path / "x"
    ranks = ranks_into(folder)
    save_file(full(3), folder / "shard-00009-model-00001-of-00001.safetensors")  # it says nothing of chunks
    (folder / "shard-00001-model-00001-of-00001.safetensors.bak").write_bytes(b"kept")
    shutil.move(folder / ranks[1], tmp_path / "blob")
    (folder / ranks[1]).symlink_to(tmp_path / "blob")
    if verb == "save":
        report: shardsave.SaveReport | shardsave.ConvertReport = shardsave.save(full(2), folder)
    else:
        report = shardsave.convert(shardsave.save(full(2), tmp_path / "y").path, folder)
    assert set(report.removed) == set(ranks) and "files of several ranks, which were not saved by shardsave" in str(report)
    kept = {"shard-00009-model-00001-of-00001.safetensors", "shard-00001-model-00001-of-00001.safetensors.bak"}
    assert {path.name for path in folder.iterdir()} - kept == {
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }
    assert same(shardsave.load(folder), full(2)) and (tmp_path / "blob").exists()


def test_a_failed_save_removes_none(tmp_path: Path) -> None:
    """Catches files of ranks that are removed before there is another checkpoint."""
    ranks = ranks_into(tmp_path / "x")
    (tmp_path / "x" / "config.json").mkdir()
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "config.json").write_text("{}")
    save_file(full(2), tmp_path / "y" / "model.safetensors")
    with pytest.raises(shardsave.SaveNotCommittedError, match="the previous checkpoint is intact"):
        shardsave.convert(tmp_path / "y", tmp_path / "x")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {*ranks, "config.json"}


def test_replaced_files_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that succeeds without a warning although its directory can no longer be read by its path."""
    ranks = ranks_into(tmp_path / "x")
    monkeypatch.setattr(Cleaner, "_remove_rank", lambda *arguments: None)
    with pytest.warns(
        UserWarning, match="files of several ranks are still in .* only be loaded by the path of its model"
    ) as caught:
        report = shardsave.save(full(2), tmp_path / "x")
    assert all(name in str(caught[0].message) for name in ranks) and not report.removed
    assert same(shardsave.load(tmp_path / "x" / "model.safetensors.index.json"), full(2))


PAIRS = {
    "ranks and torch": (["ranks", "torch"], "shard-00001-model-00001-of-00001.safetensors and pytorch_model.bin"),
    "ranks and table": (["ranks", "table"], "shard-00001-model-00001-of-00001.safetensors and .metadata"),
    "lone and table": (["lone", "table"], "model.safetensors and .metadata"),
    "torch and table": (["torch", "table"], ".metadata and pytorch_model.bin"),
    "lone and torch": (["lone", "torch"], None),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_conversion_of_two_checkpoints_in_one_directory(tmp_path: Path, pair: str) -> None:
    """Catches a conversion that picks one of two checkpoints without a word."""
    kinds, named = PAIRS[pair]
    folder = tmp_path / "x"
    folder.mkdir()
    for value, kind in enumerate(kinds):
        if kind == "ranks":
            ranks_into(folder, value)
        elif kind == "table":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                distributed_checkpoint.save(full(value), checkpoint_id=folder, no_dist=True)
        elif kind == "lone":
            save_file(full(value), folder / "model.safetensors")
        else:
            torch.save(full(value), folder / "pytorch_model.bin")
    if named is None:
        report = shardsave.convert(folder, tmp_path / "out")
        assert any("pytorch_model.bin beside model.safetensors was not read" in note for note in report.notes)
        assert same(shardsave.load(tmp_path / "out"), full(0))
        return
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=re.escape(f"the files of 2 are there: {named}; give the path")
    ):
        shardsave.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["last rank missing", "a rank as model.safetensors"])
def test_inferred_shapes_are_told(tmp_path: Path, case: str) -> None:
    """Catches truncated tensors without a word: a missing last rank cannot be noticed, so every verb says that shapes are inferred."""
    folder = tmp_path / "x"
    first, last = ranks_into(folder)
    (folder / last).unlink()
    if case == "a rank as model.safetensors":
        (folder / first).rename(folder / "model.safetensors")
    with pytest.warns(UserWarning, match=INFERRED) as caught:
        assert shardsave.load(folder)["w"].shape == (3, 4)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=INFERRED), shardsave.open(folder):
        pass
    reports = (
        shardsave.load_model(nn.ParameterDict(full(0)), folder, strict=False),
        shardsave.inspect(folder),
        shardsave.verify(folder),
        shardsave.convert(folder, tmp_path / "out"),
    )
    for report in reports:
        assert any(note.startswith(INFERRED) for note in report.notes) and INFERRED in str(report)
    result = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert INFERRED in result.output


def test_what_file_numbers_tell(tmp_path: Path) -> None:
    """Catches an absent file of a rank whose other file is there, and files of two saves, that no verb mentions."""
    state = {"a": torch.arange(8.0), "b": torch.arange(6.0)}
    cuts = {name: cut(tensor, 0) for name, tensor in state.items()}
    files = save_ranks(tmp_path / "x", state, cuts, {"a": 1, "b": 2})
    assert [file.name for file in files][2:] == [f"shard-00002-model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert "other ranks wrote" not in str(shardsave.inspect(tmp_path / "x"))
    files[2].unlink()
    notes = shardsave.verify(tmp_path / "x").notes
    assert any(files[2].name in note and "other ranks wrote" in note for note in notes) and files[1].name not in str(notes)
    (other, _) = save_ranks(tmp_path / "y", {"c": state["a"]}, {"c": cut(state["a"], 0)})
    shutil.copy(other, tmp_path / "x")
    with pytest.raises(
        shardsave.CorruptCheckpointError, match="count different numbers of files; files of some ranks are missing, or"
    ):
        shardsave.load(tmp_path / "x")
