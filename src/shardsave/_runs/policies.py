"""Policies: small values that say when a step is saved, and which steps stay and why.

A policy of keeping is called with all committed steps, in order, and returns those that stay: step → why. What no policy keeps is
removed. The last committed step and pinned steps always stay.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import ClassVar, Protocol

from shardsave._common.strict_json import glimpse
from shardsave._common.words import some
from shardsave._runs.steps import StepInfo

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*")

#: A user's own policy: returns the steps that stay, by number or as it got them.
UserPolicy = Callable[[tuple[StepInfo, ...]], Iterable["int | StepInfo"]]


class Keep(Protocol):
    """A policy of keeping."""

    def __call__(self, steps: Sequence[StepInfo]) -> Mapping[int, str]: ...


@dataclass(frozen=True)
class KeepLast:
    """Keeps the last ``count`` steps."""

    count: int

    def __call__(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {info.step: f"last {self.count}" for info in steps[-self.count :]}


@dataclass(frozen=True)
class KeepEvery:
    """Keeps one step for each multiple of ``interval``: the first step that is not before it.

    So a run whose saves do not fall on multiples, such as one every 10 minutes, keeps as many.
    """

    interval: int

    def __call__(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        first: dict[int, int] = {}
        for info in steps:
            first.setdefault(info.step // self.interval, info.step)
        return {step: f"every {self.interval}" for multiple, step in first.items() if multiple > 0}


@dataclass(frozen=True)
class KeepBest:
    """Keeps the ``count`` steps with the best ``metric``; of equal ones the later. Steps without the metric, or with NaN, do not count."""

    metric: str
    mode: str
    count: int

    def __call__(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        sign = 1 if self.mode == "min" else -1
        values = [(sign * info.metrics[self.metric], -info.step) for info in steps if not self.problem(info.metrics)]
        return {
            -step: f"best {self.metric}, {place} of {self.count}"
            for place, (_, step) in enumerate(sorted(values)[: self.count], 1)
        }

    def problem(self, metrics: Mapping[str, float]) -> str:
        """Why a step with these ``metrics`` does not count; "" if it does."""
        if self.metric not in metrics:
            others = f", only {some(map(glimpse, metrics))}" if metrics else ""
            return f"has no metric {glimpse(self.metric)}{others}"
        return f"has NaN as {glimpse(self.metric)}" if math.isnan(metrics[self.metric]) else ""


@dataclass(frozen=True)
class KeepChosen:
    """Keeps what the user's own function returns."""

    function: UserPolicy

    def __call__(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        chosen: object = self.function(tuple(steps))
        if not isinstance(chosen, Iterable):
            raise TypeError(f"policy must return the steps that stay, not {type(chosen).__name__}; no step was removed")
        numbers = [item.step if isinstance(item, StepInfo) else item for item in chosen]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, Integral):
                raise TypeError(
                    f"policy must return numbers of steps or StepInfo, not {type(number).__name__}; no step was removed"
                )
        return dict.fromkeys(map(int, numbers), "policy")


def kept(steps: Iterable[StepInfo], policies: Sequence[Keep]) -> dict[int, tuple[str, ...]]:
    """The committed steps that stay, each with all reasons. Without policies, all stay."""
    committed = [info for info in steps if info.committed]
    reasons: dict[int, list[str]] = {info.step: [] for info in committed}
    if committed:
        reasons[committed[-1].step].append("latest")
    for info in committed:
        if info.pinned:
            reasons[info.step].append("pinned")
        if not policies:
            reasons[info.step].append("no policy removes it")
    for policy in policies:
        for step, reason in policy(committed).items():
            reasons.get(step, []).append(reason)
    return {step: tuple(found) for step, found in reasons.items() if found}


class SaveWhen(Protocol):
    """A policy of saving: `due` is asked once for each step that is finished, `done` is told of each attempt to save.

    ``by_time``: whether processes that ask at the same step may get different answers. ``kind``: the same for policies that say the same
    at the same step, if they are not by time.
    """

    by_time: ClassVar[bool]

    @property
    def kind(self) -> str: ...

    def due(self, step: int) -> bool: ...

    def done(self, step: int) -> None: ...


@dataclass
class EverySteps:
    """Saves at multiples of ``interval``, or at the first step after one, if `due` is not asked for each step."""

    by_time: ClassVar[bool] = False

    interval: int
    _seen: int | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        return str(self.interval)

    def due(self, step: int) -> bool:
        seen, self._seen = self._seen, step
        return step // self.interval > (step - 1 if seen is None else seen) // self.interval

    def done(self, step: int) -> None:
        self._seen = step


@dataclass
class EverySeconds:
    """Saves when ``seconds`` have passed since the end of the last attempt to save, or since the beginning."""

    by_time: ClassVar[bool] = True

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    @property
    def kind(self) -> str:
        return "a time"

    def due(self, step: int) -> bool:
        return self.clock() - self._since >= self.seconds

    def done(self, step: int) -> None:
        self._since = self.clock()


class Never:
    """Saves only when the user asks for it, or a signal."""

    by_time: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return "None"

    def due(self, step: int) -> bool:
        return False

    def done(self, step: int) -> None:
        pass


def save_when(save_every: int | str | None) -> SaveWhen:
    """The policy for ``save_every``: a number of steps, a time such as ``"10min"``, or None. Raises TypeError or ValueError."""
    if save_every is None:
        return Never()
    if isinstance(save_every, bool) or not isinstance(save_every, (int, str)):
        raise TypeError(f"save_every must be a number of steps or a time such as '10min', not {save_every!r}")
    if isinstance(save_every, int):
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1 step, not {save_every}")
        return EverySteps(save_every)
    match = _TIME.fullmatch(save_every)
    seconds = float(match[1]) * _SECONDS[match[2]] if match is not None else 0
    if not 0 < seconds < math.inf:
        raise ValueError(f"save_every must be like 500 (steps), '30s', '10min' or '2h', not {glimpse(save_every)}")
    return EverySeconds(seconds)
