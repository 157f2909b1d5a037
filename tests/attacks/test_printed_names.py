"""Method: text that would command a terminal is put into every place that a file, a path or a model has for a name. Then every verb is
called. Whatever it prints (errors with their causes, reports, warnings, standard output) must have that text as escapes only.
"""

from __future__ import annotations

import dataclasses
import inspect
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
from printed_places import ESCAPED, HOSTILE, PLACES, Net
from torch import nn

import shardsave
from shardsave import errors
from shardsave._common.shutdown import verb

HONEST = "模型.couche_é.слой.層.👍.naïve"


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
