"""`diff`: equal checksums are not read; differences agree with torch's own arithmetic; third-party files; bad values."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardsave
from support import SmallModel

NAN, INF = math.nan, math.inf

NUMBERS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn, torch.complex64]
COUNTS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def of(a: torch.Tensor, b: torch.Tensor, folder: Path) -> shardsave.TensorChange:
    """The change of one tensor; it is the same for files of shardsave and of safetensors."""
    folder.mkdir(exist_ok=True)
    for name, tensor in (("a", a), ("b", b)):
        shardsave.save({"x": tensor}, folder / name, durable=False)
        save_file({"x": tensor}, folder / f"{name}.safetensors")
    report = shardsave.diff(folder / "a", folder / "b")
    third_party = shardsave.diff(folder / "a.safetensors", folder / "b.safetensors")
    assert report.changed == third_party.changed and not report.same and not report.equal
    return report.changed["x"]


def expected(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float, float]:
    """Number of different elements, largest absolute and relative difference, for values without NaN and infinity."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    absolute = (a - b).abs()
    relative = torch.where(absolute > 0, absolute / torch.maximum(a.abs(), b.abs()), 0.0)
    return int((absolute > 0).sum()), absolute.max().item(), relative.max().item()


@pytest.mark.parametrize("dtype", [*NUMBERS, *COUNTS], ids=str)
def test_differences_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches values read as another dtype, and differences computed in a narrow dtype."""
    torch.manual_seed(1)
    a, b = (torch.randint(-20, 20, (3, 50)).to(torch.float32) / (1 if dtype in COUNTS else 4) for _ in range(2))
    a, b = (t.abs().to(dtype) if dtype in (torch.uint16, torch.uint32, torch.uint64) else t.to(dtype) for t in (a, b))
    change = of(a, b, tmp_path)
    assert (change.elements, change.max_absolute, change.max_relative) == pytest.approx(expected(a, b), rel=1e-12)
    assert change.dtype == (dtype, dtype) and change.shape == ((3, 50), (3, 50)) and change.nans == 0


def test_four_bit_values(tmp_path: Path) -> None:
    """Catches two elements of one byte that count as one, and a code that is decoded to a wrong number."""
    a = torch.tensor([[0x10, 0x07, 0xF2]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    b = torch.tensor([[0x10, 0x05, 0x73]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    shardsave.save({"x": a}, tmp_path / "a")
    shardsave.save({"x": b}, tmp_path / "b")
    change = shardsave.diff(tmp_path / "a", tmp_path / "b").changed["x"]
    assert (change.elements, change.max_absolute, change.max_relative) == (3, 12.0, 2.0) and change.shape[0] == (1, 3)


@pytest.mark.parametrize(
    ("a", "b", "elements", "nans", "absolute", "relative"),
    [
        ([1.0, NAN], [1.5, NAN], 1, 0, 0.5, 1 / 3),
        ([1.0, NAN], [2.0, 3.0], 2, 1, 1.0, 0.5),
        ([NAN, 1.0], [1.0, NAN], 2, 2, 0.0, 0.0),
        ([INF, 1.0], [INF, 1.25], 1, 0, 0.25, 0.2),
        ([INF, 1.0], [1e30, 1.0], 1, 0, INF, INF),
        ([INF], [-INF], 1, 0, INF, INF),
        ([0.0, 0.0], [0.0, 1e-30], 1, 0, float(torch.tensor(1e-30)), 1.0),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0, 0.0, 0.0),
        ([-3.0], [3.0], 1, 0, 6.0, 2.0),
    ],
)
def test_values_that_are_no_plain_numbers(
    tmp_path: Path, a: list[float], b: list[float], elements: int, nans: int, absolute: float, relative: float
) -> None:
    """Catches a NaN that hides other differences or is not counted, and infinities or zeros that produce a NaN."""
    change = of(torch.tensor(a), torch.tensor(b), tmp_path)
    figures = (change.elements, change.nans, change.max_absolute, change.max_relative)
    assert figures == (elements, nans, absolute, pytest.approx(relative))


def test_another_kind_of_nan(tmp_path: Path) -> None:
    """Catches tensors that are called equal although bits differ, if no value differs."""
    a, b = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert of(a, b, tmp_path).elements == 0


@pytest.mark.parametrize(
    ("a", "b", "absolute"),
    [(2**63 - 1, -(2**63), 2.0**64), (2**60, 2**60 + 1, 1.0), (-1, 1, 2.0)],
)
def test_whole_numbers_are_exact(tmp_path: Path, a: int, b: int, absolute: float) -> None:
    """Catches a difference of two 64-bit integers that overflows or is rounded to zero."""
    change = of(torch.tensor([a]), torch.tensor([b]), tmp_path)
    assert (change.elements, change.max_absolute) == (1, absolute)


def test_other_dtypes_and_shapes(tmp_path: Path) -> None:
    """Catches another dtype or shape that is called equal, or compared as if it were the same."""
    whole = torch.tensor([[1.0, 2.0078125]])
    shardsave.save(
        {"cast": whole, "exact": torch.ones(2), "shape": whole.clone(), "empty": torch.ones(0), "int": torch.ones(2)},
        tmp_path / "a",
    )
    changed = {
        "cast": whole.bfloat16(),
        "exact": torch.ones(2).half(),
        "shape": whole.view(2),
        "empty": torch.ones(0, dtype=torch.int8),
    }
    shardsave.save({**changed, "int": torch.full((2,), 3)}, tmp_path / "b")
    report = shardsave.diff(tmp_path / "a", tmp_path / "b")
    assert list(report.changed) == ["cast", "exact", "shape", "empty", "int"] and not report.equal
    cast, exact, shape, empty, whole_number = report.changed.values()
    assert cast.dtype == (torch.float32, torch.bfloat16) and cast.elements == 1 and cast.max_absolute == 0.0078125
    assert exact.dtype == (torch.float32, torch.float16) and exact.elements == 0 and exact.max_absolute == 0
    assert shape.shape == ((1, 2), (2,)) and shape.elements is shape.nans is shape.max_absolute is shape.max_relative is None
    assert empty.elements == 0 and empty.dtype == (torch.float32, torch.int8)
    assert whole_number.elements == 2 and whole_number.max_absolute == 2


def test_everything_that_differs(tmp_path: Path, small_model: SmallModel) -> None:
    """Catches wrong names, flags or ties in the report, and a report that is not one readable line."""
    shardsave.save(small_model, tmp_path / "a", max_shard_size=3000)
    same = shardsave.diff(tmp_path / "a", tmp_path / "a")
    assert same.same and same.bytes == 0 and len(same.equal) == 14 and same.flags == {}
    other = SmallModel()
    other.encoder[0].requires_grad_(True)
    other.narrow.requires_grad_(False)
    with torch.no_grad():
        other.embed.weight[3, 3] += 0.5
    other.extra = torch.nn.Linear(2, 2)
    del other.steps
    shardsave.save(other, tmp_path / "b")
    report = shardsave.diff(tmp_path / "a", tmp_path / "b")
    assert list(report.changed) == ["embed.weight", "head.weight"] and not report.same
    assert report.changed["head.weight"].max_absolute == pytest.approx(0.5) and report.changed["head.weight"].elements == 1
    assert report.added == ("extra.weight", "extra.bias") and report.removed == ("steps",)
    assert report.flags == {
        "encoder.0.weight": (True, False),
        "encoder.0.bias": (True, False),
        "narrow.weight": (False, True),
        "narrow.bias": (False, True),
    }
    assert report.bytes == 2 * 50 * 16 * 4 and set(report.equal) == set(same.equal) - {"embed.weight", "head.weight", "steps"}
    assert str(report).startswith(
        f"{tmp_path}/a and {tmp_path}/b: 11 equal, 2 changed (embed.weight, head.weight), 2 added (extra.weight, extra.bias), "
        f"1 removed (steps), 4 frozen or thawed (encoder.0.weight, encoder.0.bias, narrow.weight and 1 more); 6.4 kB read, "
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.bytes = 0  # type: ignore[misc]
    shardsave.save(small_model.state_dict(), tmp_path / "plain")
    unknown = shardsave.diff(tmp_path / "a", tmp_path / "plain")
    assert unknown.flags is None and unknown.same and "14 equal" in str(unknown) and "freeze flags unknown" in str(unknown)


def test_ties_and_metadata(tmp_path: Path) -> None:
    """Catches a new or a lost tie that is not reported, a reported change if only the stored name changed, and metadata in `same`."""
    one, two = torch.rand(3), torch.rand(3)
    states = {
        "tied": {"a": one, "b": one, "c": one, "d": two},
        "turned": {"c": one, "b": one, "a": one, "d": two},
        "untied": {"a": one, "b": one, "c": one.clone(), "d": two},
        "other": {"a": one, "b": one, "c": one, "d": two},
    }
    for name, state in states.items():
        shardsave.save(
            state, tmp_path / name, metadata={"run": 7, "kept": [1]} if name != "other" else {"new": "x", "kept": [1]}
        )
    save_file({name: value.clone() for name, value in states["tied"].items()}, tmp_path / "others.safetensors")

    report = shardsave.diff(tmp_path / "tied", tmp_path / "untied")
    assert report.ties == {"c": ("a", None)} and not report.same and not report.changed and not report.metadata
    assert ", 1 tied differently (c); " in str(report)
    assert shardsave.diff(tmp_path / "untied", tmp_path / "tied").ties == {"c": (None, "a")}
    turned = shardsave.diff(tmp_path / "tied", tmp_path / "turned")
    assert turned.same and turned.ties == {}
    report = shardsave.diff(tmp_path / "tied", tmp_path / "other")
    assert report.metadata == {"run": (7, None), "new": (None, "x")} and report.same
    assert ", metadata differ (run, new); " in str(report)
    report = shardsave.diff(tmp_path / "tied", tmp_path / "others.safetensors")
    assert report.same and not report.ties and not report.metadata


def test_equal_tensors_are_not_read(tmp_path: Path) -> None:
    """Catches bytes that are read although the checksums are equal: here they are damaged, so reading them would fail."""
    for name in ("a", "b"):
        shardsave.save({"x": torch.ones(1000)}, tmp_path / name)
    path = tmp_path / "b" / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shardsave.diff(tmp_path / "a", tmp_path / "b").same


@pytest.mark.parametrize("damaged", ["a", "b"])
def test_what_is_read_is_checked(tmp_path: Path, damaged: str) -> None:
    """Catches disk damage reported as a difference of the models; on either side, and in the last of many pieces."""
    for value, name in enumerate(("a", "b")):
        shardsave.save({"x": torch.full((1_500_000,), float(value))}, tmp_path / name, durable=False)
    path = tmp_path / damaged / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        shardsave.CorruptCheckpointError, match=r"corrupt shard .*: tensor 'x' has checksum .*, its header says"
    ):
        shardsave.diff(tmp_path / "a", tmp_path / "b")


def test_third_party_files(tmp_path: Path) -> None:
    """Catches equal bytes without checksums that are called changed, and a missed difference in the last piece."""
    state = {"x": torch.arange(1_500_000, dtype=torch.int16), "y": torch.ones(3)}
    save_file(state, tmp_path / "a.safetensors")
    shardsave.save(state, tmp_path / "b")
    seen: list[tuple[int, int]] = []
    report = shardsave.diff(tmp_path / "a.safetensors", tmp_path / "b", progress=lambda done, total: seen.append((done, total)))
    assert report.same and sorted(report.equal) == ["x", "y"] and report.flags is None and report.bytes == 6_000_024
    assert seen == sorted(seen) and seen[-1] == (6_000_024, 6_000_024)
    state["x"][-1] += 1
    save_file(state, tmp_path / "c.safetensors")
    changed = shardsave.diff(tmp_path / "a.safetensors", tmp_path / "c.safetensors").changed
    assert list(changed) == ["x"] and (changed["x"].elements, changed["x"].max_absolute) == (1, 1.0)


MEMORY = """
import resource, sys, shardsave
shardsave.diff(sys.argv[1], sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
change = shardsave.diff(sys.argv[1], sys.argv[2]).changed["x"]
print(change.elements, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    """Catches whole tensors in memory: two tensors of 200 MB are compared."""
    for value, name in enumerate(("a", "b")):
        shardsave.save({"x": torch.full((50_000_000,), float(value))}, tmp_path / name, durable=False)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a"), str(tmp_path / "b")]
    elements, kilobytes = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert elements == 50_000_000 and kilobytes < 80_000


def test_wrong_arguments(tmp_path: Path) -> None:
    """Catches a comparison with a missing checkpoint, and a misplaced argument."""
    shardsave.save({"x": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(shardsave.CheckpointNotFoundError, match="no checkpoint at .*none"):
        shardsave.diff(tmp_path / "a", tmp_path / "none")
    with pytest.raises(TypeError, match="the path of a checkpoint must be"):
        shardsave.diff(tmp_path / "a", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="progress must be"):
        shardsave.diff(tmp_path / "a", tmp_path / "a", progress=3)  # type: ignore[arg-type]
