"""shardsave itself: durable saves, saves to the page cache, and whole modules."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rivals.tool import Tool


def _ready() -> None:
    import shardsave

    # Each public name is imported when it is first looked up, so all are looked up before the measurement.
    for name in shardsave.__all__:
        getattr(shardsave, name)


def _save(model: nn.Module, path: Path):
    import shardsave

    return shardsave.save(model, path, progress=False, reuse=False)


def _finish(report) -> None:
    """Waits until the files of a replaced checkpoint are removed."""
    if hasattr(report, "wait_cleaned"):
        report.wait_cleaned()


def _save_to_cache(model: nn.Module, path: Path):
    import shardsave

    return shardsave.save(model, path, durable=False, progress=False, reuse=False)


def _save_module(model: nn.Module, path: Path):
    import shardsave

    return shardsave.save(model, path, architecture=True, progress=False, reuse=False)


def _new_module(path: Path):
    import shardsave

    return shardsave.build_model(path, trust=["transformers"], progress=False).state_dict()


def _ready_for_modules() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  the classes that an architecture names

    _ready()


def _into(model: nn.Module, path: Path) -> None:
    import shardsave

    shardsave.load_model(model, path, progress=False)


def _new(path: Path):
    import shardsave

    return shardsave.load(path, progress=False)


def _mapped(path: Path):
    import shardsave

    return shardsave.load(path, mmap=True, progress=False)


TOOLS = (
    Tool(
        name="shardsave",
        packages=("shardsave",),
        ready=_ready,
        save=_save,
        loads={"into": _into, "new": _new, "new, mapped": _mapped},
        durable=True,
        atomic="yes",
        checked="every tensor",
        finish=_finish,
        mapped=frozenset({"new, mapped"}),
    ),
    Tool(
        name="shardsave, whole module",
        packages=("shardsave",),
        ready=_ready_for_modules,
        save=_save_module,
        loads={"new": _new_module},
        durable=True,
        atomic="yes",
        checked="every tensor",
        finish=_finish,
    ),
    Tool(
        name="shardsave, durable=False",
        packages=("shardsave",),
        ready=_ready,
        save=_save_to_cache,
        loads={},
        durable=False,
        atomic="yes",
        checked="every tensor",
        finish=_finish,
    ),
)
