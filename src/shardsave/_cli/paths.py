"""The type of command-line arguments that are paths of checkpoints."""

from __future__ import annotations

from typing import Any

import click

from shardsave._api.arguments import check_path


class _CheckpointPath(click.Path):
    """A path that a shell can complete; a path that cannot exist is a usage error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            check_path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


CHECKPOINT = _CheckpointPath()
