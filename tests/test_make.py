"""`make build` installs what the package needs. Method: the commands that make would run are read, and compared with pyproject.toml."""

from __future__ import annotations

import re
import subprocess

from support import ROOT


def test_build_installs_all_dependencies() -> None:
    """Catches a virtual environment of ours that lacks a dependency of the package, since a list of names was not extended."""
    command = ["make", "--dry-run", "--always-make", "build"]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (install,) = (line for line in commands if "pip install" in line and line.split()[-2:] == ["-e", "."])
    assert "--no-deps" not in install and "-c constraints.txt" in install


def test_dependencies_are_pinned() -> None:
    """Catches a dependency whose version constraints.txt does not fix."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {re.split(r"[<>=!~]", name)[0] for name in re.findall(r'"([^"]+)"', listed)} <= pinned
