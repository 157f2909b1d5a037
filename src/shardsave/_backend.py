"""Which engine is in use: the C++ extension, or numpy and torch where it is not there or not wanted."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

_VARIABLE = "SHARDSAVE_ENGINE"


def _choose() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    wanted = os.environ.get(_VARIABLE, "")
    if wanted not in ("", "native", "portable"):
        raise ValueError(f"{_VARIABLE} must be 'native' or 'portable', not {wanted!r}")
    if wanted == "portable":
        return None, ""
    try:
        return importlib.import_module("shardsave._native"), ""
    except ImportError as error:
        built = not isinstance(error, ModuleNotFoundError) or error.name != "shardsave._native"
        reason = f"it cannot be loaded: {error}" if built else "it was not built"
        if wanted == "native":
            raise ImportError(f"{_VARIABLE}=native, and there is no C++ engine: {reason}") from error
        return None, reason


native, _missing_because = _choose()


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
