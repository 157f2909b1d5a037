"""Checkpoints for PyTorch: sharded safetensors files, durable and atomic, with freeze flags that come back.

>>> import torch, shardsave
>>> model = torch.nn.Linear(4, 2)
>>> report = shardsave.save(model, "checkpoint")
>>> report = shardsave.load_model(torch.nn.Linear(4, 2), "checkpoint")
"""

from shardsave._build import build_model, load_program
from shardsave._diff import DiffReport, TensorChange, diff
from shardsave._inspect import inspect, verify
from shardsave._leavings import CleanReport, Leaving, clean
from shardsave._load import load, load_model
from shardsave._open import OpenCheckpoint, TensorSlice, open
from shardsave._reports import CheckpointInfo, Damage, LoadReport, Phases, SaveReport, TensorInfo, VerifyReport
from shardsave._save import save
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

__all__ = [
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "CleanReport",
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
    "diff",
    "inspect",
    "load",
    "load_model",
    "load_program",
    "open",
    "save",
    "verify",
]
