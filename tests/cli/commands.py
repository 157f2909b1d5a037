"""Runs commands of the command line, within this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from shardsave._cli.main import cli


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(result: Result, code: int = 0) -> list[str]:
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()


def error(result: Result, code: int) -> str:
    """Checks that a command failed with ``code`` and printed nothing on stdout; returns its single line on stderr."""
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    return line


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in its own process, with pipes for its output."""
    command = [sys.executable, "-m", "shardsave", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
