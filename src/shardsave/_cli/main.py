"""The command ``shardsave`` with all its subcommands; turns errors into one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from shardsave._cli.clean import clean
from shardsave._cli.completion import completion
from shardsave._cli.convert import convert
from shardsave._cli.diff import diff
from shardsave._cli.inspect import inspect
from shardsave._cli.list import list_steps
from shardsave._cli.plot import plot
from shardsave._cli.verify import verify
from shardsave._common.backend import check_engine
from shardsave._printable import printable
from shardsave._version import __version__
from shardsave.errors import ShardSaveError

USAGE, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 3, 130, 141


class _PipeClosed(Exception):
    """The reader of stdout has closed the pipe, as ``| head`` does."""


class Commands(click.Group):
    """A group that exits with one of the documented codes and prints each error in one line."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # A terminal that lacks some letters shows question marks instead of a traceback.
                stream.reconfigure(errors="replace")
        sys.exit(self._run(args, "shardsave", *rest, **extra))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:  # it is None if it was closed before Python started
                    sys.stdout.flush()
        except BrokenPipeError as error:  # click would handle this itself and exit with 1
            raise _PipeClosed from error

    def _run(self, *arguments: Any, **extra: Any) -> int:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return self._code_of(*arguments, **extra)

    def _code_of(self, *arguments: Any, **extra: Any) -> int:
        try:
            check_engine()
        except (ValueError, ImportError) as error:
            return _fail(f"shardsave: {error}", USAGE)
        try:
            code = super().main(*arguments, **extra)
            return code if isinstance(code, int) else 0
        except NoArgsIsHelpError as help_wanted:
            help_wanted.show()
            return USAGE
        except click.ClickException as error:
            command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "shardsave"
            hint = f"; see {command} --help" if isinstance(error, click.UsageError) else ""
            code = USAGE if isinstance(error, click.UsageError) else FAILED
            message = " ".join(map(str.strip, error.format_message().rstrip(".").splitlines()))  # click lists choices in lines
            return _fail(f"{command}: {message}{hint}", code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("shardsave: interrupted", INTERRUPTED)
        except _PipeClosed:  # otherwise Python's own flush at exit fails, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        except ShardSaveError as error:
            return _fail(f"shardsave: {error}", FAILED)
        except OSError as error:
            return _fail(f"shardsave: {error.filename or 'output'}: {error.strerror or error}", FAILED)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Prints a warning in one line, without the line of source that issued it: nobody who uses the command wrote that."""
    click.echo(printable(f"shardsave: warning: {message}"), err=True)


def _fail(message: str, code: int) -> int:
    click.echo(printable(message), err=True)
    return code


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes:
  0    done, nothing is wrong
  1    something is wrong: damage (verify, list), a difference (diff), files left behind (clean), no match (inspect)
  2    wrong usage
  3    failed: no checkpoint, unreadable files, a running save
  130  interrupted
\b
Examples:
  shardsave inspect ckpt --depth 3
  shardsave list run
  shardsave verify ckpt && echo whole
  shardsave diff ckpt-1000 ckpt-2000
  shardsave convert pytorch_model.bin ckpt""",
)
@click.version_option(__version__, package_name="shardsave", prog_name="shardsave")
def cli() -> None:
    """Inspect, verify, compare and convert checkpoints, and clean up after crashes.

    DIRECTORY may also be the path of an index or of a safetensors file from any library. Output is plain text unless it goes to a
    terminal; NO_COLOR is respected.
    """


for command in (inspect, list_steps, verify, diff, convert, plot, clean, completion):
    cli.add_command(command)
