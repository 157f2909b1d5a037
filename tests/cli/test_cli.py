"""The command line: the output and exit code of each command, on a terminal, in a pipe, and after errors."""

from __future__ import annotations

import fcntl
import json
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

import shardsave
from faults.dying import die_before_the_commit, killed
from shardsave._cli.main import cli
from shardsave._storage.transaction import Transaction
from support import SmallModel

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

COMMANDS = ["inspect", "list", "verify", "diff", "convert", "plot", "clean", "completion"]


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(result: Result, code: int = 0) -> list[str]:
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()


def error(result: Result, code: int) -> str:
    """Checks that a command failed with ``code`` and printed nothing on stdout; returns its single line on stderr."""
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    return line


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in its own process, with pipes for its output."""
    command = [sys.executable, "-m", "shardsave", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)


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


@pytest.fixture
def ckpt(tmp_path: Path, small_model: SmallModel) -> Path:
    shardsave.save(small_model, tmp_path / "ckpt", max_shard_size=4000, metadata={"step": 7})
    return tmp_path / "ckpt"


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_inspect(ckpt: Path) -> None:
    """Catches a module, size, dtype, share, tie, shard or metadata that is missing or wrong."""
    assert lines(run("inspect", ckpt)) == [
        f"{ckpt}: 8.6 kB, 13 tensors in 4 shards, 1 tied, 6 of 9 parameters frozen, durable",
        "",
        "module   tensors    size  dtypes                            frozen",
        "(all)         13  8.6 kB  float32, bfloat16, int64, 1 tied  #######.....  54.8%",
        "embed          1  3.2 kB  float32                           ............     0%",
        "encoder        9  4.8 kB  float32, int64                    ############   100%",
        "  0            2  2.2 kB  float32                           ############   100%",
        "  1            5   520 B  float32, int64                    ############   100%",
        "  2            2  2.1 kB  float32                           ############   100%",
        "narrow         2   544 B  bfloat16                          ............     0%",
        "head           0     0 B  1 tied",
        "",
        "shard                             tensors    size  dtypes                    frozen",
        "model-00001-of-00004.safetensors        4  2.4 kB  float32                   ############  100%",
        "model-00002-of-00004.safetensors        2  2.1 kB  float32                   ############  100%",
        "model-00003-of-00004.safetensors        2  3.2 kB  float32, int64            ............    0%",
        "model-00004-of-00004.safetensors        5   808 B  bfloat16, float32, int64  ............    0%",
        "",
        "tied name    shares the bytes of",
        "head.weight  embed.weight",
        "",
        'metadata  {"step": 7}',
    ]
    assert lines(run("inspect", ckpt, "--depth", 0))[3:6] == [
        "(all)        13  8.6 kB  float32, bfloat16, int64, 1 tied  #######.....  54.8%",
        "",
        "shard                             tensors    size  dtypes                    frozen",
    ]


def test_inspect_of_an_architecture(tmp_path: Path) -> None:
    """Catches a part of a checkpoint that is not shown."""
    shardsave.save(nn.BatchNorm1d(3), tmp_path, architecture=True)
    (file,) = tmp_path.glob("architecture-*.json")
    shown = lines(run("inspect", tmp_path))
    assert shown[shown.index("beside the weights  file" + " " * 25 + "size") + 1].startswith(
        f"architecture        {file.name}  "
    )
    part = json.loads(run("inspect", tmp_path, "--json").stdout)["parts"]["architecture"]
    assert part == {"file": file.name, "bytes": file.stat().st_size}


def test_inspect_lists_an_architecture_and_tensors(tmp_path: Path) -> None:
    """Catches an option that is ignored beside another one."""
    shardsave.save(torch.nn.Linear(2, 2), tmp_path, architecture=True, durable=False)
    shown = lines(run("inspect", tmp_path, "--architecture", "--tensors", "b*"))
    assert shown[0].startswith("name ") and shown[-2].startswith("tensor ") and shown[-1].startswith("bias ")
    result = run("inspect", tmp_path, "--architecture", "--tensors", "x*")
    assert result.exit_code == 1 and "no name matches 'x*'" in result.stderr


def test_inspect_of_third_party_files(tmp_path: Path) -> None:
    """Catches flags or durability that are shown although they are unknown."""
    from safetensors.torch import save_file

    save_file({"a.x": torch.ones(3), "y": torch.ones((), dtype=torch.int8)}, tmp_path / "x.safetensors")
    shown = lines(run("inspect", tmp_path / "x.safetensors"))
    assert shown[0] == f"{tmp_path}/x.safetensors: 13 B, 2 tensors in 1 shard, freeze flags unknown"
    assert shown[3:5] == ["(all)         2  13 B  float32, int8", "a             1  12 B  float32"]
    assert lines(run("inspect", tmp_path / "x.safetensors", "--tensors", "*"))[1:] == [
        "a.x     float32       3  12 B        x.safetensors",
        "y       int8     scalar   1 B        x.safetensors",
    ]


def test_inspect_of_many_modules(tmp_path: Path) -> None:
    """Catches output longer than a screen, and a rest that is not counted or cannot be shown."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    shardsave.save(model, tmp_path, max_shard_size=24, durable=False)
    shown = lines(run("inspect", tmp_path))
    assert len(shown) < 70 and "… 16 more       32  384 B  float32  ............  0%" in shown
    assert shown[-1] == "… 16 more shards; --all shows every one"
    everything = lines(run("inspect", tmp_path, "--all"))
    assert not any("more" in line for line in everything) and sum(line.startswith("model-") for line in everything) == 40


def test_tensors(ckpt: Path) -> None:
    """Catches a pattern that matches other names, and a tensor with a property that is not shown."""
    assert lines(run("inspect", ckpt, "--tensors", "*e*d.weight")) == [
        "tensor        dtype    shape    size  kind       shard                             tied",
        "embed.weight  float32  50×16  3.2 kB  trainable  model-00003-of-00004.safetensors",
        "head.weight   float32  50×16  3.2 kB  trainable  model-00003-of-00004.safetensors  = embed.weight",
    ]
    shown = lines(run("inspect", ckpt, "--tensors", "encoder.1.*"))
    assert len(shown) == 6 and sum("buffer" in line for line in shown) == 3 and sum("frozen" in line for line in shown) == 2
    assert error(run("inspect", ckpt, "--tensors", "weight"), 1) == f"shardsave inspect: {ckpt}: no name matches 'weight'"


def test_json(ckpt: Path) -> None:
    """Catches invalid JSON, and JSON that contradicts `shardsave.inspect`."""
    shown, info = json.loads(run("inspect", ckpt, "--json").stdout), shardsave.inspect(ckpt)
    assert shown["path"] == str(ckpt) and shown["bytes"] == info.bytes and shown["durable"] is True
    assert shown["metadata"] == {"step": 7} and list(shown["tensors"]) == list(info.names)
    for name, tensor in shown["tensors"].items():
        wanted = info.tensors[name]
        assert getattr(torch, tensor["dtype"]) == wanted.dtype and tuple(tensor["shape"]) == wanted.shape
        assert (tensor["bytes"], tensor["shard"]) == (wanted.nbytes, wanted.shard)
        assert tensor["parameter"] == (name in info.parameters) and bool(tensor["frozen"]) == (name in info.frozen)
        assert tensor["tied_to"] == info.ties.get(name)
    assert {shard: sums["tensors"] for shard, sums in shown["shards"].items()} == dict(zip(info.shards, (4, 2, 2, 5)))
    matching = json.loads(run("inspect", ckpt, "--json", "--tensors", "narrow.*").stdout)
    assert list(matching["tensors"]) == ["narrow.weight", "narrow.bias"]


def test_verify(ckpt: Path) -> None:
    """Catches damaged or intact tensors that are not named, and an exit code that does not report damage."""
    shards = [f"model-0000{n}-of-00004.safetensors" for n in range(5)]
    shown = lines(run("verify", ckpt))
    assert shown[:4] == [f"intact   {shards[n]}  {count} tensors" for n, count in ((1, 4), (2, 2), (3, 2), (4, 5))]
    assert shown[4].startswith(f"verified {ckpt}: 8.6 kB, 13 tensors in 4 shards") and len(shown) == 5
    assert run("verify", ckpt, "--quiet").output == ""
    flip(ckpt / shards[1])
    flip(ckpt / shards[2], 100)
    shown = lines(run("verify", ckpt), 1)
    assert [re.sub(" [0-9a-f]{16}", " …", line) for line in shown[:-1]] == [
        f"DAMAGED  {shards[1]}  1 of 4 tensors damaged",
        f"         corrupt shard {shards[1]}: tensor 'encoder.1.bias' has checksum …, its header says …; "
        f"the file was changed after it was saved",
        "         damaged  encoder.1.bias",
        "         intact   encoder.0.weight",
        "         intact   encoder.0.bias",
        "         intact   encoder.1.weight",
        f"DAMAGED  {shards[2]}  2 of 2 tensors damaged",
        f"         corrupt shard {shards[2]}: the index says a header with checksum …, the file has …; "
        f"the file was changed after it was saved, or belongs to another save",
        "         damaged  encoder.2.weight",
        "         damaged  encoder.2.bias",
        f"intact   {shards[3]}  2 tensors",
        f"intact   {shards[4]}  5 tensors",
    ]
    assert shown[-1].startswith(f"damaged {ckpt}: encoder.2.weight, encoder.2.bias, encoder.1.bias; 10 tensors intact, ")
    quiet = lines(run("verify", ckpt, "-q"), 1)
    assert len(quiet) == 7 and not any("intact" in line for line in quiet)
    report = json.loads(run("verify", ckpt, "--json").stdout)
    assert report["verified"] is False and sum(map(len, report["intact"].values())) == 10
    assert [d["tensors"] for d in report["damaged"]] == [["encoder.2.weight", "encoder.2.bias"], ["encoder.1.bias"]]


def test_verify_without_checksums(tmp_path: Path) -> None:
    """Catches a file that is called intact although only its length and header were checked."""
    save_file({"x": torch.ones(2)}, tmp_path / "m.safetensors")
    first, last = lines(run("verify", tmp_path / "m.safetensors"))
    assert first.startswith("unchecked  m.safetensors  1 tensor") and last.startswith("checked ")


def test_verify_with_a_broken_index(ckpt: Path) -> None:
    """Catches a damaged index that is reported with the exit code of wrong usage or of a failure."""
    flip(ckpt / "model.safetensors.index.json", 20)
    assert error(run("verify", ckpt), 1).startswith("shardsave: corrupt index model.safetensors.index.json: ")
    assert error(run("inspect", ckpt), 3).startswith("shardsave: corrupt index model.safetensors.index.json: ")


def test_diff(ckpt: Path, tmp_path: Path) -> None:
    """Catches a difference that is not shown, or that does not change the exit code."""
    assert lines(run("diff", ckpt, ckpt))[0].startswith(f"{ckpt} and {ckpt}: 14 equal, 0 changed")
    other = SmallModel()
    other.narrow.requires_grad_(False)
    with torch.no_grad():
        other.encoder[0].weight[0, 0] += 0.25
        other.encoder[0].bias[:2] = float("nan")
    other.encoder[2] = nn.Linear(16, 16)
    other.extra, other.steps = nn.Parameter(torch.ones(2)), torch.arange(3)
    del other.head
    shardsave.save(other, tmp_path / "b")
    shown = lines(run("diff", ckpt, tmp_path / "b"), 1)
    report = shardsave.diff(ckpt, tmp_path / "b")
    bias = report.changed["encoder.2.bias"]
    assert shown[:-1] == [
        "   changed           shape          dtype    differing  max |a-b|  max relative  NaN",
        "~  steps             5 → 3          int64",
        "~  encoder.0.weight  32×16          float32          1       0.25         0.692",
        "~  encoder.0.bias    32             float32          2          0             0    2",
        "~  encoder.2.weight  16×32 → 16×16  float32",
        f"~  encoder.2.bias    16             float32         16  {bias.max_absolute:9.3g}  {bias.max_relative:12.3g}",
        "+ extra",
        "- head.weight",
        "* encoder.2.weight: frozen → trainable",
        "* encoder.2.bias: frozen → trainable",
        "* narrow.weight: trainable → frozen",
        "* narrow.bias: trainable → frozen",
        "metadata step: 7 → nothing",
    ]
    assert shown[-1].startswith(
        f"{ckpt} and {tmp_path}/b: 8 equal, 5 changed (steps, encoder.0.weight, encoder.0.bias and 2 more), "
    )
    parsed = json.loads(run("diff", ckpt, tmp_path / "b", "--json").stdout)
    assert parsed["same"] is False and tuple(parsed["equal"]) == report.equal and parsed["removed"] == ["head.weight"]
    assert parsed["changed"]["encoder.0.weight"]["max_absolute"] == 0.25 and parsed["changed"]["steps"]["elements"] is None
    assert parsed["flags"]["narrow.bias"] == [False, True]


def test_diff_of_ties_and_metadata(tmp_path: Path) -> None:
    """Catches ties or metadata that are not shown, and an exit code of 1 if only metadata differs."""
    weight = torch.ones(2)
    shardsave.save({"a": weight, "b": weight}, tmp_path / "a", metadata={"run": 7})
    shardsave.save({"a": weight, "b": weight.clone()}, tmp_path / "b", metadata={"note": "é" * 100})
    shardsave.save({"a": weight, "b": weight}, tmp_path / "c", metadata={"run": 8})
    ties, run_line, note, _ = lines(run("diff", tmp_path / "a", tmp_path / "b"), 1)
    assert (ties, run_line) == ("= b: shares a → its own", "metadata run: 7 → nothing")
    assert note == f'metadata note: nothing → "{"é" * 58}…'
    assert lines(run("diff", tmp_path / "a", tmp_path / "c"))[0] == "metadata run: 7 → 8"
    report = json.loads(run("diff", tmp_path / "a", tmp_path / "c", "--json").stdout)
    assert report["metadata"] == {"run": [7, 8]} and report["ties"] == {} and report["same"] is True


def test_diff_in_json_has_no_infinity(tmp_path: Path) -> None:
    """Catches a word that a strict JSON reader refuses."""
    for name, value in (("a", 1.0), ("b", float("inf"))):
        shardsave.save({"x": torch.tensor([value])}, tmp_path / name)
    text = run("diff", tmp_path / "a", tmp_path / "b", "--json").stdout
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))["changed"]["x"]["max_absolute"] == "inf"


@pytest.mark.parametrize(("arguments", "answer", "left"), [
    ((), "y\n", 0), ((), "n\n", 1), ((), "", 1), (("--yes",), "", 0), (("--dry-run",), "y\n", 1), (("--dry-run", "--yes"), "", 1),
])  # fmt: skip
def test_clean(ckpt: Path, arguments: tuple[str, ...], answer: str, left: int) -> None:
    """Catches a removal that was not confirmed or not shown before. A closed stdin confirms nothing."""
    assert lines(run("clean", ckpt)) == [f"{ckpt}: nothing was left behind"]
    killed(ckpt, die_before_the_commit)
    (staging,) = ckpt.glob(".shardsave-*")
    result = run("clean", ckpt, *arguments, input=answer)
    shown = lines(result, left)
    assert shown[0].split() == ["left", "behind", "files", "size", "owner"] and shown[1].startswith(staging.name)
    assert f"  {staging.name}/names" in shown and staging.exists() == bool(left)
    assert ("Remove 1 leaving, " in result.stderr) == (not arguments)
    assert shown[-1].endswith("; 1 removed") == (not left)
    assert shardsave.verify(ckpt).verified


def test_clean_and_other_hosts(ckpt: Path) -> None:
    """Catches files of another host that are removed without --other-hosts, with or without --yes."""
    other = ckpt / ".shardsave-0123456789abcdef"
    other.mkdir()
    shown = lines(run("clean", ckpt, "--yes"), 1)
    assert other.exists() and "another host" in shown[1]
    assert shown[-1] == "files from another host are only removed with --other-hosts; make sure that no save is running there"
    assert lines(run("clean", ckpt, "--yes", "--other-hosts"))[-1].endswith("; 1 removed") and not other.exists()


def test_clean_as_json(ckpt: Path) -> None:
    """Catches a report that lacks a field, mixes text into the JSON, or removes without being told to."""
    killed(ckpt, die_before_the_commit)
    (shown,) = map(json.loads, lines(run("clean", ckpt, "--json"), 1))
    (found,) = shown["found"]
    assert shown["path"] == str(ckpt) and shown["removed"] == shown["leftovers"] == []
    assert found["dead"] is True and found["bytes"] > 0 and (ckpt / found["name"]).exists()
    (shown,) = map(json.loads, lines(run("clean", ckpt, "--json", "--yes")))
    assert shown["removed"] == [found["name"]] and not (ckpt / found["name"]).exists()
    assert json.loads(run("clean", ckpt, "--json").stdout)["found"] == []


def test_a_quiet_verification_without_checksums(tmp_path: Path) -> None:
    """Catches silence about files that have no checksums, which reads as if every byte had been verified."""
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    done = run("verify", tmp_path, "--quiet")
    assert done.stdout == ""
    assert done.stderr == f"shardsave verify: {tmp_path}: only lengths and headers were checked, no checksums stored\n"


def test_clean_during_a_save(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that hangs, or that removes files of a running save."""
    import shardsave._cli.clean as command

    monkeypatch.setattr(command, "_PATIENCE", 0.1)
    with Transaction(ckpt, durable=False, lock_timeout=1), ThreadPoolExecutor(1) as other:
        said = error(other.submit(run, "clean", ckpt).result(), 3)
        assert said.replace(" (this process)", "") == (  # some file systems do not let it know the holder
            f"shardsave: cannot clean {ckpt}: its lock was expected within 0.1 s, another save holds it; nothing was removed"
        )


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("inspect", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("inspect", "two\nlines"), 3, r"shardsave: no checkpoint at $DIR/two\nlines: No such file or directory"),
    (("verify", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("diff", "none", "none"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("plot", "none", "-o", "x.png"), 3, "shardsave: no checkpoint at $DIR/none: No such file or directory"),
    (("clean", "none"), 3, "shardsave: cannot clean $DIR/none: open: No such file or directory; nothing was removed"),
    (("inspect",), 2, "shardsave inspect: Missing argument 'DIRECTORY'; see shardsave inspect --help"),
    (("diff", "a"), 2, "shardsave diff: Missing argument 'B'; see shardsave diff --help"),
    (("plot", "a"), 2, "shardsave plot: Missing option '--output' / '-o'; see shardsave plot --help"),
    (("inspect", "a", "--depth", "x"), 2,
     "shardsave inspect: Invalid value for '--depth': 'x' is not a valid integer range; see shardsave inspect --help"),
    (("explode",), 2, "shardsave: No such command 'explode'; see shardsave --help"),
    (("verify", "a", "--jsn"), 2, "shardsave verify: No such option '--jsn'. Did you mean '--json'?; see shardsave verify --help"),
    (("inspect", ""), 2, "shardsave inspect: Invalid value for 'DIRECTORY': the path of a checkpoint must not be empty; "
     "the current directory is '.'; see shardsave inspect --help"),
])  # fmt: skip
def test_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Catches a traceback, an error of several lines or on stdout, and a wrong exit code."""
    monkeypatch.chdir(tmp_path)
    assert error(run(*arguments), code) == words.replace("$DIR", str(tmp_path))


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Catches a command without examples, exit codes or a short description, and an example of another command."""
    text = "\n".join(lines(run(command, "--help")))
    assert "Examples:" in text and (command == "completion" or "Exit codes: 0" in text)
    examples = re.findall(r"^\s+shardsave (\w+)", text, re.MULTILINE) or re.findall(r"shardsave (completion)", text)
    assert set(examples) == {command}
    top = lines(run("--help"))
    (listed,) = (line for line in top if line.startswith(f"  {command} "))
    assert not listed.endswith("...")
    assert "Exit codes:" in "\n".join(top) and lines(run("--version")) == [f"shardsave, version {shardsave.__version__}"]


def complete(words: str) -> list[str]:
    shown = process(_SHARDSAVE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    return [line.split(",")[-1] for line in shown.stdout.splitlines()]


def test_completion() -> None:
    """Catches completion that returns nothing, and a script that the shell cannot parse."""
    assert complete("shardsave ") == sorted(COMMANDS) and complete("shardsave in") == ["inspect"]
    assert {"--tensors", "--json", "--depth"} <= set(complete("shardsave inspect --"))
    for shell in ("bash", "zsh", "fish"):
        script = run("completion", shell).stdout
        assert "_SHARDSAVE_COMPLETE" in script and f"{shell}_complete" in script
    assert subprocess.run(["bash", "-n"], input=run("completion", "bash").stdout, text=True).returncode == 0
    assert error(run("completion", "tcsh"), 2).startswith(
        "shardsave completion: Invalid value for '{bash|zsh|fish}': 'tcsh' is not"
    )


def test_a_missing_choice_in_one_line() -> None:
    """Catches escapes in a message of click about an argument that is missing."""
    assert error(run("completion"), 2).endswith(
        "Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish; see shardsave completion --help"
    )


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


def loaded_by(program: str) -> set[str]:
    script = f"import sys; {program}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split())


@pytest.mark.slow
def test_imports(ckpt: Path) -> None:
    """Catches a library that imports packages of the command line, and a command that imports torch without need."""
    assert loaded_by("import shardsave; shardsave.save").isdisjoint({"click", "rich", "matplotlib"})
    inspecting = loaded_by(
        f"from click.testing import CliRunner; from shardsave._cli.main import cli; CliRunner().invoke(cli, ['inspect', '{ckpt}'])"
    )
    assert "shardsave._storage.checkpoint" in inspecting and inspecting.isdisjoint({"torch", "matplotlib"})


@pytest.mark.slow
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    """Catches an inspection that is slow for very many tensors."""
    state = {f"layers.{n // 100}.experts.{n // 2 % 50}.{'ab'[n % 2]}": torch.ones(1) for n in range(100_000)}
    shardsave.save(state, tmp_path, durable=False)
    started = time.process_time()
    shown = lines(run("inspect", tmp_path))
    assert time.process_time() - started < 5  # 1.0 s here; the bound is for a busy machine
    assert len(shown) < 50 and "100,000 tensors" in shown[0]


def test_a_config_of_another_save_is_noted(tmp_path: Path) -> None:
    """Catches a config from another save beside the weights, without a note about it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=4)
    shardsave.save(transformers.GPT2LMHeadModel(config), tmp_path / "ckpt")
    assert run("inspect", tmp_path / "ckpt").stderr == ""
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    result = run("inspect", tmp_path / "ckpt", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["tensors"]
    assert result.stderr.startswith(
        f"shardsave inspect: {tmp_path}/ckpt: config.json is not the one saved with these weights: "
    )
    assert len(result.stderr.splitlines()) == 1


def test_a_closed_output_and_a_width_of_nan(tmp_path: Path) -> None:
    """Catches a traceback if stdout is closed, and if a width is not a number."""
    shardsave.save(SmallModel(), tmp_path / "ckpt")
    command = f"{sys.executable} -m shardsave inspect {tmp_path}/ckpt >&-"
    assert "Traceback" not in subprocess.run(command, shell=True, capture_output=True, text=True).stderr
    wrong = run("plot", tmp_path / "ckpt", "-o", tmp_path / "a.png", "--width", "nan")
    assert "nan is not a number of inches" in error(wrong, 2)
