"""Method: what makes a model loops far longer than any honest model needs, or is interrupted at a random moment, many times. A build ends
in one of our errors, or in the user's interrupt, and leaves the process as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import shardsave
from shardsave._common import supervised as supervision
from shardsave._common.supervised import TooMuchTaken, supervised
from shardsave._huggingface import transformers_config
from transformers_models import tiny

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*config.json is not the one saved"),
    # An interrupt may also arrive within a callback of the garbage collector, where Python drops it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a saved BERT."""
    folder = tmp_path_factory.mktemp("bert")
    shardsave.save(tiny("BERT"), folder, durable=False)
    return folder


@pytest.fixture
def folder(saved: Path) -> Iterator[Path]:
    """The same, with its config restored afterwards."""
    config = (saved / "config.json").read_bytes()
    yield saved
    (saved / "config.json").write_bytes(config)


def built(folder: Path) -> Any:
    return shardsave.build_model(folder, trust=["transformers"])


ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 4}
SINUSOIDAL = {"sinusoidal_pos_embds": True, "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 4, "vocab_size": 8}
FRAMES = {"patch_size": 1, "tubelet_size": 1, "num_frames": 1}

#: Class, type of model, config, and what the error says: a number is refused, or the constructor is stopped.
LOOPS: list[tuple[str, str, dict[str, Any], str]] = [
    ("GPTNeoForCausalLM", "gpt_neo", {"attention_types": [[["global"] * 1000, 1 << 25]]}, "attention_types[0][1]: a number"),
    ("BarkFineModel", "fine_acoustics", {"n_codes_given": -(1 << 23)}, "n_codes_given: a number from -1024"),
    ("Cohere2MoeForCausalLM", "cohere2_moe", {"first_k_dense_replace": 1 << 25}, "first_k_dense_replace: a number"),
    ("LevitModel", "levit", {"image_size": 1 << 25, "patch_size": 1}, "image_size: a number up to 4096"),
    ("LevitModel", "levit", {"image_size": 1 << 12, "patch_size": 1}, "its constructor took more than"),
    ("VideoMAEModel", "videomae", {"image_size": 1 << 12, **FRAMES, **ONE_LAYER}, "its constructor took more than"),
    ("DistilBertModel", "distilbert", {"max_position_embeddings": 1 << 19, **SINUSOIDAL}, "its constructor took more than"),
    ("SwinModel", "swin", {"mlp_ratio": 1e30}, "mlp_ratio: a number up to"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_type", "config", "said"), LOOPS, ids=lambda value: str(value)[:40])
def test_a_constructor_that_loops_is_stopped(
    name: str, model_type: str, config: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches loops of a config or constructor that no tensor counts: they took minutes and all memory."""
    monkeypatch.setattr(transformers_config, "_ANY_SECONDS", 1.0)
    monkeypatch.setattr(transformers_config, "_ANY_BYTES", 1 << 30)
    (folder / "config.json").write_text(json.dumps({"architectures": [name], "model_type": model_type, **config}))
    peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    before = state_of_the_process()
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        built(folder)
    assert said in str(raised.value)
    assert time.monotonic() - begun < 60 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 3_000_000
    assert state_of_the_process() == before


def state_of_the_process() -> dict[str, Any]:
    """What a construction changes, in this thread and in all of them."""
    connecting = [vars(socket.socket).get(name) for name in ("connect", "connect_ex", "sendto")]
    return {
        "modes": _get_current_dispatch_mode_stack(),
        "functions": len(torch.overrides._get_current_function_mode_stack()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "initialisation": {name: value for name, value in vars(torch.nn.init).items() if callable(value)},
        "models": (transformers.PreTrainedModel.init_weights, transformers.PreTrainedModel.tie_weights),
        "offline": constants.HF_HUB_OFFLINE,
        "sockets": [*connecting, socket.getaddrinfo, socket.gethostbyname, socket.gethostbyname_ex],
    }


class Interrupts:
    """Ctrl-C, after a while that each `after` chooses anew; none later than the call that it is meant for."""

    def __init__(self) -> None:
        self._armed = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGALRM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _interrupt(self, *_: object) -> None:
        if self._armed:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            self._armed = False


def test_interrupts_leave_the_process_as_it_was(folder: Path) -> None:
    """Catches a mode, a dtype or a function that an interrupted build leaves behind, and an interrupt that becomes another error."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    built(folder)
    once, before, interrupted = min(timeit.repeat(lambda: built(folder), number=1, repeat=3)), state_of_the_process(), 0
    random.seed(1)
    with Interrupts() as interrupts:
        for _ in range(600):
            try:
                with interrupts.after(random.uniform(0.001, once)):
                    built(folder)
            except KeyboardInterrupt:
                interrupted += 1
            assert state_of_the_process() == before
            if interrupted == 30:
                break
    assert interrupted == 30 and built(folder).dtype == torch.float32  # the stored one


def test_an_interrupt_ends_a_long_construction(folder: Path) -> None:
    """Catches Ctrl-C that waits for a constructor, or is lost in it."""
    config = {"architectures": ["VideoMAEModel"], "model_type": "videomae", "image_size": 1 << 11, **FRAMES, **ONE_LAYER}
    (folder / "config.json").write_text(json.dumps(config))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.after(1.0):
        built(folder)
    assert time.monotonic() - begun < 10


EXITS = """
import json, pathlib, sys, threading, time, warnings
sys.modules["torchao"] = None  # transformers would import it, and it prints which of its libraries it cannot load
import shardsave, transformers
warnings.simplefilter("ignore")
build = lambda: shardsave.build_model(sys.argv[1], trust=["transformers"])
threading.Thread(target=build, daemon=True).start()
while not any(thread.name == "shardsave-worker" for thread in threading.enumerate()):
    time.sleep(0.01)
time.sleep(0.2)
"""


@pytest.mark.slow
def test_the_interpreter_exits_during_a_construction(folder: Path) -> None:
    """Catches a worker that returns from C++ after the interpreter is gone, and an exit that waits for a constructor."""
    config = {"architectures": ["VideoMAEModel"], "model_type": "videomae", "image_size": 1 << 11, **FRAMES, **ONE_LAYER}
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-c", EXITS, str(folder)], capture_output=True, text=True, timeout=60)
    # What stops the worker may strike in a `__del__`: Python prints that, and nothing can be done about it.
    struck = r"Exception ignored in: <function \S+\.__del__ at \w+>\nTraceback .*\n(  .*\n)*\n?shardsave\._common\.supervised\._Stop: \n"
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(f"({struck})*", done.stderr), done.stderr


# --- the supervision itself


class Around:
    """Notes when it is entered and how it is left."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def __call__(self) -> AbstractContextManager[None]:
        return self

    def __enter__(self) -> None:
        self.events.append("entered")

    def __exit__(self, kind: object, *_: object) -> None:
        self.events.append(kind)


def loops() -> None:
    while True:
        pass


def swallows() -> None:
    """Catches what stops it, several times."""
    for _ in range(3):
        with contextlib.suppress(BaseException):
            loops()


def grows() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20)))


@pytest.mark.parametrize("action", [loops, swallows, grows])
def test_what_takes_too_much_is_stopped(action: Any) -> None:
    """Catches a limit that is not watched, and code that goes on because it catches what stops it."""
    around = Around()
    with pytest.raises(TooMuchTaken):
        supervised(action, around, 0.2, 64 << 20)
    assert around.events == ["entered", TooMuchTaken]
    assert not [thread for thread in threading.enumerate() if thread.name == "shardsave-worker"]


def test_results_and_errors() -> None:
    """Catches a result, an error or a traceback that is lost between the threads."""
    assert supervised(lambda: 7, nullcontext, 1, 1 << 30) == 7
    around = Around()
    with pytest.raises(ZeroDivisionError) as raised:
        supervised(lambda: 1 // 0, around, 1, 1 << 30)
    assert around.events == ["entered", None] and raised.traceback[-1].name == "<lambda>"
    with pytest.raises(SystemExit, match="3"):
        supervised(lambda: sys.exit(3), nullcontext, 1, 1 << 30)


def test_a_call_that_cannot_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a caller that waits for C code without end, and guards that are removed while it still runs."""
    monkeypatch.setattr(supervision, "_PATIENCE", 0.1)
    around, begun = Around(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.after(0.1):
        supervised(lambda: time.sleep(2), around, 1, 1 << 30)
    assert time.monotonic() - begun < 1.8 and around.events == ["entered"]
    assert supervised(lambda: 7, nullcontext, 1, 1 << 30) == 7  # in its turn
    assert time.monotonic() - begun > 1.8 and len(around.events) == 2


def test_a_fork_during_a_construction(folder: Path) -> None:
    """Catches a child that inherits the guards, and a lock that nobody in it holds."""
    from shardsave._huggingface.transformers_construction import guarded

    before = state_of_the_process()
    with guarded(set()):
        torch.set_default_dtype(torch.float64)
        child = os.fork()
        if child == 0:
            os._exit(0 if state_of_the_process() == before else 1)
        torch.set_default_dtype(torch.float32)
    assert os.waitpid(child, 0)[1] == 0 and state_of_the_process() == before
