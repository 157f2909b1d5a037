"""transformers models: what is on disk is what `save_pretrained` writes, and each reads what the other wrote."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import shardsave
from architectures import ARCHITECTURES, FUSED, tiny
from conftest import same_bits, same_state

transformers = pytest.importorskip("transformers")
CONFIGS = ("config.json", "generation_config.json")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No words and bars of transformers itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, as another reader sees it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def frozen_in(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_as_save_pretrained_does(tmp_path: Path, name: str) -> None:
    """Catches a name, a layout, a dtype or a config that other readers do not expect; a key that from_pretrained misses or has too
    much; a bit that changes on the way; flags that are no longer by the module's names."""
    model = tiny(name)
    report = shardsave.save(model, tmp_path / "ours", max_shard_size="100KB")
    assert not report.notes
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = on_disk(tmp_path / "ours"), on_disk(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in theirs)
    for config in CONFIGS:
        assert (tmp_path / "ours" / config).exists() == (tmp_path / "theirs" / config).exists()
        if (tmp_path / "theirs" / config).exists():
            assert (tmp_path / "ours" / config).read_bytes() == (tmp_path / "theirs" / config).read_bytes()
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_state(model, again)
    found = shardsave.inspect(tmp_path / "ours")
    assert found.frozen == frozen_in(model) and not found.notes and not shardsave.verify(tmp_path / "ours").notes


def test_a_name_is_its_parts(tmp_path: Path) -> None:
    """Catches a table of mixtures that tests none: their experts must be one tensor in memory and several on disk."""
    for name in FUSED:
        model = tiny(name)
        shardsave.save(model, tmp_path, durable=False)
        assert shardsave.inspect(tmp_path).names != tuple(model.state_dict()), name


def test_wrapped(tmp_path: Path) -> None:
    """Catches a wrapper that hides the model, and its prefix on disk."""
    model = tiny("Mixtral")
    shardsave.save(model, tmp_path / "plain")
    shardsave.save(torch.nn.DataParallel(torch.compile(model)), tmp_path / "wrapped")
    assert on_disk(tmp_path / "wrapped").keys() == on_disk(tmp_path / "plain").keys()
    assert (tmp_path / "wrapped" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


def test_config_of_another_save(tmp_path: Path) -> None:
    """Catches weights and config of two saves, or a config that somebody edited, that no reader is told of."""
    model = tiny("BERT")
    shardsave.save(model, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 100', '"vocab_size": 101'))
    words = "config.json is not the one saved with these weights: [0-9]+ bytes .*; it was edited, or comes from another save"
    assert_noted(tmp_path, words)
    config.unlink()
    assert_noted(tmp_path, r"config.json is not .* expected, there is none; it was edited.*")
    os.mkfifo(config)
    assert_noted(
        tmp_path, r"config.json is not .* expected, it cannot be read \(open: a regular file was expected, it is a FIFO\).*"
    )
    config.unlink()
    shardsave.save(model, tmp_path)
    assert not shardsave.inspect(tmp_path).notes and "not the one" not in str(shardsave.inspect(tmp_path))


def assert_noted(folder: Path, words: str) -> None:
    model = tiny("BERT")
    reports: list[Any] = [shardsave.inspect(folder), shardsave.verify(folder), shardsave.load_model(model, folder)]
    for report in reports:
        (note,) = report.notes
        assert_matches(words, note)
        assert note in str(report)


def assert_matches(words: str, text: str) -> None:
    assert re.fullmatch(words, text), text


def test_other_files_stay(tmp_path: Path) -> None:
    """Catches a save that touches a file which is not its own, follows a link out of the directory, or takes away a config."""
    (tmp_path / "tokenizer.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("theirs")
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").symlink_to(elsewhere)
    model = tiny("BERT")
    shardsave.save(model, folder)
    assert elsewhere.read_text() == "theirs" and not (folder / "config.json").is_symlink()
    shardsave.save(model.state_dict(), folder)
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "config.json"}
    assert shardsave.inspect(folder).companions == () and not shardsave.inspect(folder).notes
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(shardsave.SaveNotCommittedError, match=r"config.json: .*directory; nothing was committed"):
        shardsave.save(model, folder)
    assert shardsave.load(folder)


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    """Catches a save that changes the model's config, as save_pretrained does, or its tensors."""
    model = tiny("Mixtral")
    before = model.config.to_json_string()
    shardsave.save(model.to(torch.bfloat16), tmp_path)
    assert model.config.to_json_string() == before.replace('"float32"', '"bfloat16"') or model.config.to_json_string() == before
    assert not any(hasattr(tensor, "_shardsave_sources") for tensor in model.state_dict(keep_vars=True).values())


def test_never_imported(tmp_path: Path) -> None:
    """Catches an import of transformers for a model that is none of its."""
    program = "import sys, torch, shardsave; m, to = torch.nn.Linear(2, 2), sys.argv[1]; shardsave.save(m, to)"
    check = "; shardsave.load_model(m, to); assert 'transformers' not in sys.modules"
    paths = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", program + check, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": paths})
