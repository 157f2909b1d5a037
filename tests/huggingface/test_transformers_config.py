"""transformers models without an architecture: built from the config beside the weights, and from nothing else."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import shardsave
from support import same_bits, same_state
from transformers_models import ARCHITECTURES, tiny
from warm_python import warm_python

pytestmark = pytest.mark.slow

transformers.logging.set_verbosity_error()

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def frozen_in(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def built(folder: Path, **options: Any) -> Any:
    return shardsave.build_model(folder, trust=["transformers"], **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_built_is_what_was_saved(name: str, tmp_path: Path) -> None:
    """Catches a weight, an unsaved buffer, a tie, a flag or a module that differs from the saved model."""
    model = tiny(name, 3).eval()
    shardsave.save(model, tmp_path, durable=False)
    again = built(tmp_path)
    assert type(again) is type(model) and repr(again) == repr(model)
    assert same_state(again, model) and frozen_in(again) == frozen_in(model) != set()
    buffers, others = dict(model.named_buffers()), dict(again.named_buffers())
    assert buffers.keys() == others.keys() and all(same_bits(buffers[key], others[key]) for key in buffers)
    assert len(set(map(id, again.parameters()))) == len(set(map(id, model.parameters())))


def test_what_save_pretrained_wrote(tmp_path: Path) -> None:
    """Catches a builder that needs an index of shardsave, or ignores the generation config."""
    model = llama()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    again = built(tmp_path)
    assert same_state(again, model) and again.generation_config.max_new_tokens == 7 and not again.training


def test_dtypes_are_those_of_the_files(tmp_path: Path) -> None:
    """Catches weights that are cast to the single dtype in the config."""
    model = llama().to(torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad():
        model.lm_head.weight.fill_(1 / 3)
    shardsave.save(model, tmp_path, durable=False)
    assert same_state(built(tmp_path), model)


def test_nothing_is_imported_that_is_not_trusted(tmp_path: Path) -> None:
    """Catches an import of transformers that only a file asks for."""
    shardsave.save(bert(), tmp_path, durable=False)
    program = (
        "import sys, shardsave\n"
        "try: shardsave.build_model(sys.argv[1])\n"
        "except shardsave.UntrustedCodeError as error: print(error)\n"
        "print('transformers' in sys.modules)"
    )
    done = warm_python().run(["-c", program, tmp_path])
    assert done.stdout == (
        f"cannot build a model from {tmp_path}/config.json: only what is trusted is imported, the config names "
        f"transformers.BertForMaskedLM; if you trust it, pass trust=['transformers']; nothing was imported\nFalse\n"
    )


def test_one_class_may_be_trusted(tmp_path: Path) -> None:
    """Catches trust in one class that counts as trust in no class or in all classes."""
    shardsave.save(bert(), tmp_path, durable=False)
    shardsave.build_model(tmp_path, trust=["transformers.BertForMaskedLM"])
    with pytest.raises(shardsave.UntrustedCodeError, match="the config names transformers.BertForMaskedLM"):
        shardsave.build_model(tmp_path, trust=["transformers.BertModel"])


@pytest.mark.parametrize(("name", "module"), [("BART", "bart.modeling_bart:BartDecoder"), ("T5", "t5.modeling_t5:T5Stack")])
def test_classes_that_are_not_exported(name: str, module: str, tmp_path: Path) -> None:
    """Catches a model that is found only if the package exports its name; a decoder on its own has none."""
    place, _, class_name = module.partition(":")
    model_class = getattr(importlib.import_module(f"transformers.models.{place}"), class_name)
    assert not hasattr(transformers, class_name)
    torch.manual_seed(5)
    model = model_class(tiny(name).config).eval()
    shardsave.save(model, tmp_path, durable=False)
    with pytest.raises(shardsave.UntrustedCodeError, match=f"the config names transformers.{class_name}"):
        shardsave.build_model(tmp_path, trust=["transformers.PreTrainedModel"])
    again = shardsave.build_model(tmp_path, trust=[f"transformers.{class_name}"])
    assert type(again) is model_class and same_state(again, model)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"architectures": []}, "the name of one class of transformers was expected, its architectures are []"),
    "several": ({"architectures": ["A", "B"]}, "its architectures are ['A', 'B']"),
    "a path": ({"architectures": ["os.system"]}, "its architectures are ['os.system']"),
    "not a model": ({"architectures": ["pipeline"]}, "pipeline was expected to be a model of transformers"),
    "of another model": ({"architectures": ["BartDecoder"]}, "BartDecoder was expected to be a model of transformers"),
    "no such model": ({"architectures": ["NoSuchModel"]}, "NoSuchModel was expected to be a model of transformers"),
    "a base class": ({"architectures": ["PreTrainedModel"]}, "PreTrainedModel was expected to be a model of transformers"),
    "another type": ({"model_type": "gpt2"}, "BertForMaskedLM expects model_type 'bert', it has 'gpt2'"),
    "quantized": ({"quantization_config": {}}, "a model that is not quantized was expected"),
    "bad sizes": ({"hidden_size": "many"}, "was expected to be built from it, it raised"),
    "sizes that do not fit": (
        {"hidden_size": 16, "num_attention_heads": 3},
        "was expected to be built from it, it raised ValueError",
    ),
    "other sizes": ({"intermediate_size": 32}, "the module's names and shapes were expected, there are 6 mismatched"),
}


@pytest.mark.filterwarnings("ignore:config.json is not the one saved")
@pytest.mark.parametrize("what", BAD)
def test_configs_that_cannot_be_built(what: str, tmp_path: Path) -> None:
    """Catches a config that leads to anything but a model, or that fails with a bare error of transformers."""
    values, said = BAD[what]
    shardsave.save(bert(), tmp_path, durable=False)
    change(tmp_path, **values)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        built(tmp_path)
    assert said in str(raised.value)


@pytest.mark.filterwarnings("ignore:config.json is not the one saved")
@pytest.mark.parametrize(
    ("text", "said"), [("[1]", "a JSON object expected, it is [1]"), ('{"a', "JSON expected"), ("[" * 99999, "nested")]
)
def test_configs_that_are_no_json(text: str, said: str, tmp_path: Path) -> None:
    """Catches an error for a broken file that does not name the file."""
    shardsave.save(bert(), tmp_path, durable=False)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(shardsave.CorruptCheckpointError, match="corrupt config.json: ") as raised:
        built(tmp_path)
    assert said in str(raised.value)


def test_arguments_that_a_class_reads_without_declaring_them(tmp_path: Path) -> None:
    """Catches a choice of arguments so narrow that honest files lose a size: an undeclared one, an older name, an alias."""
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, head_dim=12))
    shardsave.save(model, tmp_path / "undeclared", durable=False)
    assert same_state(built(tmp_path / "undeclared"), model)
    shardsave.save(gpt2 := tiny("GPT-2", 1), tmp_path / "alias", durable=False)
    config = tmp_path / "alias" / "config.json"
    config.write_text(config.read_text().replace('"n_embd"', '"hidden_size"').replace('"dtype"', '"torch_dtype"'))
    with pytest.warns(UserWarning, match="config.json is not the one saved"):
        assert same_state(built(tmp_path / "alias"), gpt2)


@pytest.mark.filterwarnings("ignore:config.json is not the one saved")
@pytest.mark.parametrize("name", ["Llama", "BART"])
@pytest.mark.parametrize("writer", ["shardsave", "transformers"])
def test_a_head_that_the_config_ties_and_the_checkpoint_does_not(name: str, writer: str, tmp_path: Path) -> None:
    """Catches a head that is lost to the embedding, or refused; `from_pretrained` keeps it. An equal head stays tied."""
    model = tiny(name, 7).eval()
    head = model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    shardsave.save(model, tmp_path, durable=False) if writer == "shardsave" else model.save_pretrained(tmp_path)
    change(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"^lm_head.weight and model.\S+ have different values in .*, so they are not tied"):
        again = built(tmp_path)
    assert same_state(again, model) and same_bits(again.lm_head.weight, head)
    assert "lm_head.weight" not in again.all_tied_weights_keys
    reference = type(model).from_pretrained(tmp_path)
    assert same_state(reference, again) and len(set(map(id, reference.parameters()))) == len(set(map(id, again.parameters())))
    shardsave.save(again, tmp_path / "twice", durable=False)
    with pytest.warns(UserWarning, match="so they are not tied"):
        assert same_state(built(tmp_path / "twice"), model)


def test_an_equal_head_stays_tied(tmp_path: Path) -> None:
    """Catches a tie that is cut only because a file has the tensor twice."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    change(tmp_path, tie_word_embeddings=True)
    again = built(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and same_state(again, model)


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    """Catches an infinity that is loaded as a dictionary."""
    model = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **{**SMALL, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
        )
    )
    assert model.config.time_step_limit == (0.0, float("inf"))
    shardsave.save(model, tmp_path, durable=False)
    assert '"Infinity"' in (tmp_path / "config.json").read_text()
    assert built(tmp_path).config.time_step_limit == [0.0, float("inf")]
