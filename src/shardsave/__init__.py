"""Checkpoints for PyTorch: sharded safetensors files that are written durably and atomically, and freeze flags that are restored.

>>> import torch, shardsave
>>> model = torch.nn.Linear(4, 2)
>>> report = shardsave.save(model, "checkpoint")
>>> report = shardsave.load_model(torch.nn.Linear(4, 2), "checkpoint")
"""

from typing import TYPE_CHECKING, Any

from shardsave._common.backend import check_engine as _check_engine
from shardsave._common.imports import import_at_use as _import_at_use
from shardsave._version import __version__
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    DurabilityUncertainError,
    IncompatibleCheckpointError,
    NoSuchTensorError,
    OutOfMemoryError,
    OutOfSpaceError,
    SaveCancelledError,
    SaveNotCommittedError,
    ShardSaveError,
    UnsupportedModuleError,
    UnsupportedTensorError,
    UnsupportedTrainingError,
    UntrustedCodeError,
)

if TYPE_CHECKING:
    from shardsave._api.build import build_model, load_program
    from shardsave._api.clean import CleanReport, Leaving, clean
    from shardsave._api.convert import convert
    from shardsave._api.diff import DiffReport, TensorChange, TrainingDiff, diff
    from shardsave._api.findings import ArchitectureInfo, CheckpointInfo, ConvertReport, Damage, TensorInfo, VerifyReport
    from shardsave._api.inspect import inspect
    from shardsave._api.load import load, load_model
    from shardsave._api.manager import CheckpointManager, StepInfo
    from shardsave._api.open import OpenCheckpoint, TensorSlice, open
    from shardsave._api.pending_save import PendingSave
    from shardsave._api.plan import PlannedFile, SavePlan, plan_save
    from shardsave._api.reports import LoadReport, Phases, SaveReport
    from shardsave._api.restore_flags import FlagsReport, restore_flags
    from shardsave._api.resume import resume
    from shardsave._api.resumed import PerRank, Resumed
    from shardsave._api.save import save
    from shardsave._api.save_async import save_async
    from shardsave._api.verify import verify

__all__ = [
    "ArchitectureInfo",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CleanReport",
    "ConvertReport",
    "CorruptCheckpointError",
    "Damage",
    "DiffReport",
    "DirectoryBusyError",
    "DurabilityUncertainError",
    "FlagsReport",
    "IncompatibleCheckpointError",
    "Leaving",
    "LoadReport",
    "NoSuchTensorError",
    "OpenCheckpoint",
    "OutOfMemoryError",
    "OutOfSpaceError",
    "PendingSave",
    "PerRank",
    "Phases",
    "PlannedFile",
    "Resumed",
    "SaveCancelledError",
    "SaveNotCommittedError",
    "SavePlan",
    "SaveReport",
    "ShardSaveError",
    "StepInfo",
    "TensorChange",
    "TensorInfo",
    "TensorSlice",
    "TrainingDiff",
    "UnsupportedModuleError",
    "UnsupportedTensorError",
    "UnsupportedTrainingError",
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
    "plan_save",
    "restore_flags",
    "resume",
    "save",
    "save_async",
    "verify",
]

#: The modules of `_api` and the names that each defines. A module is imported when one of its names is first used: ``import shardsave``
#: alone must not import torch, which takes a second.
_MODULES = {
    "build": ("build_model", "load_program"),
    "convert": ("convert",),
    "diff": ("DiffReport", "TensorChange", "TrainingDiff", "diff"),
    "findings": ("ArchitectureInfo", "CheckpointInfo", "ConvertReport", "Damage", "TensorInfo", "VerifyReport"),
    "inspect": ("inspect",),
    "clean": ("CleanReport", "Leaving", "clean"),
    "load": ("load", "load_model"),
    "manager": ("CheckpointManager", "StepInfo"),
    "open": ("OpenCheckpoint", "TensorSlice", "open"),
    "pending_save": ("PendingSave",),
    "plan": ("PlannedFile", "SavePlan", "plan_save"),
    "reports": ("LoadReport", "Phases", "SaveReport"),
    "restore_flags": ("FlagsReport", "restore_flags"),
    "resume": ("resume",),
    "resumed": ("PerRank", "Resumed"),
    "save": ("save",),
    "save_async": ("save_async",),
    "verify": ("verify",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            _check_engine()  # not when the package is imported, so that the command line can report a wrong engine in one line
            value = globals()[name] = getattr(_import_at_use(f"shardsave._api.{module}"), name)
            return value
    raise AttributeError(f"module 'shardsave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
