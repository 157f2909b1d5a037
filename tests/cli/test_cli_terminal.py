"""What all commands have in common on a terminal and in a pipe: colours, progress, interrupts, warnings, names that would do harm."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import pytest
import torch

import shardsave
from cli.commands import error, flip, process, run
from support import SmallModel

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def on_terminal(*arguments: object, **environment: str) -> str:
    """Runs a command in its own process on a terminal; returns its output."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "shardsave", *map(str, arguments)]
    child = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm", **environment}
    )
    os.close(terminal)
    shown = b""
    while select.select([screen], [], [], 60)[0]:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(screen)
    child.wait()
    return shown.decode()


def test_names_that_would_move_the_cursor(tmp_path: Path) -> None:
    """Catches names in a file that control the terminal, or that rich interprets as markup."""
    evil = {
        "a.\x1b[2J\n.x": torch.ones(1),
        "[red].b\u009b.y": torch.ones(1),
        "ok.\u202etxt": torch.ones(1),
        "schön.ü": torch.ones(1),
    }
    shardsave.save(evil, tmp_path / "ckpt", metadata={"\x1b[2J": "\u009b"})
    flip(tmp_path / "ckpt" / "model-00001-of-00001.safetensors")
    shardsave.save({}, tmp_path / "empty")
    for environment in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}):
        for arguments in (("inspect",), ("inspect", "--tensors", "*"), ("verify",), ("diff", tmp_path / "empty")):
            text = run(arguments[0], tmp_path / "ckpt", *arguments[1:], env=environment).output
            assert not re.search("\x1b\\[2J|\u009b|\u202e|\n\\.", text), text
            assert "\\x1b[2J" in text
    assert "[red]" in run("inspect", tmp_path / "ckpt").output and "schön" in run("inspect", tmp_path / "ckpt").output


def test_plain_text_in_a_pipe_and_colour_on_a_terminal(ckpt: Path) -> None:
    """Catches escape sequences in a pipe, a terminal without colour, and NO_COLOR that is ignored."""
    piped = process("inspect", ckpt)
    assert piped.returncode == 0 and piped.stderr == "" and "\x1b" not in piped.stdout and "#######....." in piped.stdout
    shown = on_terminal("inspect", ckpt)
    assert "\x1b[1;36m███████░░░░░\x1b[0m" in shown and "├── " in shown
    plain = on_terminal("inspect", ckpt, NO_COLOR="1")
    assert "███████░░░░░" in plain and not re.search("\x1b\\[[0-9;]*3[0-9]", plain)
    assert "model-00003-of-00004.safetensors  " in plain  # the whole name, although the terminal has only 80 columns


def test_a_terminal_without_some_letters(ckpt: Path) -> None:
    """Catches a traceback if the output cannot encode a bar."""
    assert "???????" in on_terminal("inspect", ckpt, PYTHONIOENCODING="ascii")


@pytest.mark.slow
def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """Catches a verification without a progress bar on a terminal, or with one in a pipe."""
    shardsave.save({"x": torch.ones(3_000_000)}, tmp_path, durable=False)
    assert "verifying: 100%" in on_terminal("verify", tmp_path)
    assert "verifying" not in on_terminal("verify", tmp_path, "--quiet")
    assert process("verify", tmp_path).stderr == ""


def test_a_closed_pipe(ckpt: Path) -> None:
    """Catches a traceback when the reader of a pipe stops reading, as ``head -1`` does."""
    program = f"set -o pipefail; {sys.executable} -m shardsave inspect {ckpt} --all --json | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)


def bytes_read(process: int) -> int:
    return int(re.findall(r"^rchar: (\d+)", Path(f"/proc/{process}/io").read_text(), re.MULTILINE)[0])


def test_interrupt(tmp_path: Path) -> None:
    """Catches a traceback after Ctrl-C."""
    sparse = tmp_path / "big.safetensors"
    header = b'{"x":{"dtype":"U8","shape":[4000000000000],"data_offsets":[0,4000000000000]}}'
    sparse.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(sparse, 8 + len(header) + 4_000_000_000_000)
    child = subprocess.Popen(
        [sys.executable, "-m", "shardsave", "verify", sparse], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    begin = 0
    while not begin or bytes_read(child.pid) < begin + (256 << 20):  # an earlier interrupt would meet Python's own start
        assert child.poll() is None
        if not begin and str(sparse) in map(os.path.realpath, Path(f"/proc/{child.pid}/fd").glob("*")):
            begin = bytes_read(child.pid)
        time.sleep(0.01)
    child.send_signal(2)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.strip()) == (130, "", "shardsave: interrupted")


@pytest.mark.parametrize("module", ["click", "torch"])
def test_interrupt_while_the_command_imports(tmp_path: Path, module: str) -> None:
    """Catches a traceback after Ctrl-C in the first second, when the command itself or torch is imported."""
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    done = process("verify", tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "shardsave: interrupted")


def test_warnings_have_no_line_of_source(tmp_path: Path) -> None:
    """Catches a warning that shows source of this package, of click or of torch to somebody who only ran a command."""
    torch.save({"w": torch.ones(2), "i": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.pt")
    program = (
        "import sys, warnings; import shardsave._common.backend as b; b.native, b._missing_reason = None, 'it was not built'; "
        "from shardsave._cli.main import cli; cli(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "convert", str(tmp_path / "x.pt"), str(tmp_path / "out")]
    (line,) = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert line.startswith("shardsave: warning: shardsave runs without its C++ engine (it was not built): ")


def test_quantized_tensors_cause_no_warning(tmp_path: Path) -> None:
    """Catches a warning of torch about tensors that shardsave makes itself to describe those in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, tmp_path / "x.pt")
    done = process("convert", tmp_path / "x.pt", tmp_path / "out")
    assert len(done.stderr.splitlines()) == 1 and "cannot save 'w': dtype qint8" in done.stderr


def test_a_closed_output_and_a_width_of_nan(tmp_path: Path) -> None:
    """Catches a traceback if stdout is closed, and if a width is not a number."""
    shardsave.save(SmallModel(), tmp_path / "ckpt")
    command = f"{sys.executable} -m shardsave inspect {tmp_path}/ckpt >&-"
    assert "Traceback" not in subprocess.run(command, shell=True, capture_output=True, text=True).stderr
    wrong = run("plot", tmp_path / "ckpt", "-o", tmp_path / "a.png", "--width", "nan")
    assert "nan is not a number of inches" in error(wrong, 2)
