"""Checkpoints for PyTorch: sharded safetensors files, durable and atomic, with freeze flags that come back.

>>> import torch, shardsave
>>> model = torch.nn.Linear(4, 2)
>>> report = shardsave.save(model, "checkpoint")
>>> report = shardsave.load_model(torch.nn.Linear(4, 2), "checkpoint")
"""

import importlib
from typing import TYPE_CHECKING, Any

from shardsave._backend import check_engine as _check_engine
from shardsave._version import __version__
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    DurabilityUncertainError,
    IncompatibleCheckpointError,
    OutOfSpaceError,
    SaveNotCommittedError,
    ShardSaveError,
    UnsupportedModuleError,
    UnsupportedTensorError,
    UntrustedCodeError,
)

if TYPE_CHECKING:
    from shardsave._build import build_model, load_program
    from shardsave._convert import convert
    from shardsave._diff import DiffReport, TensorChange, diff
    from shardsave._findings import CheckpointInfo, ConvertReport, Damage, TensorInfo, VerifyReport
    from shardsave._inspect import inspect, verify
    from shardsave._leavings import CleanReport, Leaving, clean
    from shardsave._load import load, load_model
    from shardsave._open import OpenCheckpoint, TensorSlice, open
    from shardsave._reports import LoadReport, Phases, SaveReport
    from shardsave._save import save

__all__ = [
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "CleanReport",
    "ConvertReport",
    "CorruptCheckpointError",
    "Damage",
    "DiffReport",
    "DirectoryBusyError",
    "DurabilityUncertainError",
    "IncompatibleCheckpointError",
    "Leaving",
    "LoadReport",
    "OpenCheckpoint",
    "OutOfSpaceError",
    "Phases",
    "SaveNotCommittedError",
    "SaveReport",
    "ShardSaveError",
    "TensorChange",
    "TensorInfo",
    "TensorSlice",
    "UnsupportedModuleError",
    "UnsupportedTensorError",
    "UntrustedCodeError",
    "VerifyReport",
    "__version__",
    "build_model",
    "clean",
    "convert",
    "diff",
    "inspect",
    "load",
    "load_model",
    "load_program",
    "open",
    "save",
    "verify",
]

#: Where each name comes from, when it is first asked for: looking into a checkpoint needs no torch, which takes a second.
_HOMES = {
    "_build": ("build_model", "load_program"),
    "_convert": ("convert",),
    "_diff": ("DiffReport", "TensorChange", "diff"),
    "_findings": ("CheckpointInfo", "ConvertReport", "Damage", "TensorInfo", "VerifyReport"),
    "_inspect": ("inspect", "verify"),
    "_leavings": ("CleanReport", "Leaving", "clean"),
    "_load": ("load", "load_model"),
    "_open": ("OpenCheckpoint", "TensorSlice", "open"),
    "_reports": ("LoadReport", "Phases", "SaveReport"),
    "_save": ("save",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            _check_engine()  # not on import: the command line says it in one line
            value = globals()[name] = getattr(importlib.import_module(f"shardsave.{module}"), name)
            return value
    raise AttributeError(f"module 'shardsave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
