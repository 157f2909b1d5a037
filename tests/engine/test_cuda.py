"""CUDA through the driver API, on the hostile fake driver of ``tests/fake_cuda``.

Method: each scenario runs in a process of its own, in which ``libcuda.so.1`` is the fake. ``device_scenarios`` test
``csrc/cuda.cpp`` alone, the others the whole C++ engine; the docstring of a scenario says what it catches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest

from fake_cuda import device_scenarios
from support import ROOT, Compile

pytestmark = pytest.mark.slow

FAKE = ROOT / "tests" / "fake_cuda"
CORE = ROOT / "csrc"
LIBRARY = ("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-ldl")
HEADERS = sorted({os.path.realpath(path) for path in glob("/usr/local/cuda*/include/cuda.h")})
ENGINE_SCENARIOS = [
    (module, line.split("(")[0].removeprefix("def "))
    for module in ("engine_scenarios", "failure_scenarios", "gather_scenarios")
    for line in (FAKE / f"{module}.py").read_text().splitlines()
    if line.startswith("def ") and line.endswith("(files: Files) -> None:")
]


def _built(compiled: Compile, name: str, sources: list[Path], *flags: str) -> Path:
    """As ``compiled``, and compiles again if a header has changed."""
    target = ROOT / "build" / "tests" / name
    headers = [*FAKE.glob("*.h"), *CORE.glob("*.h")]
    if target.exists() and any(header.stat().st_mtime > target.stat().st_mtime for header in headers):
        target.unlink()
    return compiled(name, sources, *LIBRARY, *flags)


@pytest.fixture(scope="session")
def driver(compiled: Compile) -> Path:
    """The folder of the fake driver."""
    sources = [FAKE / "driver.cpp", FAKE / "control.cpp"]
    return _built(compiled, "fake_cuda/libcuda.so.1", sources, "-Wl,-soname,libcuda.so.1").parent


@pytest.fixture(scope="session")
def shim(compiled: Compile) -> Path:
    return _built(compiled, "fake_cuda/shim.so", [FAKE / "shim.cpp", CORE / "cuda.cpp"])


def _run(module: str, name: str, libraries: Path, environment: Mapping[str, str]) -> str:
    paths = [str(ROOT / "tests"), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"fake_cuda.{module}", name],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{module} {name}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.mark.parametrize("name", device_scenarios.SCENARIOS)
def test_device(name: str, driver: Path, shim: Path) -> None:
    """Catches what the docstring of the scenario says, in `csrc/cuda.cpp`."""
    _run("device_scenarios", name, driver, {"SHIM": str(shim)})


def _need_engine() -> None:
    package = find_spec("shardsave")
    folders = package.submodule_search_locations if package is not None else None
    if not any(glob(os.path.join(folder, "_native.*.so")) for folder in folders or ()):
        pytest.skip("the C++ engine is not built")


def test_engine_scenarios_are_found() -> None:
    """Catches a new form of the scenarios in which the tests below would find none."""
    assert len(ENGINE_SCENARIOS) >= 22 and len(device_scenarios.SCENARIOS) >= 15


@pytest.mark.parametrize(("module", "name"), ENGINE_SCENARIOS)
def test_engine(module: str, name: str, driver: Path, tmp_path: Path) -> None:
    """Catches what the docstring of the scenario says, in the engine with its ring, workers and devices."""
    _need_engine()
    _run(module, name, driver, {"SCENARIO_DIR": str(tmp_path)})


def _reasons(libraries: Path, shim: Path, **environment: str) -> str:
    """The reason why CUDA is unavailable; the device layer and the engine must report the same."""
    reason = _run("device_scenarios", "unavailable", libraries, {"SHIM": str(shim), **environment})
    _need_engine()
    assert _run("engine_scenarios", "unavailable", libraries, environment) == reason
    return reason


def test_without_a_driver(shim: Path, tmp_path: Path) -> None:
    """Catches a crash or an unclear reason if libcuda.so.1 cannot be loaded."""
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert "libcuda.so.1" in _reasons(tmp_path, shim)


def test_with_a_driver_that_is_too_old(compiled: Compile, shim: Path) -> None:
    """Catches a call through a null pointer if the driver lacks a function."""
    sources = [FAKE / "driver.cpp", FAKE / "control.cpp"]
    old = _built(compiled, "fake_cuda/old/libcuda.so.1", sources, "-DcuStreamIsCapturing=cuNotThereYet")
    assert _reasons(old.parent, shim) == "libcuda.so.1 has no cuStreamIsCapturing: the CUDA driver is too old"


def test_with_a_driver_and_no_device(driver: Path, shim: Path) -> None:
    """Catches a driver without a device that counts as usable."""
    reason = "cuInit: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected"
    assert _reasons(driver, shim, FAKE_CUDA_DEVICES="0") == reason


def test_with_a_driver_that_does_not_start(driver: Path, shim: Path) -> None:
    """Catches a failed cuInit that counts as success."""
    reason = "cuInit: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    assert _reasons(driver, shim, FAKE_CUDA_FAIL_AT="1", FAKE_CUDA_FAIL_CODE="2") == reason


def _check(source: Path, header: str) -> subprocess.CompletedProcess[str]:
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    return subprocess.run([*command, "-I", os.path.dirname(header), str(source)], capture_output=True, text=True)


@pytest.mark.skipif(not HEADERS, reason="no cuda.h under /usr/local/cuda*/include")
@pytest.mark.parametrize("header", HEADERS)
def test_prototypes_are_those_of_cuda_h(header: str) -> None:
    """Catches a prototype or a constant of ours that differs from the toolkit's."""
    done = _check(FAKE / "check_prototypes.cpp", header)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HEADERS, reason="no cuda.h under /usr/local/cuda*/include")
@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        ("std::size_t bytes, Stream", "unsigned bytes, Stream"),
        ("DevicePointer = unsigned long long", "DevicePointer = unsigned"),
        ("cuEventRecord, Event event, Stream stream", "cuEventRecord, Stream stream, Event event"),
        ("event_blocking_sync = 1", "event_blocking_sync = 2"),
        ("CALL(cuMemHostRegister_v2", "CALL(cuMemHostRegisterNoSuch"),
    ],
)
def test_a_wrong_prototype_is_noticed(ours: str, wrong: str, tmp_path: Path) -> None:
    """Catches a check of prototypes that accepts everything."""
    declared = (CORE / "cuda_driver.h").read_text()
    assert ours in declared
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "cuda_driver.h").write_text(declared.replace(ours, wrong))
    checks = tmp_path / "tests" / "fake_cuda" / "check_prototypes.cpp"
    checks.parent.mkdir(parents=True)
    checks.write_text((FAKE / "check_prototypes.cpp").read_text())
    done = _check(checks, HEADERS[0])
    assert done.returncode != 0 and "error" in done.stderr
