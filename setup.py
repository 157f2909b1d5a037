"""Builds the C++ engine. Everything else about the package is in pyproject.toml.

Switches, from the environment: SHARDSAVE_WERROR=1, SHARDSAVE_DEBUG=1, SHARDSAVE_COVERAGE=1,
SHARDSAVE_SANITIZE=address,undefined (or thread), SHARDSAVE_REQUIRE_NATIVE=1 (a build failure fails the installation).
"""

from __future__ import annotations

import os
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


def switched_on(name: str) -> bool:
    return os.environ.get(f"SHARDSAVE_{name}", "") not in ("", "0")


class OptionalBuild(build_ext):
    """Continues without the extension if it cannot be built, for example without a compiler; shardsave then uses its portable engine."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if switched_on("REQUIRE_NATIVE"):
                raise
            print(f"shardsave: the C++ engine was not built ({error}); the slower portable one will be used", file=sys.stderr)

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if switched_on("REQUIRE_NATIVE"):
                raise
            print(f"shardsave: the C++ engine was not built ({error}); the slower portable one will be used", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if os.path.exists(self.get_ext_fullpath(e.name)) or self.inplace]
        self.extensions = [
            e for e in self.extensions if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(e.name)))
        ]
        super().copy_extensions_to_source()


compile_flags = ["-O0" if switched_on("DEBUG") else "-O3", "-g", "-Wall", "-Wextra"]
link_flags = ["-ldl", "-pthread"]
if switched_on("WERROR"):
    compile_flags.append("-Werror")
for switch in (f"-fsanitize={os.environ.get('SHARDSAVE_SANITIZE', '')}", "--coverage" if switched_on("COVERAGE") else ""):
    if switch not in ("", "-fsanitize="):
        compile_flags.append(switch)
        link_flags.append(switch)

setup(
    ext_modules=[
        Pybind11Extension(
            "shardsave._native",
            sorted(glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)
