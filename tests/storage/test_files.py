"""The files on disk, read by others: an independent reader, another CRC implementation, and Hugging Face's libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path

import awscrt.checksums
import pytest
import torch
from torch import nn

import shardsave
from shardsave._storage import shard_files
from support import SmallModel, same_bits, same_state

INDEX = "model.safetensors.index.json"


def test_shards_alone_have_the_extension_of_weights(tmp_path: Path) -> None:
    """Catches a file that is no shard, and that tools which read every ``*.safetensors`` of a directory would take for weights."""
    model = SmallModel()
    shardsave.save(model.encoder, tmp_path / "architecture", architecture=True, program=((torch.ones(2, 16),), {}))
    model.encoder.register_buffer("scratch", torch.ones(3), persistent=False)
    shardsave.save(model.encoder, tmp_path / "extra", architecture=True, durable=False)
    assert shardsave.inspect(tmp_path / "extra").parts.keys() == {"architecture", "extra tensors"}
    for folder in (tmp_path / "architecture", tmp_path / "extra"):
        assert {path.name for path in folder.rglob("*.safetensors")} == {*shardsave.inspect(folder).shards}


def read_as_format_says(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """A reader written from FORMAT.md alone, with every check that it asks for. Returns name → dtype, shape, bytes."""
    content = (folder / INDEX).read_bytes()
    assert content.endswith(b'"}}\n')
    assert f"{awscrt.checksums.crc64nvme(content[:-20]):016x}".encode() == content[-20:-4]
    index = json.loads(content)
    assert list(index)[-1] == "shardsave" and list(index["shardsave"])[-1] == "crc64nvme"
    record = index["shardsave"]
    assert record["requires"] == []
    found = {}
    for shard, (length, header_length, header_crc) in record["shards"].items():
        data = (folder / shard).read_bytes()
        header_bytes = data[:header_length]
        assert len(data) == length and header_length % 4096 == 0
        assert f"{awscrt.checksums.crc64nvme(header_bytes):016x}" == header_crc
        assert int.from_bytes(data[:8], "little") == header_length - 8
        header = json.loads(header_bytes[8:])
        digits = header.pop("__metadata__")["shardsave.crc64nvme"]
        end = 0
        for number, (name, tensor) in enumerate(sorted(header.items(), key=lambda item: item[1]["data_offsets"])):
            assert index["weight_map"][name] == shard
            begin, stop = tensor["data_offsets"]
            assert begin == end
            end = stop
            raw = data[header_length + begin : header_length + stop]
            assert f"{awscrt.checksums.crc64nvme(raw):016x}" == digits[16 * number : 16 * number + 16]
            found[name] = (tensor["dtype"], tensor["shape"], raw)
        assert header_length + end == length
    assert found.keys() == index["weight_map"].keys()
    for tied, stored in record["ties"].items():
        found[tied] = found[stored]
    return found


def test_an_independent_reader(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches files that do not follow FORMAT.md, and checksums that only our own code computes."""
    shardsave.save(small_model, tmp_path, max_shard_size=3000)
    found = read_as_format_says(tmp_path)
    state = small_model.state_dict()
    assert found.keys() == state.keys()
    for name, (_, shape, raw) in found.items():
        assert shape == list(state[name].shape)
        assert raw == state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors_opens_shards(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches headers that the format's own library does not accept."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    shardsave.save(small_model, tmp_path, max_shard_size=3000)
    merged: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        merged.update(load_file(path))
        with safe_open(path, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
    assert all(same_bits(merged[name], small_model.state_dict()[name]) for name in merged)
    assert len(merged) == len(small_model.state_dict()) - 1


@pytest.mark.slow
def test_hub_and_accelerate_open_checkpoints(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches an index that the loaders of huggingface_hub or accelerate do not understand."""
    from accelerate import load_checkpoint_in_model
    from huggingface_hub import load_torch_model

    shardsave.save(small_model, tmp_path, max_shard_size=3000)
    for load in (
        lambda model: load_torch_model(model, tmp_path, strict=False),
        lambda model: load_checkpoint_in_model(model, str(tmp_path)),
    ):
        fresh = SmallModel(seed=4)
        load(fresh)
        assert all(same_bits(a, b) for a, b in zip(small_model.state_dict().values(), fresh.state_dict().values()))


def test_transformers_both_ways(tmp_path: Path) -> None:
    """Catches a checkpoint that from_pretrained does not load whole, and one by save_pretrained that we do not."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
    model = BertForMaskedLM(config)
    model.bert.embeddings.requires_grad_(False)
    shardsave.save(model, tmp_path / "ours", max_shard_size=20_000)
    again, notes = BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    for folder, bound in (("sharded", "20KB"), ("lone", "1GB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=bound)
        fresh = BertForMaskedLM(config)
        report = shardsave.load_model(fresh, tmp_path / folder)
        assert report.verified is None and report.frozen is None
        assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))
        assert shardsave.inspect(tmp_path / folder).frozen is None


def test_hub_cache_symlinks_and_single_paths(tmp_path: Path) -> None:
    """Catches a reader that does not follow the links of the Hub's cache, or accepts nothing but a directory."""
    blobs = tmp_path / "blobs"
    shardsave.save({"x": torch.ones(3)}, blobs)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / path.name)
    for path in (snapshot, snapshot / INDEX, snapshot / "model-00001-of-00001.safetensors"):
        assert shardsave.load(path)["x"].tolist() == [1, 1, 1]


def test_lone_file_beside_our_index(tmp_path: Path) -> None:
    """Catches a silent choice between our checkpoint and a file that another library saved later."""
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    shardsave.save({"x": torch.ones(2)}, tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and shardsave.load(tmp_path)["x"].sum() == 2
    save_file({"x": torch.full((2,), 5.0)}, tmp_path / "model.safetensors")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="cannot tell which checkpoint is meant"):
        shardsave.load(tmp_path)
    assert shardsave.load(tmp_path / "model.safetensors")["x"].sum() == 10
    shardsave.save({"x": torch.ones(2)}, tmp_path)
    assert sorted(os.listdir(tmp_path))[-1] == INDEX


def test_ties_in_foreign_files(tmp_path: Path) -> None:
    """Catches a missing name, or a second copy, where another library left a tied tensor out and recorded the tie in its metadata."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_file, save_model

    model, lone = SmallModel(), tmp_path / "lone.safetensors"
    save_model(model, str(lone))
    state = model.state_dict()
    (tmp_path / "hub").mkdir()
    save_torch_state_dict(dict(state), tmp_path / "hub", max_shard_size=500)
    shardsave.save(model, tmp_path / "ours")
    shardsave.convert(tmp_path / "ours", tmp_path / "converted.safetensors", to="safetensors")
    for path in (lone, tmp_path / "hub", tmp_path / "converted.safetensors"):
        assert len(ties := shardsave.inspect(path).ties) == 1
        loaded = shardsave.load(path)
        assert loaded.keys() == state.keys() and all(same_bits(loaded[name], value) for name, value in state.items())
        assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
        assert shardsave.load(path, names=ties).keys() == ties.keys()
        fresh = SmallModel()
        shardsave.load_model(fresh, path)
        assert same_state(fresh, model)
    assert shardsave.inspect(tmp_path / "hub").shards[1:]
    save_file({"pt": torch.ones(2)}, tmp_path / "named.safetensors", metadata={"format": "pt", "other": "none"})
    assert shardsave.load(tmp_path / "named.safetensors").keys() == {"pt"}


def test_header_is_a_pure_function_of_its_tensors(tmp_path: Path) -> None:
    """Catches a header that depends on the save, or on other shards."""
    shardsave.save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "one", max_shard_size=4000, metadata={"run": 1})
    shardsave.save({"a": torch.ones(1000)}, tmp_path / "two", durable=False)
    first = (tmp_path / "one" / "model-00001-of-00002.safetensors").read_bytes()
    assert first == (tmp_path / "two" / "model-00001-of-00001.safetensors").read_bytes()


def test_the_header_check_is_what_finds_another_saves_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that uses a header without comparing it with the index, which alone tells two saves of one layout apart."""
    shardsave.save({"x": torch.zeros(8)}, tmp_path / "a")
    shardsave.save({"x": torch.zeros(8, dtype=torch.int32)}, tmp_path / "b")
    name = "model-00001-of-00001.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(shardsave.CorruptCheckpointError, match="the index says a header with checksum"):
        shardsave.load(tmp_path / "a")
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    monkeypatch.setattr(shard_files, "crc64", lambda data: int(index["shardsave"]["shards"][name][2], 16))
    assert shardsave.load(tmp_path / "a")["x"].dtype == torch.int32


def test_damage_is_named(tmp_path: Path, small_model: nn.Module) -> None:
    """Catches a corrupt shard that is loaded, or a message that names neither the tensor nor the state of the module."""
    shardsave.save(small_model, tmp_path)
    info = shardsave.inspect(tmp_path)
    path = tmp_path / info.tensors["encoder.0.weight"].shard
    content = bytearray(path.read_bytes())
    at = bytes(content).index(small_model.encoder[0].weight.detach().numpy().tobytes())
    content[at + 5] ^= 64
    path.write_bytes(content)
    words = r"corrupt shard .*: tensor 'encoder.0.weight' has checksum [0-9a-f]{16}, its header says [0-9a-f]{16}"
    for read in (shardsave.load, shardsave.verify):
        with pytest.raises(shardsave.CorruptCheckpointError, match=words):
            read(tmp_path)
    with pytest.raises(shardsave.CorruptCheckpointError, match=words + r".*the module is partly loaded, 12 of 13 tensors"):
        shardsave.load_model(SmallModel(), tmp_path)
    shardsave.load(tmp_path, verify=False)
