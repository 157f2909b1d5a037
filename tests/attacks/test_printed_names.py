"""Method: text that would command a terminal is put into every place that a file, a path or a model has for a name. Then every verb is
called. Whatever it prints (errors with their causes, reports, warnings, standard output) must have that text as escapes only.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from tampering import INDEX, LONE, entry, foreign, rewrite, saved, shard_bytes
from test_hostile_architectures import edit_architecture
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

import shardsave
from shardsave import errors
from shardsave._common.shutdown import verb
from transformers_models import tiny

#: Escape, bell, right-to-left override, zero width space, line separator, the one-byte form of "escape [", and a forged second line.
FORMATS = "\u202e\u200b\u2028\x9b31m"
HOSTILE = f"x\x1b[31m\x07{FORMATS}\nFORGED\r"
#: The same without control characters of ASCII, which the name of a shard must not have.
HOSTILE_FILE = f"x{FORMATS}.safetensors"
#: What print must have instead.
ESCAPED = r"\u202e\u200b\u2028\x9b31m"
HONEST = "模型.couche_é.слой.層.👍.naïve"


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.add_module(name, nn.Linear(2, 2))
        self.inner.register_buffer(name + "b", torch.ones(3))


def assert_plain(text: str) -> None:
    """Asserts that each line of ``text`` can be shown as it is, and that no line began within a name."""
    for line in text.split("\n"):
        assert line.isprintable(), ascii(line)
        assert not line.lstrip().startswith("FORGED"), ascii(text)


class Printed(list[str]):
    """What the calls within `printing` have printed; each text was checked."""

    def add(self, text: str) -> None:
        assert_plain(text)
        self.append(text)

    def add_result(self, result: object) -> None:
        for said in (str, repr):
            if type(result).__module__.startswith("shardsave."):
                self.add(said(result))
        for field in ("notes", "damaged"):
            for sentence in getattr(result, field, ()):
                self.add(getattr(sentence, "message", sentence))

    def call(self, action: Callable[[], Any]) -> None:
        """Calls ``action``, which may succeed, or fail with one of our errors."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.add_result(action())
            except (shardsave.ShardSaveError, TypeError, ValueError) as error:
                assert "\n" not in str(error)
                self.add(str(error))
                self.add("".join(traceback.format_exception(error)))
        for warning in caught:
            assert "\n" not in str(warning.message)
            self.add(str(warning.message))


@contextmanager
def printing(capfd: pytest.CaptureFixture[str]) -> Iterator[Printed]:
    printed = Printed()
    yield printed
    assert_plain("".join(capfd.readouterr()))
    assert any(ESCAPED in text for text in printed), printed


def read_lazily(path: Path, printed: Printed) -> object:
    """Everything that an open checkpoint prints."""
    with shardsave.open(path) as checkpoint:
        printed.add_result(checkpoint)
        for name in checkpoint:
            printed.add_result(checkpoint.slice(name))
        printed.call(lambda: checkpoint[HOSTILE + "?"])
    return checkpoint[next(iter(checkpoint))]


def calls_of_all_verbs(path: Path, scratch: Path, printed: Printed) -> list[Callable[[], Any]]:
    """Calls of every verb that reads ``path``."""
    good = scratch / "good"
    shardsave.save({"other": torch.ones(1), "z": torch.ones(2)}, good, metadata={"run": 1}, durable=False)

    return [
        lambda: shardsave.inspect(path),
        lambda: shardsave.verify(path),
        lambda: shardsave.verify(path, keep_going=True),
        lambda: shardsave.load(path),
        lambda: shardsave.load(path, names=[HOSTILE + "?"]),
        lambda: shardsave.load(path, prefix="nowhere."),
        lambda: shardsave.load_model(nn.Linear(2, 2), path),
        lambda: shardsave.load_model(nn.Linear(2, 2), path, strict=False),
        lambda: shardsave.load_model(Net("a"), path),
        lambda: read_lazily(path, printed),
        lambda: shardsave.diff(path, good),
        lambda: shardsave.diff(good, path),
        lambda: shardsave.build_model(path),
        lambda: shardsave.build_model(path, trust=["zoo", "transformers"]),
        lambda: shardsave.load_program(path),
        lambda: shardsave.convert(path, scratch / "converted"),
        lambda: shardsave.convert(path, scratch / "converted", drop="x*", rename=[("^x", HOSTILE)]),
        lambda: shardsave.convert(path, scratch / "converted", key=HOSTILE),
        lambda: shardsave.convert(path, path),
        lambda: shardsave.convert(path, scratch / f"{HOSTILE}.pt"),
        lambda: shardsave.convert(path, scratch / f"{HOSTILE}.pt", to="torch"),
        lambda: shardsave.clean(path),
        lambda: shardsave.save(Net(HOSTILE), path, durable=False),
    ]


# --- the places: each writes files into a directory, and returns the path to read


def tensor_names(folder: Path) -> Path:
    shardsave.save({HOSTILE: torch.ones(2), f"{HOSTILE}.y": torch.ones(3)}, folder, durable=False)
    return folder


def parameter_names(folder: Path) -> Path:
    shardsave.save(Net(HOSTILE), folder, metadata={HOSTILE: HOSTILE}, durable=False)
    return folder


def damaged_tensor(folder: Path) -> Path:
    tensor_names(folder)
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    rewrite(shard, bytes(content))
    return folder


def header_of_a_file(folder: Path) -> Path:
    metadata = json.dumps({HOSTILE: HOSTILE})
    header = f'{{"__metadata__": {metadata}, {json.dumps(HOSTILE)}: {entry()}}}'
    (folder / LONE).write_bytes(shard_bytes(header, b"\0" * 4))
    return folder / LONE


def unknown_dtype(folder: Path) -> Path:
    (folder / LONE).write_bytes(shard_bytes(f"{{{json.dumps(HOSTILE)}: {entry(HOSTILE)}}}", b"\0" * 4))
    return folder


def repeated_name(folder: Path) -> Path:
    name = json.dumps(HOSTILE)
    (folder / LONE).write_bytes(shard_bytes(f"{{{name}: {entry()}, {name}: {entry()}}}", b"\0" * 4))
    return folder


def missing_shard(folder: Path) -> Path:
    foreign(folder, {HOSTILE: "a.safetensors", "y": HOSTILE_FILE})
    return folder


def damaged_shard(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", "y": HOSTILE_FILE})
    (folder / HOSTILE_FILE).write_bytes(b"short")
    return folder


def shard_that_is_a_directory(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", "y": HOSTILE_FILE})
    (folder / HOSTILE_FILE).mkdir()
    return folder


def shard_name_that_is_none(folder: Path) -> Path:
    foreign(folder, {"x": f"../{HOSTILE}", "y": "b.safetensors"})
    return folder


def name_that_the_shard_lacks(folder: Path) -> Path:
    foreign(folder, {"x": "a.safetensors", HOSTILE: "b.safetensors"})
    return folder


def index_without_json(folder: Path) -> Path:
    (folder / INDEX).write_text(f'{{"weight_map": {HOSTILE}')
    return folder


def architecture_attribute(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["objects"][0].update({HOSTILE: HOSTILE}))
    return folder


def architecture_device(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    hostile = {"x": {"device": HOSTILE}}
    edit_architecture(folder, lambda document: document["objects"][0].setdefault("attributes", {}).update(hostile))
    return folder


def architecture_import(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["imports"].update({f"zoo:{HOSTILE}": HOSTILE}))
    return folder


def architecture_version(folder: Path) -> Path:
    shardsave.save(nn.Sequential(nn.Linear(2, 2)), folder, architecture=True, durable=False)
    edit_architecture(folder, lambda document: document["imports"].update({"zoo:Gone": HOSTILE}))
    return folder


def program_of(folder: Path) -> Path:
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(2, 2))
    shardsave.save(model, folder, program=((torch.ones(1, 2),), {}), durable=False)
    return folder


def torch_names(folder: Path) -> Path:
    torch.save({HOSTILE: torch.ones(2), "x": 3, f"{HOSTILE}2": HOSTILE}, folder / f"{FORMATS}.pt")
    return folder / f"{FORMATS}.pt"


def torch_states(folder: Path) -> Path:
    torch.save({HOSTILE: {"w": torch.ones(2)}, "other": {HOSTILE: torch.ones(2)}}, folder / f"{FORMATS}.pt")
    return folder / f"{FORMATS}.pt"


class Named:
    """Pickles as a call of a function with a hostile name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return hostile_function, (1,)


def hostile_function(_: object) -> None:
    pass


def torch_pickle(folder: Path) -> Path:
    torch.save({"w": torch.ones(2), "z": Named()}, folder / f"{FORMATS}.pt", pickle_module=HostilePickle)
    return folder / f"{FORMATS}.pt"


def torch_global(folder: Path) -> Path:
    """A pickle that asks for a name which begins with an escape; torch's own message has it as it is."""
    path = folder / f"{FORMATS}.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c\x1b[31m" + FORMATS.encode() + b"\nsystem\n.")
        archive.writestr("x/version", "3\n")
    return path


def torch_archive(folder: Path) -> Path:
    (folder / f"{FORMATS}.pt").write_bytes(b"PK\x03\x04" + HOSTILE.encode())
    return folder / f"{FORMATS}.pt"


def torch_old_format(folder: Path) -> Path:
    torch.save({HOSTILE: torch.ones(2)}, folder / f"{FORMATS}.pt", _use_new_zipfile_serialization=False)
    return folder / f"{FORMATS}.pt"


def torch_shards(folder: Path) -> Path:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {HOSTILE: "x.bin"}}))
    torch.save({"y": torch.ones(1)}, folder / "x.bin")
    return folder


def torch_shard_that_is_missing(folder: Path) -> Path:
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"w": f"{HOSTILE_FILE}.bin"}})
    )
    return folder


def hint_of_other_files(folder: Path) -> Path:
    (folder / f"{HOSTILE}.bin").write_bytes(b"")
    return folder


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save({HOSTILE: {HOSTILE: torch.ones(2)}, "s": 1}, checkpoint_id=folder)
    return folder


def distributed_twice(folder: Path) -> Path:
    def change(table: Metadata) -> None:
        table.state_dict_metadata[HOSTILE] = next(
            kind for kind in table.state_dict_metadata.values() if isinstance(kind, TensorStorageMetadata)
        )
        table.state_dict_metadata["s"] = BytesStorageMetadata()

    return edit_table(distributed(folder), change)


def distributed_file(folder: Path) -> Path:
    def change(table: Metadata) -> None:
        for place in table.storage_data.values():
            place.relative_path = HOSTILE_FILE

    return edit_table(distributed(folder), change)


def edit_table(folder: Path, change: Callable[[Metadata], None]) -> Path:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


def distributed_pickle(folder: Path) -> Path:
    module = f"x\x1b[31m{FORMATS}".encode()
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c\x06system\x93.")
    return folder


def config_architecture(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": [HOSTILE], HOSTILE: HOSTILE}))
    return folder


def config_type(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": HOSTILE}))
    return folder


def config_value(folder: Path) -> Path:
    saved(folder)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": HOSTILE, "hidden_size": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_activation(folder: Path) -> Path:
    saved(folder)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": HOSTILE, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of_generation(folder: Path) -> Path:
    shardsave.save(tiny("GPT-2"), folder, durable=False)
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": HOSTILE}))
    return folder


def config_without_json(folder: Path) -> Path:
    saved(folder)
    (folder / "config.json").write_text(f'{{"architectures": {HOSTILE}')
    return folder


def path_of_a_checkpoint(folder: Path) -> Path:
    saved(folder / HOSTILE)
    return folder / HOSTILE


def path_of_bytes(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder / HOSTILE) + b"\xff"))
    saved(path)
    return path


def path_without_a_checkpoint(folder: Path) -> Path:
    return folder / HOSTILE / "nothing"


PLACES = {
    place.__name__: place
    for place in (
        tensor_names, parameter_names, damaged_tensor, header_of_a_file, unknown_dtype, repeated_name, missing_shard,
        damaged_shard, shard_that_is_a_directory, shard_name_that_is_none, name_that_the_shard_lacks, index_without_json,
        architecture_attribute, architecture_device, architecture_import, architecture_version, torch_names, torch_states,
        torch_pickle, torch_global,
        torch_archive, torch_old_format, torch_shards, torch_shard_that_is_missing, hint_of_other_files, distributed,
        distributed_twice, distributed_file, distributed_pickle, config_architecture, config_type, config_value, config_activation,
        config_of_generation, config_without_json, path_of_a_checkpoint, path_of_bytes, path_without_a_checkpoint,
    )
}  # fmt: skip


class HostilePickle:
    """The module pickle, but `Named` pickles as a global whose module has a hostile name."""

    class Pickler(pickle._Pickler):
        def save_global(self, value: object, name: str | None = None) -> None:
            if value is not hostile_function:
                super().save_global(value, name)  # type: ignore[misc]
                return
            self.write(b"c" + f"x\x1b[31m{FORMATS}".encode() + b"\nsystem\n")  # type: ignore[attr-defined]

        dispatch = pickle._Pickler.dispatch | {type(hostile_function): save_global}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_names_from_files(place: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a name from a file, or a path, that a verb prints as it is; and a verb that ends with an error that is not ours."""
    (tmp_path / "place").mkdir()
    with printing(capfd) as printed:
        path = place(tmp_path / "place")
        for call in calls_of_all_verbs(path, tmp_path, printed):
            printed.call(call)


def hooked() -> nn.Module:
    model = nn.Module()
    model.add_module(HOSTILE, nn.Linear(2, 2))
    model.get_submodule(HOSTILE).register_forward_hook(lambda *_: None)
    return model


def unsavable() -> nn.Module:
    model = nn.Module()
    model.add_module(HOSTILE, nn.Linear(2, 2))
    model.get_submodule(HOSTILE).activation = lambda x: x
    return model


SOURCES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "a tensor that cannot be saved": lambda: ({HOSTILE: torch.ones(2).to_sparse()}, {}),
    "a value that is no tensor": lambda: ({HOSTILE: [1]}, {}),
    "a hook": lambda: (hooked(), {"architecture": True}),
    "an architecture that cannot be saved": lambda: (unsavable(), {"architecture": True}),
    "overlapping tensors": lambda: ({HOSTILE: (base := torch.ones(4))[:3], f"{HOSTILE}2": base[1:]}, {}),
    "metadata": lambda: ({"x": torch.ones(1)}, {"metadata": {HOSTILE: {1: 2}}}),
    "metadata of another kind": lambda: ({"x": torch.ones(1)}, {"metadata": {HOSTILE: object()}}),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_names_in_a_model(source: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a name in a model, which a hostile file may have given to it, that a save prints as it is."""
    model, options = source()
    with printing(capfd) as printed:
        printed.call(lambda: shardsave.save(model, tmp_path / HOSTILE, durable=False, **options))


def test_adapters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches the name of an adapter that is printed as it is."""
    from shardsave._huggingface.peft_names import active_adapter

    with printing(capfd) as printed:
        printed.call(lambda: active_adapter(SimpleNamespace(active_adapters=[HOSTILE, "b"])))


def test_programs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a program whose names of modules and arguments are printed as they are."""

    class Model(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            result: torch.Tensor = x[HOSTILE] + self.get_parameter("p" + HOSTILE)
            return result

    model = Model()
    model.register_parameter("p" + HOSTILE, nn.Parameter(torch.ones(2)))
    shardsave.save(model, tmp_path, program=(({HOSTILE: torch.ones(2)},), {}), durable=False)
    program = shardsave.load_program(tmp_path)
    with printing(capfd) as printed:
        printed.call(lambda: program)
        printed.call(lambda: program({"y": 1}))
        printed.call(lambda: program({HOSTILE: 1}))
        printed.call(lambda: program(torch.ones(1)))
        printed.call(lambda: program({HOSTILE: torch.ones(2)}, **{HOSTILE: 1}))


REPORTS = [
    value
    for name in shardsave.__all__
    if dataclasses.is_dataclass(value := getattr(shardsave, name)) and value is not shardsave.Phases
]


def hostile_field(name: str, annotation: str) -> Any:
    """A value for the field of a report."""
    if annotation.startswith("str"):
        return HOSTILE
    if "tuple[tuple[str" in annotation:
        return ((HOSTILE, HOSTILE),)
    if "tuple[Damage" in annotation:
        return (shardsave.Damage(HOSTILE, (HOSTILE,), HOSTILE),)
    if "tuple[Leaving" in annotation:
        return (shardsave.Leaving(HOSTILE, (HOSTILE,), 1, False),)
    if "tuple[PlannedFile" in annotation:
        return (shardsave.PlannedFile(HOSTILE, 1),)
    if annotation.startswith("tuple[str"):
        return (HOSTILE,)
    if annotation.startswith("TrainingDiff"):
        return shardsave.TrainingDiff((HOSTILE,), {HOSTILE: None}, (HOSTILE,), (HOSTILE,), (HOSTILE,))  # type: ignore[dict-item]
    if annotation in ("Mapping[str, float]", "Mapping[str, int]"):
        return {HOSTILE: 1}
    if "Mapping[str" in annotation:
        value = shardsave.TensorInfo(torch.float32, (1,), 4, HOSTILE) if "TensorInfo" in annotation else HOSTILE
        return {HOSTILE: value}
    if "frozenset" in annotation:
        return frozenset([HOSTILE])
    return 1 if annotation in ("int", "float", "bool") else None


@pytest.mark.parametrize("report", REPORTS)
def test_reports(report: Any) -> None:
    """Catches a field of a report, of those that exist now or later, that ``str`` or ``repr`` prints as it is; and fields that do not
    hold the value as it is in the file."""
    values = {
        name: hostile_field(name, str(parameter.annotation)) for name, parameter in inspect.signature(report).parameters.items()
    }
    printed = report(**values)
    assert_plain(str(printed))
    assert_plain(repr(printed))
    for name, value in values.items():
        if name not in ("notes", "message"):
            assert getattr(printed, name) == value
    for note in getattr(printed, "notes", ()):
        assert_plain(note)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors(name: str) -> None:
    """Catches an error class, of those that exist now or later, that prints its message as it is, or changes when it is pickled."""
    error = getattr(errors, name)(f"cannot load {HOSTILE}: {HONEST}")
    assert str(error) == str(pickle.loads(pickle.dumps(error)))
    assert str(error).isprintable() and HONEST in str(error) and ESCAPED in str(error)
    assert_plain(repr(error))


def test_honest_names_stay_readable(tmp_path: Path) -> None:
    """Catches an escape of letters of other scripts, accents or emoji."""
    with pytest.raises(shardsave.CheckpointNotFoundError) as raised:
        shardsave.load(tmp_path / HONEST)
    assert HONEST in str(raised.value)
    report = shardsave.save({HONEST: torch.ones(1)}, tmp_path / HONEST, durable=False)
    assert HONEST in str(report) and shardsave.inspect(tmp_path / HONEST).names == (HONEST,)


def test_causes() -> None:
    """Catches the text of another library's error, or a note, that is printed as the cause of ours; a traceback that is lost with it;
    and an error of the caller that is changed."""

    @verb()
    def fail(cause: BaseException) -> None:
        try:
            raise cause
        except BaseException as error:
            raise errors.CorruptCheckpointError("corrupt") from error

    noted = ValueError("plain")
    noted.__notes__ = [HOSTILE]  # type: ignore[attr-defined]
    for cause in (ValueError(HOSTILE), noted):
        with pytest.raises(errors.CorruptCheckpointError) as raised:
            fail(cause)
        shown = "".join(traceback.format_exception(raised.value))
        assert_plain(shown)
        assert "EscapedError: ValueError: " in shown and "raise cause" in shown
    own = KeyError("plain")
    with pytest.raises(errors.CorruptCheckpointError) as raised:
        try:
            raise ValueError(HOSTILE)
        except ValueError as outer:
            own.__context__ = outer
            fail(own)
    assert raised.value.__cause__ is own and type(own.__context__) is ValueError


@pytest.mark.parametrize("module", ["mod\x1b[31mEVIL was not an allowed global by default. [mod]", "posix"])
def test_a_global_is_named_whole(module: str, tmp_path: Path) -> None:
    """Catches a pickle whose name is cut at a control character, so that it looks like a harmless one."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", f"\x80\x02c{module}\nname\x07 was not an allowed global\n.".encode("latin1"))
        archive.writestr("x/version", "3\n")
    with pytest.raises(shardsave.UntrustedCodeError) as raised:
        shardsave.convert(tmp_path / "x.pt", tmp_path / "out")
    name = (module + r".name\x07 was not an allowed global").replace("\x1b", r"\x1b")
    assert f"its pickle asks for {name}; nothing of it was run" in str(raised.value)
