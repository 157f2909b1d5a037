"""Which engine is in use: the C++ extension, or numpy and torch where it is not there or not wanted."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

_VARIABLE = "SHARDSAVE_ENGINE"


def _choose() -> tuple[ModuleType | None, str, ValueError | ImportError | None]:
    """The extension, or None and the reason, or why there is no engine as it was asked for."""
    wanted = os.environ.get(_VARIABLE, "")
    if wanted not in ("", "native", "portable"):
        return None, "", ValueError(f"{_VARIABLE} must be 'native' or 'portable', not {wanted!r}")
    if wanted == "portable":
        return None, "", None
    try:
        return importlib.import_module("shardsave._native"), "", None
    except ImportError as error:
        built = not isinstance(error, ModuleNotFoundError) or error.name != "shardsave._native"
        reason = f"it cannot be loaded: {error}" if built else "it was not built"
        if wanted == "native":
            return None, "", ImportError(f"{_VARIABLE}=native, and there is no C++ engine: {reason}")
        return None, reason, None


native, _missing_because, _refusal = _choose()


def check_engine() -> None:
    """Raises ValueError or ImportError where the engine asked for is none, or is not there."""
    if _refusal is not None:
        raise type(_refusal)(str(_refusal))


def engine_name() -> str:
    """``"native"`` or ``"portable"``."""
    return "portable" if native is None else "native"


def warn_if_portable() -> None:
    """Says once that the extension is missing, and what that costs; silent when the portable engine was asked for."""
    global _missing_because
    if native is None and _missing_because:
        reason, _missing_because = _missing_because, ""
        warnings.warn(
            f"shardsave runs without its C++ engine ({reason}): the files are the same, but saving and loading are several "
            f"times slower; install a C++ compiler and reinstall shardsave, or set {_VARIABLE}=portable to accept this",
            RuntimeWarning,
            stacklevel=3,
        )
