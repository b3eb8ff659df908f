"""Builds torch_flash_mla in two steps.

1. CMake builds the kernels (csrc/kernels, no torch) into the static archive
   build/kernels/libflashmla_kernels.a. Another compiler than the operators' may do this:
   FLASHMLA_KERNEL_CXX, else clang++ 16 or newer when there is one, else c++.
2. torch's BuildExtension compiles the operators (csrc/ops) and links them with the archive into
   torch_flash_mla/_C.so, a plain shared library without Python symbols: one build serves every
   Python version.

Environment: FLASHMLA_KERNEL_CXX, MAX_JOBS, FLASHMLA_BUILD_TYPE (Release, Debug), FLASHMLA_WERROR=1,
FLASHMLA_SANITIZE=address,undefined.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext as plain_build_ext

ROOT = Path(__file__).resolve().parent
KERNEL_BUILD = ROOT / "build" / "kernels"
ARCHIVE = KERNEL_BUILD / "libflashmla_kernels.a"
OLDEST_CLANG = 16
# The one statement of the supported torch: the dependency in pyproject.toml ("torch==2.13.*").
(TORCH_SERIES,) = re.findall(r'"torch==(\d+\.\d+)\.\*"', (ROOT / "pyproject.toml").read_text())

TORCH_HELP = f"""
torch_flash_mla compiles against the PyTorch of your environment, so that must be there first and
be seen by the build:

    pip install 'torch=={TORCH_SERIES}.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
    pip install 'setuptools>=77' cmake ninja
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

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    torch = None


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


def build_kernels() -> None:
    compiler = kernel_compiler()
    print(f"torch_flash_mla: kernels are compiled by {compiler}", flush=True)
    KERNEL_BUILD.mkdir(parents=True, exist_ok=True)
    remembered = KERNEL_BUILD / "compiler.txt"
    if remembered.exists() and remembered.read_text() != compiler:
        (KERNEL_BUILD / "CMakeCache.txt").unlink(
            missing_ok=True
        )  # CMake cannot change its compiler in place
        shutil.rmtree(KERNEL_BUILD / "CMakeFiles", ignore_errors=True)
    remembered.write_text(compiler)
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(KERNEL_BUILD), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('FLASHMLA_BUILD_TYPE', 'Release')}",
        f"-DFLASHMLA_WERROR={os.environ.get('FLASHMLA_WERROR', '0')}",
        f"-DFLASHMLA_SANITIZE={os.environ.get('FLASHMLA_SANITIZE', '')}",
    ]  # fmt: skip
    build = [tool("cmake"), "--build", str(KERNEL_BUILD), "--parallel", jobs()]
    for command in (configure, build):
        # CXX rather than CMAKE_CXX_COMPILER: it may hold several words ("python -m ziglang c++").
        if subprocess.run(command, env={**os.environ, "CXX": compiler}).returncode != 0:
            raise SystemExit("torch_flash_mla: compiling the kernels failed, see above")


def operator_library():
    """torch_flash_mla/_C.so: exports nothing, needs neither libpython nor an OpenMP runtime."""
    compile_args = [
        "-O2",
        "-g0",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wextra",
    ]
    exports = "csrc/ops/exports.map"
    link_args = [f"-Wl,--version-script={ROOT / exports}", "-Wl,--as-needed"]
    if os.environ.get("FLASHMLA_WERROR", "0") != "0":
        compile_args.append("-Werror")
    if sanitize := os.environ.get("FLASHMLA_SANITIZE"):
        flags = [f"-fsanitize={sanitize}", "-fno-sanitize=vptr"]
        compile_args += [*flags, "-g", "-fno-omit-frame-pointer"]
        link_args += flags
    extension = CppExtension(
        "torch_flash_mla._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "ops").glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        extra_objects=[str(ARCHIVE)],
        depends=[str(ARCHIVE), exports, *map(str, (ROOT / "csrc").rglob("*.h"))],
        py_limited_api=True,
    )
    # torch's own headers are not held to our warnings.
    system = [argument for path in extension.include_dirs[1:] for argument in ("-isystem", path)]
    extension.extra_compile_args["cxx"] += system
    extension.include_dirs = extension.include_dirs[:1]
    return extension


if torch is None or not torch.__version__.startswith(f"{TORCH_SERIES}."):
    found = f"torch {torch.__version__} was found" if torch else "torch was not found"

    class BuildOperators(plain_build_ext):
        """Metadata and source archives need no torch; compiling does, and says so."""

        def run(self) -> None:
            raise SystemExit(
                f"torch_flash_mla needs torch {TORCH_SERIES}.* to build, and {found}.\n{TORCH_HELP}"
            )

    from setuptools import Extension

    extensions = [Extension("torch_flash_mla._C", [])]
else:

    class BuildOperators(BuildExtension.with_options(no_python_abi_suffix=True)):
        """Builds the kernel archive, then what links it."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would compile in a fresh temporary folder every time.
            self.build_temp = str(ROOT / "build" / "ops")

        def run(self) -> None:
            (ROOT / "build").mkdir(exist_ok=True)
            with (ROOT / "build" / "lock").open(
                "w"
            ) as lock:  # two builds of one tree would mix their objects
                fcntl.flock(lock, fcntl.LOCK_EX)
                build_kernels()
                try:
                    super().run()
                except RuntimeError as error:
                    raise SystemExit(
                        f"torch_flash_mla: compiling the operators failed: {error}"
                    ) from None

    extensions = [operator_library()]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildOperators},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
