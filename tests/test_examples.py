"""Runs the examples in documents and docstrings as they are, and checks the form of the documents."""

from __future__ import annotations

import doctest
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardsave
from shardsave._api import (
    build,
    clean,
    convert,
    diff,
    inspect,
    load,
    manager,
    open,
    plan,
    restore_flags,
    resume,
    save,
    save_async,
)
from shardsave._cli.main import cli
from shardsave._training import per_rank
from shardsave.integrations import dcp
from warm_python import warm_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
#: The documents written by hand. RESULTS.md is not: a program writes it.
DOCUMENTS = [
    *(
        f"{name}.md"
        for name in ("README", "ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "FORMAT", "SECURITY", "benchmarks/notes")
    ),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
WITH_EXAMPLES = [name for name in DOCUMENTS if name != "FORMAT.md" and "```python" in (ROOT / name).read_text()]


def timeless(text: str) -> str:
    """Removes from ``text`` what differs between runs: times, speeds, the engine, and the size of a picture."""
    text = re.sub(r"\d+\.\d\d s( \([\d.]+ \w+/s\), \w+, \w+)?", "… s", text)
    return re.sub(r"(map\.png: )[\d.]+ kB", r"\1…", text)


def test_documents_have_examples() -> None:
    """Catches blocks of code that are not found, because their fences changed."""
    expected = {
        "README.md",
        "docs/background.md",
        "docs/cli.md",
        "docs/convert.md",
        "docs/dcp.md",
        "docs/loading.md",
        "docs/saving.md",
        "docs/training.md",
        "docs/transformers.md",
    }
    assert expected <= set(WITH_EXAMPLES)
    assert (ROOT / "README.md").read_text().count("```python") >= 10
    for name in ("README.md", "docs/cli.md", "docs/convert.md"):
        assert "```console" in (ROOT / name).read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # PEFT calls it by a deprecated name
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")  # what DCP says in one process
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches an example that fails, and a command whose output differs from the document. All run in the document's order."""
    monkeypatch.chdir(tmp_path)
    for kind, block in re.findall(r"```(python|console)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(block, name, "exec"), {})
            continue
        for command, shown in re.findall(r"^\$ shardsave (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            assert timeless(CliRunner().invoke(cli, shlex.split(command)).output) == timeless(shown), command


#: Runs the program that follows, but SIGKILL comes at a random moment after a step.
KILLED = """
import os, signal, threading
tell = print
def print(line):
    tell(line, flush=True)
    if line.startswith("step {step}:"):
        threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


def losses_of(program: str, folder: Path, code: int = 0) -> dict[int, str]:
    """Runs ``program`` in a new process, which must end with ``code``. Returns the loss that it printed for each step."""
    done = warm_python().run(["-c", program], folder)
    assert done.returncode == code, done.stderr
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (.*)\n", done.stdout, re.MULTILINE)}


def test_the_training_loop(tmp_path: Path) -> None:
    """Catches a loop in the README that, killed and started again, is another training than the one that was never killed."""
    section = (ROOT / "README.md").read_text().split("## In a training loop")[1]
    loop = section.split("```python\n")[1].split("```")[0]
    chance = random.Random()
    step, seconds = chance.randrange(21, 51), chance.random() * 0.02  # step 20 waits until step 10 is saved
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = losses_of(loop, tmp_path / "straight")
    assert straight.keys() == {*range(1, 61)} and len({*straight.values()}) == 60
    first = losses_of(KILLED.format(step=step, seconds=seconds) + loop, tmp_path / "killed", -signal.SIGKILL)
    second = losses_of(loop, tmp_path / "killed")
    assert {**first, **second} == straight, (step, seconds)
    assert 1 < min(second, default=61) <= max(first) + 1, (step, seconds)
    assert all(second[number] == loss for number, loss in first.items() if number in second), (step, seconds)


def test_the_resumed_fine_tuning(tmp_path: Path) -> None:
    """Catches a resumed training of a real model, with frozen layers, dropout and a schedule, that differs from one never stopped."""
    command = [sys.executable, str(ROOT / "examples" / "finetune_resume.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: stopped after step 5, which is saved" in done.stdout and "start fresh" not in done.stdout, done.stdout
    assert len(re.findall(r"^step \d+: loss", done.stdout, re.MULTILINE)) == 8 + 8, done.stdout
    assert "the losses of all 8 steps agree, bit for bit: True" in done.stdout


def prose(name: str) -> str:
    """The text of a document without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_form_of_documents(name: str) -> None:
    """Catches a line that is too long to read, a table cell with more than one sentence, and a link that leads nowhere."""
    for line in prose(name).splitlines():
        assert len(line) <= 120 or line.startswith("!["), f"{len(line)} characters: {line}"
        if line.startswith("|"):
            assert not re.search(r"\. [A-Z`]", line), line
    for target, heading in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", prose(name)):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)", prose(str(path)), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, (target, heading)


def test_environment_variables() -> None:
    """Catches a variable that the table lacks, and one that nothing reads."""
    assert not any("getenv" in path.read_text() for path in (ROOT / "csrc").glob("*.*"))
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "setup.py"]
    text = "\n".join(path.read_text() for path in sources)
    read = {f"SHARDSAVE_{name}" for name in re.findall(r'switched_on\("(\w+)"\)', text)}
    read |= set(re.findall(r"(?<!_)SHARDSAVE_[A-Z]\w*", text))
    table = (ROOT / "docs" / "operations.md").read_text().split("## Environment variables")[1]
    assert set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    ) == (read | {"NO_COLOR", "FORCE_COLOR"})


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "FORMAT.md", "SECURITY.md"])
def test_files_that_documents_name(name: str) -> None:
    """Catches a document that names a file of the project which has moved."""
    folders = [ROOT / "src", ROOT / "csrc", ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"]
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*") if path.is_file()]
    for named in re.findall(r"`([\w/]+\.(?:py|cpp|h|c))`", (ROOT / name).read_text()):
        assert any(file.endswith(f"/{named}") for file in files), named


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
@pytest.mark.parametrize(
    "module",
    [
        shardsave,
        save,
        save_async,
        plan,
        load,
        open,
        diff,
        clean,
        inspect,
        build,
        convert,
        restore_flags,
        resume,
        per_rank,
        manager,
        dcp,
    ],
    ids=lambda module: module.__name__,
)
def test_docstring_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Catches a docstring whose example has another result than it shows."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed
