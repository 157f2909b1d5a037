"""State of torchao's optimizers: tensors that consist of other tensors. Skipped without torchao."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave._training.restore import StoredTraining, plan_restore
from training_state import edit_training, training_directory

pytest.importorskip("torchao", reason="torchao is not installed")
import torchao.optim
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from warm_python import warm_python


def keep(folder: Path, training: Any, model: Any = None) -> None:
    shardsave.save({} if model is None else model, folder, training=training, durable=False)


def restore(folder: Path, training: Any, model: Any = None) -> tuple[str, ...]:
    """Resumes from ``folder``. Returns the notes."""
    return shardsave.resume(folder, model, training=training).notes


@pytest.fixture(autouse=True)
def _eager() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(name: str = "AdamW8bit", seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = getattr(torchao.optim, name)(model.parameters(), **options)
    for _ in range(2):
        model(torch.randn(2, 64)).sum().backward()
        optimizer.step()
    return model, optimizer


def filled(kind: Any, **options: Any) -> torch.Tensor:
    state: torch.Tensor = kind.zeros((64, 64), **options).copy_(torch.randn(64, 64))
    return state


def parts(state: Any) -> dict[str, torch.Tensor]:
    names, _ = state.__tensor_flatten__()
    return {name: getattr(state, name) for name in names}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_state_of_an_optimizer(tmp_path: Path, name: str) -> None:
    """Catches parts that are changed, shared with what was saved, or stored as values of full size."""
    model, optimizer = trained(name)
    keep(tmp_path, {"optimizer": optimizer}, model)
    other_model, other = trained(name, seed=1)
    with open_checkpoint(tmp_path, parts=["training state"]) as checkpoint:
        assert checkpoint.training is not None
        stored = StoredTraining(str(tmp_path), checkpoint.training.shared, {}, checkpoint.training.tensors, 1)
        plan = plan_restore({"optimizer": other}, other_model, stored)
    plan.apply(flags_restored=True)
    for key, part in parts(other.state[other_model.weight]["exp_avg"]).items():
        assert part is dict(plan.fresh)[f"optimizer/weight/exp_avg/{key}"]  # read where it stays
    assert other.state[other_model.weight]["exp_avg"].codes.nbytes == (2048 if name == "AdamW4bit" else 4096)
    assert restore(tmp_path, {"optimizer": other}, other_model) == ()
    for key, saved in optimizer.state[model.weight].items():
        back = other.state[other_model.weight][key]
        assert type(back) is type(saved) and (back.dtype, back.shape) == (saved.dtype, saved.shape)
        if key == "step":
            continue
        assert back.__tensor_flatten__()[1] == saved.__tensor_flatten__()[1] and back.block_size == saved.block_size
        for inner, tensor in parts(saved).items():
            own = parts(back)[inner]
            assert torch.equal(own.view(torch.uint8), tensor.view(torch.uint8)) and own.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: filled(OptimState8bit, dtype=torch.bfloat16),
        lambda: filled(OptimState8bit, signed=False, block_size=64),
        lambda: filled(OptimState4bit, block_size=32),
        lambda: filled(OptimStateFp8),
    ],
)
def test_beside_an_optimizer(tmp_path: Path, make: Any) -> None:
    """Catches such a tensor that is saved but never filled: as a leaf of its own, in a module, and in the state of an object."""

    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"own": self.own}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.own = state["own"]

    def training() -> dict[str, Any]:
        module, holder = nn.Linear(2, 2), Holder()
        module.register_buffer("low", make())
        holder.own = make()
        return {"leaf": make(), "module": module, "holder": holder}

    saved, live = training(), training()
    leaf, low = live["leaf"], live["module"].low
    keep(tmp_path, saved)
    assert restore(tmp_path, live) == () and live["module"].low is low
    for old, new in [(saved["leaf"], leaf), (saved["module"].low, low), (saved["holder"].own, live["holder"].own)]:
        assert type(new) is type(old) and new.dtype == old.dtype and old is not new
        assert all(torch.equal(parts(old)[key].view(torch.uint8), part.view(torch.uint8)) for key, part in parts(new).items())


def test_other_tensors_in_its_place(tmp_path: Path) -> None:
    """Catches a live tensor of another class or form that is filled anyway, or silently not filled."""
    keep(tmp_path, {"t": filled(OptimState8bit)})
    others: list[tuple[torch.Tensor, str]] = [
        (torch.zeros(64, 64), "checkpoint has an OptimState8bit, here is a Tensor"),
        (filled(OptimState4bit), "checkpoint has an OptimState8bit, here is an OptimState4bit"),
        (filled(OptimState8bit, block_size=64), r"'scale' is \[16\] on disk, \[64\] here"),
        (filled(OptimState8bit, signed=False), r"here, .* on disk"),
        (OptimState8bit.zeros((32, 128)), r"'codes' is \[64, 64\] on disk, \[32, 128\] here"),
    ]
    for live, message in others:
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=rf"training\['t'\]: .*{message}.*nothing was changed"):
            restore(tmp_path, {"t": live})
    module = nn.Linear(2, 2)
    module.register_buffer("t", filled(OptimState8bit))
    keep(tmp_path / "module", {"m": module})
    for live in (torch.zeros(64, 64), filled(OptimState4bit)):
        module.t = live
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match=r"training\['m'\]\['t'\]: the checkpoint has an OptimState8bit"
        ):
            restore(tmp_path / "module", {"m": module})
    keep(tmp_path / "plain", {"t": torch.zeros(64, 64)})
    with pytest.raises(shardsave.UnsupportedTensorError, match="it is of the class OptimState8bit"):
        restore(tmp_path / "plain", {"t": filled(OptimState8bit)})


def test_a_strange_tensor_of_a_known_class(tmp_path: Path) -> None:
    """Catches a tensor that could be written but never be read, and a class that only has the name of a known one."""
    strange = OptimState8bit(torch.zeros(4, dtype=torch.uint8), torch.zeros(2), torch.zeros(5), True)
    with pytest.raises(shardsave.UnsupportedTensorError, match="an OptimState8bit with a table of 256 codes was expected"):
        keep(tmp_path / "strange", {"t": strange})
    other = type("OptimState8bit", (OptimState8bit,), {"__module__": OptimState8bit.__module__})
    with pytest.raises(shardsave.UnsupportedTensorError, match="a plain tensor was expected, it is an OptimState8bit"):
        keep(tmp_path / "other", {"t": filled(other)})
    assert not list(tmp_path.iterdir())


def test_hostile_documents(tmp_path: Path) -> None:
    """Catches a class that is imported or called because a document names it, and parts that do not fit but are believed.

    With a table that is too short, or a scale for no element, the next step would read outside of memory or divide by zero.
    """
    model, optimizer = trained()
    extra = {
        "short": torch.zeros(16), "none": torch.zeros(0), "flat": torch.zeros(4096, dtype=torch.uint8), "three": torch.zeros(3),
        "empty": torch.zeros(0, dtype=torch.uint8), "square": torch.zeros(4, 4),
    }  # fmt: skip
    keep(tmp_path, {"optimizer": optimizer, "extra": extra}, model)
    shared = json.loads((training_directory(tmp_path) / "index.json").read_bytes())["shared"]
    codes = {"tensor": "optimizer/weight/exp_avg/codes"}

    def named(name: str) -> dict[str, str]:
        return {"tensor": f"extra/{name}"}

    four = {"class": "torchao.optim.subclass_4bit.OptimState4bit"}
    size = lambda *sizes: {"context": {"list": [True, {"size": list(sizes)}, {"dtype": "float32"}]}}
    flat = {"inner": {"codes": named("flat"), "scale": named("short"), "qmap": named("short")}, "size": [8192], "stride": [1]}
    attacks: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"class": name}, {})
        for name in (
            "os.system",
            "torch.Tensor",
            "torchao.optim.AdamW8bit",
            "OptimState8bit",
            "subclass_8bit.OptimState8bit",
            "",
            3,
        )
    ]
    attacks += [(part, {}) for part in (
        {"inner": {}}, {"inner": []}, {"context": []}, {"context": {"list": []}}, {"context": {"list": [1, {"dtype": "float32"}]}},
        {"context": {"list": [True, {"dtype": "int8"}]}}, {"context": {"list": [True, {"dtype": "bfloat16"}]}},
        {"context": {"list": [True, "float32"]}}, {"context": {"tuple": [True, {"dtype": "float32"}]}}, {"context": None},
        {"size": [64]}, {"size": [[64], 64]}, {"size": 3}, {"stride": [1, 64]}, {"dtype": "bfloat16"}, {"dtype": 3},
        {"dtype": "float32 "}, four, {"class": "torchao.optim.subclass_fp8.OptimStateFp8"},
        *({**four, **flat, **size(*sizes)} for sizes in ([4096], [-2, -4096], [], [0], [8192, 2], [1 << 40])),
    )]  # fmt: skip
    attacks += [({}, part) for part in (
        {"codes": named("short")}, {"codes": named("empty")}, {"scale": named("none")}, {"scale": named("three")}, {"scale": codes},
        {"qmap": named("short")}, {"qmap": named("none")}, {"scale": named("square")}, {"codes": named("flat")},
        {"codes": 3}, {"codes": "x"}, {"codes": {"array": codes["tensor"]}}, {"codes": {"list": [1]}}, {"more": codes},
        {"codes": {"tensor": "none"}}, {"qmap": {"subclass": {}}},
    )]  # fmt: skip
    before = [part.clone() for part in parts(optimizer.state[model.weight]["exp_avg"]).values()]
    for change, inner in attacks:
        altered = copy.deepcopy(shared)
        content = altered["dict"]["optimizer"]["optimizer"]["state"]["weight"]["exp_avg"]["subclass"]
        content.update(copy.deepcopy(change))
        if inner:
            content["inner"].update(inner)
        edit_training(tmp_path, lambda document, altered=altered: document.update(shared=altered))  # type: ignore[misc]
        with pytest.raises(
            (shardsave.CorruptCheckpointError, shardsave.IncompatibleCheckpointError), match="nothing was changed"
        ) as caught:
            restore(tmp_path, {"optimizer": optimizer, "extra": extra}, model)
        assert len(str(caught.value)) < 1000, (change, inner)
    assert all(map(torch.equal, parts(optimizer.state[model.weight]["exp_avg"]).values(), before))
    fitting = copy.deepcopy(shared)
    content = fitting["dict"]["optimizer"]["optimizer"]["state"]["weight"]["exp_avg"]["subclass"]
    content.update({**four, **flat, **size(8192)})
    edit_training(tmp_path, lambda document: document.update(shared=fitting))
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"the checkpoint has a tensor of \[8192\]"):
        restore(
            tmp_path, {"optimizer": optimizer, "extra": extra}, model
        )  # the attacks differ from one that is only of another shape


def test_nothing_is_imported(tmp_path: Path) -> None:
    """Catches a program in which a document has torchao imported."""
    keep(tmp_path, {"holder": [1], "t": filled(OptimState8bit)})
    program = (
        "import sys, torch, shardsave\n"
        "try: shardsave.resume(sys.argv[1], training={'holder': [1], 't': torch.zeros(64, 64)})\n"
        "except shardsave.IncompatibleCheckpointError as error: print(error)\n"
        "print('torchao' in sys.modules)"
    )
    done = warm_python().run(["-c", program, tmp_path])
    assert "here is a Tensor" in done.stdout and done.stdout.endswith("False\n")


def test_save_and_resume(tmp_path: Path) -> None:
    """Catches a checkpoint whose training state is refused by the verbs that users call."""
    model, optimizer = trained("AdamW4bit")
    shardsave.save(model, tmp_path / "c", training={"optimizer": optimizer}, step=2, durable=False)
    other_model, other = trained("AdamW4bit", seed=1)
    shardsave.load_model(other_model, tmp_path / "c")
    assert shardsave.resume(tmp_path / "c", other_model, training={"optimizer": other}).notes == ()
    for mine, its in ((model, optimizer), (other_model, other)):
        its.zero_grad()
        mine(torch.ones(2, 64)).sum().backward()
        its.step()
    saved, back = (o.state[m.weight]["exp_avg"] for m, o in ((model, optimizer), (other_model, other)))
    assert torch.equal(saved.codes, back.codes) and not torch.equal(saved.codes, torch.zeros_like(saved.codes))
