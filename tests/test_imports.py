"""The stages know only earlier stages: reads every import with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardsave

ORDER = [
    "errors", "_words", "_json", "_arguments", "_metadata", "_ending", "_version", "_native", "_collector", "_files",
    "_assembled", "_dtypes", "_backend", "_crc64", "_memory", "_state", "_extra_tensors", "_kinds", "_imports", "_table",
    "_architecture", "_values", "_attached", "_extra_states", "_builder", "_graph", "_signature", "_program",
    "_traced_arguments", "_capture", "_plan", "_format", "_lend", "_engine", "_portable", "_index", "_staging", "_companions",
    "_lock", "_clean", "_commit", "_find", "_shard_files", "_checkpoint", "_choice", "_map", "_reports", "_findings",
    "_progress", "_read", "_slots", "_fillable", "_groups", "_fill", "_fit", "_transformers", "_conversion", "_peft", "_shards",
    "_save", "_load", "_open", "_compare", "_diff", "_leavings", "_inspect", "_from_config", "_build", "_torch_file",
    "_distributed", "_foreign", "_changes", "_single", "_convert", "__init__", "_cli", "__main__",
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
    paths = [(path.stem, path) for path in SOURCE.glob("*.py")] + [("_cli", path) for path in SOURCE.glob("_cli/*.py")]
    assert {name for name, _ in paths} | {"_native"} == set(ORDER)
    for name, path in paths:
        for other in imported(path) - ({"_cli"} if name == "_cli" else set()):
            assert ORDER.index(other) < ORDER.index(name) or (name, other) in ALLOWED, f"{name} imports {other}"


def test_every_public_name_has_a_home() -> None:
    """Catches a name that the type checker knows and the package does not, or the other way round."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: str(node.module).removeprefix("shardsave.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: module for module, names in shardsave._HOMES.items() for name in names}
    assert typed.keys() <= set(shardsave.__all__) and all(getattr(shardsave, name) is not None for name in shardsave.__all__)
    assert set(shardsave.__all__) <= set(dir(shardsave))
    with pytest.raises(AttributeError, match="module 'shardsave' has no attribute 'sav'"):
        _ = shardsave.sav  # type: ignore[attr-defined]


def test_a_plain_save_and_load_import_little(tmp_path: Path) -> None:
    """Catches the import of what only whole models, programs, transformers models and other verbs need: it takes longer than a save."""
    script = """if True:
        import sys, torch, shardsave
        model = torch.nn.Linear(2, 2)
        shardsave.save(model, sys.argv[1])
        shardsave.load_model(model, sys.argv[1])
        shardsave.load(sys.argv[1])
        print(*sorted(name for name in sys.modules if name.startswith("shardsave.")))
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    unneeded = {"_architecture", "_capture", "_program", "_conversion", "_findings", "_inspect", "_convert", "_portable"}
    assert not {f"shardsave.{name}" for name in unneeded}.intersection(done.stdout.split())
