"""Conversion of files that the real libraries wrote, from every kind of source and back, compared bit by bit."""

from __future__ import annotations

import fcntl
import os
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardsave
from jobs import run_ranks
from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.boxes import aligned
from support import SmallModel, same_bits
from warm_python import warm_python


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(same_bits(actual[name], expected[name]) for name in expected)


def saved_by_torch(path: Path, **more: Any) -> dict[str, torch.Tensor]:
    state = SmallModel().state_dict()
    torch.save({"state_dict": state, "epoch": 3, **more} if more else state, path)
    return state


def distributed(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        distributed_checkpoint.save(state, checkpoint_id=folder)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth"])
def test_files_of_torch(tmp_path: Path, ending: str) -> None:
    """Catches a value that changes, a tie that is stored twice, and freeze flags that are guessed."""
    state = saved_by_torch(tmp_path / f"model{ending}")
    report = shardsave.convert(tmp_path / f"model{ending}", tmp_path / "ckpt", max_shard_size=3000)
    assert same(shardsave.load(tmp_path / "ckpt"), state) and report.shards > 1
    info = shardsave.inspect(tmp_path / "ckpt")
    assert info.ties == {"head.weight": "embed.weight"} == report.ties and info.frozen is None
    assert (
        report.kind == "torch"
        and "\n" not in str(report)
        and str(report).startswith(f"converted {tmp_path}/model{ending} (torch) to")
    )


def test_tensors_of_all_layouts(tmp_path: Path) -> None:
    """Catches strides, offsets, conjugation or empty tensors that are ignored when bytes are read from the mapped file."""
    base = torch.arange(24.0).reshape(4, 6)
    z = torch.complex(base, base + 1)
    state = {
        "whole": base, "transposed": base.t(), "slice": base[1:3, 2:4], "expanded": base[0].expand(3, 6), "conj": z.conj(),
        "negative": torch.complex(base, base).clone().conj().imag, "empty": torch.empty(3, 0), "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
        "half": base.half(), "f8": base.to(torch.float8_e4m3fn), "long": torch.arange(3),
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    shardsave.convert(tmp_path / "x.pt", tmp_path / "ckpt")
    assert same(shardsave.load(tmp_path / "ckpt"), state)
    shardsave.convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch")
    assert same(torch.load(tmp_path / "y.pt", weights_only=True), state)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "x.pt", "y.pt"]


def shards_of_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Writes shards as transformers did before version 5; returns their tensors."""
    import json

    folder.mkdir()
    state = {"a.w": torch.arange(6.0), "b.w": torch.arange(4), "c.w": torch.ones(2, 2)}
    files = {"pytorch_model-00001-of-00002.bin": ["a.w", "b.w"], "pytorch_model-00002-of-00002.bin": ["c.w"]}
    for file, names in files.items():
        torch.save({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 72}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state


def test_shards_of_torch(tmp_path: Path) -> None:
    """Catches a shard that is not read, and shards that do not belong to their index."""
    state = shards_of_torch(tmp_path / "torch")
    for at, path in enumerate((tmp_path / "torch", tmp_path / "torch" / "pytorch_model.bin.index.json")):
        shardsave.convert(path, tmp_path / f"ckpt{at}")
        assert same(shardsave.load(tmp_path / f"ckpt{at}"), state)
    torch.save({"d.w": torch.ones(2)}, tmp_path / "torch" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(
        shardsave.CorruptCheckpointError, match="'c.w' is only in the index; index and shard belong to different saves"
    ):
        shardsave.convert(tmp_path / "torch", tmp_path / "no")
    (tmp_path / "torch" / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(shardsave.CorruptCheckpointError, match="names pytorch_model-00001-of-00002.bin, there is no such file"):
        shardsave.convert(tmp_path / "torch", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_shards_of_transformers(tmp_path: Path) -> None:
    """Catches safetensors shards, in the layout of the Hugging Face cache with links, that are not found or lose tensors."""
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    )
    snapshot = tmp_path / "models--some--bert" / "snapshots" / "abc123"
    blobs = tmp_path / "models--some--bert" / "blobs"
    model.save_pretrained(snapshot, max_shard_size="20KB")
    blobs.mkdir()
    for file in sorted(snapshot.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        file.symlink_to(Path("../../blobs") / f"blob-{file.name}")
    (tmp_path / "models--some--bert" / "refs").mkdir()
    (tmp_path / "models--some--bert" / "refs" / "main").write_text("abc123")
    report = shardsave.convert(tmp_path / "models--some--bert", tmp_path / "ckpt", dtype="bfloat16", rename=[("^", "bert.")])
    wanted = {f"bert.{name}": tensor.bfloat16() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert report.kind == "safetensors" and report.verified is None and same(shardsave.load(tmp_path / "ckpt"), wanted)


def test_a_lone_file_with_odd_alignment(tmp_path: Path) -> None:
    """Catches tensors read from the wrong place if the writer does not align them, and metadata that is lost."""
    state = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.arange(7.0)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt", "license": "mit"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" "  # a writer that does not pad
    swapped = header.replace(b'"data_offsets":[0,28]', b'"data_offsets":[5,33]').replace(
        b'"data_offsets":[28,33]', b'"data_offsets":[0,5]'
    )
    data = raw[8 + length :]
    (tmp_path / "x.safetensors").write_bytes(len(swapped).to_bytes(8, "little") + swapped + data[28:] + data[:28])
    assert same(shardsave.load(tmp_path / "x.safetensors"), state)
    shardsave.convert(tmp_path / "x.safetensors", tmp_path / "ckpt", dtype=torch.float16)
    assert same(shardsave.load(tmp_path / "ckpt"), {"a": state["a"], "b": state["b"].half()})
    assert shardsave.inspect(tmp_path / "ckpt").metadata == {"license": "mit"}


def test_own_checkpoints_keep_flags_ties_and_metadata(tmp_path: Path) -> None:
    """Catches flags, ties or metadata that are lost, also when tensors are renamed."""
    model = SmallModel()
    shardsave.save(model, tmp_path / "ckpt", metadata={"run": "7", "steps": [1, 2]})
    old = shardsave.inspect(tmp_path / "ckpt")
    report = shardsave.convert(
        tmp_path / "ckpt", tmp_path / "new", dtype="float16", drop="narrow.*", rename=[("^encoder", "body")]
    )
    new = shardsave.inspect(tmp_path / "new")
    assert old.frozen and new.frozen == {name.replace("encoder", "body") for name in old.frozen} and new.ties == old.ties
    assert new.metadata == old.metadata and report.flags_known and report.verified and "narrow.weight" in report.dropped
    assert new.tensors["body.0.weight"].dtype == torch.float16 and new.tensors["steps"].dtype == torch.int64
    shardsave.convert(tmp_path / "ckpt", tmp_path / "part", drop=["embed.*"])
    assert shardsave.inspect(tmp_path / "part").ties == {} and same_bits(
        shardsave.load(tmp_path / "part")["head.weight"], model.head.weight
    )


def test_damage_does_not_get_new_checksums(tmp_path: Path) -> None:
    """Catches a converted checkpoint whose checksums vouch for bytes that were already damaged."""
    shardsave.save({"x": torch.ones(1000)}, tmp_path / "ckpt")
    shard = tmp_path / "ckpt" / "model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(shardsave.CorruptCheckpointError, match="tensor 'x' has checksum"):
        shardsave.convert(tmp_path / "ckpt", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert shardsave.convert(tmp_path / "ckpt", tmp_path / "new", verify=False).verified is False


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """Catches names that lose their nesting, and other values in the checkpoint that are taken for tensors."""
    state = SmallModel().state_dict()
    distributed({"model": state, "step": 3, "optimizer": {"state": {"w": {"exp_avg": torch.ones(2)}}}}, tmp_path / "dcp")
    report = shardsave.convert(tmp_path / "dcp", tmp_path / "ckpt")
    assert report.kind == "distributed" and same(shardsave.load(tmp_path / "ckpt"), state)
    shardsave.convert(tmp_path / "dcp", tmp_path / "o", key="optimizer.state.w")
    assert shardsave.load(tmp_path / "o")["exp_avg"].sum() == 2


def save_sharded(rank: int, folder: Path) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    a, b, c = torch.randn(10, 7), torch.randn(6, 9, 5), torch.arange(64).reshape(8, 8)
    sharded = {
        "rows": distribute_tensor(a, line, [Shard(0)]),
        "columns": distribute_tensor(b, line, [Shard(1)]),
        "boxes": distribute_tensor(c, square, [Shard(0), Shard(1)]),
        "copies": distribute_tensor(a, line, [Replicate()]),
    }
    distributed_checkpoint.save({"model": sharded}, checkpoint_id=folder)


@pytest.mark.slow
def test_distributed_checkpoints_of_four_ranks(tmp_path: Path) -> None:
    """Catches parts that are assembled at the wrong place: rows, columns and boxes, with and without a cast."""
    run_ranks(4, save_sharded, tmp_path / "dcp")
    torch.manual_seed(0)
    a, b, c = torch.randn(10, 7), torch.randn(6, 9, 5), torch.arange(64).reshape(8, 8)
    wanted = {"rows": a, "columns": b, "boxes": c, "copies": a}
    shardsave.convert(tmp_path / "dcp", tmp_path / "ckpt")
    assert same(shardsave.load(tmp_path / "ckpt"), wanted)
    shardsave.convert(tmp_path / "dcp", tmp_path / "half.pt", to="torch", dtype="bfloat16")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in wanted.items()}
    assert same(torch.load(tmp_path / "half.pt", weights_only=True), half)


def test_any_range_of_an_assembled_tensor() -> None:
    """Catches an element from the wrong part when a block of a file begins or ends in the middle of a row."""
    whole = torch.arange(5 * 6 * 7, dtype=torch.int16).reshape(5, 6, 7)
    cuts = [(0, 2, 0, 3), (0, 2, 3, 6), (2, 5, 0, 1), (2, 5, 1, 6)]
    parts = [Chunk((r, c, 0), whole[r:s, c:d].clone()) for r, s, c, d in cuts]
    assembled = Assembled(torch.int16, whole.shape, parts)
    raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    pick = random.Random(1)
    for _ in range(300):
        begin, end = sorted(2 * pick.randrange(whole.numel() + 1) for _ in range(2))
        block = bytearray(end - begin)
        assembled.gather(begin, memoryview(block))
        assert block == raw[begin:end]


def test_back_to_one_file(tmp_path: Path) -> None:
    """Catches a file that its own library reads differently, a tie that is lost, and a loss without a note."""
    model = SmallModel()
    shardsave.save(model, tmp_path / "ckpt", metadata={"run": "7", "steps": [1, 2]}, max_shard_size=3000)
    report = shardsave.convert(tmp_path / "ckpt", tmp_path / "m.pt", to="torch")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert type(state) is dict and same(state, model.state_dict())
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert report.notes == ("freeze flags were left out", "metadata was left out: run, steps")
    report = shardsave.convert(tmp_path / "ckpt", tmp_path / "m.safetensors", to="safetensors")
    assert report.notes == ("freeze flags were left out", "metadata was left out: steps")
    fresh = SmallModel(seed=9)
    load_model(fresh, tmp_path / "m.safetensors")
    assert same(fresh.state_dict(), model.state_dict())
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys() - {"head.weight"}
    shardsave.convert(tmp_path / "m.safetensors", tmp_path / "again")
    info = shardsave.inspect(tmp_path / "again")
    assert info.ties == {"head.weight": "embed.weight"} and info.metadata == {"run": "7"} and info.frozen is None
    shardsave.convert(tmp_path / "m.pt", tmp_path / "m2.pt", to="torch", dtype="float64")
    assert torch.load(tmp_path / "m2.pt", weights_only=True)["embed.weight"].dtype == torch.float64


def test_ties_of_safetensors_itself(tmp_path: Path) -> None:
    """Catches a tied name that safetensors omitted from the file, and that is lost by a conversion."""
    save_model(SmallModel(), str(tmp_path / "m.safetensors"))
    shardsave.convert(tmp_path / "m.safetensors", tmp_path / "ckpt")
    assert same(shardsave.load(tmp_path / "ckpt"), SmallModel().state_dict())


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    """Catches a file of torch.save that holds the whole storage of a converted view."""
    big = torch.zeros(100_000)
    torch.save({"a": big[:10], "b": big}, tmp_path / "x.pt")
    shardsave.convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch", drop=["b"])
    assert (tmp_path / "y.pt").stat().st_size < 5000


def test_quantised_tensors_are_not_cast(tmp_path: Path) -> None:
    """Catches a cast of quantised values, which mean nothing without their scales, or of values that are not floating point."""
    state = {
        "f8": torch.ones(3).to(torch.float8_e5m2),
        "f64": torch.ones(3).double(),
        "i": torch.ones(3).int(),
        "c": torch.ones(2) * 1j,
    }
    torch.save(state, tmp_path / "x.pt")
    assert shardsave.convert(tmp_path / "x.pt", tmp_path / "ckpt", dtype="float32").cast == 1
    assert same(shardsave.load(tmp_path / "ckpt"), {**state, "f64": torch.ones(3)})


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    """Catches a progress bar that stops before its end, or moves back, when source and result differ in size."""
    shardsave.save({"x": torch.ones(3_000_000)}, tmp_path / "ckpt")
    for at, more in enumerate(({}, {"to": "torch"}, {"to": "safetensors"})):
        seen: list[tuple[int, int]] = []
        shardsave.convert(
            tmp_path / "ckpt", tmp_path / str(at), dtype="float64", progress=lambda d, t: seen.append((d, t)), **more
        )  # type: ignore[arg-type]
        assert seen == sorted(seen) and seen[-1][0] >= seen[-1][1] == 36_000_000


def test_a_cast_reads_only_aligned_elements() -> None:
    """Catches a cast of elements at unaligned addresses. Few processors fail on them, so the test checks the address itself."""
    raw = torch.arange(33, dtype=torch.uint8)
    odd = torch.frombuffer(raw.numpy(), dtype=torch.uint8, offset=1).view(torch.float32)
    copy = aligned(odd)
    assert (
        odd.data_ptr() % 4
        and copy.data_ptr() % 4 == 0
        and same_bits(copy, torch.frombuffer(bytearray(range(1, 33)), dtype=torch.float32))
    )


def test_architectures_and_programs_are_copied(tmp_path: Path) -> None:
    """Catches an architecture or a program that is lost when a model is resharded, or kept when it no longer fits the weights."""
    model = SmallModel().eval()
    x = torch.arange(3)
    shardsave.save(model, tmp_path / "a", architecture=True, program=((x,), {}))
    report = shardsave.convert(tmp_path / "a", tmp_path / "b", max_shard_size=1000)
    assert report.shards > 1 and report.notes == ()
    again = shardsave.build_model(tmp_path / "b", trust=["support"])
    assert same(again.state_dict(), model.state_dict()) and same_bits(again.scratch, model.scratch)
    assert same_bits(shardsave.load_program(tmp_path / "b")(x), again(x))
    shardsave.verify(tmp_path / "b")
    for options in ({"dtype": "bfloat16"}, {"rename": [("^", "x.")]}, {"drop": "embed.*"}):
        report = shardsave.convert(tmp_path / "a", tmp_path / "c", **options)
        assert report.notes == tuple(
            f"the {part} was left out: it refers to the saved names and dtypes" for part in ("architecture", "program")
        )
        assert shardsave.inspect(tmp_path / "c").parts == {}
    report = shardsave.convert(tmp_path / "a", tmp_path / "one.safetensors", to="safetensors")
    assert report.notes[:2] == tuple(
        f"the {part} was left out: a single file cannot hold it" for part in ("architecture", "program")
    )


@pytest.mark.parametrize("writer", ["shardsave", "transformers"])
def test_a_config_is_copied(writer: str, tmp_path: Path) -> None:
    """Catches weights that transformers cannot load, because the config is missing or names the dtype from before the cast."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.lm_head.weight.requires_grad_(False)
    if writer == "shardsave":
        shardsave.save(model, tmp_path / "thawed")
        model.model.layers[0].mlp.experts.requires_grad_(False)  # one tensor in memory, several on disk
        shardsave.save(model, tmp_path / "a")
        flags = shardsave.diff(tmp_path / "thawed", tmp_path / "a").flags
        assert flags and all("experts" in name and change == (False, True) for name, change in flags.items())
    else:
        model.save_pretrained(tmp_path / "a")
    shardsave.convert(tmp_path / "a", tmp_path / "b", max_shard_size=4000)
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "b")
    assert same(again.state_dict(), model.state_dict())
    shardsave.convert(tmp_path / "a", tmp_path / "half", dtype="bfloat16")
    half = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and same(half.state_dict(), model.to(torch.bfloat16).state_dict())
    for folder in ("b", "half"):
        built = shardsave.build_model(tmp_path / folder, trust=["transformers"])
        assert [p.requires_grad for p in built.parameters()] == [
            writer == "transformers" or p.requires_grad for p in model.parameters()
        ]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_after_a_killed_conversion(tmp_path: Path, to: str) -> None:
    """Catches scratch files of a killed writer that are never removed, and scratch files of a living writer that are removed."""
    shardsave.save({"w": torch.ones(3, 5).t(), "x": torch.ones(200)}, tmp_path / "ckpt")
    script = f"""
import os, signal, sys, shardsave
shardsave.convert(sys.argv[1], sys.argv[2], to="{to}", dtype="float64",
                  progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total // 2 else None)
"""
    target = tmp_path / f"out.{to}"
    killed = warm_python().run(["-c", script, tmp_path / "ckpt", target])
    left = sorted(name for name in os.listdir(tmp_path) if name.endswith(".part"))
    assert killed.returncode == -9 and len(left) == 1
    with open(tmp_path / f".out.{to}.{'0' * 16}.part", "w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        (tmp_path / f".out.{to}.mine.part").touch()
        shardsave.convert(tmp_path / "ckpt", target, to=to)
        assert sorted(os.listdir(tmp_path)) == sorted(
            ["ckpt", target.name, f".out.{to}.{'0' * 16}.part", f".out.{to}.mine.part"]
        )
    shardsave.convert(tmp_path / "ckpt", target, to=to)
    assert sorted(os.listdir(tmp_path)) == sorted(["ckpt", target.name, f".out.{to}.mine.part"])


def rewritten(path: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Packs the archive at ``path`` again, without torch's alignment; ``changed``: file name → other content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.rpartition("/")[2], old.read(name)))


def test_repacked_files(tmp_path: Path) -> None:
    """Catches bytes read from where torch would have written them, in a file that another program packed."""
    state = {"a": torch.zeros(1000), "b": torch.randn(1000)}
    torch.save(state, tmp_path / "a.pt")
    note = "is not as torch wrote it, so it cannot be mapped: all of it was read into memory"
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        rewritten(tmp_path / "a.pt", tmp_path / "b.pt", compression)
        report = shardsave.convert(tmp_path / "b.pt", tmp_path / "out")
        assert same(shardsave.load(tmp_path / "out"), state) and report.notes in ((f"b.pt {note}",), ())
    big = {"0": state["a"].numpy().tobytes(), "1": state["b"].numpy().byteswap().tobytes(), "byteorder": b"big"}
    rewritten(tmp_path / "a.pt", tmp_path / "big.pt", **big)
    assert same(torch.load(tmp_path / "big.pt", weights_only=True), state)
    assert shardsave.convert(tmp_path / "big.pt", tmp_path / "out").notes == (f"big.pt {note}",)
    assert same(shardsave.load(tmp_path / "out"), state)
    rewritten(tmp_path / "a.pt", tmp_path / "short.pt", **{"1": b"1234"})
    with pytest.raises(shardsave.CorruptCheckpointError, match="corrupt short.pt"):
        shardsave.convert(tmp_path / "short.pt", tmp_path / "out")


def test_tied_names_that_metadata_reserves(tmp_path: Path) -> None:
    """Catches a header with a key twice, when a tied tensor has the name of a metadata entry."""
    for name in ("format", "shardsave.crc64nvme", "__metadata__"):
        shared = torch.ones(3)
        torch.save({"w": shared, name: shared}, tmp_path / "a.pt")
        try:
            shardsave.convert(tmp_path / "a.pt", tmp_path / "a.safetensors", to="safetensors")
        except (shardsave.UnsupportedTensorError, shardsave.IncompatibleCheckpointError) as refusal:
            assert name in str(refusal) and "nothing was written" in str(refusal)
            assert not (tmp_path / "a.safetensors").exists()
        else:
            assert shardsave.load(tmp_path / "a.safetensors").keys() >= {"w"}


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    """Catches a misspelt pattern without a note."""
    saved_by_torch(tmp_path / "a.pt")
    report = shardsave.convert(
        tmp_path / "a.pt", tmp_path / "out", drop=["stepz", "steps"], rename=[("^embed", "e"), ("zzz", "")]
    )
    assert report.notes == ("drop='stepz' matched no name", "rename='zzz' matched no name") and report.dropped == ("steps",)


def test_adapters_of_torch_save(tmp_path: Path) -> None:
    """Catches an adapter that loses its config without a word, and an advice to convert a directory that is then refused."""
    folder, config = tmp_path / "adapter", b'{"peft_type": "LORA"}'
    folder.mkdir()
    state = {"base_model.model.l.lora_A.weight": torch.ones(2, 3)}
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes(config)
    with pytest.raises(shardsave.CheckpointNotFoundError, match="shardsave convert SRC DST makes a checkpoint of it"):
        shardsave.inspect(folder)
    report = shardsave.convert(folder, tmp_path / "out", durable=False)
    assert report.notes == () and same(shardsave.load(tmp_path / "out"), state)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == config
    assert same(shardsave.load(tmp_path / "out" / "adapter_model.safetensors"), state)
    (note,) = shardsave.convert(folder / "adapter_model.bin", tmp_path / "lone", durable=False).notes
    assert note.startswith("adapter_config.json beside adapter_model.bin was not read")
