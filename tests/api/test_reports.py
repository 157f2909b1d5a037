"""What users see: reports, error messages and the progress bar."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import SmallModel

SIZE = r"[\d.]+ (?:B|kB|MB|GB), [\d,]+ tensors? in \d+ shards?, \d+\.\d\d s \([\d.]+ \w+/s\)"
HOW = r"(?:native|portable), (?:direct|buffered)"


def lines_of(report: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print(report)
    return capsys.readouterr().out.splitlines()


def test_every_report_prints_as_one_line(tmp_path: Path, small_model: SmallModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a report that does not say what was done, how much, how fast, and by which engine."""
    path = re.escape(str(tmp_path))
    old = r"removed or replaced model-00001-of-00002\.safetensors, model-00002-of-00002\.safetensors"
    for durable, words in ((True, "durable"), (False, f"not durable; {old}")):
        saved = lines_of(shardsave.save(small_model, tmp_path, durable=durable, reuse=False), capsys)
        assert len(saved) == 1 and re.fullmatch(rf"saved {path}: {SIZE}, {HOW}, {words}", saved[0])
    loaded = lines_of(shardsave.load_model(SmallModel(), tmp_path), capsys)
    assert len(loaded) == 1 and re.fullmatch(rf"loaded {path}: {SIZE}, {HOW}, checksums verified, 6 frozen", loaded[0])
    loaded = lines_of(shardsave.load_model(SmallModel(), tmp_path, verify=False, restore_frozen=False), capsys)
    assert len(loaded) == 1 and re.fullmatch(rf"loaded {path}: {SIZE}, {HOW}, not verified, flags left alone", loaded[0])
    verified = lines_of(shardsave.verify(tmp_path), capsys)
    assert len(verified) == 1 and re.fullmatch(rf"verified {path}: {SIZE}, {HOW}, checksums verified", verified[0])


def test_reports_name_overlaps_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches overlaps, differences and missing checksums that no report names."""
    from safetensors.torch import save_file

    base = torch.ones(10)
    (saved,) = lines_of(shardsave.save({"a": base[:6], "b": base[4:]}, tmp_path / "overlap"), capsys)
    assert saved.endswith("; overlapping but stored separately: a and b")
    state = {f"layer{n}": torch.ones(1) for n in range(5)} | {"bias": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    (loaded,) = lines_of(shardsave.load_model(nn.Linear(2, 2), tmp_path, strict=False), capsys)
    assert ", no checksums stored, flags left alone; missing from the checkpoint: weight; " in loaded
    assert loaded.endswith("not in the module: layer0, layer1, layer2 and 2 more")
    (converted,) = lines_of(shardsave.convert(tmp_path / "model.safetensors", tmp_path / "converted"), capsys)
    assert converted.endswith(", durable, the source has no checksums")
    checked = shardsave.verify(tmp_path)
    path = re.escape(str(tmp_path))
    (line,) = lines_of(checked, capsys)
    assert re.fullmatch(rf"checked {path}: {SIZE}, {HOW}, only lengths and headers, no checksums stored", line)
    assert checked.verified is None


def test_a_load_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a load of no tensor whose report looks like a success with verified checksums."""
    shardsave.save({"x": torch.ones(3)}, tmp_path)
    (loaded,) = lines_of(shardsave.load_model(nn.Linear(1, 1), tmp_path, strict=False), capsys)
    assert loaded == f"nothing was loaded from {tmp_path}: missing from the checkpoint: bias, weight; not in the module: x"
    shardsave.save({}, tmp_path)
    (loaded,) = lines_of(shardsave.load_model(nn.Module(), tmp_path), capsys)
    assert loaded == f"nothing was loaded from {tmp_path}"


def test_reports_have_every_figure(tmp_path: Path, small_model: SmallModel) -> None:
    """Catches a figure that is missing, wrong or in a wrong unit, and a report that can be changed."""
    saved = shardsave.save(small_model, tmp_path, max_shard_size=3000)
    loaded = shardsave.load_model(SmallModel(), tmp_path)
    verified = shardsave.verify(tmp_path)
    stored = {name: t for name, t in small_model.state_dict().items() if name != "head.weight"}
    for report in (saved, loaded, verified):
        assert report.path == str(tmp_path)
        assert report.bytes == sum(tensor.nbytes for tensor in stored.values())
        assert report.tensors == len(stored)
        assert report.shards == len(list(tmp_path.glob("*.safetensors"))) > 2
        spent = dataclasses.astuple(report.phases)
        assert all(part >= 0 for part in spent) and 0 < sum(spent) <= report.seconds * 1.01 < 60
        assert report.bytes_per_second == pytest.approx(report.bytes / report.seconds)
        assert 0 < report.staging_bytes <= 256 << 20 and report.pinned is False
        assert report.engine in ("native", "portable") and isinstance(report.direct, bool)
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.bytes = 0  # type: ignore[misc]
    assert saved.durable and saved.leftovers == () and saved.phases.sync > 0 and saved.phases.commit > 0


def test_inspect_prints_flags_by_child(tmp_path: Path, small_model: SmallModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches flags that are not shown, or that are shown although they are unknown."""
    shardsave.save(small_model, tmp_path)
    assert lines_of(shardsave.inspect(tmp_path), capsys) == [
        f"{tmp_path}: 8.6 kB, 13 tensors in 2 shards, 1 tied, 6 of 9 parameters frozen",
        "  embed: 0 of 1 frozen",
        "  encoder: 6 of 6 frozen",
        "  narrow: 0 of 2 frozen",
        "  head: tied",
    ]
    shardsave.save(small_model.state_dict(), tmp_path, reuse=False)
    (line,) = lines_of(shardsave.inspect(tmp_path), capsys)
    assert line.endswith("13 tensors in 1 shard, 1 tied, freeze flags unknown")


def test_inspect_is_complete(tmp_path: Path, small_model: SmallModel) -> None:
    """Catches a name, shape, dtype, shard or tie that is missing or wrong."""
    shardsave.save(small_model, tmp_path, max_shard_size=3000, metadata={"run": 7}, durable=False)
    info = shardsave.inspect(tmp_path)
    state = small_model.state_dict()
    assert set(info.names) == set(state) and info.metadata == {"run": 7} and info.durable is False
    for name, tensor in state.items():
        tensor_info = info.tensors[name]
        assert (tensor_info.dtype, tensor_info.shape, tensor_info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
        assert tensor_info.shard == index["weight_map"][info.ties.get(name, name)] and tensor_info.shard in info.shards
    assert info.bytes == sum(tensor.nbytes for name, tensor in state.items() if name not in info.ties)


def test_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that is forced but not shown, shown but forbidden, or that does not reach its end."""
    state = {"x": torch.ones(3_000_000)}
    for progress, words in ((True, "saving: 100%"), (None, ""), (False, "")):
        shardsave.save(state, tmp_path, progress=progress)
        output = capfd.readouterr()
        assert (words in output.err if words else output.err == "") and output.out == ""
    for verb, words in ((shardsave.load, "loading: 100%"), (shardsave.verify, "verifying: 100%")):
        verb(tmp_path, progress=True)
        assert words in capfd.readouterr().err
    model = nn.Module()
    model.register_buffer("x", torch.zeros(3_000_000))
    calls: list[tuple[int, int]] = []
    shardsave.load_model(model, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1] == (12_000_000, 12_000_000)


def test_errors_have_one_shape(tmp_path: Path) -> None:
    """Catches a message without the path, what was expected, what is there instead, or the state afterwards."""
    shardsave.save({"x": torch.ones(3)}, tmp_path / "ckpt")
    path = re.escape(str(tmp_path))

    def message(kind: type[Exception], action: object) -> str:
        with pytest.raises(kind) as caught:
            action()  # type: ignore[operator]
        assert isinstance(caught.value, shardsave.ShardSaveError) and "\n" not in str(caught.value)
        return str(caught.value)

    cases = [
        (
            message(shardsave.CheckpointNotFoundError, lambda: shardsave.load(tmp_path / "none")),
            rf"no checkpoint at {path}/none: No such file or directory",
        ),
        (
            message(shardsave.CheckpointNotFoundError, lambda: shardsave.load(tmp_path)),
            rf"no checkpoint at {path}: neither model.safetensors.index.json nor model.safetensors is there",
        ),
        (
            message(shardsave.IncompatibleCheckpointError, lambda: shardsave.load(tmp_path / "ckpt", names=["y"])),
            rf"cannot load from {path}/ckpt: 'y' was asked for, the checkpoint has no tensor of that name",
        ),
        (
            message(shardsave.IncompatibleCheckpointError, lambda: shardsave.load_model(nn.Linear(1, 1), tmp_path / "ckpt")),
            rf"cannot load {path}/ckpt: the module's names and shapes were expected, there are "
            r"2 missing from the checkpoint: bias, weight; 1 not in the module: x; the module is unchanged",
        ),
        (
            message(shardsave.UnsupportedTensorError, lambda: shardsave.save({"x": 3}, tmp_path / "new")),
            r"cannot save 'x': a tensor was expected, it is an int: pass plain values as metadata=; nothing was written",
        ),
    ]
    for text, pattern in cases:
        assert re.fullmatch(pattern, text), text


def test_a_load_reports_casts_and_changed_flags(tmp_path: Path) -> None:
    """Catches casts and changed flags that the report does not name."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    shardsave.save(model, tmp_path)
    report = shardsave.load_model(model, tmp_path)
    assert report.notes == () and report.changed_flags == 0 and str(report).endswith("2 frozen")
    other = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))
    other[0].bias.requires_grad_(False)
    report = shardsave.load_model(other, tmp_path)
    assert report.notes == ("2 cast from float32 to float16",) and report.changed_flags == 3
    assert str(report).endswith("2 frozen (3 flags changed); 2 cast from float32 to float16")


def test_a_save_reports_third_party_files_that_it_replaced(tmp_path: Path) -> None:
    """Catches a third-party file that a save replaces without a note, or an index of others that it does not name."""
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    report = shardsave.save({"x": torch.ones(2)}, tmp_path)
    assert report.notes == ("model.safetensors, which was not saved by shardsave, was replaced",)
    assert not (tmp_path / "model.safetensors").exists()
    assert shardsave.save({"x": torch.ones(2)}, tmp_path).notes == ()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({key: value for key, value in json.loads(index.read_text()).items() if key != "shardsave"}))
    report = shardsave.save({"x": torch.ones(2)}, tmp_path)
    assert report.notes == ("the checkpoint that was replaced was not saved by shardsave",) and index.name in report.removed
    index.write_text("{")
    assert shardsave.save({"x": torch.ones(2)}, tmp_path).removed == (index.name,)
    assert index.name not in shardsave.save({"x": torch.ones(2)}, tmp_path).removed


def test_save_and_inspect_count_the_same(tmp_path: Path) -> None:
    """Catches extra tensors that only one of the two counts, and a tied parameter that counts twice."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[1].weight = model[0].weight
    model.register_buffer("scratch", torch.ones(5), persistent=False)
    saved = shardsave.save(model, tmp_path / "ckpt", architecture=True)
    converted = shardsave.convert(tmp_path / "ckpt", tmp_path / "converted")
    for report in (saved, converted):
        info = shardsave.inspect(report.path)
        assert (report.bytes, report.tensors, report.shards) == (info.bytes, 3, len(info.shards))
        assert str(info).splitlines() == [
            f"{report.path}: 32 B, 3 tensors in 1 shard, 1 tied, 3 of 3 parameters frozen",
            "  0: 2 of 2 frozen",
            "  1: 1 of 1 frozen",
        ]
        assert len(info.parameters or ()) == len(info.frozen or ()) == 4  # every name, in the fields
    assert shardsave.load_model(model, tmp_path / "ckpt").frozen == 3


def test_errors_are_what_python_expects(tmp_path: Path) -> None:
    """Catches an error that code written for Python's own errors does not catch."""
    with pytest.raises(FileNotFoundError) as missing:
        shardsave.load(tmp_path / "none")
    assert type(missing.value) is shardsave.CheckpointNotFoundError and missing.value.errno == errno.ENOENT
    shardsave.save({"x": torch.ones(1)}, tmp_path / "ckpt", durable=False)
    with shardsave.open(tmp_path / "ckpt") as checkpoint:
        for kind in (KeyError, shardsave.NoSuchTensorError, shardsave.IncompatibleCheckpointError):
            with pytest.raises(kind, match="^cannot read from .*: 'y' was asked for"):
                checkpoint["y"]
        assert checkpoint.get("y") is None


def test_a_save_without_tensors(tmp_path: Path) -> None:
    """Catches a checkpoint without a tensor that looks like one of the model."""

    class Hidden(torch.nn.Linear):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {}

    def hollow(module: torch.nn.Module) -> torch.nn.Module:
        """A wrapper around a function that calls ``module``, as torch.compile makes of a module that it has compiled already."""
        wrapper = torch.nn.Identity()
        wrapper.call = lambda x: module(x)  # type: ignore[assignment]
        return wrapper

    empty = r"no tensor is saved: tensors were expected in the state dict of the module \(%s\), it is empty"
    for module, words in (
        (hollow(torch.nn.Linear(2, 2)), empty % "Identity"),
        (Hidden(2, 2), f"{empty % 'Hidden'}, although the module has 2 parameters"),
    ):
        with pytest.warns(UserWarning, match=f"^{words}$"):
            report = shardsave.save(module, tmp_path / "empty", durable=False)
        assert report.tensors == 0 and re.search(words, str(report))
    (note,) = shardsave.save(torch.nn.ReLU(), tmp_path / "relu", architecture=True, durable=False).notes
    assert re.search(empty % "ReLU", note)
    assert shardsave.save({}, tmp_path / "mapping", durable=False).notes == ()
