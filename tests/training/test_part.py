"""`load_model(part=)`: a model from a part of the training state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import shardsave
from support import SmallModel, same_bits, same_state
from training_state import edit_training, training_directory


class Counting(nn.Linear):
    """Has extra state that is plain data."""

    count: Any = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


def test_an_averaged_model(tmp_path: Path) -> None:
    """Catches the weights of the model in the place of the average, its counter, lost ties and dtypes, and flags that change."""
    model = SmallModel()
    ema = AveragedModel(model, use_buffers=True)
    filled(ema.module, 0.25)
    shardsave.save(model, tmp_path, training={"optimizer": torch.optim.SGD(model.parameters()), "ema": ema}, durable=False)
    other = SmallModel(4).requires_grad_(True)
    report = shardsave.load_model(other, tmp_path, part="ema")
    assert same_state(other, ema.module) and other.head.weight is other.embed.weight
    assert report.frozen is None and all(p.requires_grad for p in other.parameters()) and report.verified and report.notes == ()
    compiled = torch.compile(SmallModel(5), backend="eager")
    shardsave.load_model(compiled, tmp_path, part="ema")
    assert same_state(compiled._orig_mod, ema.module)
    head = nn.Linear(16, 50, bias=False).half()
    report = shardsave.load_model(head, tmp_path, part="ema", prefix="head.")
    assert same_bits(head.weight, ema.module.head.weight.half()) and "1 cast from float32 to float16" in report.notes
    with torch.device("meta"):
        on_meta = nn.Linear(16, 50, bias=False)
    shardsave.load_model(on_meta, tmp_path, part="ema", prefix="head.", device="cpu")
    assert same_bits(on_meta.weight, ema.module.head.weight)


def test_other_parts(tmp_path: Path) -> None:
    """Catches places that `skip=` can name and `part=` cannot, a module whose extra state is lost, and weights that are opened too."""
    model = nn.Linear(2, 2)
    training = {
        "teachers": [filled(Counting(2, 2), 1), {7: filled(nn.Linear(2, 2), 2)}],
        "shadow": {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()},
        "own": shardsave.PerRank({"critic": filled(nn.Linear(2, 2), 4)}),
    }
    training["teachers"][0].count = 9  # type: ignore[index, union-attr]
    shardsave.save(model, tmp_path, training=training, durable=False)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    for part, value in (("teachers/1/7", 2), ("shadow", 3), ("own/critic", 4)):
        shardsave.load_model(model, tmp_path, part=part)
        assert all((tensor == value).all() for tensor in model.state_dict().values()), part
    counting = Counting(2, 2)
    shardsave.load_model(counting, tmp_path, part="teachers/0")
    assert counting.count == 9 and (counting.weight == 1).all()


def test_what_is_no_part(tmp_path: Path) -> None:
    """Catches an error that does not say which parts there are, and a module that has changed before it."""
    model = nn.Linear(2, 2)
    training = {
        "optimizer": torch.optim.SGD(model.parameters()),
        "ema": AveragedModel(model),
        "epoch": 3,
        "x": {"y": torch.ones(1)},
    }
    shardsave.save(model, tmp_path / "a", training=training, durable=False)
    shardsave.save(model, tmp_path / "b", training={"values": np.ones(2)}, durable=False)
    shardsave.save(model, tmp_path / "c", durable=False)
    before = copy.deepcopy(model)
    cases = {
        (
            "a",
            "emma",
        ): "at 'emma' of the training state, it has none of that name (the closest is 'ema'); parts that can fill a model: "
        "'ema', 'x'; the module is unchanged",
        ("a", "optimizer"): "it has a SGD; parts that can fill a model: 'ema', 'x'",
        ("a", "epoch"): "it has an int; parts",
        ("a", ""): "it has a dict of 'optimizer', 'ema', 'epoch' and 1 more; parts",
        ("a", "x"): "2 missing from the checkpoint: bias, weight; 1 not in the module: y; the module is unchanged",
        ("b", "values"): "it has an array; no part of it can fill a model; the module is unchanged",
        (
            "c",
            "ema",
        ): "a training state was expected, the checkpoint has none: it was saved without training= and rng=; the module is unch",
    }
    for (folder, part), message in cases.items():
        with pytest.raises(shardsave.IncompatibleCheckpointError) as caught:
            shardsave.load_model(model, tmp_path / folder, part=part)
        assert message in str(caught.value), (part, str(caught.value))
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match="'encoder.' were asked for, part 'ema' has 'weight', 'bias'; the"
    ):
        shardsave.load_model(model, tmp_path / "a", part="ema", prefix="encoder.")
    with pytest.raises(
        TypeError, match="part must be the name of a part of the training state such as 'ema', or None, not int"
    ):
        shardsave.load_model(model, tmp_path / "a", part=3)  # type: ignore[arg-type]
    assert same_state(model, before)


def test_damaged_documents(tmp_path: Path) -> None:
    """Catches a document that is believed where it is wrong."""
    model = nn.Linear(2, 2)
    shardsave.save(model, tmp_path, training={"ema": AveragedModel(model)}, durable=False)
    unknown, no_names = ({"class": "M", "tensors": tensors, "others": {}} for tensors in ({"weight": "none"}, []))
    for module in ({"class": 1}, unknown, [], no_names):
        edit_training(tmp_path, lambda top, module=module: top["shared"]["dict"]["ema"].update(module=module))
        with pytest.raises(
            shardsave.CorruptCheckpointError, match="corrupt training state in .* part 'ema'.*; nothing was changed"
        ):
            shardsave.load_model(model, tmp_path, part="ema")
    for shared in ([], 3, {"dict": 3}, {"list": {}}, {"pairs": [[1]]}, {"per_rank": 3}, {"dict": {"ema": {}}}):
        edit_training(tmp_path, lambda top, shared=shared: top.update(shared=shared))
        with pytest.raises(shardsave.IncompatibleCheckpointError, match="no part of it can fill a model"):
            shardsave.load_model(model, tmp_path, part="ema")
    (training_directory(tmp_path) / "rank-00000-00001.tensors").unlink()
    with pytest.raises(shardsave.CorruptCheckpointError, match=r"rank-00000-00001.tensors"):
        shardsave.load_model(model, tmp_path, part="ema")
