"""Programs: a loaded program computes what its model computes, without the classes of the model."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import SmallModel, same_bits
from warm_python import warm_python

pytestmark = pytest.mark.slow

TOKENS = torch.arange(6)


class Branches(nn.Module):
    """Has computed sizes, a constant, a non-persistent buffer, and results with names."""

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
    """Catches a program that needs the package of the model or computes something else, and weights that are stored twice."""
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
        done = warm_python().run(["-c", script], tmp_path, action="error")
        assert done.returncode == 0, done.stderr
    info = shardsave.inspect(tmp_path / "ckpt")
    assert info.parts.keys() == {"program"} and info.bytes == 4 * (3 * 64 * 64 + 4 * 64)
    text = (tmp_path / "ckpt" / info.parts["program"]).read_text()
    assert "package" not in text and "mine" not in text  # neither stack traces nor class names


def test_every_kind_of_tensor_argument_and_result(tmp_path: Path) -> None:
    """Catches constants, buffers, keywords or results that are lost, also if an architecture is saved with the program."""
    model = Branches().eval()
    x = torch.randn(6, 4)
    shardsave.save(model, tmp_path, program=((x,), {"twice": False}), architecture=True)
    assert shardsave.inspect(tmp_path).parts.keys() == {"architecture", "program", "extra tensors"}
    result, wanted = shardsave.load_program(tmp_path)(x, twice=False), model(x)
    assert same_bits(result["y"], wanted["y"]) and same_bits(result["pair"][0], wanted["pair"][0])
    assert result["pair"][1] == wanted["pair"][1]
    built = shardsave.build_model(tmp_path, trust=["test_program"])
    assert same_bits(built(x)["y"], wanted["y"])


def test_exported_program_with_dynamic_sizes(tmp_path: Path) -> None:
    """Catches expressions over sizes that torch writes and a save refuses."""
    model = SmallModel().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: batch},))
    shardsave.save(model, tmp_path, program=exported)
    program = shardsave.load_program(tmp_path, device="cpu")
    for count in (2, 6, 50):
        tokens = torch.arange(count)
        assert same_bits(program(tokens), model(tokens))


class Sizes(nn.Module):
    """Has sizes that depend on each other, on a number, and on values."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x[:count] + 1, y * x.shape[0], x[x > 0]


def test_arguments_that_a_program_accepts(tmp_path: Path) -> None:
    """Catches accepted arguments for which the graph computes something else than the model; torch assumed others when it traced."""
    batch = torch.export.Dim("batch", min=2, max=64)
    model, shapes = Sizes(), ({0: batch}, {0: batch + 1}, torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (torch.ones(6, 4), torch.ones(7), 3), dynamic_shapes=shapes)
    shardsave.save(model, tmp_path, program=exported)
    program = shardsave.load_program(tmp_path)
    x, y = torch.randn(10, 4), torch.randn(11)
    for result, wanted in zip(program(x, count=5, y=y), model(x, y, 5)):
        assert same_bits(result, wanted)
    for arguments, error, message in (
        ((x[:1], y[:2], 1), ValueError, "argument x: size of dimension 0: 2 to 64 was expected, 1 was given"),
        ((x, y), TypeError, "argument count was expected, it was not given"),
        ((x, y, 5, 6), TypeError, "at most 3 positional arguments were expected, 4 were given"),
        (
            (x[:, :3], y, 5),
            ValueError,
            "argument x: size of dimension 1: 4 was expected, as the program was exported, 3 was given",
        ),
        (
            (x.double(), y, 5),
            TypeError,
            "argument x: torch.float32 of 2 dimensions was expected, torch.float64 of 2 dimensions was",
        ),
        (
            (x[0], y, 5),
            TypeError,
            "argument x: torch.float32 of 2 dimensions was expected, torch.float32 of 1 dimensions was given",
        ),
        ((x, [y], 5), TypeError, "argument y: a tensor was expected, list of 1 was given"),
        ((x, y, True), TypeError, "argument count: an int was expected, bool was given"),
        ((x, y[:10], 5), RuntimeError, "the program was exported for arguments of which L['y'].size()[0] == "),
    ):
        with pytest.raises(error) as raised:
            program(*arguments)
        assert message in str(raised.value)
    if getattr(exported, "_guards_code", ()):  # newer versions of torch list everything that they assumed
        with pytest.raises(RuntimeError, match=r"for arguments of which L\['count'\] >= 0 and L\['count'\] <= L\['x'\].size"):
            program(x, y, 11)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor, m: torch.Tensor, **more: torch.Tensor) -> Any:
        return x.view(-1, 2, 4), x.sort(), max(x.shape[0], 5), collections.OrderedDict(m=m + x)


def test_sizes_that_are_multiples_of_another(tmp_path: Path) -> None:
    """Catches failures with a size that is a multiple of another, with ``**keywords`` of a forward, and with results of torch's classes."""
    half = torch.export.Dim("half", min=2, max=50)
    shapes = {"x": {0: 2 * half}, "m": {0: 2 * half}}
    model, x = Halves(), torch.randn(8, 4)
    exported = torch.export.export(model, (), {"x": x, "m": x}, dynamic_shapes=shapes)
    shardsave.save(model, tmp_path, program=exported)
    program = shardsave.load_program(tmp_path)
    x = torch.randn(12, 4)
    halves, ordered, count, named = program(m=x, x=x)
    assert same_bits(halves, x.view(-1, 2, 4)) and same_bits(ordered[1], x.sort().indices) and count == 12
    assert same_bits(named["m"], x + x)
    for wrong, error in ((torch.randn(13, 4), RuntimeError), (torch.randn(102, 4), ValueError)):
        with pytest.raises(error):
            program(x=wrong, m=wrong)
    with pytest.raises((RuntimeError, ValueError)):
        program(x=x, m=torch.randn(10, 4))


class Nested(nn.Module):
    def forward(self, pair: list[torch.Tensor], *more: torch.Tensor, named: dict[str, torch.Tensor], scale: float = 2.0) -> Any:
        return {"sum": pair[0] + pair[1] + more[0] + named["x"] * scale, "fixed": ["text", None, 3, float("inf"), scale]}


def test_nested_and_constant_arguments(tmp_path: Path) -> None:
    """Catches nested arguments or results that are flattened in another order than torch's, and constants that are lost."""
    x = [torch.full((3,), float(n)) for n in range(4)]
    shardsave.save(Nested(), tmp_path, program=((x[:2], x[2]), {"scale": 3.0, "named": {"x": x[3]}}))
    program = shardsave.load_program(tmp_path)
    result = program((x[0], x[1]), x[2], named={"x": x[3]})
    assert same_bits(result["sum"], torch.full((3,), 12.0)) and result["fixed"] == ["text", None, 3, float("inf"), 3.0]
    for keywords, error, message in (
        ({"named": {"y": x[3]}}, TypeError, "argument named: a dict with x was expected, a dict with y was given"),
        (
            {"named": {"x": x[3]}, "scale": 4.0},
            ValueError,
            "argument scale: 3.0 was expected, as the program was exported, 4.0",
        ),
        ({"named": {"x": x[3]}, "other": 1}, TypeError, "argument other was not expected: the program was exported without it"),
    ):
        with pytest.raises(error, match=message):
            program(x[:2], x[2], **keywords)


class Flows(nn.Module):
    """Has graphs within a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        from torch._higher_order_ops.scan import scan
        from torch._higher_order_ops.while_loop import while_loop

        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = self.layer(x)
        chosen = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t.masked_fill(t < 0, -torch.inf), (half,))
        last, rows = scan(lambda carried, row: (carried + row, carried * row), x[0] * 0, x)
        steps = while_loop(lambda n, t: n < 3, lambda n, t: (n + 1, t + x), (torch.tensor(0), x * 1))
        return chosen, last, rows, steps[1]


def test_control_flow(tmp_path: Path) -> None:
    """Catches a branch, a loop or an autocast that behaves differently from the model's."""
    model, x = Flows().eval().requires_grad_(False), torch.randn(6, 4)
    shardsave.save(model, tmp_path, program=((x,), {}))
    program = shardsave.load_program(tmp_path)
    for sample in (x.abs(), -x.abs()):
        for result, wanted in zip(program(sample), model(sample)):
            assert same_bits(result, wanted)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch 2.13 warns of its own use of pytrees
@pytest.mark.parametrize("functional", [False, True])
def test_training_mode(functional: bool, tmp_path: Path) -> None:
    """Catches statistics that are not updated (in place, or as results after torch's functional pass), and training mode without a note."""
    model, x = Counts(), torch.randn(6, 4)
    exported = torch.export.export(model, (x,))
    report = shardsave.save(model, tmp_path, program=exported.run_decompositions() if functional else ((x,), {}))
    assert any("in training mode" in note for note in report.notes) == (not functional)
    program = shardsave.load_program(tmp_path)
    for _ in range(2):
        assert torch.allclose(program(x), model(x))
    assert torch.allclose(program.norm.running_mean, model.norm.running_mean) and program.norm.num_batches_tracked == 2
    assert program.state_dict().keys() == model.state_dict().keys()
    if not functional:
        with pytest.raises(
            RuntimeError, match="exported in training mode and computes only that, evaluation mode was asked for"
        ):
            program.eval()
    model.eval()
    shardsave.save(model, tmp_path, program=((x,), {}))
    program = shardsave.load_program(tmp_path).eval()
    assert not program.training and same_bits(program(x), model(x).detach())


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters(remove_duplicate=False)}


def test_program_is_an_ordinary_module(tmp_path: Path) -> None:
    """Catches a program that still uses its first tensors after it is copied, compiled or loaded with a state dict."""
    model = SmallModel().eval()
    shardsave.save(model, tmp_path, program=((TOKENS,), {}))
    program = shardsave.load_program(tmp_path)
    assert flags(program) == flags(model) and len(set(flags(model).values())) == 2
    copied = copy.deepcopy(program)
    new_state = {name: tensor + 1 for name, tensor in program.state_dict().items()}
    program.load_state_dict(new_state)
    model_copy = copy.deepcopy(model)
    assert same_bits(copied(TOKENS).detach(), model(TOKENS).detach())
    model_copy.load_state_dict(new_state)
    assert same_bits(program(TOKENS).detach(), model_copy(TOKENS).detach())
    assert same_bits(torch.compile(shardsave.load_program(tmp_path), backend="eager")(TOKENS).detach(), model(TOKENS).detach())


def test_refused_at_save(tmp_path: Path) -> None:
    """Catches arguments that reach torch.export unchecked, and exceptions of torch that are not turned into errors of this package."""

    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    for wrong in ((TOKENS,), [(TOKENS,), {}], ((TOKENS,), None)):
        with pytest.raises(TypeError, match="program must be"):
            shardsave.save(SmallModel(), tmp_path / "ckpt", program=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a program needs an nn.Module, not a dict"):
        shardsave.save({}, tmp_path / "ckpt", program=((TOKENS,), {}))
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="cannot save a program: torch.export was expected to trace the model"
    ):
        shardsave.save(Untraceable(), tmp_path / "ckpt", program=((TOKENS,), {}))
    named = nn.Module()
    named.register_buffer("_document", torch.ones(2))
    named.forward = lambda x: x + named._document  # type: ignore[method-assign]
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="names that tensors of a module can have expected, one is '_document'"
    ):
        shardsave.save(named, tmp_path / "ckpt", program=((torch.ones(2),), {}))
    other = torch.export.export(SmallModel(), (TOKENS,))
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="a program of the model's own weights was expected, its .* is another"
    ):
        shardsave.save(SmallModel(), tmp_path / "ckpt", program=other)

    class Foreign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.test_program.twice(x)  # type: ignore[no-any-return]

    library = torch.library.Library("test_program", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="an operator of torch that computes expected, it is 'test_program.twice"
    ):
        shardsave.save(Foreign(), tmp_path / "ckpt", program=((torch.ones(2),), {}))
    assert not (tmp_path / "ckpt").exists()
    shardsave.save(SmallModel(), tmp_path)
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="a program was expected, the checkpoint has none"):
        shardsave.load_program(tmp_path)
