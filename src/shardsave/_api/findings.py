"""What the verbs give back that look into a checkpoint or convert it: frozen values that print as a few readable lines.

Apart from `_reports`, so that a training run, which saves and loads, need not make these classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardsave._api.reports import VERIFIED, Report
from shardsave._common.words import count, human_bytes, some

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointInfo", "ConvertReport", "Damage", "TensorInfo", "VerifyReport"]


@dataclass(frozen=True)
class Damage:
    """What is wrong in one place: ``tensors`` of ``shard`` (stored names) are damaged, or may be, as ``message`` says."""

    shard: str
    tensors: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class VerifyReport(Report):
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
            done, extent = "verified", VERIFIED[self.verified]
        return self._with_notes(f"{done} {self.path}: {self._size_and_speed()}, {self._how()}, {extent}")


@dataclass(frozen=True)
class ConvertReport(Report):
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
        how = f"{self._how()}, {'durable' if self.durable else 'not durable'}, {VERIFIED[self.verified]}"
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
