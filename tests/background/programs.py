"""Programs that save in the background, in processes that begin with everything imported, and end as every interpreter does."""

from __future__ import annotations

import textwrap
from pathlib import Path

from warm_python import Running, warm_python

_BEGIN = """
from background.prelude import *
folder = sys.argv[1]
ckpt = f"{folder}/ckpt"
signal.alarm(60)
"""


def run_program(program: str, folder: Path) -> Running:
    """Starts ``program``, which may use ``folder``, ``ckpt`` in it, and all that is in `background.prelude`."""
    return warm_python("background.prelude").start(["-c", _BEGIN + textwrap.dedent(program), folder])
