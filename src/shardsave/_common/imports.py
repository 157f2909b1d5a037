"""Imports modules at first use so that a signal handler and a forked child can use them at any moment.

While a module is being imported, a signal handler on the same thread would find it half made. And a child that is forked meanwhile
inherits the module's lock, which nobody in the child will free. So modules are imported on a thread of their own, for which the caller
waits, as a handler does that comes in between; and `os.fork` waits for the import.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from types import ModuleType

from shardsave._common.gc_pause import gc_paused

#: How long a fork waits for an import, in seconds: not for ever, since the import may wait for a lock that the forking thread holds.
_PATIENCE = 10.0

_importing = threading.RLock()  # held during an import, and by a thread that forks
_importers: set[int] = set()  # the threads that import
_forking: dict[int, bool] = {}  # a thread that forks → whether it holds the lock
_hooks: list[None] = []  # one element once the hooks are registered


def import_at_use(name: str) -> ModuleType:
    """Returns the module ``name``, imported as a whole. Raises what its import raises."""
    module = sys.modules.get(name)
    if module is not None and not _is_being_imported(name):
        return module
    # torch itself is imported on the caller's thread, which may be doing that already; and so is what an import imports.
    if "torch" not in sys.modules or _is_being_imported("torch") or threading.get_ident() in _importers:
        return importlib.import_module(name)
    _register_hooks()
    failures: list[BaseException] = []
    thread = threading.Thread(target=_import, args=(name, failures), name=f"import of {name}")
    with gc_paused():  # a collection walks over all objects of torch, which takes longer than these imports
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: there are too many, or the interpreter is ending
            return importlib.import_module(name)
        thread.join()
    if failures:
        raise failures[0]
    return sys.modules[name]


def _import(name: str, failures: list[BaseException]) -> None:
    with _importing:
        _importers.add(threading.get_ident())
        try:
            importlib.import_module(name)
        except BaseException as error:
            failures.append(error)
        finally:
            _importers.discard(threading.get_ident())


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _register_hooks() -> None:
    """Registers the hooks of `os.fork` when torch is there, and with it every module that has hooks of its own (logging, random).

    Hooks that are registered last run first. So a thread waits for an import before it takes the locks of these modules, which the import
    may need.
    """
    if not _hooks:
        _hooks.append(None)
        os.register_at_fork(before=_wait_for_imports, after_in_parent=_go_on, after_in_child=_go_on_in_child)


def _wait_for_imports() -> None:
    _forking[threading.get_ident()] = _importing.acquire(timeout=_PATIENCE)


def _go_on() -> None:
    if _forking.pop(threading.get_ident()):
        _importing.release()


def _go_on_in_child() -> None:
    global _importing
    _importing = threading.RLock()
    _importers.clear()
    _forking.clear()
