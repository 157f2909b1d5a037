"""Programs: what a model computes, without its classes. What torch would evaluate of a file is checked before torch sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from conftest import SmallModel, same_bits

TOKENS = torch.arange(6)


class Branches(nn.Module):
    """Sizes that are computed, a constant, a non-persistent buffer, and a result with names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([2.0])
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> dict[str, Any]:
        half = x.shape[0] // 2
        with torch.no_grad():
            y = self.layer(x[:half]) * self.scale + self.shift
        return {"y": y, "pair": (y.sum(), [half])}


def test_runs_without_the_classes(tmp_path: Path) -> None:
    """Catches a program that needs the model's package, or computes something else; and weights that are stored twice."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])\n"
        "        self.layers[3].weight = self.layers[0].weight\n"
        "    def forward(self, x):\n"
        "        for layer in self.layers:\n"
        "            x = layer(x).relu()\n"
        "        return x\n"
    )
    make = (
        "import sys, torch; sys.path.insert(0, 'package'); import mine, shardsave\n"
        "torch.manual_seed(0); model = mine.Net().eval(); x = torch.randn(2, 64)\n"
        "shardsave.save(model, 'ckpt', program=((x,), {}))\n"
        "shardsave.save({'x': x, 'y': model(x).detach()}, 'example')\n"
    )
    use = (
        "import torch, shardsave\n"
        "example = shardsave.load('example')\n"
        "assert torch.equal(shardsave.load_program('ckpt')(example['x']), example['y'])\n"
    )
    for script in (make, use):
        subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, check=True)
    info = shardsave.inspect(tmp_path / "ckpt")
    assert info.parts.keys() == {"program"} and info.bytes == 4 * (3 * 64 * 64 + 4 * 64)
    text = (tmp_path / "ckpt" / info.parts["program"]).read_text()
    assert "package" not in text and "mine" not in text  # neither traces nor class names


def test_parts_of_a_model(tmp_path: Path) -> None:
    """Catches constants, buffers, keywords or results of several kinds that do not come back; saved together with an architecture."""
    model = Branches().eval()
    x = torch.randn(6, 4)
    shardsave.save(model, tmp_path, program=((x,), {"twice": False}), architecture=True)
    assert shardsave.inspect(tmp_path).parts.keys() == {"architecture", "program", "extra tensors"}
    result, wanted = shardsave.load_program(tmp_path)(x, twice=False), model(x)
    assert same_bits(result["y"], wanted["y"]) and same_bits(result["pair"][0], wanted["pair"][0])
    assert result["pair"][1] == wanted["pair"][1]
    built = shardsave.build_model(tmp_path, trust=["test_program"])
    assert same_bits(built(x)["y"], wanted["y"])


def test_an_exported_program_with_dynamic_sizes(tmp_path: Path) -> None:
    """Catches expressions over sizes that are refused though torch made them."""
    model = SmallModel().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: batch},))
    shardsave.save(model, tmp_path, program=exported)
    program = shardsave.load_program(tmp_path, device="cpu")
    for count in (2, 6, 50):
        tokens = torch.arange(count)
        assert same_bits(program(tokens), model(tokens))


def test_refused_at_save(tmp_path: Path) -> None:
    """Catches arguments that reach torch.export unchecked, and an exception of a trace that comes out raw."""

    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    for wrong in ((TOKENS,), [(TOKENS,), {}], ((TOKENS,), None)):
        with pytest.raises(TypeError, match="program must be"):
            shardsave.save(SmallModel(), tmp_path / "ckpt", program=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a program needs an nn.Module, there is none in a dict"):
        shardsave.save({}, tmp_path / "ckpt", program=((TOKENS,), {}))
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="cannot save a program: torch.export was expected to trace the model"
    ):
        shardsave.save(Untraceable(), tmp_path / "ckpt", program=((TOKENS,), {}))
    assert not (tmp_path / "ckpt").exists()
    shardsave.save(SmallModel(), tmp_path)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="a program was expected, the checkpoint has none"):
        shardsave.load_program(tmp_path)


def first(graph: Any, key: str) -> Any:
    """The first object that has ``key``."""
    if isinstance(graph, dict):
        if key in graph:
            return graph
        parts: Any = graph.values()
    else:
        parts = graph if isinstance(graph, list) else ()
    return next((found for part in parts if (found := first(part, key)) is not None), None)


Change = Callable[[dict[str, Any]], object]

ATTACKS: dict[str, tuple[Change, str]] = {
    "a function of os": (
        lambda graph: first(graph, "target").update(target="torch.os.system"),
        "an operator of torch was expected, it is 'torch.os.system'",
    ),
    "a function of torch": (
        lambda graph: first(graph, "target").update(target="torch.hub.load"),
        "an operator of torch was expected, it is 'torch.hub.load'",
    ),
    "an operator that opens files": (
        lambda graph: first(graph, "target").update(target="torch.ops.aten.from_file.default"),
        "an operator of torch was expected, it is 'torch.ops.aten.from_file.default'",
    ),
    "an extension": (
        lambda graph: first(graph, "target").update(target="#x:y"),
        "an operator of torch was expected, it is '#x:y'",
    ),
    "an attribute of an operator": (
        lambda graph: first(graph, "target").update(target="torch.ops.aten.add.Tensor.__globals__"),
        "an operator of torch was expected",
    ),
    "an expression with a call": (
        lambda graph: first(graph, "as_expr")["as_expr"].update(expr_str="__import__('os').system('true')"),
        "an expression over sizes was expected",
    ),
    "an expression with an attribute": (
        lambda graph: first(graph, "as_expr")["as_expr"].update(expr_str="s77.free_symbols"),
        "an expression over sizes was expected, it is 's77.free_symbols'",
    ),
    "an expression with a name": (
        lambda graph: first(graph, "as_expr")["as_expr"].update(expr_str="exec"),
        "an expression over sizes was expected, it is 'exec'",
    ),
    "a range of an expression": (
        lambda graph: graph["range_constraints"].update({"print(1)": {"min_val": 0, "max_val": 1}}),
        "an expression over sizes was expected, it is 'print(1)'",
    ),
    "a name that is code": (
        lambda graph: first(graph, "nodes")["nodes"][0].update(name="x): import os  #"),
        "a name was expected, it is 'x): import os  #'",
    ),
    "an argument that is code": (
        lambda graph: graph["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=["x=print()"]),
        "a name was expected, it is 'x=print()'",
    ),
    "guards": (lambda graph: graph.update(guards_code=["print(1)"]), "no code was expected, there is ['print(1)']"),
    "guards that are names": (lambda graph: graph.update(guards_code=["quit"]), "no code was expected, there is ['quit']"),
    "metadata": (
        lambda graph: first(graph, "nodes")["nodes"][0].update(metadata={"stack_trace": "x"}),
        "no metadata was expected, there is {'stack_trace': 'x'}",
    ),
    "a tree of another class": (
        lambda graph: graph["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec='[1, {"type": "os.system", "context": "null", "children_spec": []}]'
        ),
        "tuples, lists and dicts was expected",
    ),
    "no graph": (lambda graph: graph.clear(), "a program that torch"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    model = SmallModel().eval()
    exported = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    shardsave.save(model, folder, program=exported)
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a string of a file that torch would evaluate, look up or compile."""
    from shardsave import _program

    change, message = ATTACKS[name]
    document = json.loads((saved / shardsave.inspect(saved).parts["program"]).read_bytes())
    change(document["graph"])
    with pytest.raises(shardsave.ShardSaveError) as raised:
        made = _program.ProgramDocument(json.dumps(document).encode(), "the program in ckpt")
        made.module({}, {}, None)
    assert message in str(raised.value) and str(raised.value).endswith("; nothing was run")
