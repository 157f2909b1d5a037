"""Models of transformers and PEFT that ``fully_shard`` has sharded: what ranks agree on, and what will be on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardsave
from jobs import run_ranks
from ranks.test_agree import assembled, global_state, summary
from ranks.test_failing_loads import raised
from ranks.test_save import same_files
from shardsave._huggingface.choose_saving import choose_layout
from shardsave._saving.disk_layout import DiskLayout
from shardsave._state.module import read_state
from support import same_bits


def llama(name: str) -> Any:
    from transformers_models import tiny

    return tiny(name)


def lora(name: str) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(llama(name), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def added(name: str) -> Any:
    import peft

    model = llama(name)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def joined(name: str) -> Any:
    """A user's model whose tensors are one on disk, which transformers knows by the name of its class."""
    import transformers
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    from ranks.test_layouts_on_disk import Several

    parts = [f"parts.{n}.weight" for n in range(3)]
    register_checkpoint_conversion_mapping(
        name, [WeightConverter("joined.weight", parts, operations=[Chunk(dim=0)])], overwrite=True
    )
    torch.manual_seed(0)
    return Several(transformers.PreTrainedConfig())


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def same_on_disk(rank: int) -> None:
    for build, name, adapter_only in [
        (llama, "Llama, tied", False),
        (llama, "Mixtral", False),
        (lora, "Llama, tied", False),
        (lora, "Llama", True),
        (added, "Llama", False),
        (joined, "Several", False),
    ]:
        whole, model = build(name), build(name)
        shard(model)
        expected, state = read_state(whole), global_state(model)
        assert summary(state) == summary(expected), (build, name)
        on_disk = layout(model, adapter_only).apply(state)
        on_disk_whole = layout(whole, adapter_only).apply(expected)
        assert summary(on_disk.state) == summary(on_disk_whole.state), (build, name)
        assert on_disk._replace(state=on_disk_whole.state, copied_bytes=0, notes=()) == on_disk_whole._replace(
            copied_bytes=0, notes=()
        )
        assert build is not joined or on_disk.state.entries[0].name == "joined.weight"
        assert type(model).__name__ == f"FSDP{type(whole).__name__}"
        for entry, one in zip(on_disk.state.entries, on_disk_whole.state.entries):
            source: Any = entry.source
            assert entry.tied_to is not None or same_bits(assembled(source), one.tensor), (name, entry.name)


def layout(model: Any, adapter_only: bool) -> DiskLayout:
    return choose_layout(model, adapter_only, with_parts=False)


def test_same_on_disk() -> None:
    """Catches a model whose class ``fully_shard`` changed and that no layout recognises, flags of frozen weights under an adapter, ties."""
    run_ranks(2, same_on_disk, seconds=100)


def how_often_asked(rank: int, folder: Path) -> list[int]:
    """How often saves of a model whose names stay, and of one whose tensors are taken apart, have asked transformers how."""
    from shardsave._huggingface import transformers_saving

    asked = []
    for name in ("Llama", "Mixtral"):
        model = llama(name)
        shard(model)
        with mock.patch.object(transformers_saving, "reverted", wraps=transformers_saving.reverted) as revert:
            shardsave.save(model, folder / name, durable=False)
        asked.append(revert.call_count)
    return asked


def test_one_rank_asks_transformers(tmp_path: Path) -> None:
    """Catches ranks that all compile transformers' patterns for names that stay as they are, and one that then takes nothing apart."""
    for name in ("Llama", "Mixtral"):
        shardsave.save(llama(name), tmp_path / "one" / name, durable=False)
    asked = run_ranks(2, how_often_asked, tmp_path / "many", seconds=100)
    assert asked == [[1, 1], [0, 1]]
    for name in ("Llama", "Mixtral"):
        same_files(tmp_path / "one" / name, tmp_path / "many" / name)


def converted_on_one(rank: int, folder: Path) -> list[tuple[str, str]]:
    """Saves a model that transformers converts on one rank alone: first on rank 1, then on both, then on rank 0."""
    import transformers
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    from ranks.test_layouts_on_disk import Several

    ends = []
    for number, ranks in enumerate(([1], [0, 1], [0])):
        torch.manual_seed(0)
        model = joined("Several") if rank in ranks else Several(transformers.PreTrainedConfig())
        if rank not in ranks:
            register_checkpoint_conversion_mapping("Several", [], overwrite=True)
        options: dict[str, Any] = {"process_group": dist.group.WORLD, "durable": False}
        ends.append(raised(lambda model=model, number=number: shardsave.save(model, folder / str(number), **options)))  # type: ignore[misc]
    return ends


def test_a_conversion_that_one_rank_has(tmp_path: Path) -> None:
    """Catches a rank whose model transformers would store in another way, and that is stored as rank 0 has it, without a word, or with
    none about its tensors."""
    first, second = run_ranks(2, converted_on_one, tmp_path, libraries=True)
    assert first == second
    assert [kind for kind, _ in first] == ["ValueError", "", "ValueError"]
    found = (
        "'parts.0.weight' is F32 [6, 4] on rank 0, missing on rank 1; 'parts.1.weight' is",
        "'joined.weight' is F32 [18, 4] on rank 0, missing on rank 1; 'parts.0.weight' is missing on rank 0, F32 [6, 4] on rank 1; ",
    )
    for (_, message), words in zip(first[::2], found, strict=True):
        assert f"the same layout on disk was expected on all ranks, {words}" in message, message
        assert message.endswith("; 1 more tensor differs; nothing was written"), message
    assert "joined.weight" in shardsave.load(tmp_path / "1")
