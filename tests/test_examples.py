"""What README and docstrings show is run as it stands there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import shardsave
from shardsave import _build, _diff, _inspect, _leavings, _load, _open, _save

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that does not run, in the order in which a reader meets them."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "module", [shardsave, _save, _load, _open, _diff, _leavings, _inspect, _build], ids=lambda module: module.__name__
)
def test_docstring_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Catches a docstring that shows what is not so."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed
