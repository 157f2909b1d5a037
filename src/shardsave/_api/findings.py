"""The results of `inspect`, `verify` and `convert`: frozen values that print as a few readable lines.

They are not in `shardsave._api.reports`, so that a training run, which only saves and loads, does not have to define these classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardsave._api.reports import VERIFIED, Printed, Removing, Report
from shardsave._common.words import count, human_bytes, some
from shardsave._format.index import TRAINING, Moment
from shardsave._printable import printable

if TYPE_CHECKING:
    import torch

__all__ = ["ArchitectureInfo", "CheckpointInfo", "ConvertReport", "Damage", "TensorInfo", "VerifyReport"]


def counted_once(parameters: Iterable[str], ties: Mapping[str, str]) -> frozenset[str]:
    """Those names of ``parameters`` that count: of tied names the one under which the bytes are stored, since they are one parameter."""
    names = frozenset(parameters)
    return frozenset(name for name in names if ties.get(name) not in names)


@dataclass(frozen=True)
class Damage:
    """One damaged place: ``tensors`` (stored names) in ``shard`` are damaged, or may be; ``message`` says how."""

    shard: str
    tensors: tuple[str, ...]
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


@dataclass(frozen=True)
class VerifyReport(Report):
    """What a verification read. Without ``keep_going``, damage raises an error instead.

    ``verified``: True if every byte was checked against a stored checksum; None if the files have no checksums, so that only
    lengths and headers were checked; False if something is damaged. ``damaged``: the damaged places. ``intact``: shard → the
    stored names of its tensors that are not damaged. ``ranks``: how many processes verified together.
    """

    verified: bool | None = None
    damaged: tuple[Damage, ...] = ()
    intact: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranks: int = 1

    def _lines(self) -> Iterator[str]:
        more = [f"by {self.ranks} ranks"] if self.ranks > 1 else []
        if self.damaged:
            places = dict.fromkeys(name for damage in self.damaged for name in (damage.tensors or [damage.shard]))
            yield self._with_notes(
                f"damaged {self.path}: {some(places)}; {count(self.tensors, 'tensor')} intact, {self.seconds:.2f} s", *more
            )
            return
        if self.verified is None:
            verb, extent = "checked", "only lengths and headers, no checksums stored"
        else:
            verb, extent = "verified", VERIFIED[self.verified]
        yield self._with_notes(f"{verb} {self.path}: {self._size_and_speed()}, {self._engine_and_access()}, {extent}", *more)


@dataclass(frozen=True)
class ConvertReport(Removing, Report):
    """What a conversion did: it read ``source`` and wrote ``path``.

    ``kind``: the kind of the source: "shardsave", "safetensors", "torch" or "distributed"; ``to``: the kind that was written.
    ``verified``: whether the source's tensors were checked against stored checksums; None if it has none. ``cast``: how many
    tensors were cast to another dtype. ``dropped``: names in the source, with the keys that lead to them. ``renamed``: names in the
    source. ``ties``: tied name → the name under which the bytes are stored. ``flags_known``: whether the source records which
    parameters were frozen. ``removed``: as in a SaveReport.
    """

    source: str = ""
    kind: str = ""
    to: str = ""
    durable: bool = True
    verified: bool | None = None
    cast: int = 0
    dropped: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    flags_known: bool = False
    removed: tuple[str, ...] = ()

    def _lines(self) -> Iterator[str]:
        counts = (("dropped", len(self.dropped)), ("renamed", len(self.renamed)), ("cast", self.cast), ("tied", len(self.ties)))
        more = [f"{number:,} {word}" for word, number in counts if number]
        checked = "the source has no checksums" if self.verified is None else VERIFIED[self.verified]
        how = f"{self._engine_and_access()}, {'durable' if self.durable else 'not durable'}, {checked}"
        line = f"converted {self.source} ({self.kind}) to {self.path} ({self.to}): {self._size_and_speed()}, {how}"
        removed = [f"removed or replaced {some(self.removed)}"] if self.removed else []
        yield self._with_notes(line, *([", ".join(more)] if more else []), *removed)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: torch dtype, shape, length in bytes, and the shard's file name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str


@dataclass(frozen=True)
class ArchitectureInfo:
    """What an architecture asks for, read without importing anything of it.

    ``uses``: each class, function and method that it names → what a build would use it for, in words. ``versions``: the same names → the
    package that each was saved with; None if unknown. ``needs``: name → the entry of ``trust`` that a build needs for it; names
    that need none are left out. ``trust``: all these entries. ``script_classes``: names that a build needs in ``classes``. A class with
    code that a build would run, such as a ``__setstate__``, needs its exact name; only an import of it tells which do.
    """

    uses: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, str | None]
    needs: Mapping[str, str]
    trust: tuple[str, ...]
    script_classes: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointInfo(Printed):
    """What a checkpoint contains, read from its index and headers only.

    ``tensors``: by name; a tied name has the entry of the tensor that it shares. ``parameters``: the names of parameters;
    ``frozen``: those of them that were frozen; both are None if unknown, as with third-party files. These are the names in the
    module, which differ from the names on disk for some transformers models. ``ties``: tied name → the name under which the bytes are
    stored. ``bytes``: how many bytes of tensor data; a tied group counts once. ``durable``: the argument of the save; None if unknown.
    ``parts``: role of a part (such as "architecture") → its file name; ``part_bytes``: role → length of its files. ``companions``: the
    files with fixed names that were saved beside the weights, such as a model's config. ``notes``: which companions were changed or
    removed since. ``architecture``: what the architecture asks for; None if there is none, or if it was not read. ``step``, ``metrics``:
    the arguments of the save; ``epoch``: that of the training state; ``ranks``: how many processes saved; ``created``: when, in UTC.
    These are None, and ``metrics`` is empty, if the save did not say them. ``shared``: the shards that the save did not write, but took
    over from an earlier checkpoint: the two share their bytes on disk, as long as both exist.
    """

    path: str
    bytes: int
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    parameters: frozenset[str] | None
    frozen: frozenset[str] | None
    ties: Mapping[str, str]
    metadata: Mapping[str, Any]
    durable: bool | None
    parts: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    architecture: ArchitectureInfo | None = None
    part_bytes: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    epoch: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    ranks: int | None = None
    created: str | None = None
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, tied names too, in the order of the index."""
        return tuple(self.tensors)

    def _lines(self) -> Iterator[str]:
        stored = len(self.tensors) - len(self.ties)
        summary = f"{self.path}: {human_bytes(self.bytes)}, {count(stored, 'tensor')} in {count(len(self.shards), 'shard')}"
        if self.ties:
            summary += f", {len(self.ties)} tied"
        if self.frozen is None or self.parameters is None:
            yield f"{summary}, freeze flags unknown"
        else:
            names = counted_once(self.parameters, self.ties)
            yield f"{summary}, {len(names & self.frozen)} of {count(len(names), 'parameter')} frozen"
            in_order = [name for name in self.tensors if name in self.parameters]
            in_order += sorted(self.parameters - self.tensors.keys())
            total = Counter(name.split(".")[0] for name in names)
            frozen = Counter(name.split(".")[0] for name in names & self.frozen)
            for child in dict.fromkeys(name.split(".")[0] for name in in_order):
                yield f"  {child}: " + (f"{frozen[child]} of {total[child]} frozen" if total[child] else "tied")
        moment = Moment(self.step, self.epoch, self.metrics, self.ranks, self.created)
        if words := moment_words(moment):
            yield f"  {words}"
        if self.shared:
            yield f"  {count(len(self.shared), 'shard')} taken over from an earlier checkpoint"
        if TRAINING in self.part_bytes:
            yield f"  {TRAINING}: {human_bytes(self.part_bytes[TRAINING])}"
        yield from (f"  {note}" for note in self.notes)


def moment_words(moment: Moment) -> str:
    """``step 100, epoch 3, loss 0.25, saved 2026-11-30T05:40:00Z by 1 rank``, as far as it is known."""
    words = [f"{name} {value:,}" for name, value in (("step", moment.step), ("epoch", moment.epoch)) if value is not None]
    words += [f"{name} {value:.6g}" for name, value in moment.metrics.items()]
    if moment.created is not None:
        words.append(f"saved {moment.created}" + (f" by {count(moment.ranks, 'rank')}" if moment.ranks is not None else ""))
    return ", ".join(words)
