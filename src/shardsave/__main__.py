"""``python -m shardsave``, and the script ``shardsave``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command. Imports take a second, and Ctrl-C may come before there is anything else that handles it."""
    try:
        from shardsave._cli.main import cli

        cli()
    except KeyboardInterrupt:
        print("shardsave: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
