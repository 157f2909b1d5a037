"""What the verbs give back: frozen values that print as one readable line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardsave._words import count, human_bytes, some

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointInfo", "ConvertReport", "Damage", "LoadReport", "Phases", "SaveReport", "TensorInfo", "VerifyReport"]


@dataclass(frozen=True)
class Phases:
    """Where the time went, in seconds. A load has no sync; its commit is the setting of flags and of what needed care."""

    plan: float = 0.0
    transfer: float = 0.0
    sync: float = 0.0
    commit: float = 0.0


@dataclass(frozen=True)
class _Report:
    """What all reports have.

    ``bytes``: of tensor data. ``tensors``: stored tensors, a tied group counting once. ``seconds``: the whole call, wall clock.
    ``staging_bytes``: the most staging memory held. ``direct``: whether every file was moved past the page cache.
    """

    path: str
    bytes: int
    tensors: int
    shards: int
    seconds: float
    phases: Phases
    engine: str
    direct: bool
    staging_bytes: int
    pinned: bool
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def bytes_per_second(self) -> float:
        """Tensor bytes over the wall time of the whole call."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0

    def _size_and_speed(self) -> str:
        return (
            f"{human_bytes(self.bytes)}, {count(self.tensors, 'tensor')} in {count(self.shards, 'shard')}, "
            f"{self.seconds:.2f} s ({human_bytes(self.bytes_per_second)}/s)"
        )

    def _how(self) -> str:
        words = [self.engine, "direct" if self.direct else "buffered"]
        if self.pinned:
            words.append("pinned")
        return ", ".join(words)

    def _with_notes(self, line: str, *more: str) -> str:
        return "; ".join([line, *more, *self.notes])


@dataclass(frozen=True)
class SaveReport(_Report):
    """What a save did.

    ``durable``: whether the checkpoint survives a loss of power from here on. ``leftovers``: names that should have been
    removed and could not be. ``overlaps``: pairs of tensors that share a part of their memory and were stored apart.
    """

    durable: bool = True
    leftovers: tuple[str, ...] = ()
    overlaps: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        more = []
        if self.leftovers:
            more.append(f"could not remove {', '.join(self.leftovers)}")
        if self.overlaps:
            more.append(f"stored apart though overlapping: {some(f'{a} and {b}' for a, b in self.overlaps)}")
        how = f"{self._how()}, {'durable' if self.durable else 'not durable'}"
        return self._with_notes(f"saved {self.path}: {self._size_and_speed()}, {how}", *more)


@dataclass(frozen=True)
class LoadReport(_Report):
    """What a load into a module did.

    ``verified``: whether every byte was checked against a stored checksum; None where the files have none.
    ``missing``: names of the module that the checkpoint does not have; ``unexpected``: the reverse; ``mismatched``: of both,
    with different shapes, and therefore left alone. All empty after a strict load. ``frozen``: how many parameters were
    set to ``requires_grad=False``, None where the flags were not touched.
    """

    verified: bool | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    frozen: int | None = None

    def __str__(self) -> str:
        differences = (
            ("missing from the checkpoint", self.missing),
            ("not in the module", self.unexpected),
            ("mismatched", self.mismatched),
        )
        more = [f"{words}: {some(names)}" for words, names in differences if names]
        if self.tensors == 0:
            line = f"nothing was loaded from {self.path}"
            return self._with_notes(f"{line}: {more[0]}" if more else line, *more[1:])
        flags = "flags left alone" if self.frozen is None else f"{self.frozen} frozen"
        checked = _VERIFIED[self.verified]
        return self._with_notes(f"loaded {self.path}: {self._size_and_speed()}, {self._how()}, {checked}, {flags}", *more)


@dataclass(frozen=True)
class Damage:
    """What is wrong in one place: ``tensors`` of ``shard`` (stored names) are damaged, or may be, as ``message`` says."""

    shard: str
    tensors: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class VerifyReport(_Report):
    """What a verification read; without ``keep_going`` it raises where it finds damage.

    ``verified``: True when every byte was checked against a stored checksum; None where the files have none, and only
    lengths and headers could be checked; False where something is damaged. ``damaged``: what. ``intact``: shard → the stored
    names of its tensors that are not.
    """

    verified: bool | None = None
    damaged: tuple[Damage, ...] = ()
    intact: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.damaged:
            places = dict.fromkeys(name for damage in self.damaged for name in (damage.tensors or [damage.shard]))
            return self._with_notes(
                f"damaged {self.path}: {some(places)}; {count(self.tensors, 'tensor')} intact, {self.seconds:.2f} s"
            )
        if self.verified is None:
            done, extent = "checked", "only lengths and headers, no checksums stored"
        else:
            done, extent = "verified", _VERIFIED[self.verified]
        return self._with_notes(f"{done} {self.path}: {self._size_and_speed()}, {self._how()}, {extent}")


@dataclass(frozen=True)
class ConvertReport(_Report):
    """What a conversion did; ``path`` is where it wrote, ``source`` what it read.

    ``kind``: what the source was: "shardsave", "safetensors", "torch" or "distributed"; ``to``: what was made of it. ``verified``:
    whether the source's tensors were checked against stored checksums, None where it has none. ``cast``: how many tensors got
    another dtype. ``dropped``, ``renamed``: names of the source. ``ties``: name → the name that it shares its bytes with.
    ``flags_known``: whether the source knew which parameters were frozen.
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

    def __str__(self) -> str:
        counts = (("dropped", len(self.dropped)), ("renamed", len(self.renamed)), ("cast", self.cast), ("tied", len(self.ties)))
        more = [f"{count:,} {word}" for word, count in counts if count]
        how = f"{self._how()}, {'durable' if self.durable else 'not durable'}, {_VERIFIED[self.verified]}"
        line = f"converted {self.source} ({self.kind}) to {self.path} ({self.to}): {self._size_and_speed()}, {how}"
        return self._with_notes(line, *([", ".join(more)] if more else []))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: torch dtype, shape, length in bytes, and the shard's file name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, read from its index and headers alone.

    ``tensors``: by name, a tied name having the entry of the tensor that it shares. ``parameters``: the names that are
    parameters and ``frozen``: those of them that were frozen; both None where unknown, as with files of others. They are names
    in the module, which for some transformers models are others than those on disk.
    ``ties``: tied name → the name under which the bytes are stored. ``bytes``: of tensor data, each tie counted once.
    ``durable``: what the save was asked for; None where unknown. ``parts``: what else it has → the file. ``companions``: the
    files of fixed names that were saved beside the weights, such as a model's config; ``notes``: which of them are no longer
    what was saved.
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

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, tied ones too, in the order of the index."""
        return tuple(self.tensors)

    def __str__(self) -> str:
        stored = len(self.tensors) - len(self.ties)
        first = f"{self.path}: {human_bytes(self.bytes)}, {count(stored, 'tensor')} in {count(len(self.shards), 'shard')}"
        if self.ties:
            first += f", {len(self.ties)} tied"
        notes = [f"  {note}" for note in self.notes]
        if self.frozen is None or self.parameters is None:
            return "\n".join([f"{first}, freeze flags unknown", *notes])
        in_order = [name for name in self.tensors if name in self.parameters]
        in_order += sorted(self.parameters - self.tensors.keys())
        total = Counter(name.split(".")[0] for name in in_order)
        frozen = Counter(name.split(".")[0] for name in self.frozen)
        groups = [f"  {child}: {frozen[child]} of {total[child]} frozen" for child in total]
        return "\n".join([f"{first}, {len(self.frozen)} of {len(self.parameters)} parameters frozen", *groups, *notes])


_VERIFIED = {True: "checksums verified", False: "not verified", None: "no checksums stored"}
