"""The commands together, and how each of them ends: exit codes, and errors in one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from shardsave._cli.clean import clean
from shardsave._cli.completion import completion
from shardsave._cli.convert import convert
from shardsave._cli.diff import diff
from shardsave._cli.inspect import inspect
from shardsave._cli.output import printable
from shardsave._cli.plot import plot
from shardsave._cli.verify import verify
from shardsave._common.backend import check_engine
from shardsave._version import __version__
from shardsave.errors import ShardSaveError

USAGE, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 3, 130, 141


class _PipeClosed(Exception):
    """Nobody reads on what is printed, as behind ``| head``."""


class Commands(click.Group):
    """A group that ends the process with one of the documented codes, and says what went wrong in one line."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that has not all letters gets question marks, no traceback
        sys.exit(self._run(args, "shardsave", *rest, **extra))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:  # it was closed before we came
                    sys.stdout.flush()
        except BrokenPipeError as error:  # click would take it for itself, and end with 1
            raise _PipeClosed from error

    def _run(self, *arguments: Any, **extra: Any) -> int:
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
            return _fail(f"{command}: {error.format_message().rstrip('.')}{hint}", code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("shardsave: interrupted", INTERRUPTED)
        except _PipeClosed:  # Python's own flush at the end must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        except ShardSaveError as error:
            return _fail(f"shardsave: {error}", FAILED)
        except OSError as error:
            return _fail(f"shardsave: {error.filename or 'output'}: {error.strerror or error}", FAILED)


def _fail(message: str, code: int) -> int:
    click.echo(printable(message), err=True)
    return code


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes:
  0    done, and nothing is wrong
  1    something is: damage (verify), a difference (diff), leavings that stay (clean), no match (inspect)
  2    the command line is not right
  3    it could not be done: no checkpoint, unreadable files, a save at work
  130  interrupted
\b
Examples:
  shardsave inspect ckpt --depth 3
  shardsave verify ckpt && echo whole
  shardsave diff ckpt-1000 ckpt-2000
  shardsave convert pytorch_model.bin ckpt""",
)
@click.version_option(__version__, package_name="shardsave", prog_name="shardsave")
def cli() -> None:
    """Look into checkpoints, check them, compare them, and tidy up after crashes.

    DIRECTORY may also be the path of an index or of one safetensors file, whoever wrote it. Output is plain text where it does not
    go to a terminal; NO_COLOR is honoured.
    """


for command in (inspect, verify, diff, convert, plot, clean, completion):
    cli.add_command(command)
