"""Which wing of the package may import which: every import statement is read with ast, nothing is run.

ARCHITECTURE.md has the same table, with what each wing knows.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardsave
from shardsave import errors
from support import ROOT
from warm_python import warm_python

SOURCE = ROOT / "src" / "shardsave"

#: Each wing and the wings that it may import, ground floor first: a wing is only ever named in rows below its own.
WINGS: dict[str, set[str]] = {
    "_printable": set(),
    "errors": {"_printable"},
    "_version": set(),
    "_common": {"_printable", "errors"},
    "_format": {"_common", "errors"},
    "_state": {"_common", "_format", "errors"},
    "_engine": {"_common", "_format"},
    "_storage": {"_common", "_format", "errors"},
    "_runs": {"_common", "_format", "_storage", "errors"},
    "_architecture": {"_common", "_format", "_state", "errors"},
    "_program": {"_common", "_format", "_printable", "_state", "errors"},
    "_training": {"_common", "_format", "_state", "errors"},
    "_saving": {"_common", "_engine", "_format", "_state", "_storage", "_version", "errors"},
    "_background": {"_common", "_printable", "_engine", "_format", "_saving", "_state", "errors"},
    "_loading": {"_common", "_engine", "_format", "_state", "_storage", "errors"},
    "_ranks": {
        "_common", "_engine", "_format", "_loading", "_printable", "_saving", "_state", "_storage", "_training", "errors",
    },
    "_huggingface": {"_common", "_format", "_loading", "_printable", "_saving", "_state", "_storage", "errors"},
    "_foreign": {"_common", "_format", "_state", "_storage", "errors"},
    "_conversion": {
        "_common", "_engine", "_foreign", "_format", "_loading", "_printable", "_saving", "_state", "_storage", "errors",
    },
    "_api": {
        "_architecture", "_background", "_common", "_conversion", "_engine", "_format", "_huggingface", "_loading", "_printable",
        "_program", "_ranks", "_runs", "_saving", "_state", "_storage", "_training", "_version", "errors",
    },
    "__init__": {"_api", "_common", "_version", "errors"},
    "_cli": {"__init__", "_api", "_common", "_format", "_printable", "_runs", "_storage", "_version", "errors"},
    "__main__": {"_cli"},
    "integrations": {
        "_api", "_common", "_format", "_huggingface", "_loading", "_ranks", "_saving", "_state", "_storage", "_training", "errors",
    },
}  # fmt: skip

#: Imports between single files that the table would allow and the plan does not: each with the reason that it must not be.
FORBIDDEN = {
    ("_program.*", "_architecture.*"): "a program imports nothing that a file names",
    ("_huggingface.*_saving", "_loading.*"): "a plain save must not import code that only loads need",
    ("_huggingface.*_loading", "_saving.*"): "a plain load must not import code that only saves need",
    ("_api.save", "_loading.*"): "a plain save must not import code that only loads need",
    ("_api.save_contents", "_loading.*"): "a plain save must not import code that only loads need",
    ("_api.load", "_saving.*"): "a plain load must not import code that only saves need",
    ("_api.model_load", "_saving.*"): "a plain load must not import code that only saves need",
    ("_api.resume", "_saving.*"): "a resume must not import code that only saves need",
}


#: Every file of the package by its dotted name without ``shardsave.``; the empty ``__init__`` of wings are left out.
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in SOURCE.rglob("*.py")
    if path.name != "__init__.py" or path.parent == SOURCE
}
PACKAGES = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that ``path`` imports anywhere, by dotted name; of other packages only the first part."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (re.sub(r"^shardsave\.", "", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            if module == "shardsave" or module.removeprefix("shardsave.") in PACKAGES:
                prefix = module.removeprefix("shardsave").removeprefix(".")
                for alias in node.names:
                    name = f"{prefix}.{alias.name}".removeprefix(".")
                    yield name if name in MODULES or name in PACKAGES else prefix or "__init__"
            else:
                yield module.removeprefix("shardsave.")


EDGES = {(name, other) for name, path in MODULES.items() for other in imports(path) if other in MODULES}


def wing(module: str) -> str:
    return module.partition(".")[0]


def matches(module: str, pattern: str) -> bool:
    return re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\w+"), module) is not None


def test_the_table_names_every_wing_and_only_earlier_ones() -> None:
    """Catches a wing without a rule, and a rule that would allow a cycle of wings."""
    assert set(WINGS) == {wing(name) for name in MODULES}
    seen: set[str] = set()
    for name, allowed in WINGS.items():
        assert allowed <= seen, f"{name} may import {allowed - seen}, which stands below it"
        seen.add(name)


def test_the_table_in_the_document() -> None:
    """Catches an ARCHITECTURE.md that lists other wings than the table, or other imports."""
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## Wings")[1].split("\n## ")[0]
    items = (" ".join(item.split()) for item in section.split("\n- ")[1:])
    rows = [(item.split("`")[1], item.rpartition("Imports ")[2]) for item in items]
    assert {name: set(re.findall(r"`(\w+)`", listed)) for name, listed in rows} == WINGS
    assert [name for name, _ in rows] == list(WINGS)


def test_wings_import_only_what_the_table_allows() -> None:
    """Catches a wing that imports another one that it must not know."""
    wrong = {(a, b) for a, b in EDGES if wing(a) != wing(b) and wing(b) not in WINGS[wing(a)]}
    wrong |= {(a, b) for a, b in EDGES for (x, y) in FORBIDDEN if matches(a, x) and matches(b, y)}
    assert not wrong, wrong


def test_no_two_files_import_each_other() -> None:
    """Catches a cycle of imports between files, however long, also one that is hidden within functions."""
    left = set(EDGES)
    while left:
        importing = {a for a, _ in left}
        ends = {(a, b) for a, b in left if b not in importing}
        assert ends, f"a cycle among {sorted(left)}"
        left -= ends


def test_wings_are_empty_packages() -> None:
    """Catches code in a wing's ``__init__``, which every import of one of its files would run."""
    for name in PACKAGES:
        assert (SOURCE / name / "__init__.py").read_text() == "", name


def test_only_foreign_reads_pickles() -> None:
    """Catches an unpickler anywhere but where files of other libraries are read; `torch.load` counts as one."""
    for name, path in MODULES.items():
        if wing(name) != "_foreign":
            used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not {"pickle", "_pickle", "cloudpickle", "dill"} & set(imports(path)) and "torch.load" not in used, name


#: Packages that are imported only for models and files of these packages, or for an option that names its package when it is missing.
OPTIONAL = {"accelerate", "huggingface_hub", "matplotlib", "peft", "transformers"}


def test_every_dependency_is_declared() -> None:
    """Catches an imported package that an installation does not bring along, or a dependency that nothing imports."""
    imported = {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
    imported -= sys.stdlib_module_names | {*map(wing, MODULES), *PACKAGES, "_native", "shardsave"}
    (line,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert imported - OPTIONAL == set(re.findall(r'"(\w+)>=', line))


def test_every_public_name_has_a_module() -> None:
    """Catches a name that the type checker knows and the package does not, or the other way round."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: str(node.module).removeprefix("shardsave._api.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: module for module, names in shardsave._MODULES.items() for name in names}
    assert typed.keys() <= set(shardsave.__all__) and all(getattr(shardsave, name) is not None for name in shardsave.__all__)
    assert set(shardsave.__all__) <= set(dir(shardsave))
    with pytest.raises(AttributeError, match="module 'shardsave' has no attribute 'sav'"):
        _ = shardsave.sav  # type: ignore[attr-defined]


def test_every_error_is_public() -> None:
    """Catches an exception class that is missing in ``errors.__all__`` or cannot be imported from ``shardsave``."""
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("_")
    }
    assert sorted(classes) == errors.__all__
    assert classes <= set(shardsave.__all__)


IMPORTED_BY = """if True:
    import sys, torch, shardsave
    model = torch.nn.Linear(2, 2)
    {}
    print(*sorted(name.removeprefix("shardsave.") for name in sys.modules if name.startswith(("shardsave.", "safetensors"))))
"""


def imported_by(call: str, folder: Path) -> set[str]:
    done = warm_python().run(["-c", IMPORTED_BY.format(call), folder])
    done.check_returncode()
    return set(done.stdout.split())


def test_the_format_needs_no_torch() -> None:
    """Catches an import of torch by a file of `_format`: reading an index must not take the second that torch needs."""
    names = sorted(f"shardsave.{name}" for name in MODULES if wing(name) == "_format")
    script = (
        "import importlib, sys\nfor name in sys.argv[1:]: print(name, importlib.import_module(name) and 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} False" for name in names]


def test_a_plain_save_and_a_plain_load_import_little(tmp_path: Path) -> None:
    """Catches the import of what only the other direction, whole models, programs and other verbs need: it takes longer than a save."""
    saving = imported_by("shardsave.save(model, sys.argv[1])", tmp_path)
    loading = imported_by("shardsave.load_model(model, sys.argv[1]); shardsave.load(sys.argv[1])", tmp_path)
    assert {"_saving", "_engine.engine"} <= saving and {"_loading", "_engine.engine"} <= loading
    rare = {
        "_training",
        "_architecture",
        "_program",
        "_conversion",
        "_foreign",
        "_engine.portable",
        "_api.findings",
        "_api.inspect",
    }
    rare |= {"_huggingface.transformers_loading", "_huggingface.transformers_config", "_huggingface.peft_loading"}
    rare.add("safetensors")  # only `verify` asks it
    assert not rare & saving and not rare & loading
    assert "_saving" not in loading
