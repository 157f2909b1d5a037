"""``python -m shardsave``."""

from shardsave._cli.main import cli

if __name__ == "__main__":
    cli()
