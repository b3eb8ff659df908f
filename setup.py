"""Builds torch_flash_mla in two steps.

1. CMake builds the kernels (csrc/kernels, no torch) into the static archive
   build/kernels/libflashmla_kernels.a. Another compiler than the operators' may do this:
   FLASHMLA_KERNEL_CXX, else clang++ 16 or newer when there is one, else c++.
2. CMake builds the operators (csrc/ops) and links them with the archive into
   torch_flash_mla/_C_torch<series>.so, a plain shared library without Python symbols: for the torch
   of this environment, or for each of the torch folders that FLASHMLA_TORCH names.

Environment: FLASHMLA_TORCH=folder:folder, FLASHMLA_KERNEL_CXX, MAX_JOBS, FLASHMLA_BUILD_TYPE
(Release, Debug), FLASHMLA_WERROR=1, FLASHMLA_SANITIZE=address,undefined.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNEL_BUILD = ROOT / "build" / "kernels"
OPERATOR_BUILD = ROOT / "build" / "ops"
ARCHIVE = KERNEL_BUILD / "libflashmla_kernels.a"
OLDEST_CLANG = 16

series = runpy.run_path(str(ROOT / "torch_flash_mla" / "_series.py"))
SUPPORTED_TORCH = series["SUPPORTED_TORCH"]

TORCH_HELP = """
torch_flash_mla compiles against the PyTorch of your environment, so that must be there first and
be seen by the build:

    pip install torch 'setuptools>=77' cmake ninja
    pip install --no-build-isolation .
"""

# cmake and ninja usually come from pip: they lie beside this Python, which need not be on PATH.
os.environ["PATH"] = os.pathsep.join(
    [
        os.environ.get("PATH", os.defpath),
        sysconfig.get_path("scripts"),
        str(Path(sys.executable).parent),
    ]
)


def torch_folders() -> dict[str, Path]:
    """Folders with torch's include/ and lib/, by series."""
    if named := os.environ.get("FLASHMLA_TORCH"):
        folders = [Path(folder).resolve() for folder in named.split(os.pathsep)]
    else:
        found = importlib.util.find_spec("torch")
        folders = [Path(found.origin).parent] if found and found.origin else []
    return {torch_series(folder): folder for folder in folders}


def torch_series(folder: Path) -> str:
    """The series of the torch in ``folder``, as its headers say."""
    try:
        text = (folder / "include" / "torch" / "headeronly" / "version.h").read_text()
    except FileNotFoundError:  # this header came with 2.9
        oldest = SUPPORTED_TORCH[0]
        raise SystemExit(
            f"torch_flash_mla needs torch {oldest} or newer to build; {folder} has an older one, "
            f"or no headers.\n{TORCH_HELP}"
        ) from None
    part = {name: re.search(rf"TORCH_VERSION_{name} (\d+)", text)[1] for name in ("MAJOR", "MINOR")}
    return f"{part['MAJOR']}.{part['MINOR']}"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(
            f"torch_flash_mla: {name} not found. It comes with pip: pip install cmake ninja"
        )
    return path


def clang_version(compiler: str) -> int:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"clang version (\d+)", text)
    return int(found[1]) if found else 0


def kernel_compiler() -> str:
    """The compiler of the kernels: clang is 5 to 50 % ahead of g++ 12 here, but never required."""
    if chosen := os.environ.get("FLASHMLA_KERNEL_CXX"):
        return chosen
    for name in ("clang++", *(f"clang++-{version}" for version in range(29, OLDEST_CLANG - 1, -1))):
        if shutil.which(name) and clang_version(name) >= OLDEST_CLANG:
            return name
    return os.environ.get("CXX", "c++")


def jobs() -> str:
    return os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)


def run_cmake(source: Path, build: Path, compiler: str, what: str, **options: str) -> None:
    """Configures and builds a CMake project."""
    cmake, ninja = tool("cmake"), tool("ninja")
    build.mkdir(parents=True, exist_ok=True)
    remembered = build / "compiler.txt"
    if remembered.exists() and remembered.read_text() != compiler:
        # CMake cannot change its compiler in place.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
    remembered.write_text(compiler)
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_BUILD_TYPE": os.environ.get("FLASHMLA_BUILD_TYPE", "Release"),
        "FLASHMLA_WERROR": os.environ.get("FLASHMLA_WERROR", "0"),
        "FLASHMLA_SANITIZE": os.environ.get("FLASHMLA_SANITIZE", ""),
        **options,
    }
    configure = [cmake, "-S", str(source), "-B", str(build), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    for command in (configure, [cmake, "--build", str(build), "--parallel", jobs()]):
        # CXX rather than CMAKE_CXX_COMPILER: it may hold several words ("python -m ziglang c++").
        if subprocess.run(command, env={**os.environ, "CXX": compiler}).returncode != 0:
            raise SystemExit(f"torch_flash_mla: compiling the {what} failed, see above")


class BuildOperators(build_ext):
    """Builds the kernel archive, then a library of operators for each torch."""

    def run(self) -> None:
        if not TORCH:
            raise SystemExit(f"torch_flash_mla: torch was not found.\n{TORCH_HELP}")
        for name in TORCH:
            if series["order"](name) < series["order"](SUPPORTED_TORCH[0]):
                raise SystemExit(
                    f"torch_flash_mla needs torch {SUPPORTED_TORCH[0]} or newer to build, and "
                    f"torch {name} was found.\n{TORCH_HELP}"
                )
            if name not in SUPPORTED_TORCH:
                print(
                    f"torch_flash_mla: WARNING: torch {name} is none of those that this release "
                    f"was tested with: {', '.join(SUPPORTED_TORCH)}",
                    file=sys.stderr,
                    flush=True,
                )
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree would mix their objects
            self.compile()
            super().run()

    def compile(self) -> None:
        compiler = kernel_compiler()
        print(f"torch_flash_mla: kernels are compiled by {compiler}", flush=True)
        run_cmake(ROOT, KERNEL_BUILD, compiler, "kernels")
        run_cmake(
            ROOT / "csrc" / "ops",
            OPERATOR_BUILD,
            os.environ.get("CXX", "c++"),
            "operators",
            FLASHMLA_TORCH=";".join(map(str, TORCH.values())),
            FLASHMLA_KERNELS=str(ARCHIVE),
        )

    def build_extension(self, extension: Extension) -> None:
        """Takes the library that CMake made."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(OPERATOR_BUILD / target.name), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python version: no Python symbol is used."""
        return fullname.replace(".", os.sep) + ".so"


def extension(name: str) -> Extension:
    library = series["library_name"](name)
    return Extension(f"torch_flash_mla.{Path(library).stem}", [], py_limited_api=True)


# Metadata and source archives need no torch; compiling does, and says so.
TORCH = torch_folders()
setup(
    install_requires=[series["requirement"](tuple(TORCH))],
    ext_modules=[extension(name) for name in TORCH or SUPPORTED_TORCH[-1:]],
    cmdclass={"build_ext": BuildOperators},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
