"""Processes that end, are interrupted or killed, and fork, while a save is in flight."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from background.held import value_in
from background.programs import run_program

INDEX = "model.safetensors.index.json"

SAVES = "shardsave.save(full(1), ckpt, durable=False)\npending = shardsave.save_async(full(2), ckpt, progress=hold)\n"

#: The last line of a program. The end begins right after it.
LAST = "say('the last line')\n"


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder / "ckpt") if name.startswith(".shardsave")]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('of the training')", 1),
        ("threading.Thread(target=lambda: time.sleep(60), daemon=True).start()", 0),
        ("del pending; import gc; gc.collect()", 0),
    ],
)
def test_the_process_ends(memory: Path, ending: str, code: int) -> None:
    """Catches a save that is lost because the process ends, an exit code that is another one, and a process that hangs or aborts."""
    running = run_program(SAVES + ending, memory)
    running.until("held")
    time.sleep(0.05)
    (memory / "go").touch()
    assert running.wait() == code, running.error
    assert value_in(memory / "ckpt") == 2 and not litter(memory)
    assert ("ValueError: of the training" in running.error) if code == 1 else (running.error == "")


def test_an_exit_that_waits_says_so(memory: Path) -> None:
    """Catches a process that seems to hang at its end, and one that says so where it takes no time."""
    running = run_program(f"from shardsave._background import turns\nturns._SILENT_SECONDS = 0.05\n{SAVES}", memory)
    running.until(f"shardsave: the program ends as soon as {memory}/ckpt is saved; Ctrl-C says how to give that up\n")
    (memory / "go").touch()
    assert running.wait() == 0 and running.error.count("\n") == 1 and value_in(memory / "ckpt") == 2


def test_ctrl_c_while_the_exit_waits(memory: Path) -> None:
    """Catches a first Ctrl-C that loses the save, or that says nothing."""
    running = run_program(SAVES + LAST, memory)
    running.until("held")
    running.until("the last line")
    time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    running.until("is still being saved; Ctrl-C again gives that up, the previous checkpoint stays as it is")
    (memory / "go").touch()
    assert running.wait() == 0 and value_in(memory / "ckpt") == 2 and "Traceback" not in running.error


def test_ctrl_c_twice_while_the_exit_waits(memory: Path) -> None:
    """Catches a save that cannot be given up, one that leaves files or spoils the previous checkpoint, and a process that aborts."""
    running = run_program(SAVES + LAST, memory)
    running.until("held")
    running.until("the last line")
    time.sleep(0.05)
    for words in ("is still being saved", "is given up"):
        os.kill(running.pid, signal.SIGINT)
        running.until(words)
    (memory / "go").touch()
    assert running.wait() == 0 and value_in(memory / "ckpt") == 1 and not litter(memory) and "Traceback" not in running.error


def test_ctrl_c_twice_during_the_commit(memory: Path) -> None:
    """Catches an exit that says the save is given up, although it is committed."""
    program = """
        from shardsave._storage.transaction import Transaction
        real = Transaction._clean
        def clean(self, index):
            hold(0, 0)
            return real(self, index)
        Transaction._clean = clean
        pending = shardsave.save_async(full(2), ckpt)
        say("the last line")
    """
    running = run_program(program, memory)
    running.until("held")
    running.until("the last line")
    time.sleep(0.05)
    for words in ("is still being saved", "can no longer be given up: it is being committed"):
        os.kill(running.pid, signal.SIGINT)
        running.until(words)
    (memory / "go").touch()
    assert running.wait() == 0 and value_in(memory / "ckpt") == 2


def test_ctrl_c_during_a_wait(memory: Path) -> None:
    """Catches Ctrl-C that ends the save with the wait for it, or that waits itself."""
    waits = "try:\n    say('waits')\n    pending.wait()\nexcept KeyboardInterrupt: say('interrupted', pending.done())\n"
    program = f"{SAVES}{waits}say(pending.wait().tensors)"
    running = run_program(program, memory)
    running.until("held")
    running.until("waits")
    time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    running.until("interrupted False")
    (memory / "go").touch()
    assert running.wait() == 0 and running.out.endswith("\n1\n") and value_in(memory / "ckpt") == 2


def test_a_call_on_a_daemon_thread(memory: Path) -> None:
    """Catches a save that ends with its caller: Python does not wait for daemon threads, nor for the threads that inherit that."""
    program = """
        called = threading.Event()

        def call():
            shardsave.save_async(full(2), ckpt, progress=hold)
            called.set()  # Python kills daemon threads at its end; one that is in torch's code then may abort the process
            time.sleep(60)

        threading.Thread(target=call, daemon=True).start()
        called.wait()
    """
    running = run_program(program, memory)
    running.until("held")
    time.sleep(0.05)
    (memory / "go").touch()
    assert running.wait() == 0 and value_in(memory / "ckpt") == 2 and running.error == ""


@pytest.mark.parametrize("when", ["atexit.register(call)", "threading._register_atexit(call)"])
def test_a_call_at_the_end(memory: Path, when: str) -> None:
    """Catches a save that begins when Python no longer waits for threads, and is lost or hangs."""
    program = f"""
        def call():
            say(shardsave.save_async(full(2), ckpt, staging="snapshot").wait().tensors)
        {when}
    """
    running = run_program(program, memory)
    assert running.wait() == 0 and running.out == "1\n" and value_in(memory / "ckpt") == 2, running.error


def test_no_thread_can_be_started_at_the_end(memory: Path) -> None:
    """Catches a save that needs one more thread when the process is ending, where Python 3.12 and later start none: to free the
    space of removed files, to remove steps, to import a module."""
    program = """
        import _thread
        import shardsave._api.manager
        (manager := shardsave.CheckpointManager(f"{folder}/run", save_every=1, keep_last=1, asynchronous=True, progress=hold))
        open(f"{folder}/go", "w").close()
        for step in (1, 2):
            manager.step(step, full(step))
        manager.close()
        os.unlink(f"{folder}/go")
        shardsave.save(full(1), ckpt)
        manager.step(3, full(3))

        def refuse(*arguments, **options):
            say("refused")
            raise RuntimeError("can't create new thread at interpreter shutdown")

        _thread.start_new_thread = threading._start_new_thread = refuse
        say("the end")
    """
    running = run_program(program, memory)
    running.until("the end")
    time.sleep(0.05)
    (memory / "go").touch()
    assert running.wait() == 0 and running.error == "", running.error
    assert "refused" in running.out
    assert sorted(path.name for path in (memory / "run").glob("step-*")) == ["step-00000003"]
    assert value_in(memory / "run" / "step-00000003") == 3


CHILD = """
import time, torch, shardsave

def slowly(done, total):
    time.sleep(0.3)

def child(path):
    shardsave.save_async({"x": torch.full((8,), 2.0)}, path, progress=slowly)
"""


@pytest.mark.slow
def test_children_of_multiprocessing(memory: Path) -> None:
    """Catches a child that ends before its save does: no `atexit` function runs there."""
    (memory / "child.py").write_text(CHILD)
    program = """
        sys.path.insert(0, folder)
        import child
        children = []
        for kind in ("fork", "spawn", "forkserver"):
            children.append(multiprocessing.get_context(kind).Process(target=child.child, args=(f"{folder}/{kind}",)))
            children[-1].start()
        for process in children:
            process.join()
            say(process.exitcode)
    """
    running = run_program(program, memory)
    assert running.wait() == 0 and running.out.split() == ["0", "0", "0"], running.error
    assert [value_in(memory / kind) for kind in ("fork", "spawn", "forkserver")] == [2, 2, 2]


def test_a_child_that_is_forked_meanwhile(memory: Path) -> None:
    """Catches a child that waits for a save which only its parent has, that cannot save itself, or that harms the save of its parent."""
    program = f"""
{SAVES}
for kind in ("before", "after"):
    child = os.fork()
    if child == 0:
        try:
            pending.wait()
        except shardsave.ShardSaveError as error:
            say(f"it belongs to process {{os.getppid()}}" in str(error), type(error).__name__)
        say(pending.done(), pending.cancel(), pending.staged.wait(1), type(pending.exception()).__name__)
        say(shardsave.save_async(full(3), f"{{folder}}/child-{{kind}}").wait().notes)
        break
    say(kind, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if kind == "before":
        open(f"{{folder}}/go", "w").close()
        pending.wait()
"""
    running = run_program(program, memory)
    assert running.wait() == 0 and running.error == "", running.error
    told = ["True ShardSaveError", "True False True ShardSaveError", "()"]
    assert [line for line in running.out.splitlines() if line != "held"] == [*told, "before 0", *told, "after 0"]
    assert [value_in(memory / name) for name in ("ckpt", "child-before", "child-after")] == [2, 3, 3] and not litter(memory)


@pytest.mark.slow
def test_workers_of_a_data_loader(memory: Path) -> None:
    """Catches a data loader whose workers, forked while a save reads the model, hang or read what is not theirs."""
    program = """
        net = torch.nn.Linear(800, 800)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        batches = []
        for round in range(3):
            pending = shardsave.save_async(net, ckpt, training={"optimizer": optimizer}, staging="ring")
            for batch in torch.utils.data.DataLoader(torch.ones(8, 800), batch_size=4, num_workers=2):
                net(batch).sum().backward()
                optimizer.step()
                batches.append(batch.sum().item())
            pending.wait()
        say(batches == [3200.0] * 6, pending.wait().staging)
    """
    running = run_program(program, memory)
    assert running.wait() == 0 and running.out == "True ring\n", running.error


LOOP = """
size = 3_000_000
shardsave.save(full(1, size), ckpt)
say("ready")
for number in range(2, 1000):
    pending = shardsave.save_async(full(number, size), ckpt)
    {}
"""


def test_terminated(memory: Path) -> None:
    """SIGTERM has its default handling: the process dies at once. Catches anything else afterwards than the old or new checkpoint."""
    running = run_program(LOOP.format("time.sleep(0.001)"), memory)
    running.until("ready")
    time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM and (value_in(memory / "ckpt") or 0) >= 1


def test_killed_at_any_moment_in_the_background(tmp_path: Path) -> None:
    """Catches a moment at which kill -9 leaves neither the old nor the new checkpoint, or one after which no save works."""
    chance = random.Random()
    seed = chance.randrange(1 << 30)
    chance.seed(seed)
    for trial in range(int(os.environ.get("SHARDSAVE_BACKGROUND_KILLS", "6"))):
        running = run_program(LOOP.format("time.sleep(0.02 * torch.rand(()).item())"), tmp_path)
        running.until("ready")
        time.sleep(chance.random() * 0.1)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert (value_in(tmp_path / "ckpt") or 0) >= 1, (seed, trial)
    running = run_program("shardsave.save_async(full(7), ckpt)", tmp_path)
    assert running.wait() == 0 and value_in(tmp_path / "ckpt") == 7 and not litter(tmp_path), seed


def test_python_without_its_private_hook(memory: Path) -> None:
    """Catches an import that fails, or an end that does not wait, in a Python that has no `threading._register_atexit`."""
    program = """
        import importlib
        del threading._register_atexit
        threading._threading_atexits.clear()
        importlib.reload(shardsave._background.turns)
        shardsave.save_async(full(2), ckpt, progress=hold)
        say("called")
    """
    running = run_program(program, memory)
    running.until("called")
    running.until("held")
    time.sleep(0.05)
    (memory / "go").touch()
    assert running.wait() == 0 and value_in(memory / "ckpt") == 2, running.error


def test_an_interrupt_while_the_thread_starts(memory: Path) -> None:
    """Catches Ctrl-C in `Thread.start` that leaves the lock of an event locked: the new thread waits for it for ever, and the end for
    the thread."""
    program = """
        def trace(frame, event, argument):
            back = frame.f_back and frame.f_back.f_back
            if event == "call" and frame.f_code.co_name == "__exit__" and back and back.f_code.co_name == "start":
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            shardsave.save_async(full(2), ckpt)
        except KeyboardInterrupt:
            say("interrupted")
        sys.settrace(None)
        signal.alarm(10)
    """
    running = run_program(program, memory)
    assert running.wait() == 0, (running.out, running.error)
    assert value_in(memory / "ckpt") == (None if "interrupted" in running.out else 2)
