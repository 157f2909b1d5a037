"""``shardsave clean``: what it shows, asks and removes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shardsave
from cli.commands import error, lines, run
from faults.dying import die_before_the_commit, killed
from shardsave._storage.transaction import Transaction


@pytest.mark.parametrize(("arguments", "answer", "left"), [
    ((), "y\n", 0), ((), "n\n", 1), ((), "", 1), (("--yes",), "", 0), (("--dry-run",), "y\n", 1), (("--dry-run", "--yes"), "", 1),
])  # fmt: skip
def test_clean(ckpt: Path, arguments: tuple[str, ...], answer: str, left: int) -> None:
    """Catches a removal that was not confirmed or not shown before. A closed stdin confirms nothing."""
    assert lines(run("clean", ckpt)) == [f"{ckpt}: nothing was left behind"]
    killed(ckpt, die_before_the_commit)
    (staging,) = ckpt.glob(".shardsave-*")
    result = run("clean", ckpt, *arguments, input=answer)
    shown = lines(result, left)
    assert shown[0].split() == ["left", "behind", "files", "size", "owner"] and shown[1].startswith(staging.name)
    assert f"  {staging.name}/names" in shown and staging.exists() == bool(left)
    assert ("Remove 1 leaving, " in result.stderr) == (not arguments)
    assert shown[-1].endswith("; 1 removed") == (not left)
    assert shardsave.verify(ckpt).verified


def test_clean_and_other_hosts(ckpt: Path) -> None:
    """Catches files of another host that are removed without --other-hosts, with or without --yes."""
    other = ckpt / ".shardsave-0123456789abcdef"
    other.mkdir()
    shown = lines(run("clean", ckpt, "--yes"), 1)
    assert other.exists() and "another host" in shown[1]
    assert shown[-1] == "files from another host are only removed with --other-hosts; make sure that no save is running there"
    assert lines(run("clean", ckpt, "--yes", "--other-hosts"))[-1].endswith("; 1 removed") and not other.exists()


def test_clean_as_json(ckpt: Path) -> None:
    """Catches a report that lacks a field, mixes text into the JSON, or removes without being told to."""
    killed(ckpt, die_before_the_commit)
    (shown,) = map(json.loads, lines(run("clean", ckpt, "--json"), 1))
    (found,) = shown["found"]
    assert shown["path"] == str(ckpt) and shown["removed"] == shown["leftovers"] == []
    assert found["dead"] is True and found["bytes"] > 0 and (ckpt / found["name"]).exists()
    (shown,) = map(json.loads, lines(run("clean", ckpt, "--json", "--yes")))
    assert shown["removed"] == [found["name"]] and not (ckpt / found["name"]).exists()
    assert json.loads(run("clean", ckpt, "--json").stdout)["found"] == []


def test_clean_during_a_save(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that hangs, or that removes files of a running save."""
    import shardsave._cli.clean as command

    monkeypatch.setattr(command, "_PATIENCE", 0.1)
    with Transaction(ckpt, durable=False, lock_timeout=1), ThreadPoolExecutor(1) as other:
        said = error(other.submit(run, "clean", ckpt).result(), 3)
        assert said.replace(" (this process)", "") == (  # some file systems do not let it know the holder
            f"shardsave: cannot clean {ckpt}: its lock was expected within 0.1 s, another save holds it; nothing was removed"
        )
