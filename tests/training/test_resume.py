"""The verb `resume`: what it restores, in which order, and what is true after each of its errors."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardsave
from shardsave._common import memory_errors
from shardsave._common.free_memory import FreeMemory
from support import same_state
from training_state import INDEX, edit_training, replace, training_directory

STEPS = 4


def make(seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model with dropout and a frozen layer, and its training state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return model, {
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "own": shardsave.PerRank({"generator": np.random.default_rng(seed), "seen": np.zeros(3)}),
        "epoch": 0,
    }


def train(model: nn.Module, training: dict[str, Any], steps: int = STEPS) -> None:
    for _ in range(steps):
        training["optimizer"].zero_grad()
        model(torch.rand(8, 4) + random.random() + np.random.rand()).pow(2).mean().backward()
        training["optimizer"].step()
        training["scheduler"].step()
        training["ema"].update_parameters(model)
        training["own"].value["seen"] += training["own"].value["generator"].random(3)
        training["epoch"] += 1


def everything(model: nn.Module, training: dict[str, Any]) -> str:
    """All state there is, of the process too."""
    own = training["own"].value
    states = [training[name].state_dict() for name in ("optimizer", "scheduler", "ema") if name in training]
    flags = [p.requires_grad for p in model.parameters()]
    process = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state(legacy=False)
    with np.printoptions(threshold=2000):
        return repr((model.state_dict(), flags, states, own["generator"].bit_generator.state, own["seen"], process))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint after some steps."""
    model, training = make()
    train(model, training)
    shardsave.save(model, tmp_path / "step", training=training, rng=True, step=STEPS, durable=False)
    return tmp_path / "step"


def test_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Catches anything of a training that is not restored, or restored before something that changes it."""
    model, training = make()
    train(model, training)
    report = shardsave.save(model, tmp_path, training=training, rng=True, step=STEPS, durable=False)
    train(model, training)
    again, other = make(5)
    resumed = shardsave.resume(tmp_path, again, training=other, rng=True)
    assert (resumed.step, resumed.next_step, resumed.notes) == (STEPS, STEPS + 1, ()) and not again[2].weight.requires_grad
    assert resumed.values["own"]["seen"] is other["own"].value["seen"] and resumed.values["epoch"] == STEPS
    assert (
        resumed.report is not None
        and resumed.report.frozen == 2
        and resumed.report.verified
        and resumed.report.bytes > report.bytes
    )
    other["epoch"] = resumed.values["epoch"]
    train(again, other)
    assert everything(again, other) == everything(model, training)


@pytest.mark.parametrize("everything_in_the_optimizer", [True, False])
@pytest.mark.parametrize("with_training", [True, False])
def test_flags_that_a_resume_changes(folder: Path, everything_in_the_optimizer: bool, with_training: bool) -> None:
    """Catches a parameter that someone has thawed or frozen before the resume, and whose flag changes without a word."""
    model, training = make(3)
    model.requires_grad_(True)[3].requires_grad_(False)
    parameters = [p for p in model.parameters() if everything_in_the_optimizer or p.requires_grad]
    training["optimizer"] = torch.optim.AdamW(parameters, 1e-2)
    asked = {"training": training, "rng": True} if with_training else {}
    resumed = shardsave.resume(folder, model, **asked)
    way_out = "restore_frozen=False keeps the flags of the model"
    assert [note for note in resumed.notes if note.startswith("flags: ")] == [
        f"flags: 2 parameters were trainable and are frozen now, as they were saved: '2.weight', '2.bias'; {way_out}",
        f"flags: 2 parameters were frozen and are trainable now, as they were saved: '3.weight', '3.bias'; {way_out}",
    ]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    resumed = shardsave.resume(folder, model, **asked)
    assert not any(note.startswith("flags: ") for note in resumed.notes)
    model[2].bias.requires_grad_(True)
    resumed = shardsave.resume(folder, model, restore_frozen=False, **asked)
    assert not any(note.startswith("flags: ") for note in resumed.notes) and model[2].bias.requires_grad
    resumed = shardsave.resume(folder, model, **asked)
    assert f"flags: 1 parameter was trainable and is frozen now, as it was saved: '2.bias'; {way_out}" in resumed.notes


def test_many_flags_that_a_resume_changes(tmp_path: Path) -> None:
    """Catches a note with thousands of names."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    shardsave.save(model.requires_grad_(False), tmp_path, durable=False)
    (note,) = shardsave.resume(tmp_path, model.requires_grad_(True)).notes
    assert note.startswith("flags: 100 parameters were trainable and are frozen") and "'4.bias' and 90 more; restore" in note


class Drawing(nn.Linear):
    """Draws a number when it is loaded."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        torch.rand(1), random.random()
        super()._load_from_state_dict(*arguments)


def test_generators_come_last(tmp_path: Path) -> None:
    """Catches generators that are set before a module or an object that draws from them has been restored."""
    model = nn.Sequential(Drawing(2, 2))
    shardsave.save(model, tmp_path, rng=True, durable=False)
    state = random.getstate(), torch.get_rng_state().tolist()
    shardsave.resume(tmp_path, model, rng=True)
    assert state == (random.getstate(), torch.get_rng_state().tolist())


def flip(file: Path, name: str) -> None:
    """Changes the last byte of the tensor ``name`` in ``file``."""
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    header = eval(content[8:begin].decode(), {"null": None})
    content[begin + header[name]["data_offsets"][1] - 1] ^= 1
    replace(file, bytes(content))


def flip_training(name: str) -> Callable[[Path], None]:
    return lambda folder: flip(training_directory(folder) / "rank-00000-00001.tensors", name)


def flip_weight(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = next(f for f in folder.glob("model-*.safetensors") if f'"{name}"'.encode() in f.read_bytes())
        flip(file, name)

    return damage


def without(name: str) -> Callable[[Any, dict[str, Any]], Any]:
    return lambda model, training: training.pop(name)


def save_again(**options: Any) -> Callable[[Path], object]:
    return lambda folder: shardsave.save(make()[0], folder, durable=False, **options)


INCOMPATIBLE, CORRUPT = shardsave.IncompatibleCheckpointError, shardsave.CorruptCheckpointError
Change = Callable[[nn.Module, dict[str, Any]], Any]

#: Name → what happens to the checkpoint, what to the live training, options, the error, its message.
CAUSES: dict[str, tuple[Callable[[Path], Any] | None, Change | None, dict[str, Any], type[Exception], str]] = {
    "no checkpoint": (lambda f: [p.unlink() for p in f.iterdir() if p.is_file()], None, {}, shardsave.CheckpointNotFoundError, "step"),
    "no training state": (save_again(), None, {}, INCOMPATIBLE, "a training state was expected, the checkpoint has none: it was saved"),
    "no generators": (save_again(training=1), None, {"only": ["rng"]}, INCOMPATIBLE, "rng: the checkpoint has no random generators"),
    "a model of other names": (None, lambda m, t: m.append(nn.Linear(2, 2)), {}, INCOMPATIBLE, "missing from the checkpoint: 4."),
    "a model of other shapes": (
        None, lambda m, t: setattr(m[3], "bias", nn.Parameter(torch.ones(3))), {"skip": ["optimizer"]}, INCOMPATIBLE, "1 mismatched: 3.bias"
    ),
    "another optimizer": (
        None, lambda m, t: t.update(optimizer=torch.optim.Adam(m.parameters())), {}, INCOMPATIBLE, "of AdamW, this is Adam; strict"
    ),
    "a leaf that was not saved": (None, lambda m, t: t.update(more=torch.amp.GradScaler("cpu")), {}, INCOMPATIBLE, "nothing for a GradSc"),
    "a leaf that nobody asked for": (None, without("scheduler"), {}, INCOMPATIBLE, "has an ExponentialLR, here is nothing; strict=False"),
    "other ranks": (
        lambda f: edit_training(f, lambda top: top.update(ranks=2)), None, {"on_world_change": "raise"}, INCOMPATIBLE,
        "1 ranks were expected, 2 saved it; nothing was changed",
    ),
    "a part that is none": (None, None, {"skip": ["optimiser"]}, ValueError, "skip must name parts .* 'optimiser' is none"),
    "a part as text": (None, None, {"only": "rng"}, TypeError, r"only must be a collection of names such as \['optimizer'\], not 'rng'"),
    "a wrong choice": (None, None, {"on_world_change": "ignore"}, ValueError, "on_world_change must be 'fresh' or 'raise', not 'ignore'"),
    "a wrong group": (None, None, {"process_group": 1}, TypeError, "process_group must be a group of torch.distributed or None, not int"),
    "a tensor that cannot be filled": (
        lambda f: None, lambda m, t: t["own"].value.update(seen=np.broadcast_to(np.float64(0), 3)), {},
        shardsave.UnsupportedTensorError, "an array that can be written",
    ),
    "a flipped byte in an optimizer": (flip_training("optimizer/0.weight/exp_avg"), None, {}, CORRUPT, "'optimizer/0.weight/exp_avg' has"),
    "a flipped byte in a generator": (flip_training("rank 0/rng/torch"), None, {}, CORRUPT, "tensor 'rank 0/rng/torch' has checksum"),
    "a document that was cut": (
        lambda f: replace(training_directory(f) / "rank-00000.json", b"{}"), None, {}, CORRUPT, "the index says .*, the file has 2"
    ),
    "a document that is none": (
        lambda f: edit_training(f, lambda document: document.update(rank=7), "rank-00000.json"), None, {}, CORRUPT,
        "rank 0 expected, it is 7",
    ),
    "an index that was cut": (lambda f: replace(f / INDEX, b"{"), None, {}, CORRUPT, "corrupt index"),
    "a shard that was cut": (
        lambda f: [replace(s, s.read_bytes()[:-1]) for s in f.glob("model-*")], None, {}, CORRUPT, "corrupt shard model-"
    ),
    "a directory that may not be read": (lambda f: (f / INDEX).unlink() or (f / INDEX).mkdir(), None, {}, CORRUPT, "a regular file was"),
    "tensors that are gone": (
        lambda f: (training_directory(f) / "rank-00000-00001.tensors").unlink(), None, {}, CORRUPT, "there is no such file"
    ),
    "a generator of another kind": (
        None, lambda m, t: t["own"].value.update(generator=np.random.Generator(np.random.MT19937(1))), {}, CORRUPT,
        r"training\['own'\]\['generator'\]: the state of a generator was expected, .*; nothing was changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_a_resume_that_fails_changes_nothing(folder: Path, name: str) -> None:
    """Catches a model, an optimizer, a flag or a generator that has changed although the resume was refused."""
    damage, change, options, error, message = CAUSES[name]
    if damage is not None:
        damage(folder)
    model, training = make(3)
    model[0].requires_grad_(False)
    train(model, training, 1)
    if change is not None:
        change(model, training)
    before, versions = everything(model, training), [p._version for p in model.parameters()]
    with pytest.raises(error, match=message) as caught:
        shardsave.resume(folder, model, training=training, **{"rng": True, **options})
    assert everything(model, training) == before and [p._version for p in model.parameters()] == versions
    if issubclass(error, shardsave.ShardSaveError):
        assert str(caught.value).endswith(("; nothing was changed", "; the module is unchanged"))


def test_damage_where_memory_is_filled(folder: Path) -> None:
    """Catches an error that does not say what has changed, or a wrong number of tensors, and objects that get a state all the same."""
    model, training = make(3)
    before = everything(model, training)
    flip_training("ema/module.3.weight")(folder)
    with pytest.raises(
        CORRUPT,
        match=r"tensor 'ema/module.3.weight' has .*; the model is loaded, tensors in place in the training state are partly restored, "
        "no object has received its state$",
    ):
        shardsave.resume(folder, model, training=training, rng=True)
    assert not training["optimizer"].state and repr(random.getstate()) in before
    flip_weight("0.weight")(folder)
    with pytest.raises(CORRUPT, match=r"the module is partly loaded, 5 of 6 tensors; the training state is unchanged$"):
        shardsave.resume(folder, model, training=training, rng=True, skip=["ema"])
    assert not training["optimizer"].state and repr(random.getstate()) in before
    with pytest.raises(CORRUPT, match="the module is partly loaded, 5 of 6 tensors$"):
        shardsave.resume(folder, model)


class Refusing:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise KeyError("colour")


def test_an_object_that_refuses(tmp_path: Path) -> None:
    """Catches an error after which nobody knows that the model has been loaded."""
    model = nn.Linear(2, 2)
    shardsave.save(model, tmp_path, training=[Refusing()], durable=False)
    with pytest.raises(INCOMPATIBLE, match=r"KeyError: 'colour'; the training state is partly restored; the model is loaded$"):
        shardsave.resume(tmp_path, model, training=[Refusing()])
    with pytest.raises(INCOMPATIBLE, match=r"KeyError: 'colour'; the training state is partly restored$"):
        shardsave.resume(tmp_path, training=[Refusing()])


class Critic(nn.Module):
    """Shares the first layer of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.head = model[0], nn.Linear(6, 1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared when saved", "not shared when saved"])
def test_memory_of_the_model_in_the_training_state(tmp_path: Path, shared: bool) -> None:
    """Catches a module of the training state whose values land in the model, and one that rightly shares layers but is refused."""
    model, _ = make()
    shardsave.save(model, tmp_path, training={"critic": Critic(model if shared else make(1)[0])}, durable=False)
    again, _ = make(5)
    before = copy.deepcopy(again)
    if shared:
        shardsave.resume(tmp_path, again, training={"critic": Critic(again)})
        assert same_state(again, model)
        return
    with pytest.raises(
        shardsave.UnsupportedTensorError,
        match=r"cannot fill 'critic/encoder.\w+' of the training state: memory of its own was expected, it shares some with '0.\w+' of the "
        "model, and their values on disk differ; nothing was changed",
    ):
        shardsave.resume(tmp_path, again, training={"critic": Critic(again)})
    assert same_state(again, before)


def test_only_what_is_asked_for(folder: Path) -> None:
    """Catches what is restored without being asked for, and what is not restored and not named."""
    model, training = make(3)
    fresh = copy.deepcopy(training["ema"])
    random.seed(9)
    before = random.getstate()
    resumed = shardsave.resume(folder, model)
    assert resumed.notes == ("training: it was saved, and was not asked for",) and random.getstate() == before
    assert resumed.values is None and resumed.step == STEPS and not training["optimizer"].state
    other, _ = make(4)
    resumed = shardsave.resume(folder, rng=True)
    assert resumed.notes == ("training: it was saved, and was not asked for",) and random.getstate() != before
    assert "nothing was loaded" not in str(resumed) and str(resumed).startswith(f"resumed after step {STEPS}; training: it")
    resumed = shardsave.resume(folder, model, training=training, only=["optimizer"])
    skipped = [f"training{place}: skipped" for place in ("['ema']", "['own']['generator']", "['own']['seen']", "['scheduler']")]
    assert sorted(resumed.notes) == ["rng: the generators were saved, and were not asked for", *skipped]
    assert training["optimizer"].state and same_state(training["ema"], fresh)
    resumed = shardsave.resume(folder, model, training=training, skip=["optimizer", "rng"], rng=True)
    assert resumed.notes == ("training['optimizer']: skipped", "rng: skipped") and not same_state(training["ema"], fresh)
    with pytest.raises(INCOMPATIBLE, match="pass the model too, which names the parameters"):
        shardsave.resume(folder, training=training)
    with pytest.raises(ValueError, match="only and skip name parts of a training state, pass training= or rng=True too"):
        shardsave.resume(folder, model, skip=["optimizer"])
    assert shardsave.resume(folder).step == STEPS and not same_state(other, model)


def test_what_fits(folder: Path) -> None:
    """Catches `strict=False` that leaves out more than what differs, in the model and in the training state."""
    model, training = make(3)
    model.append(nn.Linear(2, 2))
    training["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
    resumed = shardsave.resume(folder, model, training=training, rng=True, strict=False)
    assert (
        resumed.notes[0]
        == "training['optimizer']: the checkpoint has the state of AdamW, this is SGD; it keeps the state that it has"
        and len(resumed.notes) == 1
    )
    assert resumed.report is not None and resumed.report.missing == ("4.bias", "4.weight")
    assert training["own"].value["seen"].all() and resumed.values["epoch"] == STEPS


def test_another_number_of_ranks(folder: Path) -> None:
    """Catches the state of one rank in another, and leaves that are not filled without a word."""
    edit_training(folder, lambda top: top.update(ranks=2))
    model, training = make(3)
    state, own = random.getstate(), str(training["own"])
    resumed = shardsave.resume(folder, model, training=training, rng=True)
    assert random.getstate() == state and str(training["own"]) == own and training["optimizer"].state
    assert resumed.notes == (
        "training['own']: it belongs to a rank and is not filled, since the number of ranks is another one",
        "rng: not set, since 2 ranks saved it",
    )


def test_the_order_of_calls(folder: Path) -> None:
    """Catches an optimizer that cannot be made before the resume: from flags alone, on the meta device, with a device to move to."""
    with torch.device("meta"):
        model = make()[0]
    assert shardsave.restore_flags(model.requires_grad_(True), folder).frozen == 2
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    resumed = shardsave.resume(folder, model, training={"optimizer": optimizer}, only=["optimizer"], device="cpu")
    assert resumed.notes[:1] == ("rng: the generators were saved, and were not asked for",)
    assert len(optimizer.state) == 4 and same_state(model, shardsave_model(folder))


def shardsave_model(folder: Path) -> nn.Module:
    model, _ = make(8)
    shardsave.load_model(model, folder)
    return model


def test_a_model_alone_reads_no_training_state(folder: Path) -> None:
    """Catches a load of the model that opens files of the training state."""
    for file in training_directory(folder).iterdir():
        file.unlink()
    training_directory(folder).rmdir()
    model = shardsave_model(folder)
    assert shardsave.restore_flags(model, folder).frozen == 2 and len(shardsave.load(folder)) == 6
    assert shardsave.resume(folder, model).step == STEPS
    with pytest.raises(CORRUPT, match="training-"):
        shardsave.resume(folder, model, rng=True)


def test_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the state of an optimizer that does not fit, but is not counted, and a process that is killed in the middle of a resume."""
    monkeypatch.setattr(memory_errors, "_SMALL", 0)
    model, training = make(3)
    monkeypatch.setattr(memory_errors, "free_memory", lambda: FreeMemory(100, 100, "the machine"))
    before = everything(model, training)
    with pytest.raises(shardsave.OutOfMemoryError, match="the machine has 100 B free; .*; nothing was changed"):
        shardsave.resume(folder, model, training=training, rng=True)
    assert everything(model, training) == before
    monkeypatch.setattr(memory_errors, "free_memory", lambda: FreeMemory(100, 10**9, "the machine"))
    resumed = shardsave.resume(folder, model, training=training, rng=True)
    assert len(resumed.notes) == 1 and resumed.notes[0].endswith("a part may be swapped")


def test_progress_and_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a bar that ends before all is read, and a resume that leaves no record, or one without notes."""
    seen: list[tuple[int, int]] = []
    model, training = make(3)
    with caplog.at_level(logging.INFO, "shardsave"):
        resumed = shardsave.resume(folder, model, training=training, progress=lambda done, total: seen.append((done, total)))
    assert resumed.report is not None and seen[-1] == (resumed.report.bytes, resumed.report.bytes)
    [record] = caplog.records
    facts = record.shardsave  # type: ignore[attr-defined]
    assert (
        facts["event"] == "resume"
        and facts["path"] == str(folder)
        and facts["step"] == STEPS
        and facts["notes"] == (*resumed.report.notes, *resumed.notes)
    )
    assert record.levelno == logging.INFO and record.pathname == __file__ and "values" not in facts


def test_size_in_reports(tmp_path: Path) -> None:
    """Catches a report, a plan or `inspect` with another size of the training state than its files have."""
    model, training = make()
    train(model, training)
    arguments: dict[str, Any] = {"training": training, "rng": True, "step": 1, "max_shard_size": 300}
    plan = shardsave.plan_save(model, tmp_path, **arguments)
    report = shardsave.save(model, tmp_path, **arguments, durable=False)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in training_directory(tmp_path).iterdir())
    assert report.training_bytes == plan.training_bytes == size and f" and {size / 1000:.1f} kB of training state, " in str(
        report
    )
    assert report.bytes_written > report.bytes and report.bytes_per_second == report.bytes_written / report.seconds
    assert f"  training state: {size / 1000:.1f} kB\n" in str(plan)
    assert sorted(plan_file.bytes for plan_file in plan.files)[1:] == sorted(file.stat().st_size for file in files)[1:]
    assert len(plan.files) == len(files) and report.bytes == plan.bytes < report.training_bytes
    assert shardsave.inspect(tmp_path).part_bytes["training state"] == size
    assert shardsave.save(model, tmp_path, durable=False).training_bytes == 0


def test_refused_arguments(folder: Path) -> None:
    """Catches an argument in another's place that is taken."""
    with pytest.raises(TypeError, match="model must be an nn.Module or None, not a dict"):
        shardsave.resume(folder, {"a": torch.ones(1)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rng must be True or False, not 1"):
        shardsave.resume(folder, rng=1)  # type: ignore[arg-type]
    with torch.device("meta"):
        model, training = make()
    with pytest.raises(
        shardsave.UnsupportedTensorError, match="make the optimizer after the model has memory; nothing was changed"
    ):
        shardsave.resume(folder, model, training={"optimizer": training["optimizer"]}, only=["optimizer"])


def test_a_group_of_one_process(folder: Path) -> None:
    """Catches a group that is refused although it has the one process that this version can serve."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        model, training = make(3)
        assert shardsave.resume(folder, model, training=training, rng=True, process_group=group).step == STEPS
        shardsave.save(model, folder, training=training, rng=True, process_group=group, durable=False)
    finally:
        torch.distributed.destroy_process_group()


def test_the_words_for_a_result(tmp_path: Path) -> None:
    """Catches a `repr` of what was resumed that prints every object of the training state, a whole model too."""
    model = torch.nn.Linear(1, 1)
    shardsave.save(model, tmp_path, training={"ema": torch.nn.Linear(7, 1)}, step=3, durable=False)
    resumed = shardsave.resume(tmp_path, model, training={"ema": torch.nn.Linear(7, 1)})
    assert repr(resumed).startswith("Resumed(step=3, notes=()") and "Linear" not in repr(resumed)
