"""Packages that only load safetensors files: fastsafetensors and the Run:ai model streamer, without a GPU."""

from __future__ import annotations

from pathlib import Path

from rivals.tool import Tool

_NAME = "model.safetensors"


def _fast_ready() -> None:
    import fastsafetensors  # noqa: F401


def _fast_new(path: Path):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(path / _NAME)]})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name) for name in loader.get_keys()}


def _streamer_ready() -> None:
    import runai_model_streamer  # noqa: F401


def _streamer_new(path: Path):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path / _NAME))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


TOOLS = (
    Tool(
        name="fastsafetensors",
        packages=("fastsafetensors",),
        ready=_fast_ready,
        save=None,
        loads={"new": _fast_new},
        durable=False,
        atomic="only loads",
        checked="nobody",
        saved_by="safetensors",
    ),
    Tool(
        name="runai-model-streamer",
        packages=("runai-model-streamer",),
        ready=_streamer_ready,
        save=None,
        loads={"new": _streamer_new},
        durable=False,
        atomic="only loads",
        checked="nobody",
        saved_by="safetensors",
    ),
)
