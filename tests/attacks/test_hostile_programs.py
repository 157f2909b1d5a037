"""Method: a good program is saved, and one thing in its document is changed. Each change must be refused, with the message in the table."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardsave
from shardsave._program.operators import find_function
from shardsave._program.program import LoadedProgram, ProgramDocument
from shardsave._program.refusals import BadProgram
from support import SmallModel

pytestmark = pytest.mark.slow

Document = dict[str, Any]
Change = Callable[[Document], object]


def calls(document: Document) -> list[Any]:
    calls: list[Any] = document["graphs"][0]["calls"]
    return calls


def function(name: Any) -> Change:
    """Replaces the function of the first call."""
    return lambda document: calls(document)[0].__setitem__(0, name)


def argument(value: Any) -> Change:
    """Replaces the arguments of the first call."""
    return lambda document: calls(document)[0].__setitem__(1, [value])


def dtype_argument(dtype: Any) -> Change:
    """Replaces the first call by one of an operator that takes a dtype."""
    return lambda document: calls(document)[0].__setitem__(slice(0, 3), ["aten.view.dtype", [{"value": 0}, dtype], {}])


def tensor(**members: Any) -> Change:
    """Changes members of the first tensor."""
    return lambda document: document["tensors"][0].update(members)


def arguments(tree: Any) -> Change:
    """Replaces the arguments of the program by one."""
    return lambda document: document.update(arguments={"positional": [["tokens", tree]], "keyword": {}})


COMPUTES = "graphs[0].calls[0]: an operator of torch that computes expected, it is "
PLAIN = "graphs[0].calls[0]: a value of the graph or a plain value expected, it is "
LEAF = "arguments: a tensor, a size, a constant, or a list or dict of them expected, it is "
NAMES = "names that tensors of a module can have expected, one is "
EACH_ONCE = "tensors expected, once each, with name, tensor, kept, kind, requires_grad, one is "
deep: Any = 1
for _ in range(60):
    deep = [deep]

ATTACKS: dict[str, tuple[Change, str]] = {
    "a function of os": (function("os.system"), f"{COMPUTES}'os.system'"),
    "a builtin": (function("builtins.eval"), f"{COMPUTES}'builtins.eval'"),
    "a function of torch": (function("torch.load"), f"{COMPUTES}'torch.load'"),
    "a function of operator": (function("python.attrgetter"), f"{COMPUTES}'python.attrgetter'"),
    "a function of math": (function("math.__loader__"), f"{COMPUTES}'math.__loader__'"),
    "a call of a TorchScript object": (function("higher_order.call_torchbind"), f"{COMPUTES}'higher_order.call_torchbind'"),
    "a name that is a list": (function(["aten.add.Tensor"]), f"{COMPUTES}['aten.add.Tensor']"),
    "a name with a line feed": (function("aten.relu.default\n"), f"{COMPUTES}'aten.relu.default\\n'"),
    "a name with letters beyond ASCII": (function("aten.rélu.default"), f"{COMPUTES}'aten.rélu.default'"),
    "an operator that opens files": (function("aten.from_file.default"), f"{COMPUTES}'aten.from_file.default'"),
    "an operator that writes files": (function("aten.save.default"), f"{COMPUTES}'aten.save.default'"),
    "a function that only TorchScript has": (
        function("aten.manual_seed.default"),
        f"an operator of torch {torch.__version__} expected, it is 'aten.manual_seed.default'; it was saved with torch",
    ),
    "an operator that changes the memory of a tensor": (
        function("aten.set_.source_Storage_storage_offset"),
        f"{COMPUTES}'aten.set_.source_Stor",
    ),
    "an operator that trusts sizes": (function("aten._reshape_alias.default"), f"{COMPUTES}'aten._reshape_alias.default'"),
    "an operator of another library": (function("torchvision.nms.default"), f"{COMPUTES}'torchvision.nms.default'"),
    "an attribute of all operators": (function("aten.__class__.default"), f"{COMPUTES}'aten.__class__.default'"),
    "an attribute of an operator": (function("aten.add.__globals__"), "an operator of torch "),
    "a method of an operator": (function("aten.add.overloads"), f"an operator of torch {torch.__version__} expected"),
    "an attribute of an attribute": (function("aten.add.Tensor.__globals__"), f"{COMPUTES}'aten.add.Tensor.__globals__'"),
    "a value of a later call": (argument({"value": 10_000}), f"{PLAIN}{{'value': 10000}}"),
    "a negative number of a value": (argument({"value": -1}), f"{PLAIN}{{'value': -1}}"),
    "true as the number of a value": (argument({"value": True}), f"{PLAIN}{{'value': True}}"),
    "a graph that calls itself": (argument({"graph": 0}), f"{PLAIN}{{'graph': 0}}"),
    "a graph that does not exist": (argument({"graph": 7}), f"{PLAIN}{{'graph': 7}}"),
    "an object with two tags": (argument({"value": 0, "graph": 1}), f"{PLAIN}{{'graph': 1, 'value': 0}}"),
    "an object without a tag": (argument({}), f"{PLAIN}{{}}"),
    "a tag of another format": (argument({"import": "os"}), f"{PLAIN}{{'import': 'os'}}"),
    "a dtype that is a function": (argument({"dtype": "load"}), f"a dtype of torch {torch.__version__} expected, it is 'load'"),
    "a dtype that is a path": (
        argument({"dtype": "hub.sys"}),
        f"a dtype of torch {torch.__version__} expected, it is 'hub.sys'",
    ),
    "a device with a line feed": (argument({"device": "cpu\n"}), f"{PLAIN}{{'device': 'cpu\\n'}}"),
    "a float by an unknown name": (argument({"float": "infinity"}), f"{PLAIN}{{'float': 'infinity'}}"),
    "a complex number of strings": (argument({"complex": ["1", "2"]}), f"{PLAIN}{{'complex': ['1', '2']}}"),
    "a dtype that is a number": (
        dtype_argument(200),
        "graphs[0].calls[0]: a torch.dtype as argument dtype expected, it is 200",
    ),
    "a dtype that is the result of a call": (
        dtype_argument({"value": 0}),
        "graphs[0].calls[0]: a torch.dtype as argument dtype expected, it is Value",
    ),
    "a device that is text": (
        lambda d: calls(d)[0].__setitem__(slice(0, 3), ["aten.zeros.default", [[2]], {"device": "meta"}]),
        "graphs[0].calls[0]: a torch.device as argument device expected, it is 'meta'",
    ),
    "a memory format that is a number": (
        lambda d: calls(d)[0].__setitem__(slice(0, 3), ["aten.clone.default", [{"value": 0}], {"memory_format": 4}]),
        "graphs[0].calls[0]: a torch.memory_format as argument memory_format expected, it is 4",
    ),
    "a layout that is not strided": (argument({"layout": "sparse_coo"}), "a layout of torch"),
    "a quantised dtype": (argument({"dtype": "qint8"}), "a dtype of torch"),
    "an operator that makes a sparse tensor": (function("aten.to_sparse.default"), f"{COMPUTES}'aten.to_sparse.default'"),
    "an operator that computes a gradient": (
        function("aten.nll_loss2d_backward.default"),
        f"{COMPUTES}'aten.nll_loss2d_backward.default'",
    ),
    "a number of more than 64 bits": (argument(2**63), f"{PLAIN}9223372036854775808"),
    "values too deep": (argument(deep), "graphs[0].calls[0]: values nested at most 32 deep expected, it is [[["),
    "a call that is not a list": (
        lambda d: calls(d).__setitem__(0, "x"),
        "a function, its arguments and its keywords expected",
    ),
    "no graph": (lambda d: d.update(graphs=[]), "graphs: a list of graphs expected, it is []"),
    "a graph without a result": (lambda d: d["graphs"][0].pop("result"), "graphs[0]: inputs, calls and a result expected"),
    "a graph with too many inputs": (lambda d: d["graphs"][0].update(inputs=10**12), "for its tensors and arguments, expected"),
    "true as a number of inputs": (lambda d: d["graphs"][0].update(inputs=True), "a number of inputs and a list of calls"),
    "a result of another shape": (
        lambda d: d["graphs"][0].update(result=[]),
        "mutations: numbers of inputs, as many as the graph",
    ),
    "a mutation without a value": (
        lambda d: d.update(mutations=[0]),
        "mutations: numbers of inputs, as many as the graph returns values for,",
    ),
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
    "values for mutations that are not a list": (
        lambda d: d["graphs"][0].update(result={"tuple": [None, None]}),
        "mutations: numbers of inputs",
    ),
    "a tensor twice": (lambda d: d["tensors"].append(d["tensors"][0]), EACH_ONCE),
    "a tensor of another kind": (tensor(kind="module"), EACH_ONCE),
    "a tensor with an unknown member": (tensor(grad=True), EACH_ONCE),
    "tensors that are not a list": (lambda d: d.update(tensors=None), EACH_ONCE),
    "arguments of another kind": (arguments({"object": 1}), f"{LEAF}{{'object': 1}}"),
    "arguments too deep": (arguments({"list": deep}), LEAF),
    "an argument with an unknown dtype": (arguments({"tensor": "load", "shape": []}), "arguments: a dtype of torch"),
    "an argument with a negative size": (
        arguments({"tensor": "float32", "shape": [-1]}),
        "arguments: a size expected, it is -1",
    ),
    "a constant that is an object": (arguments({"constant": {"value": 0}}), f"{LEAF}{{'constant': {{'value': 0}}}}"),
    "no arguments": (lambda d: d.update(arguments=[]), "arguments: positional and keyword expected, it is []"),
    "fewer arguments": (
        lambda d: d.update(arguments={"positional": [], "keyword": {}}),
        "for its tensors and arguments, expected",
    ),
    "a training mode that is text": (
        lambda d: d.update(training="yes"),
        "training expected to be true, false or null, it is 'yes'",
    ),
    "another format": (lambda d: d.update(format="pickle"), "a document of format shardsave-program expected, it is 'pickle'"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("program")
    shardsave.save(SmallModel().eval(), folder, program=((torch.arange(6),), {}))
    document: Document = json.loads((folder / shardsave.inspect(folder).parts["program"]).read_bytes())
    return document


def read(document: Document) -> None:
    program = ProgramDocument(json.dumps(document).encode(), "the program in ckpt", torch.device("cpu"))
    LoadedProgram(program, {place.name: torch.zeros(2) for place in program.places})


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(name: str, stored: Document) -> None:
    """Catches a part of a document that leads to anything but an operator on values of the graph."""
    change, message = ATTACKS[name]
    document = copy.deepcopy(stored)
    read(document)
    change(document)
    with pytest.raises(shardsave.CorruptCheckpointError) as raised:
        read(document)
    assert message in str(raised.value) and "; nothing was run" in str(raised.value)


def test_newer_version_is_refused(stored: Document) -> None:
    """Catches a reader that guesses at a document of a newer version."""
    for change in ({"version": 2}, {"requires": ["streams"]}):
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match="which this version of shardsave does not know; the checkpoint is"
        ):
            read(stored | change)


def test_no_operator_reaches_files_or_addresses() -> None:
    """Catches an allowed operator of the dispatcher that opens a file or takes memory by its address."""
    schemas = torch._C._jit_get_all_schemas()
    allowed = []
    for schema in schemas:
        namespace, _, short = schema.name.partition("::")
        try:
            find_function(f"{namespace}.{short}.{schema.overload_name or 'default'}", "")
        except BadProgram:
            continue
        allowed.append(schema)
    assert len(allowed) > 1000
    kinds = {str(argument.type) for schema in allowed for argument in schema.arguments}
    assert not any(word in kind for kind in kinds for word in ("Storage", "Stream", "Any", "Future", "__torch__", "t[]")), kinds
    files = {s.name for s in allowed for argument in s.arguments if "file" in argument.name and "str" in str(argument.type)}
    assert not files
