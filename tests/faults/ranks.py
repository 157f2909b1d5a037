"""Method: as in ``scenarios.py``, for four ranks: the N-th OS call of one of them on the watched directory meets a fate.

Each time all ranks end with the same result, the directory holds the old or the new checkpoint, whole, the next call works, and nothing is
left: no litter, no lock, no thread, no descriptor, no group.

``python -m faults.ranks RANK FOLDER SCENARIO/KIND/BEFORE/EVERY …``, with the library of ``beneath.c`` preloaded; the ranks inherit it.
Without arguments it reads them from its input, as JSON, line by line; after each line it prints "end" and how many scenarios failed.
``KIND``: what is saved (`rank_savers.KINDS`); ``BEFORE``: "first" or "overwrite"; ``EVERY``: only every so many calls are tried. Where a
scenario has several fates, they take turns.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from faults import failing_ranks, lost_ranks, rank_resumes, rank_runs
from faults.beneath import Fate
from faults.rank_savers import Case

SCENARIOS: dict[str, tuple[Callable[[Case], int], list[tuple[Fate, int]]]] = {
    "fails": (failing_ranks.fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL, errno.ENOSPC)]),
    "fails_after": (failing_ranks.fails, [(Fate.FAIL_AFTER, errno.EIO)]),
    "loses_its_disk": (failing_ranks.fails, [(Fate.FAIL_FROM_HERE, errno.EIO)]),
    "is_killed": (lost_ranks.is_killed, [(Fate.KILL, 0)]),
    "is_killed_after": (lost_ranks.is_killed, [(Fate.KILL_AFTER, 0)]),
    "is_stopped": (lost_ranks.is_stopped, [(Fate.STOP, 0)]),
    "is_killed_at_random": (lost_ranks.is_killed_at_random, [(Fate.PASS, 0)]),
    "resume_fails": (rank_resumes.resume_fails, [(Fate.FAIL, errno.EIO)]),
    "resume_is_killed": (rank_resumes.resume_is_killed, [(Fate.KILL, 0)]),
    "run_fails": (rank_runs.run_fails, [(Fate.FAIL, errno.EIO)]),
    "run_is_killed": (rank_runs.run_is_killed, [(Fate.KILL_AFTER, 0)]),
}


def main(victim: str, folder: str, *runs: str) -> int:
    """Returns how many scenarios failed."""
    failed = 0
    for place, run in enumerate(runs):
        name, kind, before, every = run.split("/")
        scenario, fates = SCENARIOS[name]
        for turn, (fate, number) in enumerate(fates):
            case_folder = Path(folder) / f"{place}-{name}-{turn}"
            case_folder.mkdir()
            begin = 1 + turn * int(every) // len(fates)
            case = Case(case_folder, kind, before == "first", int(victim), fate, number, begin, int(every))
            started = time.monotonic()
            try:
                result = f"{scenario(case)} trials"
            except Exception:
                failed += 1
                result = f"FAILED\n{traceback.format_exc()}"
            what = f"{run} of rank {victim}, {fate.name} {errno.errorcode.get(number, '')}"
            print(f"{what}: {result} ({time.monotonic() - started:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    os.environ["JOBS_PRELOAD"] = "faults.lost_ranks faults.rank_resumes faults.rank_runs"
    if sys.argv[1:]:
        sys.exit(main(*sys.argv[1:]))
    for line in sys.stdin:
        print("end", main(*json.loads(line)), flush=True)
