"""What every rank does by itself, and all must succeed in: reading what is saved, opening a checkpoint, checking arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from shardsave._common.words import some
from shardsave._ranks.failures import failure_of, is_foreign, unpacked

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

_T = TypeVar("_T")

#: Begins what a rank says, and what comes of all: an error; identities that are all the same, or not.
_FAILED, _SAME, _OTHER = b"!", b"=", b"~"


def attempt(
    session: Session, what: str, work: Callable[[], _T], identity: Callable[[_T], bytes] = lambda _: b""
) -> tuple[_T, bool]:
    """What ``work`` returns, once it has succeeded on all ranks, and whether its ``identity`` is the same on all.

    If it fails on some of them, all raise the error of the lowest, in front of which stand the ranks that have it, unless all have. An
    error that is none of this package's is raised where it struck as it is.
    """
    error: Exception | None = None
    try:
        result = work()
        mine = _SAME + identity(result)
    except Exception as raised:
        error, mine = raised, _FAILED + failure_of(raised, "").packed()
    gathered = session.gather(what, mine)
    told = session.publish(f"{what} of all", None if gathered is None else _verdict(session, gathered))
    if told[:1] != _FAILED:
        return result, told == _SAME
    of_job = unpacked(told[1:]).error(session.usual)
    is_own = error is not None and (is_foreign(error) or (type(error), str(error)) == (type(of_job), str(of_job)))
    raised_here = error if is_own and error is not None else of_job
    session.end_with(raised_here)
    if is_own:
        raise raised_here
    raise raised_here from error


def _verdict(session: Session, gathered: Sequence[bytes]) -> bytes:
    failures = {rank: unpacked(one[1:]) for rank, one in enumerate(gathered) if one[:1] == _FAILED}
    if not failures:
        return _SAME if len({*gathered}) == 1 else _OTHER
    first = next(iter(failures.values()))
    ranks = [rank for rank, failure in failures.items() if failure == first]
    if len(ranks) < session.size:
        first = first._replace(text=f"{some(map(session.name, ranks))}: {first.text}")
    return _FAILED + first.packed()
