"""Compares saves and loads on a CUDA device with the bandwidth of a pinned copy between device and host.

    python gpu.py DIRECTORY SIZE [--to FILE] [--loop]

SIZE is the size of the model in bytes. The limit is torch's own copy between the device and a pinned buffer of 256 MiB, repeated. A
save to the page cache and a load from it measure the transfer between device and memory. The durable save and the cold load show
whether the disk alone is the limit. With ``--loop``, a training loop on the device also saves in each way (see loop.py). Each value is
printed on stderr as soon as it is measured, and FILE is rewritten, so that an interrupted run keeps its values. At the end all values
are printed on stdout as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import measure
import model as models
from rivals.background import WAYS

DEVICE = "cuda"
REPEAT = 3  # how often transfers without the disk are measured; the best value counts


class Figures:
    """The values so far: rates in bytes per second, sizes in bytes."""

    def __init__(self, file: Path | None) -> None:
        self.values: dict[str, object] = {}
        self._file = file

    def add(self, name: str, value: object) -> None:
        self.values[name] = value
        print(f"{name}: {value / 1e9:.3f} GB" if isinstance(value, float) else f"{name}: {value}", file=sys.stderr, flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps(self.values) + "\n")


def bandwidth(to_device: bool, repeat: int = 16) -> float:
    """Bytes per second of a pinned copy in one direction, the best of three."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    target, source = (device, host) if to_device else (host, device)
    target.copy_(source)

    def copies() -> None:
        for _ in range(repeat):
            target.copy_(source, non_blocking=True)

    return repeat * host.nbytes / min(_seconds(copies) for _ in range(REPEAT))


def _seconds(action: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Bench:
    """Saves and loads one model on the device. ``extra`` is the largest extra memory of any of these calls, in bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._model = models.build(size).to(DEVICE)
        self._values = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self.nbytes = models.tensor_bytes(self._model)
        self.extra = 0

    def save(self, name: str, durable: bool) -> float:
        """Saves to a new directory; returns bytes per second."""
        import shardsave

        self.remove(name)
        measure.touch_free_memory(self.nbytes * 5 // 4)
        return self._timed(lambda: shardsave.save(self._model, self._path / name, durable=durable, progress=False, reuse=False))

    def load(self, name: str) -> float:
        """Loads into the model, after setting it to zero, and checks the values; returns bytes per second."""
        import shardsave

        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()
        rate = self._timed(lambda: shardsave.load_model(self._model, self._path / name, progress=False))
        if not models.same(self._model, self._values):
            raise RuntimeError(f"{self._path / name}: the loaded values differ from the saved values")
        return rate

    def remove(self, name: str) -> None:
        """Removes a directory, and waits until the disk has no writes left, since they would slow the next measurement."""
        shutil.rmtree(self._path / name, ignore_errors=True)
        os.sync()

    def _timed(self, action: Callable[[], object]) -> float:
        meter = measure.Meter()
        rate = self.nbytes / _seconds(action)
        self.extra = max(self.extra, meter.read()["peak_extra"])
        return rate


def measure_all(path: Path, size: int, figures: Figures) -> None:
    import shardsave

    _ = shardsave.save, shardsave.load_model  # imports them now, outside of the measurement
    bench = Bench(path, size)
    figures.add("device", torch.cuda.get_device_name())
    figures.add("bytes", bench.nbytes)
    # The bandwidth is measured before memory is, because torch keeps the pinned buffer.
    figures.add("device_to_host", bandwidth(False))
    figures.add("host_to_device", bandwidth(True))
    meter = measure.Meter()
    # Allocates and pins the ring of buffers.
    shardsave.save({"warm": torch.zeros(1, device=DEVICE)}, path / "first", progress=False)
    ring = meter.read()["peak_extra"]
    figures.add("save_to_cache", max(bench.save("cached", durable=False) for _ in range(REPEAT)))
    figures.add("load_warm", max(bench.load("cached") for _ in range(REPEAT)))
    bench.remove("cached")
    figures.add("save_durable", bench.save("durable", durable=True))
    measure.make_cold(path / "durable")
    figures.add("load_cold", bench.load("durable"))
    figures.add("peak_extra", ring + bench.extra)


def loops(path: Path, size: int) -> dict[str, object]:
    """Each way to save → the medians of the saves after the first one, in seconds; or why it failed."""
    results: dict[str, object] = {}
    for way in WAYS:
        command = [
            sys.executable,
            str(Path(__file__).with_name("loop.py")),
            way,
            str(path / "loop"),
            str(size),
            "--device",
            DEVICE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            results[way] = (done.stderr.strip().splitlines() or ["no message"])[-1]
            continue
        saves = json.loads(done.stdout.splitlines()[-1])["saves"][1:]
        results[way] = {key: median(save[key] for save in saves) for key in ("stall", "lost", "finished", "step", "memcpy")}
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path, metavar="DIRECTORY")
    parser.add_argument("size", type=int, help="bytes of the model")
    parser.add_argument("--to", type=Path, metavar="FILE", help="also write the JSON here, after each value")
    parser.add_argument("--loop", action="store_true", help="also measure a training loop on the device")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "not run on a GPU: torch sees no CUDA device here"}))
        return
    figures = Figures(options.to)
    options.path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.path) as scratch:
        measure_all(Path(scratch), options.size, figures)
        if options.loop:
            figures.add("loop", loops(Path(scratch), options.size // 4))
    print(json.dumps(figures.values))


if __name__ == "__main__":
    main()
