"""Adapters of other tools beside a checkpoint: from_pretrained adds them to whatever weights are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardsave

NAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("verb", ["save a module", "save a mapping", "convert"])
def test_an_adapter_of_another_tool_stays_loudly(verb: str, linked: bool, tmp_path: Path) -> None:
    """Catches an adapter that stays beside new weights of any kind, also behind symbolic links, without a warning."""
    model, folder = torch.nn.Linear(2, 2), tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (tmp_path / name if linked else folder / name).write_bytes(b"{}")
        if linked:
            (folder / name).symlink_to(tmp_path / name)
    with pytest.warns(UserWarning, match="adapter_config.json and adapter_model.safetensors stay in .* from_pretrained adds"):
        if verb == "convert":
            save_file(model.state_dict(), tmp_path / "other.safetensors")
            notes = shardsave.convert(tmp_path / "other.safetensors", folder, durable=False).notes
        else:
            notes = shardsave.save(model if verb == "save a module" else model.state_dict(), folder, durable=False).notes
    assert sum("adapter_config.json" in note for note in notes) == 1 and {*NAMES} <= {*os.listdir(folder)}
    for name in NAMES:
        (folder / name).unlink()
    assert not shardsave.save(model, folder, durable=False).notes
