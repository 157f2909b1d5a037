"""Method: a process uses a verb for the first time. While the verb's modules are being imported, a signal arrives, or another thread
forks. Hooks of the import system hold the import at that moment.
"""

from __future__ import annotations

import gc
import sys
import textwrap
from pathlib import Path

import pytest

from warm_python import warm_python

PREAMBLE = """
import os, signal, sys, threading, time
import shardsave
import torch  # after shardsave, as isort orders them

folder = sys.argv[1]
reached = threading.Event()


class Halt:
    '''Calls ``meanwhile`` when a module of this name is about to be imported.'''

    def __init__(self, name, meanwhile):
        self.name, self.meanwhile = name, meanwhile

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            reached.set()
            self.meanwhile()


def save(name, **options):
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.ones(2))
    return shardsave.save(model, os.path.join(folder, name), durable=False, **options)
"""

SIGNAL = """
signal.signal(signal.SIGUSR1, lambda *_: print("handler:", save("handler").tensors))


def send():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.3)


sys.meta_path.insert(0, Halt("shardsave._storage.transaction", send))
print("main:", save("main").tensors)
"""

FORK = """
sys.meta_path.insert(0, Halt(MODULE, lambda: time.sleep(0.5)))
thread = threading.Thread(target=lambda: save("thread", **OPTIONS))
thread.start()
reached.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    save("child", **OPTIONS)
    os._exit(0)
print("child:", os.waitpid(child, 0)[1])
thread.join()
print("thread:", shardsave.load(os.path.join(folder, "thread"))["x"].tolist())
"""


def output_of(program: str, folder: Path) -> str:
    done = warm_python().run(["-c", textwrap.dedent(PREAMBLE + program), folder])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_signal_handler_during_the_first_save(tmp_path: Path) -> None:
    """Catches a handler (of SIGTERM, say) that finds a module half imported: its save fails, or waits for ever."""
    assert sorted(output_of(SIGNAL, tmp_path).splitlines()) == ["handler: 1", "main: 1"]


@pytest.mark.parametrize(
    ("module", "options"),
    [("shardsave._storage.transaction", {}), ("shardsave._architecture.write_values", {"architecture": True})],
    ids=["the verb", "an option"],
)
def test_a_child_forked_during_the_first_save(tmp_path: Path, module: str, options: dict[str, object]) -> None:
    """Catches a child that waits for ever for the import lock of a thread that it does not have, or finds a module half imported."""
    program = FORK.replace("MODULE", repr(module)).replace("OPTIONS", repr(options))
    assert output_of(program, tmp_path).splitlines() == ["child: 0", "thread: [1.0, 1.0]"]


def test_nothing_is_imported_while_a_verb_runs(tmp_path: Path) -> None:
    """Catches a plain save or load that imports a module while it runs, and imports of ours that end in an error."""
    program = """
        model = torch.nn.Linear(2, 2)
        for verb, arguments in (("save", (model,)), ("load_model", (model,)), ("load", ()), ("verify", ()), ("inspect", ())):
            function = getattr(shardsave, verb)
            before = set(sys.modules)
            function(*arguments, folder)
            print(verb, sorted(set(sys.modules) - before))
    """
    expected = [f"{verb} []" for verb in ("save", "load_model", "load", "verify", "inspect")]
    assert output_of(textwrap.dedent(program), tmp_path).splitlines() == expected


def test_errors_of_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import error that is lost on the thread that imports, and a thread that cannot be started."""
    import threading

    from shardsave._common.imports import import_at_use

    with pytest.raises(ModuleNotFoundError, match="No module named 'shardsave._none'"):
        import_at_use("shardsave._none")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert import_at_use("colorsys").__name__ == "colorsys"


def test_no_collection_during_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a collection of garbage that walks over all objects of torch in the middle of an import: it takes longer than the import."""
    (tmp_path / "looks_at_the_collector.py").write_text("import gc\nis_on = gc.isenabled()\n")
    (tmp_path / "fails_beside_the_collector.py").write_text("raise OSError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from shardsave._common.imports import import_at_use

    assert gc.isenabled() and not import_at_use("looks_at_the_collector").is_on and gc.isenabled()
    with pytest.raises(OSError):
        import_at_use("fails_beside_the_collector")
    assert gc.isenabled()
