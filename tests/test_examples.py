"""What README and docstrings show is run as it stands there."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardsave
from shardsave._api import build, clean, convert, diff, inspect, load, open, save
from shardsave._cli.main import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that does not run, in the order in which a reader meets them."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def timeless(text: str) -> str:
    """``text`` without what differs from run to run: times, speeds, engine, and the size of a picture."""
    text = re.sub(r"\d+\.\d\d s( \([\d.]+ \w+/s\), \w+, \w+)?", "… s", text)
    return re.sub(r"(map\.png: )[\d.]+ kB", r"\1…", text)


@pytest.mark.parametrize("name", ["README.md", "docs/cli.md", "docs/convert.md"])
def test_commands_in_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a command that does not print what the document shows, after the examples in Python that stand before it."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|console)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert sum(kind == "console" for kind, _ in blocks) >= 1
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, name, "exec"), {})
            continue
        for command, shown in re.findall(r"^\$ shardsave (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            assert timeless(CliRunner().invoke(cli, shlex.split(command)).output) == timeless(shown), command


@pytest.mark.parametrize(
    "module", [shardsave, save, load, open, diff, clean, inspect, build, convert], ids=lambda module: module.__name__
)
def test_docstring_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Catches a docstring that shows what is not so."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed
