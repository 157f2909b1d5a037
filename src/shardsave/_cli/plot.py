"""``shardsave plot``: a picture of a checkpoint."""

from __future__ import annotations

import math
import os

import click

from shardsave._cli.paths import CHECKPOINT
from shardsave._common.gc_pause import gc_paused
from shardsave._common.words import human_bytes
from shardsave._storage.open_checkpoint import open_checkpoint


@click.command(
    short_help="Draw shards and tensors to scale.",
    epilog="""\b
Examples:
  shardsave plot ckpt -o map.png
  shardsave plot ckpt -o map.svg --width 16

Exit codes: 0 done, 2 wrong usage, 3 failed.""",
)
@click.argument("directory", type=CHECKPOINT)
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False), help="File to write: .png, .svg, .pdf, …")
@click.option("--width", type=click.FloatRange(4, 60), default=12.0, show_default=True, help="Width of the picture in inches.")
def plot(directory: str, output: str, width: float) -> None:
    """Draw a checkpoint to scale: a row for each shard of DIRECTORY, a rectangle for each tensor.

    Frozen parameters are dark and trainable ones light, also in print; grey tensors are no parameters, or their flags are unknown.
    Reads headers only. Needs matplotlib: pip install 'shardsave[plot]'.
    """
    if not math.isfinite(width):
        raise click.BadParameter(f"{width} is not a number of inches", param_hint="'--width'")
    try:
        from shardsave._cli import picture
    except ImportError as error:
        raise click.ClickException(
            f"matplotlib is needed, it cannot be imported ({error}); pip install 'shardsave[plot]'"
        ) from error
    suffix = os.path.splitext(output)[1].lstrip(".").lower()
    formats = picture.formats()
    if suffix not in formats:
        raise click.UsageError(f"the picture's format must be one of {', '.join(formats)}, not {output!r}")
    with gc_paused(), open_checkpoint(directory) as checkpoint:
        figure = picture.draw(checkpoint, width)
    picture.write(figure, output)
    click.echo(f"{output}: {human_bytes(os.path.getsize(output))}")
