"""After each test of background saves: nothing of them is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.optim import optimizer as torch_optimizer

from background.saving import hooks
from shardsave._background.snapshot import release_snapshot_memory


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Catches a hook that stays registered."""
    assert hooks() == 0
    yield
    left = hooks()
    torch_optimizer._global_optimizer_pre_hooks.clear()
    assert left == 0, "a hook before steps is still registered"
    release_snapshot_memory()
