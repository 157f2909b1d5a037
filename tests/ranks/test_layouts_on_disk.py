"""The layouts of transformers and PEFT for models whose tensors are spread over ranks: the same tensors as of a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ranks.spread_states import spread_states, whole_tensor
from shardsave._huggingface.transformers_saving import TransformersLayout
from shardsave._saving.disk_layout import DiskLayout, OnDisk
from shardsave._state.module import State, read_state
from shardsave.errors import UnsupportedTensorError
from support import same_bits
from transformers_models import tiny

RANKS = 3


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
