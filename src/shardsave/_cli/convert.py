"""``shardsave convert``: turns third-party checkpoints into shardsave directories, and these into single files."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from shardsave._cli.output import GOOD, Output, wants_bar
from shardsave._cli.paths import CHECKPOINT
from shardsave._cli.runs import latest_of_run
from shardsave._format.file_names import TORCH_ENDINGS
from shardsave.errors import IncompatibleCheckpointError, UntrustedCodeError

if TYPE_CHECKING:
    from shardsave._api.convert import Form


@click.command(
    short_help="Convert checkpoints from and to other formats.",
    epilog="""\b
Examples:
  shardsave convert pytorch_model.bin ckpt
  shardsave convert dcp-dir ckpt --key model --dtype bfloat16 --max-shard-size 2GB
  shardsave convert old.pt ckpt --drop 'optimizer.*' --rename '^module\\.' ''
  shardsave convert ckpt weights --drop training
  shardsave convert ckpt model.safetensors --to safetensors

Exit codes: 0 converted, 2 wrong usage, 3 failed; then DST is unchanged.""",
)
@click.argument("source", metavar="SRC", type=CHECKPOINT)
@click.argument("destination", metavar="DST", type=CHECKPOINT)
@click.option(
    "--to",
    type=click.Choice(["shardsave", "safetensors", "torch"]),
    default="shardsave",
    show_default=True,
    help="A directory of shards, or one file of safetensors or of torch.save.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="2GB", show_default=True, help="Bytes of data in one shard: 500MB, 2GiB."
)
@click.option("--dtype", metavar="DTYPE", help="Cast floating tensors: bfloat16, float16, float32, …")
@click.option("--drop", metavar="PATTERN", multiple=True, help="Leave out names that match (*, ?, [abc]). Can be repeated.")
@click.option(
    "--rename",
    metavar="REGEX NEW",
    type=(str, str),
    multiple=True,
    help=r"In every name, replace matches of REGEX by NEW (\1: its first group). Can be repeated.",
)
@click.option("--key", metavar="KEY", help="Which state to convert if SRC holds several: model, trainer.ema.")
@click.option(
    "--allow",
    metavar="NAME",
    multiple=True,
    help="Read objects of this class as inert records; nothing is imported. Can be repeated.",
)
@click.option("--no-verify", is_flag=True, help="Do not check the checksums of SRC first.")
@click.option("--not-durable", is_flag=True, help="Do not wait until the result is safe from a loss of power.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert(
    source: str,
    destination: str,
    to: Form,
    max_shard_size: str,
    dtype: str | None,
    drop: tuple[str, ...],
    rename: tuple[tuple[str, str], ...],
    key: str | None,
    allow: tuple[str, ...],
    no_verify: bool,
    not_durable: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC to DST, which is replaced completely or not at all.

    SRC may be a shardsave checkpoint, a safetensors file or directory from any library, a file of torch.save (.bin, .pt, .pth), a
    directory of such shards, or a directory of torch.distributed.checkpoint. Of a run, the latest step is converted. No code in it is
    run. The memory needed does not grow with the model.
    """
    import shardsave

    source = latest_of_run("convert", source, (".distcp", ".safetensors", *TORCH_ENDINGS))
    try:
        report = shardsave.convert(
            source,
            destination,
            to=to,
            max_shard_size=max_shard_size,
            dtype=dtype,
            drop=drop,
            rename=rename,
            key=key,
            allow=allow,
            verify=not no_verify,
            durable=not not_durable,
            progress=wants_bar(),
        )
    except ValueError as error:
        raise click.UsageError(_as_options(str(error))) from error
    except (IncompatibleCheckpointError, UntrustedCodeError) as error:
        raise type(error)(_as_options(str(error))) from error
    report = replace(report, notes=tuple(map(_as_options, report.notes)))
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        Output().line((str(report), GOOD))


def _as_options(message: str) -> str:
    """Rewrites the arguments in a library message as options: ``key='x'`` becomes ``--key 'x'``, and a list the option for each item."""
    message = re.sub(r"(?<!\S)(allow|drop)=(\[[^\]]*\])", _repeated, message)
    message = re.sub(r"(?<!\S)(allow|drop|key|rename|to)=(?=['\"])", r"--\1 ", message)
    message = re.sub(r"^(allow|drop|dtype|key|rename) must ", r"--\1 must ", message)
    return re.sub(r"\bmax_shard_size\b", "--max-shard-size", message)


def _repeated(argument: re.Match[str]) -> str:
    option, listed = argument.groups()
    try:
        return " ".join(f"--{option} {item!r}" for item in ast.literal_eval(listed))
    except (ValueError, SyntaxError):  # a name with a bracket
        return argument[0]
