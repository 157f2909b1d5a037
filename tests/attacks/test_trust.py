"""Method: an honest architecture is edited so that code of a trusted package would be called with values that the file chose.

Every case leads to a file being written (the canary) or a directory being changed unless the build is refused. No canary may exist after
the build, and none after the built model was called.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import Json
from test_hostile_architectures import edit_architecture
from torch import nn

import shardsave

T = "transformers.models"
LOADS_FILE = "transformers.dynamic_module_utils:get_class_in_module"
ROFORMER = f"{T}.roformer.tokenization_roformer:RoFormerTokenizer"
JAPANESE = f"{T}.bert_japanese.tokenization_bert_japanese:BertJapaneseTokenizer"
CONFIG = f"{T}.bert.configuration_bert:BertConfig"
WRAPPER = "torch.utils.data.datapipes.datapipe:_DataPipeSerializationWrapper"


class Scene:
    """A checkpoint that an attacker edits, a Python file that writes the canary, and a directory of the victim."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.canary, self.victim = folder / "ckpt", folder / "canary", folder / "victim"
        self.script = folder / f"script_{abs(hash(folder))}.py"
        self.script.write_text(f"open({str(self.canary)!r}, 'w').close()\nclass X: pass\n")

    def save(self, model: nn.Module) -> None:
        shardsave.save(model, self.checkpoint, architecture=True, durable=False, progress=False)

    def edit(self, *objects: Json, imports: tuple[str, ...] = (), **attributes: Any) -> None:
        """Adds objects, from number ``len(objects)`` of the saved table on, and attributes of the root."""

        def change(document: Json) -> None:
            document["imports"].update(dict.fromkeys(imports))
            document["imports"].update({node["object"]: None for node in objects if "object" in node})
            self.first = len(document["objects"])
            document["objects"].extend(objects)
            document["objects"][0].setdefault("attributes", {}).update(attributes)

        edit_architecture(self.checkpoint, change)

    def partial(self, function: str, **named: Any) -> Json:
        return {"partial": [{"import": function}, [], [[name, value] for name, value in named.items()]]}

    def import_script(self) -> Json:
        return self.partial(LOADS_FILE, class_name="X", module_path=str(self.script))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1, vocab_size=3, max_position_embeddings=4
    )
    model = BertModel(config).eval()
    model.embeddings.LayerNorm.bias.data.fill_(1.0)
    return model


def roformer(scene: Scene) -> None:
    scene.save(nn.Linear(2, 2))
    scene.edit(
        {"object": ROFORMER, "attributes": {"_tokenizer": {"ref": 4}}},
        {"object": CONFIG, "attributes": {"get_vocab": scene.import_script()}},
        imports=(LOADS_FILE,),
    )


def japanese(scene: Scene) -> None:
    scene.save(nn.Linear(2, 2))
    scene.edit(
        {"object": JAPANESE, "state": {"ref": 5}},
        {"object": CONFIG, "attributes": {"keys": scene.import_script()}},
        {"dict": [["word_tokenizer_type", "mecab"], ["lower_case", True], ["never_split", None], ["mecab_kwargs", {"ref": 4}]]},
        imports=(LOADS_FILE,),
    )


class Writes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def unpickles(scene: Scene) -> None:
    scene.save(nn.Linear(2, 2))
    payload = base64.b64encode(pickle.dumps(Writes(scene.canary))).decode()
    scene.edit({"object": WRAPPER, "state": {"tuple": [{"bytes": payload}, False]}})


GADGETS: dict[str, tuple[Callable[[Scene], None], list[str]]] = {
    "RoFormerTokenizer": (roformer, ["transformers"]),
    "BertJapaneseTokenizer": (japanese, ["transformers"]),
    "torch": (unpickles, ["torch"]),
    "torch.utils": (unpickles, ["torch.utils"]),
}


@pytest.mark.parametrize("name", GADGETS)
def test_repro(name: str, scene: Scene) -> None:
    make, trust = GADGETS[name]
    make(scene)
    try:
        shardsave.build_model(scene.checkpoint, trust=trust)
    except Exception as e:
        print(type(e), e)
    assert not scene.canary.exists()


def test_activation(scene: Scene) -> None:
    scene.save(bert())

    def change(document: Json) -> None:
        document["imports"][LOADS_FILE] = None
        node = next(n for n in document["objects"] if str(n.get("module")).endswith("BertIntermediate"))
        node["attributes"]["intermediate_act_fn"] = scene.partial(LOADS_FILE, module_path=str(scene.script))

    edit_architecture(scene.checkpoint, change)
    try:
        model = shardsave.build_model(scene.checkpoint, trust=["transformers"])
        model(torch.tensor([[1]]))
    except Exception as e:
        print(type(e), e)
    assert not scene.canary.exists()


def test_dropout(scene: Scene) -> None:
    scene.save(bert())
    scene.victim.mkdir()
    exact = []

    def change(document: Json) -> None:
        node = next(n for n in document["objects"] if str(n.get("module")).endswith("BertEmbeddings"))
        del node["children"]["dropout"]
        node["attributes"]["dropout"] = {"partial": [{"method": [{"ref": 0}, "save_pretrained"]}, [str(scene.victim)], []]}
        exact.extend(name.replace(":", ".") for name in document["imports"])

    edit_architecture(scene.checkpoint, change)
    try:
        model = shardsave.build_model(scene.checkpoint, trust=[n for n in exact if not n.startswith("torch.nn")])
        model(torch.tensor([[1]]))
    except Exception as e:
        print(type(e), e)
    assert not list(scene.victim.iterdir())
