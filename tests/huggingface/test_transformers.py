"""transformers models: the files are those of `save_pretrained`, and each library loads what the other saved."""

from __future__ import annotations

import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import shardsave
from shardsave._huggingface.transformers_names import NamesInMemory
from support import ROOT, same_bits, same_state
from transformers_models import ARCHITECTURES, FUSED, IMAGE, tiny
from warm_python import warm_python

transformers = pytest.importorskip("transformers")
CONFIGS = ("config.json", "generation_config.json")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, as the safetensors library reads it."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def frozen_in(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_as_save_pretrained_does(tmp_path: Path, name: str) -> None:
    """Catches a name, a layout, a dtype or a config that other readers do not expect; a missing or additional key for
    from_pretrained; a changed bit; and flags that are not recorded under the names in the module."""
    model = tiny(name)
    own, reference = tmp_path / "shardsave", tmp_path / "transformers"
    report = shardsave.save(model, own, max_shard_size="100KB")
    assert not report.notes
    model.save_pretrained(reference)
    actual, expected = on_disk(own), on_disk(reference)
    assert actual.keys() == expected.keys() and all(same_bits(actual[name], expected[name]) for name in expected)
    for config in CONFIGS:
        assert (own / config).exists() == (reference / config).exists()
        if (reference / config).exists():
            assert (own / config).read_bytes() == (reference / config).read_bytes()
    loaded, loading_info = type(model).from_pretrained(own, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_state(model, loaded)
    info = shardsave.inspect(own)
    assert info.frozen == frozen_in(model) and not info.notes and not shardsave.verify(own).notes
    for folder in (own, reference):
        fresh = tiny(name, seed=1).requires_grad_(True)
        before = list(fresh.parameters())
        recomputed = fresh._keys_to_ignore_on_save or set()
        report = shardsave.load_model(fresh, folder)
        assert all(old is new for old, new in zip(before, fresh.parameters(), strict=True))
        assert all(
            same_bits(a, b) for (n, a), b in zip(model.state_dict().items(), fresh.state_dict().values()) if n not in recomputed
        )
        assert frozen_in(fresh) == (frozen_in(model) if folder == own else set())
        assert report.tensors >= len(actual) and not (report.missing or report.unexpected or report.notes)


def test_fused_models_are_split_on_disk(tmp_path: Path) -> None:
    """Catches a table of fused models without one: experts must be one tensor in memory and several on disk."""
    for name in FUSED:
        model = tiny(name)
        shardsave.save(model, tmp_path, durable=False)
        assert shardsave.inspect(tmp_path).names != tuple(model.state_dict()), name


def test_a_meta_model(tmp_path: Path) -> None:
    """Catches parts that are read into memory that the materialised model does not use, and lost flags."""
    model = tiny("Mixtral")
    model.save_pretrained(tmp_path / "transformers")
    shardsave.save(model, tmp_path / "shardsave")
    for folder in ("shardsave", "transformers"):
        with torch.device("meta"):
            fresh = transformers.MixtralForCausalLM(model.config)
        fresh.model.rotary_emb = type(fresh.model.rotary_emb)(model.config)
        shardsave.load_model(fresh, tmp_path / folder)
        assert same_state(fresh, model) and frozen_in(fresh) == (frozen_in(model) if folder == "shardsave" else set())


def test_casts(tmp_path: Path) -> None:
    """Catches parts of a tensor that are cast differently than by from_pretrained."""
    model = tiny("Mixtral")
    model.save_pretrained(tmp_path)
    fresh = tiny("Mixtral", seed=1).to(torch.bfloat16)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, type(model).from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_another_head(tmp_path: Path) -> None:
    """Catches a base model that is not found in a model with a head, or the reverse, lost flags, and wrong names in a report."""
    model = tiny("BERT")
    shardsave.save(model, tmp_path / "head")
    base = transformers.BertModel(model.config, add_pooling_layer=False)
    with pytest.raises(
        shardsave.IncompatibleCheckpointError, match=r"there are 7 not in the module: cls\.predictions\.bias, .*; the module is"
    ):
        shardsave.load_model(base, tmp_path / "head")
    report = shardsave.load_model(base, tmp_path / "head", strict=False)
    assert same_state(base, model.bert) and frozen_in(base) == frozen_in(model.bert)
    assert all(name.startswith("cls.") for name in report.unexpected)
    shardsave.save(base, tmp_path / "base")
    fresh = tiny("BERT", seed=1)
    report = shardsave.load_model(fresh, tmp_path / "base", strict=False)
    assert same_state(fresh.bert, model.bert) and frozen_in(fresh.bert) == frozen_in(model.bert)
    assert report.missing == tuple(
        sorted(name for name in fresh.state_dict() if "cls" in name and "decoder.weight" not in name)
    )
    part = transformers.BertModel(model.config, add_pooling_layer=False)
    shardsave.load_model(part, tmp_path / "head", prefix="bert.")
    assert same_state(part, model.bert) and frozen_in(part) == frozen_in(model.bert)


def test_old_names(tmp_path: Path) -> None:
    """Catches an old checkpoint that is refused for its old names, or for a buffer that is no longer saved."""
    model = tiny("BERT")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    shardsave.save(old, tmp_path)
    fresh = tiny("BERT", seed=1)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model)


def test_names_in_memory(tmp_path: Path) -> None:
    """Catches a state dict, saved with the names in memory, that cannot be loaded."""
    model = tiny("Mixtral")
    shardsave.save(model.state_dict(), tmp_path)
    fresh = tiny("Mixtral", seed=1)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model)


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    """Catches a missing expert, or a fused tensor of another size, that is noticed only when the model is half loaded."""
    model = tiny("Mixtral")
    shardsave.save(model, tmp_path / "all")
    stored = shardsave.load(tmp_path / "all")
    missing_name = next(name for name in stored if re.search(r"experts\.3\.w2", name))
    shardsave.save({name: tensor for name, tensor in stored.items() if name != missing_name}, tmp_path / "one-missing")
    cut_name = next(name for name in stored if re.search(r"experts\.3\.w1", name))
    shardsave.save({name: tensor[:-1] if name == cut_name else tensor for name, tensor in stored.items()}, tmp_path / "one-cut")
    before = tiny("Mixtral", seed=1)
    fresh = tiny("Mixtral", seed=1)
    for folder, words in (
        (
            "one-missing",
            r"1 mismatched: model\.layers\.0\.mlp\.experts\.down_proj \[3, 32, 64\] on disk, \[4, 32, 64\] in the module",
        ),
        (
            "one-cut",
            r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' was expected to be made of 8 stored tensors, .* raised RuntimeError",
        ),
    ):
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=f"{words}.*the module is unchanged"):
            shardsave.load_model(fresh, tmp_path / folder)
        assert same_state(fresh, before)


def test_damaged_expert(tmp_path: Path) -> None:
    """Catches a damaged part that is loaded, or that is not reported by its name on disk."""
    model = tiny("Mixtral")
    shardsave.save(model, tmp_path)
    needle = model.model.layers[1].mlp.experts.down_proj[2].detach().numpy().tobytes()
    (path,) = [path for path in tmp_path.glob("*.safetensors") if needle in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(needle) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        shardsave.CorruptCheckpointError, match=r"tensor 'model.layers.1.block_sparse_moe.experts.2.w2.weight' has"
    ):
        shardsave.load_model(tiny("Mixtral", seed=1), tmp_path)


class Joined(transformers.PreTrainedModel):
    """A user's model in which three tensors are one on disk."""

    config_class = transformers.PreTrainedConfig
    base_model_prefix = "model"

    def __init__(self, config: Any, hooked: bool = False) -> None:
        super().__init__(config)
        self.attention = torch.nn.ModuleDict({part: torch.nn.Linear(4, 3, bias=False) for part in ("q", "k", "v")})
        self.out = torch.nn.Linear(3, 2)
        self.seen: list[str] = []
        if hooked:
            self.attention.register_load_state_dict_pre_hook(lambda module, state, *rest: self.seen.extend(state))

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass


@pytest.fixture
def joined_on_disk() -> None:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    parts = [f"attention.{part}.weight" for part in ("q", "k", "v")]
    converter = WeightConverter("attention.qkv.weight", parts, operations=[Chunk(dim=0)])
    register_checkpoint_conversion_mapping("Joined", [converter], overwrite=True)


def test_joined_on_disk(tmp_path: Path, joined_on_disk: None) -> None:
    """Catches tensors that are joined on disk and so left out, loaded in a wrong order or hidden from a load hook; and copies in
    memory without a note."""
    model = Joined(transformers.PreTrainedConfig())
    model.attention.requires_grad_(False)
    report = shardsave.save(model, tmp_path / "shardsave")
    assert report.notes == ("144 B were copied in memory, since these tensors are joined on disk",)
    model.save_pretrained(tmp_path / "transformers")
    actual, expected = on_disk(tmp_path / "shardsave"), on_disk(tmp_path / "transformers")
    assert actual.keys() == expected.keys() == {"attention.qkv.weight", "out.weight", "out.bias"}
    assert all(same_bits(actual[name], expected[name]) for name in expected)
    assert shardsave.inspect(tmp_path / "shardsave").frozen == frozen_in(model)
    for hooked in (False, True):
        for folder in ("shardsave", "transformers"):
            fresh = Joined(transformers.PreTrainedConfig(), hooked)
            report = shardsave.load_model(fresh, tmp_path / folder)
            assert same_state(fresh, model) and report.tensors == 3
            assert frozen_in(fresh) == (frozen_in(model) if folder == "shardsave" else set())
            assert sorted(fresh.seen) == (["k.weight", "q.weight", "v.weight"] if hooked else [])


def test_experts_of_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the experts of all layers in memory at the same time, if a hook makes each layer load itself."""
    model, fresh = tiny("Mixtral"), tiny("Mixtral", seed=1)
    joined: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    alive = []
    convert = NamesInMemory.convert

    def watched(*arguments: Any) -> dict[str, torch.Tensor]:
        values = convert(*arguments)
        joined.update(value for value in values.values() if not value.is_meta)
        return values

    monkeypatch.setattr(NamesInMemory, "convert", watched)
    for layer in fresh.model.layers:
        layer.register_load_state_dict_pre_hook(lambda *_: alive.append(len(joined)))
    shardsave.save(model, tmp_path)
    shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model) and alive == [2, 2]


def pixio(seed: int, kind: str = "PixioBackbone") -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.PixioConfig(**IMAGE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_a_mapping_that_is_not_its_own_inverse(tmp_path: Path) -> None:
    """Catches two layer norms that are swapped: transformers gives the names on disk of this class to other tensors in memory."""
    model = pixio(1)
    model.layernorm.requires_grad_(False)
    report = shardsave.save(model, tmp_path / "own")
    norms = "pixio.layernorm.weight, pixio.layernorm.bias, layernorm.weight and 1 more"
    assert report.notes == (
        f"names and tensors are stored as they are in memory, since transformers would not give back {norms} from its own layout "
        "of PixioBackbone",
        f"from_pretrained renames {norms} to other names, load_model does not",
    )
    # One tensor more, one wrapper more, or another reader: the names are still those in memory.
    shardsave.save({**model.state_dict(), "more": torch.ones(1)}, tmp_path / "more")
    shardsave.save(torch.nn.ModuleDict({"inner": model}), tmp_path / "inner")
    for folder, prefix in (("own", ""), ("more", ""), ("inner", "inner.")):
        fresh = pixio(2)
        shardsave.load_model(fresh, tmp_path / folder, prefix=prefix, strict=False)
        assert same_state(fresh, model)
        assert folder == "more" or frozen_in(fresh) == {"layernorm.weight", "layernorm.bias"}
    misread = type(model).from_pretrained(tmp_path / "own").state_dict()
    assert same_bits(misread["layernorm.weight"], model.pixio.layernorm.weight)  # what the note says
    assert not shardsave.save(pixio(1, "PixioModel"), tmp_path / "one-norm").notes


def test_files_of_a_mapping_that_is_not_its_own_inverse(tmp_path: Path) -> None:
    """Catches layer norms that save_pretrained has exchanged on disk and that a load then exchanges without a word."""
    model = pixio(1)
    model.save_pretrained(tmp_path / "norms")
    fresh = pixio(2)
    words = "pixio.layernorm.weight, pixio.layernorm.bias, layernorm.weight and 1 more may have been exchanged"
    assert shardsave.load_model(fresh, tmp_path / "norms").notes[0].startswith(words)
    assert same_bits(fresh.layernorm.weight, model.pixio.layernorm.weight)  # what the note says
    with pytest.warns(UserWarning, match=words):
        shardsave.build_model(tmp_path / "norms", trust=["transformers"])
    pixio(1, "PixioModel").save_pretrained(tmp_path / "one-norm")
    assert not shardsave.load_model(pixio(2, "PixioModel"), tmp_path / "one-norm").notes


class Misnamed(transformers.PreTrainedModel):
    """A user's model in which two names are one on disk, or that has names which transformers renames when it loads."""

    config_class = transformers.PreTrainedConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first = torch.nn.Linear(3, 2)
        self.second = torch.nn.Linear(3, 2)
        self.LayerNorm = torch.nn.ParameterDict({"gamma": torch.rand(2), "weight": torch.rand(2)})

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass


def test_names_that_meet_or_move(tmp_path: Path) -> None:
    """Catches a tensor that is lost because another has its name on disk, and names that transformers takes for old ones."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model = Misnamed(transformers.PreTrainedConfig())
    for renamings, lost in (([], "LayerNorm.gamma"), ([WeightRenaming("first", "second")], "first.weight")):
        register_checkpoint_conversion_mapping("Misnamed", renamings, overwrite=True)
        (note, *_) = shardsave.save(model, tmp_path).notes
        assert note.startswith("names and tensors are stored as they are in memory") and lost in note
        fresh = Misnamed(transformers.PreTrainedConfig())
        shardsave.load_model(fresh, tmp_path)
        assert same_state(fresh, model)


def test_a_layout_that_was_given_to_from_pretrained(tmp_path: Path) -> None:
    """Catches names that only the key_mapping of one call of from_pretrained leads back to the model."""
    model = tiny("BERT")
    old = {name.replace("bert.encoder", "bert.stack"): tensor.clone() for name, tensor in model.state_dict().items()}
    shardsave.save(old, tmp_path / "old")
    model.config.save_pretrained(tmp_path / "old")
    loaded = type(model).from_pretrained(tmp_path / "old", key_mapping={r"^bert\.stack": "bert.encoder"})
    report = shardsave.save(loaded, tmp_path / "new")
    assert len(report.notes) == 1 and "would not give back bert.encoder.layer.0" in report.notes[0]
    fresh = tiny("BERT", seed=1)
    shardsave.load_model(fresh, tmp_path / "new")
    assert same_state(fresh, loaded) and same_state(type(model).from_pretrained(tmp_path / "new"), loaded)


def test_a_wrapped_model(tmp_path: Path) -> None:
    """Catches a wrapper that hides the model, or whose prefix is in the names on disk."""
    model = tiny("Mixtral")
    shardsave.save(model, tmp_path / "plain")
    shardsave.save(torch.nn.DataParallel(torch.compile(model)), tmp_path / "wrapped")
    assert on_disk(tmp_path / "wrapped").keys() == on_disk(tmp_path / "plain").keys()
    assert (tmp_path / "wrapped" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


def test_a_config_of_another_save(tmp_path: Path) -> None:
    """Catches a config of another save, or an edited one, without a note in the reports."""
    model = tiny("BERT")
    shardsave.save(model, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 100', '"vocab_size": 101'))
    words = "config.json is not the one saved with these weights: [0-9]+ bytes .*; it was edited, or comes from another save"
    assert_noted(tmp_path, words)
    config.unlink()
    assert_noted(tmp_path, r"config.json is not .* expected, there is none; it was edited.*")
    os.mkfifo(config)
    assert_noted(
        tmp_path, r"config.json is not .* expected, it cannot be read \(open: a regular file was expected, it is a FIFO\).*"
    )
    config.unlink()
    shardsave.save(model, tmp_path)
    assert not shardsave.inspect(tmp_path).notes and "not the one" not in str(shardsave.inspect(tmp_path))


def assert_noted(folder: Path, words: str) -> None:
    model = tiny("BERT")
    reports: list[Any] = [shardsave.inspect(folder), shardsave.verify(folder), shardsave.load_model(model, folder)]
    for report in reports:
        (note,) = report.notes
        assert_matches(words, note)
        assert note in str(report)


def assert_matches(words: str, text: str) -> None:
    assert re.fullmatch(words, text), text


def test_other_files_stay(tmp_path: Path) -> None:
    """Catches a save that touches a foreign file, follows a symbolic link out of the directory, or removes a config."""
    (tmp_path / "tokenizer.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("foreign")
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").symlink_to(elsewhere)
    model = tiny("BERT")
    shardsave.save(model, folder)
    assert elsewhere.read_text() == "foreign" and not (folder / "config.json").is_symlink()
    shardsave.save(model.state_dict(), folder)
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "config.json"}
    assert shardsave.inspect(folder).companions == () and not shardsave.inspect(folder).notes
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(shardsave.SaveNotCommittedError, match=r"config.json: .*directory; nothing was committed"):
        shardsave.save(model, folder)
    assert shardsave.load(folder)


def test_a_save_does_not_change_the_model(tmp_path: Path) -> None:
    """Catches a save that changes the config, as save_pretrained does, or that leaves attributes on the tensors."""
    model = tiny("Mixtral")
    before = model.config.to_json_string()
    shardsave.save(model.to(torch.bfloat16), tmp_path)
    assert model.config.to_json_string() == before.replace('"float32"', '"bfloat16"') or model.config.to_json_string() == before
    assert not any(hasattr(tensor, "_shardsave_sources") for tensor in model.state_dict(keep_vars=True).values())


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    """Catches an import of transformers for a plain torch model."""
    program = "import sys, torch, shardsave; m, to = torch.nn.Linear(2, 2), sys.argv[1]; shardsave.save(m, to)"
    check = "; shardsave.load_model(m, to); assert 'transformers' not in sys.modules"
    warm_python().run(["-c", program + check, tmp_path]).check_returncode()


def test_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that fails, and a table of architectures that differs from that of the tests."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "transformers.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "transformers.md", "exec"), {})
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| ✓", text, re.MULTILINE)
    assert rows == [(name, kind) for name, (kind, _, _) in ARCHITECTURES.items()]
