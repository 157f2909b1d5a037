"""transformers, huggingface_hub and accelerate: each writes sharded safetensors files in its own way."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rivals.tool import Tool


def _transformers_ready() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401


def _save_pretrained(model: nn.Module, path: Path) -> None:
    model.save_pretrained(path)


def _from_pretrained(path: Path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def _hub_ready() -> None:
    from huggingface_hub import load_torch_model, save_torch_model  # noqa: F401


def _hub_save(model: nn.Module, path: Path) -> None:
    from huggingface_hub import save_torch_model

    save_torch_model(model, path)


def _hub_into(model: nn.Module, path: Path) -> None:
    from huggingface_hub import load_torch_model

    load_torch_model(model, path)


def _accelerate_ready() -> None:
    import accelerate  # noqa: F401


def _accelerate_save(model: nn.Module, path: Path) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, path)


def _accelerate_into(model: nn.Module, path: Path) -> None:
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(model, path)


TOOLS = (
    Tool(
        name="transformers",
        packages=("transformers", "safetensors"),
        ready=_transformers_ready,
        save=_save_pretrained,
        loads={"new, mapped": _from_pretrained},
        durable=False,
        atomic="no: writes over the files",
        checked="nobody",
        mapped=frozenset({"new, mapped"}),
    ),
    Tool(
        name="huggingface_hub",
        packages=("huggingface_hub", "safetensors"),
        ready=_hub_ready,
        save=_hub_save,
        loads={"into": _hub_into},
        durable=False,
        atomic="no: writes over the files",
        checked="nobody",
        through_map=frozenset({"into"}),
    ),
    Tool(
        name="accelerate",
        packages=("accelerate", "safetensors"),
        ready=_accelerate_ready,
        save=_accelerate_save,
        loads={"into": _accelerate_into},
        durable=False,
        atomic="no: removes the old files first",
        checked="nobody",
        through_map=frozenset({"into"}),
    ),
)
