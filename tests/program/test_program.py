"""Programs: what a model computes, without its classes. A file of one may be anything: it is data, and nothing of it is code."""

from __future__ import annotations

import collections
import copy
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
from support import SmallModel, same_bits

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


class Sizes(nn.Module):
    """Sizes that depend on each other, on a number, and on values."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x[:count] + 1, y * x.shape[0], x[x > 0]


def test_what_a_program_takes(tmp_path: Path) -> None:
    """Catches arguments for which the graph computes something else than the model: torch assumed other ones while it traced."""
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
    if getattr(exported, "_guards_code", ()):  # newer versions of torch tell of all that they assumed
        with pytest.raises(RuntimeError, match=r"for arguments of which L\['count'\] >= 0 and L\['count'\] <= L\['x'\].size"):
            program(x, y, 11)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor, m: torch.Tensor, **more: torch.Tensor) -> Any:
        return x.view(-1, 2, 4), x.sort(), max(x.shape[0], 5), collections.OrderedDict(m=m + x)


def test_sizes_of_which_no_argument_has_the_plain_one(tmp_path: Path) -> None:
    """Catches a size that is a multiple of another, keywords of a forward that takes any, and results of torch's own classes."""
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
    """Catches a tree of arguments or results that is flattened in another order than torch's, and constants that are lost."""
    x = [torch.full((3,), float(n)) for n in range(4)]
    shardsave.save(Nested(), tmp_path, program=((x[:2], x[2]), {"scale": 3.0, "named": {"x": x[3]}}))
    program = shardsave.load_program(tmp_path)
    result = program((x[0], x[1]), x[2], named={"x": x[3]})
    assert same_bits(result["sum"], torch.full((3,), 12.0)) and result["fixed"] == ["text", None, 3, float("inf"), 3.0]
    for keywords, error, message in (
        ({"named": {"y": x[3]}}, TypeError, "argument named: a dict with x was expected, one with y was given"),
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
    """Graphs within a graph."""

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
    """Catches a branch, a loop or an autocast that is taken otherwise than in the model."""
    model, x = Flows().eval().requires_grad_(False), torch.randn(6, 4)
    shardsave.save(model, tmp_path, program=((x,), {}))
    program = shardsave.load_program(tmp_path)
    for given in (x.abs(), -x.abs()):
        for result, wanted in zip(program(given), model(given)):
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
    """Catches statistics that are not updated (in place, or as results that torch's own passes make of it), and a silent mode."""
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
            RuntimeError, match="exported in training mode and computes as in that, evaluation mode was asked for"
        ):
            program.eval()
    model.eval()
    shardsave.save(model, tmp_path, program=((x,), {}))
    program = shardsave.load_program(tmp_path).eval()
    assert not program.training and same_bits(program(x), model(x).detach())


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters(remove_duplicate=False)}


def test_is_a_module_like_others(tmp_path: Path) -> None:
    """Catches a program that keeps to the tensors it was loaded with when it is copied, cast, compiled or filled."""
    model = SmallModel().eval()
    shardsave.save(model, tmp_path, program=((TOKENS,), {}))
    program = shardsave.load_program(tmp_path)
    assert flags(program) == flags(model) and len(set(flags(model).values())) == 2
    copied = copy.deepcopy(program)
    changed = {name: tensor + 1 for name, tensor in program.state_dict().items()}
    program.load_state_dict(changed)
    model_copy = copy.deepcopy(model)
    assert same_bits(copied(TOKENS).detach(), model(TOKENS).detach())
    model_copy.load_state_dict(changed)
    assert same_bits(program(TOKENS).detach(), model_copy(TOKENS).detach())
    assert same_bits(torch.compile(shardsave.load_program(tmp_path), backend="eager")(TOKENS).detach(), model(TOKENS).detach())


def test_refused_at_save(tmp_path: Path) -> None:
    """Catches arguments that reach torch.export unchecked, and an exception of a trace that comes out raw."""

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
        shardsave.UnsupportedModuleError, match="names that a module can give to tensors expected, one is '_document'"
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


Document = dict[str, Any]
Change = Callable[[Document], object]


def calls(document: Document) -> list[Any]:
    found: list[Any] = document["graphs"][0]["calls"]
    return found


def called(name: Any) -> Change:
    """The first call is of another function."""
    return lambda document: calls(document)[0].__setitem__(0, name)


def argument(value: Any) -> Change:
    return lambda document: calls(document)[0].__setitem__(1, [value])


def typed(dtype: Any) -> Change:
    """The first call is of an operator that takes a dtype."""
    return lambda document: calls(document)[0].__setitem__(slice(0, 3), ["aten.view.dtype", [{"value": 0}, dtype], {}])


def tensor(**changed: Any) -> Change:
    return lambda document: document["tensors"][0].update(changed)


def takes(tree: Any) -> Change:
    return lambda document: document.update(arguments={"positional": [["tokens", tree]], "keyword": {}})


COMPUTES = "graphs[0].calls[0]: an operator of torch that computes expected, it is "
PLAIN = "graphs[0].calls[0]: a value of the graph or a plain one expected, it is "
LEAF = "arguments: a tensor, a size, a constant, or a list or dict of them expected, it is "
NAMES = "names that a module can give to tensors expected, one is "
EACH_ONCE = "tensors expected, each once, with a name, a place and a kind, one is "
deep: Any = 1
for _ in range(60):
    deep = [deep]

ATTACKS: dict[str, tuple[Change, str]] = {
    "a function of os": (called("os.system"), f"{COMPUTES}'os.system'"),
    "a builtin": (called("builtins.eval"), f"{COMPUTES}'builtins.eval'"),
    "a function of torch": (called("torch.load"), f"{COMPUTES}'torch.load'"),
    "a function of operator": (called("python.attrgetter"), f"{COMPUTES}'python.attrgetter'"),
    "a function of math": (called("math.__loader__"), f"{COMPUTES}'math.__loader__'"),
    "a graph that calls another's code": (called("higher_order.call_torchbind"), f"{COMPUTES}'higher_order.call_torchbind'"),
    "no name": (called(["aten.add.Tensor"]), f"{COMPUTES}['aten.add.Tensor']"),
    "a name with a line": (called("aten.relu.default\n"), f"{COMPUTES}'aten.relu.default\\n'"),
    "a name of other letters": (called("aten.rélu.default"), f"{COMPUTES}'aten.rélu.default'"),
    "an operator that opens files": (called("aten.from_file.default"), f"{COMPUTES}'aten.from_file.default'"),
    "an operator that writes files": (called("aten.save.default"), f"{COMPUTES}'aten.save.default'"),
    "a function of TorchScript": (
        called("aten.manual_seed.default"),
        f"an operator of torch {torch.__version__} expected, it is 'aten.manual_seed.default'; it was saved with torch",
    ),
    "an operator of other memory": (called("aten.set_.source_Storage_storage_offset"), f"{COMPUTES}'aten.set_.source_Stor"),
    "an operator that trusts sizes": (called("aten._reshape_alias.default"), f"{COMPUTES}'aten._reshape_alias.default'"),
    "an operator of another library": (called("torchvision.nms.default"), f"{COMPUTES}'torchvision.nms.default'"),
    "an attribute of all operators": (called("aten.__class__.default"), f"{COMPUTES}'aten.__class__.default'"),
    "an attribute of an operator": (called("aten.add.__globals__"), "an operator of torch "),
    "a method of an operator": (called("aten.add.overloads"), f"an operator of torch {torch.__version__} expected"),
    "an attribute of an attribute": (called("aten.add.Tensor.__globals__"), f"{COMPUTES}'aten.add.Tensor.__globals__'"),
    "a value that is not there yet": (argument({"value": 10_000}), f"{PLAIN}{{'value': 10000}}"),
    "a value before all": (argument({"value": -1}), f"{PLAIN}{{'value': -1}}"),
    "a value that is true": (argument({"value": True}), f"{PLAIN}{{'value': True}}"),
    "a graph that calls itself": (argument({"graph": 0}), f"{PLAIN}{{'graph': 0}}"),
    "a graph that is not there": (argument({"graph": 7}), f"{PLAIN}{{'graph': 7}}"),
    "an object with two tags": (argument({"value": 0, "graph": 1}), f"{PLAIN}{{'graph': 1, 'value': 0}}"),
    "an object without a tag": (argument({}), f"{PLAIN}{{}}"),
    "a tag of another format": (argument({"import": "os"}), f"{PLAIN}{{'import': 'os'}}"),
    "a dtype that is a function": (argument({"dtype": "load"}), f"a dtype of torch {torch.__version__} expected, it is 'load'"),
    "a dtype that is a path": (
        argument({"dtype": "hub.sys"}),
        f"a dtype of torch {torch.__version__} expected, it is 'hub.sys'",
    ),
    "a device that is no word": (argument({"device": "cpu\n"}), f"{PLAIN}{{'device': 'cpu\\n'}}"),
    "a float of another word": (argument({"float": "infinity"}), f"{PLAIN}{{'float': 'infinity'}}"),
    "a complex of words": (argument({"complex": ["1", "2"]}), f"{PLAIN}{{'complex': ['1', '2']}}"),
    "a dtype that is a number": (typed(200), "graphs[0].calls[0]: a dtype for dtype expected, it is 200"),
    "a dtype that is computed": (typed({"value": 0}), "graphs[0].calls[0]: a dtype for dtype expected, it is Value"),
    "a device that is text": (
        lambda d: calls(d)[0].__setitem__(slice(0, 3), ["aten.zeros.default", [[2]], {"device": "meta"}]),
        "graphs[0].calls[0]: a device for device expected, it is 'meta'",
    ),
    "a memory format that is a number": (
        lambda d: calls(d)[0].__setitem__(slice(0, 3), ["aten.clone.default", [{"value": 0}], {"memory_format": 4}]),
        "graphs[0].calls[0]: a memory_format for memory_format expected, it is 4",
    ),
    "a layout that is not strided": (argument({"layout": "sparse_coo"}), "a layout of torch"),
    "a quantised dtype": (argument({"dtype": "qint8"}), "a dtype of torch"),
    "a sparse tensor": (called("aten.to_sparse.default"), f"{COMPUTES}'aten.to_sparse.default'"),
    "a gradient": (called("aten.nll_loss2d_backward.default"), f"{COMPUTES}'aten.nll_loss2d_backward.default'"),
    "a number of more than 64 bits": (argument(2**63), f"{PLAIN}9223372036854775808"),
    "values too deep": (argument(deep), "graphs[0].calls[0]: values nested at most 32 deep expected, it is [[["),
    "a call that is no list": (lambda d: calls(d).__setitem__(0, "x"), "a function, its arguments and its keywords expected"),
    "no graph": (lambda d: d.update(graphs=[]), "graphs: a list of graphs expected, it is []"),
    "a graph without a result": (lambda d: d["graphs"][0].pop("result"), "graphs[0]: inputs, calls and a result expected"),
    "a graph of too many inputs": (lambda d: d["graphs"][0].update(inputs=10**12), "for its tensors and arguments, expected"),
    "a graph of no number of inputs": (lambda d: d["graphs"][0].update(inputs=True), "a number of inputs and a list of calls"),
    "a result of another shape": (
        lambda d: d["graphs"][0].update(result=[]),
        "mutations: numbers of inputs, as many as results",
    ),
    "a mutation of nothing": (lambda d: d.update(mutations=[0]), "mutations: numbers of inputs, as many as results for them,"),
    "a tensor named as a method": (tensor(name="forward"), f"{NAMES}'forward'"),
    "a tensor named as an attribute": (tensor(name="_document"), f"{NAMES}'_document'"),
    "a tensor below a method": (tensor(name="forward.__globals__"), f"{NAMES}'forward.__globals__'"),
    "a tensor below a class": (tensor(name="__class__.x"), f"{NAMES}'__class__.x'"),
    "a tensor below another": (
        lambda d: d["tensors"][1].update(name=d["tensors"][0]["name"] + ".x"),
        NAMES,
    ),
    "a tensor without a name": (tensor(name=""), EACH_ONCE),
    "a tensor with an empty part": (tensor(name="a..b"), EACH_ONCE),
    "a tensor below very many modules": (tensor(name="a." * 120_000 + "b"), EACH_ONCE),
    "mutations of no list": (lambda d: d["graphs"][0].update(result={"tuple": [None, None]}), "mutations: numbers of inputs"),
    "a tensor twice": (lambda d: d["tensors"].append(d["tensors"][0]), EACH_ONCE),
    "a tensor of another kind": (tensor(kind="module"), EACH_ONCE),
    "a tensor with more": (tensor(grad=True), EACH_ONCE),
    "tensors that are no list": (lambda d: d.update(tensors=None), EACH_ONCE),
    "arguments of another kind": (takes({"object": 1}), f"{LEAF}{{'object': 1}}"),
    "arguments too deep": (takes({"list": deep}), LEAF),
    "an argument of no dtype": (takes({"tensor": "load", "shape": []}), "arguments: a dtype of torch"),
    "an argument of no size": (takes({"tensor": "float32", "shape": [-1]}), "arguments: a size expected, it is -1"),
    "a constant that is an object": (takes({"constant": {"value": 0}}), f"{LEAF}{{'constant': {{'value': 0}}}}"),
    "no arguments": (lambda d: d.update(arguments=[]), "arguments: positional and keyword expected, it is []"),
    "fewer arguments": (
        lambda d: d.update(arguments={"positional": [], "keyword": {}}),
        "for its tensors and arguments, expected",
    ),
    "a mode that is no mode": (lambda d: d.update(training="yes"), "training expected to be true, false or null, it is 'yes'"),
    "another format": (lambda d: d.update(format="pickle"), "a document of format shardsave-program expected, it is 'pickle'"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("program")
    shardsave.save(SmallModel().eval(), folder, program=((TOKENS,), {}))
    document: Document = json.loads((folder / shardsave.inspect(folder).parts["program"]).read_bytes())
    return document


def read(document: Document) -> None:
    from shardsave._program.program import LoadedProgram, ProgramDocument

    made = ProgramDocument(json.dumps(document).encode(), "the program in ckpt", torch.device("cpu"))
    LoadedProgram(made, {place.name: torch.zeros(2) for place in made.places})


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, stored: Document) -> None:
    """Catches a part of a file that leads anywhere but to an operator on values of the graph."""
    change, message = ATTACKS[name]
    document = copy.deepcopy(stored)
    read(document)
    change(document)
    with pytest.raises(shardsave.CorruptCheckpointError) as raised:
        read(document)
    assert message in str(raised.value) and "; nothing was run" in str(raised.value)


def test_of_a_newer_version(stored: Document) -> None:
    """Catches a reader that makes a guess."""
    for change in ({"version": 2}, {"requires": ["streams"]}):
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match="which this version of shardsave does not know; the checkpoint is"
        ):
            read(stored | change)


def test_reaches_nothing_else(stored: Document) -> None:
    """Catches an operator of the dispatcher that opens a file or takes memory by its address, under any name."""
    from shardsave._program.graph import Bad, _function

    schemas = torch._C._jit_get_all_schemas()
    reached = []
    for schema in schemas:
        namespace, _, short = schema.name.partition("::")
        try:
            _function(f"{namespace}.{short}.{schema.overload_name or 'default'}", "")
        except Bad:
            continue
        reached.append(schema)
    assert len(reached) > 1000
    kinds = {str(argument.type) for schema in reached for argument in schema.arguments}
    assert not any(word in kind for kind in kinds for word in ("Storage", "Stream", "Any", "Future", "__torch__", "t[]")), kinds
    files = {s.name for s in reached for argument in s.arguments if "file" in argument.name and "str" in str(argument.type)}
    assert not files
