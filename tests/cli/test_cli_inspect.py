"""``shardsave inspect``: the contents of a checkpoint as text and as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardsave
from cli.commands import error, lines, run


def test_inspect(ckpt: Path) -> None:
    """Catches a module, size, dtype, share, tie, shard or metadata that is missing or wrong."""
    assert lines(run("inspect", ckpt)) == [
        f"{ckpt}: 8.6 kB, 13 tensors in 4 shards, 1 tied, 6 of 9 parameters frozen, durable",
        "",
        "module   tensors    size  dtypes                            frozen",
        "(all)         13  8.6 kB  float32, bfloat16, int64, 1 tied  #######.....  54.8%",
        "embed          1  3.2 kB  float32                           ............     0%",
        "encoder        9  4.8 kB  float32, int64                    ############   100%",
        "  0            2  2.2 kB  float32                           ############   100%",
        "  1            5   520 B  float32, int64                    ############   100%",
        "  2            2  2.1 kB  float32                           ############   100%",
        "narrow         2   544 B  bfloat16                          ............     0%",
        "head           0     0 B  1 tied",
        "",
        "shard                             tensors    size  dtypes                    frozen",
        "model-00001-of-00004.safetensors        4  2.4 kB  float32                   ############  100%",
        "model-00002-of-00004.safetensors        2  2.1 kB  float32                   ############  100%",
        "model-00003-of-00004.safetensors        2  3.2 kB  float32, int64            ............    0%",
        "model-00004-of-00004.safetensors        5   808 B  bfloat16, float32, int64  ............    0%",
        "",
        "tied name    shares the bytes of",
        "head.weight  embed.weight",
        "",
        'metadata  {"step": 7}',
    ]
    assert lines(run("inspect", ckpt, "--depth", 0))[3:6] == [
        "(all)        13  8.6 kB  float32, bfloat16, int64, 1 tied  #######.....  54.8%",
        "",
        "shard                             tensors    size  dtypes                    frozen",
    ]


def test_inspect_of_an_architecture(tmp_path: Path) -> None:
    """Catches a part of a checkpoint that is not shown."""
    shardsave.save(nn.BatchNorm1d(3), tmp_path, architecture=True)
    (file,) = tmp_path.glob("architecture-*.json")
    shown = lines(run("inspect", tmp_path))
    assert shown[shown.index("beside the weights  file" + " " * 25 + "size") + 1].startswith(
        f"architecture        {file.name}  "
    )
    part = json.loads(run("inspect", tmp_path, "--json").stdout)["parts"]["architecture"]
    assert part == {"file": file.name, "bytes": file.stat().st_size}


def test_inspect_lists_an_architecture_and_tensors(tmp_path: Path) -> None:
    """Catches an option that is ignored beside another one."""
    shardsave.save(torch.nn.Linear(2, 2), tmp_path, architecture=True, durable=False)
    shown = lines(run("inspect", tmp_path, "--architecture", "--tensors", "b*"))
    assert shown[0].startswith("name ") and shown[-2].startswith("tensor ") and shown[-1].startswith("bias ")
    result = run("inspect", tmp_path, "--architecture", "--tensors", "x*")
    assert result.exit_code == 1 and "no name matches 'x*'" in result.stderr


def test_inspect_of_third_party_files(tmp_path: Path) -> None:
    """Catches flags or durability that are shown although they are unknown."""

    save_file({"a.x": torch.ones(3), "y": torch.ones((), dtype=torch.int8)}, tmp_path / "x.safetensors")
    shown = lines(run("inspect", tmp_path / "x.safetensors"))
    assert shown[0] == f"{tmp_path}/x.safetensors: 13 B, 2 tensors in 1 shard, freeze flags unknown"
    assert shown[3:5] == ["(all)         2  13 B  float32, int8", "a             1  12 B  float32"]
    assert lines(run("inspect", tmp_path / "x.safetensors", "--tensors", "*"))[1:] == [
        "a.x     float32       3  12 B        x.safetensors",
        "y       int8     scalar   1 B        x.safetensors",
    ]


def test_inspect_of_many_modules(tmp_path: Path) -> None:
    """Catches output longer than a screen, and a rest that is not counted or cannot be shown."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    shardsave.save(model, tmp_path, max_shard_size=24, durable=False)
    shown = lines(run("inspect", tmp_path))
    assert len(shown) < 70 and "… 16 more       32  384 B  float32  ............  0%" in shown
    assert shown[-1] == "… 16 more shards; --all shows every one"
    everything = lines(run("inspect", tmp_path, "--all"))
    assert not any("more" in line for line in everything) and sum(line.startswith("model-") for line in everything) == 40


def test_tensors(ckpt: Path) -> None:
    """Catches a pattern that matches other names, and a tensor with a property that is not shown."""
    assert lines(run("inspect", ckpt, "--tensors", "*e*d.weight")) == [
        "tensor        dtype    shape    size  kind       shard                             tied",
        "embed.weight  float32  50×16  3.2 kB  trainable  model-00003-of-00004.safetensors",
        "head.weight   float32  50×16  3.2 kB  trainable  model-00003-of-00004.safetensors  = embed.weight",
    ]
    shown = lines(run("inspect", ckpt, "--tensors", "encoder.1.*"))
    assert len(shown) == 6 and sum("buffer" in line for line in shown) == 3 and sum("frozen" in line for line in shown) == 2
    assert error(run("inspect", ckpt, "--tensors", "weight"), 1) == f"shardsave inspect: {ckpt}: no name matches 'weight'"


def test_json(ckpt: Path) -> None:
    """Catches invalid JSON, and JSON that contradicts `shardsave.inspect`."""
    shown, info = json.loads(run("inspect", ckpt, "--json").stdout), shardsave.inspect(ckpt)
    assert shown["path"] == str(ckpt) and shown["bytes"] == info.bytes and shown["durable"] is True
    assert shown["metadata"] == {"step": 7} and list(shown["tensors"]) == list(info.names)
    for name, tensor in shown["tensors"].items():
        wanted = info.tensors[name]
        assert getattr(torch, tensor["dtype"]) == wanted.dtype and tuple(tensor["shape"]) == wanted.shape
        assert (tensor["bytes"], tensor["shard"]) == (wanted.nbytes, wanted.shard)
        assert tensor["parameter"] == (name in info.parameters) and bool(tensor["frozen"]) == (name in info.frozen)
        assert tensor["tied_to"] == info.ties.get(name)
    assert {shard: sums["tensors"] for shard, sums in shown["shards"].items()} == dict(zip(info.shards, (4, 2, 2, 5)))
    matching = json.loads(run("inspect", ckpt, "--json", "--tensors", "narrow.*").stdout)
    assert list(matching["tensors"]) == ["narrow.weight", "narrow.bias"]


@pytest.mark.slow
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    """Catches an inspection that is slow for very many tensors."""
    state = {f"layers.{n // 100}.experts.{n // 2 % 50}.{'ab'[n % 2]}": torch.ones(1) for n in range(100_000)}
    shardsave.save(state, tmp_path, durable=False)
    started = time.process_time()
    shown = lines(run("inspect", tmp_path))
    assert time.process_time() - started < 5  # 1.0 s here; the bound is for a busy machine
    assert len(shown) < 50 and "100,000 tensors" in shown[0]


def test_a_config_of_another_save_is_noted(tmp_path: Path) -> None:
    """Catches a config from another save beside the weights, without a note about it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=4)
    shardsave.save(transformers.GPT2LMHeadModel(config), tmp_path / "ckpt")
    assert run("inspect", tmp_path / "ckpt").stderr == ""
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    result = run("inspect", tmp_path / "ckpt", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["tensors"]
    assert result.stderr.startswith(
        f"shardsave inspect: {tmp_path}/ckpt: config.json is not the one saved with these weights: "
    )
    assert len(result.stderr.splitlines()) == 1
