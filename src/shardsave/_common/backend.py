"""Chooses the engine: the C++ extension, or the portable one in numpy and torch if the extension is missing or not wanted."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from shardsave._common.warn_caller import warn_caller

_VARIABLE = "SHARDSAVE_ENGINE"


def _choose() -> tuple[ModuleType | None, str, ValueError | ImportError | None]:
    """Returns the extension or None, the reason why it is missing, and the error if the requested engine is not available."""
    request = os.environ.get(_VARIABLE, "")
    if request not in ("", "native", "portable"):
        return None, "", ValueError(f"{_VARIABLE} must be 'native' or 'portable', not {request!r}")
    if request == "portable":
        return None, "", None
    try:
        return importlib.import_module("shardsave._native"), "", None
    except ImportError as error:
        was_built = not isinstance(error, ModuleNotFoundError) or error.name != "shardsave._native"
        reason = f"it cannot be loaded: {error}" if was_built else "it was not built"
        if request == "native":
            return None, "", ImportError(f"{_VARIABLE}=native was requested, but there is no C++ engine: {reason}")
        return None, reason, None


native, _missing_reason, _refusal = _choose()


def check_engine() -> None:
    """Raises ValueError if the requested engine does not exist, or ImportError if it is not available."""
    if _refusal is not None:
        raise type(_refusal)(str(_refusal))


def engine_name() -> str:
    """``"native"`` or ``"portable"``."""
    return "portable" if native is None else "native"


def warn_if_portable() -> None:
    """Warns once that the extension is missing, and what that costs; does not warn if the portable engine was requested."""
    global _missing_reason
    if native is None and _missing_reason:
        reason, _missing_reason = _missing_reason, ""
        warn_caller(
            f"shardsave runs without its C++ engine ({reason}): the files are the same, but saving and loading are several "
            f"times slower; install a C++ compiler and reinstall shardsave, or set {_VARIABLE}=portable to accept this",
            RuntimeWarning,
        )
