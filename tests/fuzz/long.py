"""The long fuzzing run: ``python tests/fuzz/long.py SECONDS [SEED]`` divides the time between generators and between parsers.

Uses the mutator and the grammar, and the coverage-guided fuzzer if atheris is installed (``pip install atheris``). The first failure
ends the run and prints its input, for `check_shard` or `check_index` in ``targets.py``.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

Target = Callable[[bytes], None]


def by_mutation(name: str, seconds: float, seed: int) -> int:
    """Fuzzes with the mutator; returns the number of inputs."""
    import seeds
    import targets
    from mutation import Mutator

    target: Target = {"headers": targets.fuzz_header, "indexes": targets.fuzz_index}[name]
    mutator = Mutator(getattr(seeds, "shards" if name == "headers" else name)(), seed)
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:
        for _ in range(100):
            content = mutator.next()
            try:
                target(content)
            except BaseException:
                sys.exit(f"{traceback.format_exc()}\nfound by mutation: {content!r}")
        tried += 100
    return tried


def by_grammar(name: str, seconds: float, seed: int) -> int:
    """Fuzzes with the grammar; returns the number of inputs."""
    import grammar
    import targets
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    target: Target = {"headers": targets.fuzz_header, "indexes": targets.fuzz_index}[name]
    strategy = {"headers": grammar.shards, "indexes": grammar.indexes}[name]()
    end = time.monotonic() + seconds
    tried = 0

    def attempt(content: bytes) -> None:
        nonlocal tried
        tried += 1
        target(content)

    for number in _until(end):
        options = settings(
            max_examples=1000,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        seeded(seed * 1_000_000 + number)(options(given(strategy)(attempt)))()
    return tried


def _until(end: float) -> Iterator[int]:
    number = 0
    while time.monotonic() < end:
        yield number
        number += 1


def by_coverage(name: str, seconds: float, seed: int) -> int:
    """Fuzzes with atheris in its own process, since libFuzzer ends its process; returns the number of inputs."""
    import seeds

    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(getattr(seeds, "shards" if name == "headers" else name)()):
            (Path(corpus) / str(number)).write_bytes(content)
        command = [sys.executable, __file__, "--guided", name, corpus]
        limits = [
            f"-max_total_time={max(1, round(seconds))}",
            f"-seed={seed}",
            "-max_len=20000",
            "-timeout=20",
            "-rss_limit_mb=4096",
        ]
        ended = subprocess.run(
            [*command, *limits], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    done = re.search(r"Done (\d+) runs", ended.stdout)
    if ended.returncode != 0 or done is None:
        sys.exit(f"{ended.stdout[-8000:]}\nfound by coverage")
    return int(done[1])


def guided(name: str, arguments: list[str]) -> None:
    """Runs atheris in this process and does not return."""
    import atheris

    with atheris.instrument_imports(
        include=["shardsave._common.strict_json", "shardsave._format.header", "shardsave._format.index_parsing"]
    ):
        import targets
    target: Target = {"headers": targets.fuzz_header, "indexes": targets.fuzz_index}[name]
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


def main(seconds: float, seed: int) -> None:
    import targets

    ways = [by_mutation, by_grammar]
    if importlib.util.find_spec("atheris") is not None:
        ways.append(by_coverage)
    else:
        print("fuzz: atheris is not installed: no coverage-guided part")
    print(f"fuzz: seed {seed}", flush=True)
    share = seconds / (2 * len(ways))
    for name in ("headers", "indexes"):
        for way in ways:
            began = time.monotonic()
            tried = way(name, share, seed)
            print(
                f"fuzz: {name} {way.__name__.replace('_', ' ')}: {tried} inputs in {time.monotonic() - began:.0f} s", flush=True
            )
    print(f"fuzz: headers: {targets.headers}; indexes: {targets.indexes} (coverage apart); nothing found")


if __name__ == "__main__":
    if sys.argv[1] == "--guided":
        guided(sys.argv[2], sys.argv[3:])
    else:
        main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time()))
