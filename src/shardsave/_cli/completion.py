"""``shardsave completion``: prints a script with which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    epilog="""\b
Examples:
  eval "$(shardsave completion bash)"                                    # in ~/.bashrc
  eval "$(shardsave completion zsh)"                                     # in ~/.zshrc
  shardsave completion fish > ~/.config/fish/completions/shardsave.fish"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell."""
    kind = get_completion_class(shell)
    assert kind is not None, "the choice above has only shells that click knows"
    click.echo(kind(context.find_root().command, {}, "shardsave", "_SHARDSAVE_COMPLETE").source())
