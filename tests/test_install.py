"""The package without a compiler, and the choice of an engine. Method: pip installs the package, new processes use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT
from warm_python import warm_python

pytestmark = pytest.mark.slow

USE = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import shardsave
    for _ in range(2):
        report = shardsave.save({"x": torch.arange(1000)}, sys.argv[1])
        assert torch.equal(shardsave.load(sys.argv[1])["x"], torch.arange(1000))
        shardsave.verify(sys.argv[1])
ours = [warning for warning in caught if issubclass(warning.category, RuntimeWarning)]
assert all(warning.filename == "<string>" for warning in ours), "a warning that points into the package"
said = [str(warning.message) for warning in ours]
print(report.engine, len(said), shardsave.__file__, *said, sep="\\n")
"""


def use(folder: Path, **environment: str) -> list[str]:
    """Saves and loads in a new process. Returns its engine, the number of warnings, the package's file, and the warnings."""
    done = warm_python().run(["-c", USE, folder], folder.parent, **{"SHARDSAVE_ENGINE": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installs the package from its sources, with compilers that fail."""
    folder = tmp_path_factory.mktemp("install")
    build_products = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=build_products)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHARDSAVE_")}
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(folder / "target"), str(folder / "sources")],
        env=inherited | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "target"


IMPORT_EVERY_MODULE = """
import importlib, pkgutil, shardsave
names = [module.name for module in pkgutil.walk_packages(shardsave.__path__, "shardsave.") if not module.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "shardsave._native":  # the wrapper of the extension needs the extension
            raise
print(shardsave.__file__, *names, sep="\\n")
"""


def files_below(folder: Path) -> set[Path]:
    """The package's files, relative to ``folder``, without compiled ones."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in files if path.suffix != ".so" and "__pycache__" not in path.parts}


def test_every_package_and_module_is_installed(without_compiler: Path) -> None:
    """Catches a package that the wheel lacks (without ``__init__.py``), and a module that can be imported only in the source tree."""
    source, installed = ROOT / "src" / "shardsave", without_compiler / "shardsave"
    assert files_below(installed) == files_below(source)
    environment = {"PYTHONPATH": str(without_compiler), "SHARDSAVE_ENGINE": "portable"}
    done = warm_python().run(["-c", IMPORT_EVERY_MODULE], without_compiler, **environment)
    assert done.returncode == 0, done.stderr
    file, *names = done.stdout.splitlines()
    assert Path(file).is_relative_to(without_compiler)
    modules = {path.with_suffix("") for path in files_below(source) if path.suffix == ".py"}
    expected = {path.parent if path.name == "__init__" else path for path in modules} - {Path("."), Path("__main__")}
    assert {Path(*name.split(".")[1:]) for name in names} == expected


def test_licence_is_installed(without_compiler: Path) -> None:
    """Catches a wheel without the text of its licence."""
    (licence,) = without_compiler.glob("shardsave-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_installed_without_a_compiler(without_compiler: Path, tmp_path: Path) -> None:
    """Catches an installation that fails, a package that does not work, and a missing or repeated warning about the missing engine."""
    assert not list(without_compiler.rglob("*.so")) and (without_compiler / "shardsave" / "py.typed").exists()
    engine, count, file, *warnings = use(tmp_path / "ckpt", PYTHONPATH=str(without_compiler))
    assert Path(file).is_relative_to(without_compiler) and (engine, count) == ("portable", "1")
    assert warnings[0].startswith("shardsave runs without its C++ engine (it was not built): the files are the same, but ")
    assert "several times slower; install a C++ compiler" in warnings[0]
    assert use(tmp_path / "requested", PYTHONPATH=str(without_compiler), SHARDSAVE_ENGINE="portable")[:2] == ["portable", "0"]


def test_a_missing_native_engine(without_compiler: Path) -> None:
    """Catches a silent fallback when the native engine was requested."""
    environment = {**os.environ, "PYTHONPATH": str(without_compiler), "SHARDSAVE_ENGINE": "native"}
    done = subprocess.run(
        [sys.executable, "-c", "import shardsave; shardsave.save"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ImportError: SHARDSAVE_ENGINE=native was requested, but there is no C++ engine: it was not built" in done.stderr


def test_a_native_engine_that_cannot_be_loaded(without_compiler: Path, tmp_path: Path) -> None:
    """Catches a damaged extension, or one for another machine, that is reported as not built."""
    shutil.copytree(without_compiler, tmp_path / "target")
    (tmp_path / "target" / "shardsave" / "_native.abi3.so").write_bytes(b"no library")
    *_, warning = use(tmp_path / "ckpt", PYTHONPATH=str(tmp_path / "target"))
    assert warning.startswith("shardsave runs without its C++ engine (it cannot be loaded: ")


@pytest.mark.parametrize("engine", ["native", "portable"])
def test_the_requested_engine(tmp_path: Path, engine: str) -> None:
    """Catches a requested engine that is not used, or that causes a warning."""
    assert use(tmp_path / "ckpt", SHARDSAVE_ENGINE=engine)[:2] == [engine, "0"]


def test_an_unknown_engine(tmp_path: Path) -> None:
    """Catches a misspelt engine that silently becomes the default."""
    environment = {**os.environ, "SHARDSAVE_ENGINE": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", "import shardsave; shardsave.save"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ValueError: SHARDSAVE_ENGINE must be 'native' or 'portable', not 'fast'" in done.stderr
    command = [sys.executable, "-m", "shardsave", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "shardsave: SHARDSAVE_ENGINE must be 'native' or 'portable', not 'fast'\n"
