"""The stages know only earlier stages: reads every import with ast."""

from __future__ import annotations

import ast
from pathlib import Path

ORDER = [
    "errors", "_arguments", "_ending", "_version", "_json", "_native", "_collector", "_files", "_dtypes", "_backend",
    "_crc64", "_state", "_imports", "_architecture", "_builder", "_program", "_plan", "_format", "_lend", "_engine",
    "_portable", "_index", "_lock", "_clean", "_commit", "_find", "_checkpoint", "_map", "_reports", "_progress", "_read",
    "_slots", "_fillable", "_fill", "_save", "_load", "_open", "_compare", "_diff", "_leavings", "_inspect", "_build",
    "__init__",
]  # fmt: skip

#: The engine chooses its fallback, which has the engine's own types.
ALLOWED = {("_engine", "_portable")}

SOURCE = Path(__file__).parent.parent / "src" / "shardsave"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "shardsave":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardsave."):
            names.add(str(node.module).split(".")[1])
    return names


def test_no_stage_imports_a_later_one() -> None:
    """Catches a stage that learns what it must not know."""
    paths = {path.stem: path for path in SOURCE.glob("*.py")}
    assert paths.keys() | {"_native"} == set(ORDER)
    for name, path in paths.items():
        for other in imported(path):
            assert ORDER.index(other) < ORDER.index(name) or (name, other) in ALLOWED, f"{name} imports {other}"
