"""The layouts of transformers and PEFT for models whose tensors are spread over ranks: the same tensors as of a whole model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from ranks.spread_states import spread_states, whole_tensor
from shardsave._huggingface.added_adapter_saving import AddedAdapterLayout
from shardsave._huggingface.peft_saving import AdapterLayout
from shardsave._huggingface.transformers_saving import TransformersLayout
from shardsave._saving.disk_layout import DiskLayout, IdentityLayout, OnDisk
from shardsave._saving.trainable import only_trainable
from shardsave._state.module import State, read_state
from shardsave.errors import UnsupportedTensorError
from support import same_bits
from transformers_models import tiny

RANKS = 3
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers and PEFT


def on_disk_of_ranks(layout: DiskLayout, state: State) -> tuple[OnDisk, list[OnDisk]]:
    return layout.apply(state), [layout.apply(of_rank) for of_rank in spread_states(state, RANKS)]


def check_same(whole: OnDisk, of_ranks: list[OnDisk]) -> None:
    for one in of_ranks:
        assert [entry[:4] for entry in one.state.entries] == [entry[:4] for entry in whole.state.entries]
        assert one._replace(state=whole.state, copied_bytes=0, notes=()) == whole._replace(copied_bytes=0, notes=())
    for number, entry in enumerate(whole.state.entries):
        if entry.tied_to is None:
            spreads: list[Any] = [one.state.entries[number].source for one in of_ranks]
            assert same_bits(whole_tensor(spreads), entry.tensor), entry.name


#: With ties, with experts that are fused in memory, and with neither. All of `ARCHITECTURES` pass.
NAMES = ["Llama, tied", "T5", "Mixtral", "DeepSeek-V3", "Jamba", "Whisper"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name: str) -> None:
    """Catches a tensor on disk that ranks join of other elements than transformers does, and names that are not those of transformers."""
    built = tiny(name)
    whole, of_ranks = on_disk_of_ranks(TransformersLayout(built, keep_names=False), read_state(built))
    check_same(whole, of_ranks)


class Several(transformers.PreTrainedModel):
    """A user's model of three tensors, which an operation of transformers takes from one on disk."""

    config_class = transformers.PreTrainedConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.parts = torch.nn.ModuleList([torch.nn.Linear(4, 6, bias=False) for _ in range(3)])
        self.out = torch.nn.Linear(3, 2)

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass


def operations() -> dict[str, list[Any]]:
    from transformers.core_model_loading import Chunk, Interleave, SplitModulelist, Transpose

    return {
        "joined": [Chunk(dim=0)],
        "joined columns": [Chunk(dim=1)],
        "stacked": [SplitModulelist(dim=0)],
        "stacked inside": [SplitModulelist(dim=1)],
        "transposed": [Transpose(0, 1)],
        "interleaved": [Interleave(dim=0), Chunk(dim=0)],
    }


@pytest.mark.parametrize("kind", ["joined", "joined columns", "stacked", "stacked inside", "transposed", "interleaved"])
def test_tensors_that_are_one_on_disk(kind: str) -> None:
    """Catches rows of a joined tensor that come from another part, and an operation that ranks cannot do without the whole tensor."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    targets = ["parts.*.weight"] if "stacked" in kind else [f"parts.{n}.weight" for n in range(3)]
    if kind == "transposed":
        targets = ["out.weight"]
    converter = WeightConverter("joined.weight", targets, operations=operations()[kind])
    register_checkpoint_conversion_mapping("Several", [converter], overwrite=True)
    built = Several(transformers.PreTrainedConfig())
    layout = TransformersLayout(built, keep_names=False)
    if kind == "interleaved":
        message = "cannot save 'joined.weight': a tensor that is split, joined or stacked on its way to disk was expected, transformers"
        with pytest.raises(UnsupportedTensorError, match=message):
            on_disk_of_ranks(layout, read_state(built))
        return
    whole, of_ranks = on_disk_of_ranks(layout, read_state(built))
    assert "joined.weight" in {entry.name for entry in whole.state.entries}
    check_same(whole, of_ranks)


def adapted(options: dict[str, Any]) -> Any:
    base = tiny("Llama, tied")
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters(options: dict[str, Any]) -> None:
    """Catches a tensor of an adapter that is replaced by an empty one or by that of another layer, with and without the base model."""
    model = adapted(options)
    state = read_state(model)
    for layout in (AdapterLayout(model), IdentityLayout()):
        check_same(*on_disk_of_ranks(layout, state))
    whole, of_ranks = on_disk_of_ranks(TransformersLayout(model.base_model.model, keep_names=False), state)
    check_same(whole, of_ranks)


def test_an_added_adapter() -> None:
    """Catches the same in a model of transformers that has an adapter: the biases of the base model are in both files."""
    model = tiny("Llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all"))
    check_same(*on_disk_of_ranks(AddedAdapterLayout(model, keep_names=False), read_state(model)))


def test_an_adapter_that_is_computed() -> None:
    """Catches empty tensors in the place of those that PEFT computes of whole ones."""
    model = peft.get_peft_model(tiny("Llama"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(
        UnsupportedTensorError, match="'prompt_embeddings': a tensor of the module was expected, PEFT computes it"
    ):
        on_disk_of_ranks(AdapterLayout(model), read_state(model))


def test_only_what_is_trainable() -> None:
    """Catches buffers of trainable layers that are left out, since no address says which they are."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2).requires_grad_(False))
    state = read_state(model)

    def trainable(of_rank: State) -> OnDisk:
        renamed = [entry._replace(name=f"on_disk.{entry.name}") for entry in of_rank.entries]
        return only_trainable(OnDisk(of_rank._replace(entries=tuple(renamed))), model, of_rank)[0]

    whole = trainable(state)
    assert len(whole.state.entries) == 7
    check_same(whole, [trainable(of_rank) for of_rank in spread_states(state, RANKS)])
