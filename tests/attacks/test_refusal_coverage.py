"""Method: the lines on which readers refuse something are searched for in their source, and a trace records which of them the attacks
reach. A refusal that no attack reaches is untested.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from test_attacks import CASES

import shardsave
from shardsave._common import strict_json
from shardsave._format import file_names, header, index, index_parsing, rank_files
from shardsave._storage import find, open_checkpoint, shard_files
from shardsave._storage import rank_files as assembling

MODULES = (strict_json, file_names, header, index, index_parsing, rank_files, find, shard_files, assembling, open_checkpoint)
READERS = {str(module.__file__): Path(str(module.__file__)) for module in MODULES}

#: Refusals that are not about bad files: those of writers, and those caused by a failing disk or another process.
OF_WRITERS = {"encode_header", "encode_index", "check_shard_count"}
BY_OTHERS = ("cannot_read", "DirectoryBusyError")


def refusals(path: Path) -> dict[int, str]:
    """Line → source, for every statement that raises or calls a function that does."""
    text = path.read_text()
    tree = ast.parse(text)
    writers = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in OF_WRITERS]
    skipped = {inner for writer in writers for inner in ast.walk(writer)}
    sources = {}
    for node in ast.walk(tree):
        raises = isinstance(node, ast.Raise) and node.exc is not None
        calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "_bad"
        source = ast.unparse(node) if raises or calls else ""
        if source and node not in skipped and not any(word in source for word in BY_OTHERS):
            sources[node.lineno] = source
    return sources


@pytest.mark.slow
def test_every_refusal_is_attacked(tmp_path: Path) -> None:
    """Catches a refusal that was added without an attack, and a refusal that cannot be reached."""
    expected = {name: refusals(path) for name, path in READERS.items()}
    assert sum(map(len, expected.values())) > 50
    missed = {(name, line) for name, lines in expected.items() for line in lines}

    @cache
    def refusals_in(code: CodeType) -> set[tuple[str, int]]:
        return {(code.co_filename, line) for _, _, line in code.co_lines() if line in expected.get(code.co_filename, ())}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            missed.discard((frame.f_code.co_filename, frame.f_lineno))
        return trace if refusals_in(frame.f_code) & missed else None

    before = sys.gettrace()
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = case.make(folder) or folder
        sys.settrace(trace)
        try:
            with pytest.raises(shardsave.ShardSaveError):
                shardsave.inspect(path)
        finally:
            sys.settrace(before)
    assert not missed, "\n".join(
        ["no attack reaches", *(f"{Path(name).name}:{line}: {expected[name][line]}" for name, line in sorted(missed))]
    )
