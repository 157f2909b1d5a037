"""Method: an honest architecture is edited so that code of a trusted package would be called with values that the file chose.

Unless the build is refused, each case writes a file (the canary) or changes a directory of somebody else. So no canary may exist after
the build, nor after the built model was called.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import traps
from architecture_cases import edit_architecture
from click.testing import CliRunner
from tampering import Json
from torch import nn

import shardsave
import zoo
from shardsave._cli.main import cli

READS = "transformers.dynamic_module_utils:get_class_in_module"
ROFORMER = "transformers.models.roformer.tokenization_roformer:RoFormerTokenizer"
JAPANESE = "transformers.models.bert_japanese.tokenization_bert_japanese:BertJapaneseTokenizer"
CONFIG = "transformers.models.bert.configuration_bert:BertConfig"
UNPICKLES = "torch.utils.data.datapipes.datapipe:_DataPipeSerializationWrapper"
CALLED = "the model could call it, with values from the file"


class Scene:
    """A checkpoint that is edited, a Python file that writes the canary, and a directory of somebody else."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.canary, self.foreign = folder / "ckpt", folder / "canary", folder / "foreign"
        self.foreign.mkdir()
        self.script = folder / f"script_{zlib.crc32(bytes(folder))}.py"
        self.script.write_text(f"open({str(self.canary)!r}, 'w').close()\nclass X: pass\n")

    def save(self, model: nn.Module) -> list[str]:
        """Saves ``model``, and returns the trust that a build needs."""
        return list(shardsave.save(model, self.checkpoint, architecture=True, durable=False, progress=False).trust)

    def edit(self, *objects: Json, imports: tuple[str, ...] = (), **attributes: Any) -> None:
        """Adds objects, from number 10 on, and attributes of the root."""

        def change(document: Json) -> None:
            document["imports"].update(dict.fromkeys(imports))
            document["imports"].update({node["object"]: None for node in objects if "object" in node})
            document["objects"].extend({"list": []} for _ in range(10 - len(document["objects"])))
            document["objects"].extend(objects)
            document["objects"][0].setdefault("attributes", {}).update(attributes)

        edit_architecture(self.checkpoint, change)

    def reads_script(self) -> Json:
        """A value of the document: a call of it imports the script."""
        return {"partial": [{"import": READS}, [], [["class_name", "X"], ["module_path", str(self.script)]]]}

    def untouched(self) -> bool:
        return not self.canary.exists() and not list(self.foreign.iterdir())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def bert() -> nn.Module:
    """A model with dropouts that see one number, which is not zero: some functions take it for a switch."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1, "vocab_size": 3, "max_position_embeddings": 4}
    model = BertModel(BertConfig(num_hidden_layers=1, **sizes)).eval()
    model.embeddings.LayerNorm.bias.data.fill_(1.0)
    return model


def node_of(document: Json, kind: str) -> Json:
    node: Json = next(node for node in document["objects"] if str(node.get("module")).endswith(kind))
    return node


def roformer(scene: Scene) -> None:
    """Its ``__setstate__`` calls ``self._tokenizer.get_vocab()``."""
    scene.save(nn.Linear(2, 2))
    scene.edit(
        {"object": ROFORMER, "attributes": {"_tokenizer": {"ref": 11}}},
        {"object": CONFIG, "attributes": {"get_vocab": scene.reads_script()}},
        imports=(READS,),
    )


def roformer_alone(scene: Scene) -> None:
    """Its ``__setstate__`` with a value that is not callable."""
    scene.save(nn.Linear(2, 2))
    scene.edit({"object": ROFORMER, "attributes": {"_tokenizer": None}})


def japanese(scene: Scene) -> None:
    """Its ``__setstate__`` unpacks ``**self.mecab_kwargs``, which calls ``keys``."""
    scene.save(nn.Linear(2, 2))
    scene.edit(
        {"object": JAPANESE, "state": {"ref": 12}},
        {"object": CONFIG, "attributes": {"keys": scene.reads_script()}},
        {
            "dict": [
                ["word_tokenizer_type", "mecab"],
                ["lower_case", True],
                ["never_split", None],
                ["mecab_kwargs", {"ref": 11}],
            ]
        },
        imports=(READS,),
    )


def activation(scene: Scene) -> None:
    """A function that imports a file, in the place of an activation."""
    scene.save(bert())

    def change(document: Json) -> None:
        document["imports"][READS] = None
        function = {"partial": [{"import": READS}, [], [["module_path", str(scene.script)]]]}
        node_of(document, "BertIntermediate")["attributes"]["intermediate_act_fn"] = function

    edit_architecture(scene.checkpoint, change)


def dropout(scene: Scene) -> None:
    """A method of the model that writes a directory, in the place of a dropout."""
    scene.save(bert())

    def change(document: Json) -> None:
        node = node_of(document, "BertEmbeddings")
        del node["children"]["dropout"]
        method = {"method": [{"ref": 0}, "save_pretrained"]}
        node["attributes"]["dropout"] = {"partial": [method, [str(scene.foreign)], []]}

    edit_architecture(scene.checkpoint, change)


class Writes:
    """Unpickling it writes the canary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def unpickles(scene: Scene) -> None:
    """A class of torch whose ``__setstate__`` is ``pickle.loads``."""
    scene.save(nn.Linear(2, 2))
    payload = base64.b64encode(pickle.dumps(Writes(scene.canary))).decode()
    scene.edit({"object": UNPICKLES, "state": {"tuple": [{"bytes": payload}, False]}})


BERT = "transformers.models.bert.modeling_bert"
PARTS = [
    "Attention",
    "Embeddings",
    "Encoder",
    "Intermediate",
    "Layer",
    "Model",
    "Output",
    "Pooler",
    "SelfAttention",
    "SelfOutput",
]
BERT_CLASSES = ["transformers.activations.GELUActivation", *(f"{BERT}.Bert{part}" for part in PARTS)]

#: The edit, what is trusted, and what of the message says why that is not enough.
GADGETS: dict[str, tuple[Callable[[Scene], None], list[str], str]] = {
    "RoFormerTokenizer": (roformer, ["transformers"], f"{READS.replace(':', '.')} ({CALLED})"),
    "RoFormerTokenizer alone": (
        roformer_alone,
        ["transformers"],
        f"{ROFORMER.replace(':', '.')} (its __setstate__ would run on values from the file; the model could call",
    ),
    "BertJapaneseTokenizer": (japanese, ["transformers"], f"{READS.replace(':', '.')} ({CALLED})"),
    "an activation": (activation, ["transformers"], f"asks for {READS.replace(':', '.')} ({CALLED}); "),
    "a dropout": (dropout, ["transformers"], f"asks for {BERT}.BertModel.save_pretrained ({CALLED}); "),
    "a dropout, with exact names": (
        dropout,
        [*BERT_CLASSES, CONFIG.replace(":", ".")],
        f"asks for {BERT}.BertModel.save_pretrained ({CALLED}); ",
    ),
    "pickle.loads": (unpickles, ["torch.nn.modules.linear.Linear", "transformers"], f"asks for {UNPICKLES.replace(':', '.')};"),
}


@pytest.mark.parametrize("name", GADGETS)
def test_gadgets(name: str, scene: Scene) -> None:
    """Catches code that runs because its package is trusted, with arguments that the file chose."""
    make, trust, reason = GADGETS[name]
    make(scene)
    with pytest.raises(shardsave.UntrustedCodeError) as raised:
        shardsave.build_model(scene.checkpoint, trust=trust)(torch.tensor([[1]]))
    assert reason in str(raised.value) and scene.untouched()


def test_an_honest_bert(scene: Scene) -> None:
    """Catches rules that refuse a model as its library makes it."""
    model = bert()
    assert scene.save(model) == ["transformers"]
    built = shardsave.build_model(scene.checkpoint, trust=["transformers"])
    assert torch.equal(built(torch.tensor([[1]]))[0], model(torch.tensor([[1]]))[0]) and scene.untouched()


BROAD = [
    "torch", "torch.utils", "torch.utils.data.datapipes.datapipe", "torch.nn.functional", "torch._inductor", "functorch",
    "os", "os.path", "collections", "builtins",
]  # fmt: skip


@pytest.mark.parametrize("entry", BROAD)
def test_torch_and_the_standard_library_are_not_trusted_as_a_whole(entry: str, scene: Scene) -> None:
    """Catches trust in a package that has a class for everything."""
    unpickles(scene)
    with pytest.raises(ValueError) as raised:
        shardsave.build_model(scene.checkpoint, trust=["zoo", entry])
    assert str(raised.value) == (
        "trust must name classes and functions of torch and of the standard library one by one, such as "
        f"'torch.nn.modules.normalization.LayerNorm', not the module {entry!r}; modules and functions of torch.nn need no trust"
    )
    assert scene.untouched()


def test_an_exact_name_runs_its_code(scene: Scene) -> None:
    """Catches gadgets that are refused for another reason than trust, so that the tests above would show nothing."""
    unpickles(scene)
    shardsave.build_model(scene.checkpoint, trust=[UNPICKLES.replace(":", ".")])
    assert scene.canary.exists()


#: What is added to the document: objects, imports, attributes. What runs would be in ``traps.ran``.
LISTED: dict[str, tuple[tuple[Json, ...], tuple[str, ...], dict[str, Any], str]] = {
    "a function": ((), ("zoo:double",), {"act": {"import": "zoo:double"}}, f"zoo.double ({CALLED})"),
    "a class": ((), ("zoo:Config",), {"act": {"import": "zoo:Config"}}, f"zoo.Config ({CALLED})"),
    "a class of torch": (
        (),
        ("torch.nn.modules.linear:Linear",),
        {"act": {"import": "torch.nn.modules.linear:Linear"}},
        f"torch.nn.modules.linear.Linear ({CALLED})",
    ),
    "a factory": (
        ({"dict": [], "type": "defaultdict", "factory": {"import": "zoo:Config"}},),
        ("zoo:Config",),
        {},
        f"zoo.Config ({CALLED})",
    ),
    "a method of an object": (
        ({"object": "zoo:Config"},),
        (),
        {"act": {"method": [{"ref": 10}, "wider"]}},
        f"zoo.Config.wider ({CALLED})",
    ),
    "a method of a member of an enum": (
        (),
        ("zoo:Mode",),
        {"act": {"method": [{"enum": ["zoo:Mode", "FAST"]}, "describe"]}},
        f"zoo.Mode.describe ({CALLED})",
    ),
    "a hook": (
        (),
        (),
        {"hooks": None},
        f"zoo.Property.before ({CALLED})",
    ),
    "an object in a partial": (
        ({"object": "zoo:Config"},),
        ("torch.nn.functional:pad",),
        {"act": {"partial": [{"import": "torch.nn.functional:pad"}, [{"ref": 10}], []]}},
        "torch.nn.functional.pad (it is to be called with more than plain values from the file)",
    ),
    "a class in a partial": (
        (),
        ("torch.nn.functional:pad", "zoo:Config"),
        {"act": {"partial": [{"import": "torch.nn.functional:pad"}, [], [["value", {"tuple": [{"import": "zoo:Config"}]}]]]}},
        "torch.nn.functional.pad (it is to be called with more than plain values from the file), zoo.Config",
    ),
    "extra state": ((), (), {"extra_state": 1}, "zoo.Property (its set_extra_state would run on values from the file)"),
    "an object that can be called": (
        ({"object": "traps:Callable"},),
        (),
        {"act": {"ref": 10}},
        "traps.Callable (the model could call an instance, with values from the file)",
    ),
    "a member of an enum that can be called": (
        (),
        ("traps:CallableMember",),
        {"act": {"enum": ["traps:CallableMember", "ONE"]}},
        "traps.CallableMember (the model could call an instance, with values from the file)",
    ),
    "a named tuple that can be called": (
        (),
        ("traps:CallablePair",),
        {"act": {"namedtuple": ["traps:CallablePair", [1, 2]]}},
        "traps.CallablePair (the model could call an instance, with values from the file)",
    ),
    "a dict that takes its state": (
        ({"object": "traps:TakesState", "items": [["a", 1]]},),
        (),
        {},
        "traps.TakesState (its __setstate__ would run on values from the file)",
    ),
    "a class that is derived from for computed tensors": (
        (),
        ("traps:Watched",),
        {"module": "traps:Watched", "parametrized": ["weight"]},
        "traps.Watched (its __init_subclass__ would run)",
    ),
    "a metaclass that makes a class for computed tensors": (
        (),
        ("traps:Made",),
        {"module": "traps:Made", "parametrized": ["weight"]},
        "traps.Made (its metaclass would run)",
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_what_would_run_is_listed(name: str, scene: Scene) -> None:
    """Catches a way to code of a trusted package that needs no exact name, and a message that does not say what would run."""
    objects, imports, changes, reason = LISTED[name]
    scene.save(zoo.Property())
    members = {key: changes[key] for key in ("extra_state", "module", "parametrized") if key in changes}
    if "hooks" in changes:
        members["hooks"] = {"_forward_pre_hooks": [[{"method": [{"ref": 0}, "before"]}, False]]}
    scene.edit(*objects, imports=imports, **{key: value for key, value in changes.items() if key not in {*members, "hooks"}})
    edit_architecture(scene.checkpoint, lambda document: document["objects"][0].update(members))
    traps.ran.clear()
    with pytest.raises(shardsave.UntrustedCodeError) as raised:
        shardsave.build_model(scene.checkpoint, trust=["traps", "zoo"])
    assert f"asks for {reason}" in str(raised.value) and traps.ran == []


def test_classes_given_for_names_are_exact(scene: Scene) -> None:
    """Catches a class or a function in ``classes`` that is refused although it was given for exactly this name."""
    scene.save(zoo.Remembers())
    assert shardsave.build_model(scene.checkpoint, classes={"zoo.Remembers": zoo.Remembers}).cache == "made again"
    scene.edit(imports=("zoo:double",), act={"import": "zoo:double"})
    trusted = {"zoo.Remembers": zoo.Remembers, "zoo.double": torch.relu}
    assert shardsave.build_model(scene.checkpoint, classes=trusted).act is torch.relu


@pytest.mark.parametrize("bound", [True, False])
def test_a_trusted_method_is_no_plain_function(bound: bool, scene: Scene) -> None:
    """Catches a method that, because its exact name is trusted, may be called with any object in the place of its instance."""
    trust = [*scene.save(zoo.Everything()), "zoo.Everything.helper"]
    shardsave.build_model(scene.checkpoint, trust=trust)  # as a method of an instance
    function = {"import": "zoo:Everything.helper"}
    act = {"partial": [function, [{"ref": 11}], []]} if bound else function
    scene.edit({"list": []}, {"list": [1, 2]}, imports=("zoo:Everything.helper",), act=act)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        shardsave.build_model(scene.checkpoint, trust=trust)
    assert str(raised.value) == (
        f"cannot build the architecture in {scene.checkpoint}: classes and functions of a module expected, it asks for "
        "zoo.Everything.helper (a method as a plain function; only a method of an instance can be a value); nothing was built"
    )
    given = shardsave.build_model(scene.checkpoint, trust=trust, classes={"zoo.Everything.helper": torch.relu}).act
    assert (given.func if bound else given) is torch.relu


def test_a_method_as_a_plain_function_is_refused_at_save(scene: Scene) -> None:
    """Catches an architecture that is written although a build would refuse its function."""
    model = nn.Linear(2, 2)
    model.act = zoo.Everything.helper  # type: ignore[assignment]
    with pytest.raises(shardsave.UnsupportedModuleError) as raised:
        scene.save(model)
    assert str(raised.value) == (
        "cannot save the architecture: model.act: a zoo.Everything.helper: a method as a plain function; only a method of an instance "
        "can be a value; nothing was written"
    )


def test_many_names_make_a_short_message(scene: Scene) -> None:
    """Catches a message as long as the file."""
    scene.save(nn.Linear(2, 2))
    scene.edit(imports=tuple(f"stranger{number}:Net" for number in range(3000)))
    with pytest.raises(shardsave.UntrustedCodeError, match=r"stranger199\.Net and 2800 more; if you trust it") as raised:
        shardsave.build_model(scene.checkpoint)
    assert len(str(raised.value)) < 20_000


def test_the_report_names_the_trust(scene: Scene) -> None:
    """Catches a report that does not name what a build needs, or names more."""
    report = shardsave.save(zoo.Everything(), scene.checkpoint, architecture=True, durable=False)
    wanted = ["torch.nn.modules.normalization.LayerNorm", "zoo", "zoo.Everything.helper", "zoo.Remembers", "zoo.double"]
    assert report.trust == tuple(wanted) and str(report).endswith(f"; build with trust={wanted}")
    for entry in wanted:
        with pytest.raises(shardsave.UntrustedCodeError):
            shardsave.build_model(scene.checkpoint, trust=[other for other in wanted if other != entry])
    shardsave.build_model(scene.checkpoint, trust=report.trust)
    assert shardsave.save(nn.Linear(2, 2), scene.checkpoint, architecture=True, durable=False).trust == ()


def test_an_inspection_lists_what_a_build_asks_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a class, a function or a method that is not listed, and an inspection that imports one of them."""
    scene.save(zoo.Everything())
    scene.edit(imports=("stranger:Net", "bell\x07:Net"))
    assert shardsave.inspect(scene.checkpoint).architecture is None
    info = shardsave.inspect(scene.checkpoint, architecture=True).architecture
    assert info is not None
    assert info.uses["zoo.Remembers"] == ("a module", "a module with extra state") and info.uses["stranger.Net"] == ()
    assert info.uses["zoo.double"] == ("a value that the model can call",) and info.needs["zoo.double"] == "zoo.double"
    assert info.uses["zoo.Everything.helper"] == ("a method that the model can call",)
    assert info.versions["torch.tanh"] == f"torch {torch.__version__}" and "torch.tanh" not in info.needs
    assert {"bell\x07", "stranger", "zoo", "zoo.double", "zoo.Everything.helper"} <= set(info.trust)


def test_the_command_line_lists_what_a_build_asks_for(scene: Scene) -> None:
    """Catches a name that is not listed, an import of it, and control characters of a name on a terminal."""
    model = nn.Sequential(zoo.Outer.Inner(), nn.GELU())
    model.norm = nn.LayerNorm  # type: ignore[assignment]
    scene.save(model)
    strange = {"unheard:Net": None, "bell\x07\u202e:Net": "x\x1b"}
    edit_architecture(scene.checkpoint, lambda document: document["imports"].update(strange))
    shown = CliRunner().invoke(cli, ["inspect", str(scene.checkpoint), "--architecture"]).output
    assert sorted(line.split("  ")[0] for line in shown.splitlines()[:7]) == [
        r"bell\x07\u202e.Net",
        "name",
        "torch.nn.modules.activation.GELU",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.normalization.LayerNorm",
        "unheard.Net",
        "zoo.Outer.Inner",
    ]
    assert shown.replace("\n", "").isprintable() and "unheard" not in sys.modules
    assert shown.splitlines()[8].endswith("'torch.nn.modules.normalization.LayerNorm', 'unheard', 'zoo']")
    as_json = CliRunner().invoke(cli, ["inspect", str(scene.checkpoint), "--architecture", "--json"])
    asked = json.loads(as_json.output)["architecture"]
    assert asked["needs"]["zoo.Outer.Inner"] == "zoo" and asked["uses"]["zoo.Outer.Inner"] == ["a module"]
    shardsave.save(nn.Linear(2, 2), scene.checkpoint)
    none = CliRunner().invoke(cli, ["inspect", str(scene.checkpoint), "--architecture"])
    assert none.exit_code == 1
    assert none.output == f"shardsave inspect: {scene.checkpoint}: the checkpoint has no architecture\n"
