"""What all commands have in common: errors of one line, help, completion, and what they import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardsave
from cli.commands import error, lines, process, run

COMMANDS = ["inspect", "list", "verify", "diff", "convert", "plot", "clean", "completion"]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("inspect", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("inspect", "two\nlines"), 3, r"shardsave: no checkpoint at $DIR/two\nlines: No such file or directory"),
    (("verify", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("diff", "none", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("plot", "none", "-o", "x.png"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("clean", "none"), 3, "shardsave: cannot clean $DIR/none: open: No such file or directory; nothing was removed"),
    (("inspect",), 2, "shardsave inspect: Missing argument 'DIRECTORY'; see shardsave inspect --help"),
    (("diff", "a"), 2, "shardsave diff: Missing argument 'B'; see shardsave diff --help"),
    (("plot", "a"), 2, "shardsave plot: Missing option '--output' / '-o'; see shardsave plot --help"),
    (("inspect", "a", "--depth", "x"), 2,
     "shardsave inspect: Invalid value for '--depth': 'x' is not a valid integer range; see shardsave inspect --help"),
    (("explode",), 2, "shardsave: No such command 'explode'; see shardsave --help"),
    (("verify", "a", "--jsn"), 2, "shardsave verify: No such option '--jsn'. Did you mean '--json'?; see shardsave verify --help"),
    (("inspect", ""), 2, "shardsave inspect: Invalid value for 'DIRECTORY': the path of a checkpoint must not be empty; "
     "the current directory is '.'; see shardsave inspect --help"),
])  # fmt: skip
def test_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Catches a traceback, an error of several lines or on stdout, and a wrong exit code."""
    monkeypatch.chdir(tmp_path)
    assert error(run(*arguments), code) == words.replace("$DIR", str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Catches a command without examples, exit codes or a short description, and an example of another command."""
    text = "\n".join(lines(run(command, "--help")))
    assert "Examples:" in text and (command == "completion" or "Exit codes: 0" in text)
    examples = re.findall(r"^\s+shardsave (\w+)", text, re.MULTILINE) or re.findall(r"shardsave (completion)", text)
    assert set(examples) == {command}
    top = lines(run("--help"))
    (listed,) = (line for line in top if line.startswith(f"  {command} "))
    assert not listed.endswith("...")
    assert "Exit codes:" in "\n".join(top) and lines(run("--version")) == [f"shardsave, version {shardsave.__version__}"]


def complete(words: str) -> list[str]:
    shown = process(_SHARDSAVE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    return [line.split(",")[-1] for line in shown.stdout.splitlines()]


def test_completion() -> None:
    """Catches completion that returns nothing, and a script that the shell cannot parse."""
    assert complete("shardsave ") == sorted(COMMANDS) and complete("shardsave in") == ["inspect"]
    assert {"--tensors", "--json", "--depth"} <= set(complete("shardsave inspect --"))
    for shell in ("bash", "zsh", "fish"):
        script = run("completion", shell).stdout
        assert "_SHARDSAVE_COMPLETE" in script and f"{shell}_complete" in script
    assert subprocess.run(["bash", "-n"], input=run("completion", "bash").stdout, text=True).returncode == 0
    assert error(run("completion", "tcsh"), 2).startswith(
        "shardsave completion: Invalid value for '{bash|zsh|fish}': 'tcsh' is not"
    )


def test_a_missing_choice_in_one_line() -> None:
    """Catches escapes in a message of click about an argument that is missing."""
    assert error(run("completion"), 2).endswith(
        "Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish; see shardsave completion --help"
    )


def loaded_by(program: str) -> set[str]:
    script = f"import sys; {program}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split())


@pytest.mark.slow
def test_imports(ckpt: Path) -> None:
    """Catches a library that imports packages of the command line, and a command that imports torch without need."""
    assert loaded_by("import shardsave; shardsave.save").isdisjoint({"click", "rich", "matplotlib"})
    inspecting = loaded_by(
        f"from click.testing import CliRunner; from shardsave._cli.main import cli; CliRunner().invoke(cli, ['inspect', '{ckpt}'])"
    )
    assert "shardsave._storage.checkpoint" in inspecting and inspecting.isdisjoint({"torch", "matplotlib"})
