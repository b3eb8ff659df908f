"""What is built: symbols, dependencies, the cost of importing, errors of building and importing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_flash_mla
from torch_flash_mla import SUPPORTED_TORCH, _series

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(torch_flash_mla.library_path)
OBJECTS = (ROOT / "build" / "kernels" / "CMakeFiles").glob("*.dir/csrc/kernels/levels/*.o")
ISA_OBJECTS = sorted(path for path in OBJECTS if path.name != "dispatch.cpp.o")  # of no level


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Output of a command that must succeed."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.skipif(not ISA_OBJECTS, reason="built elsewhere")
def test_objects_of_an_instruction_set_have_no_weak_symbols() -> None:
    """The linker may pick one copy of a weak symbol for all: it must not need AVX-512."""
    levels = {path.name.removesuffix(".cpp.o") for path in ISA_OBJECTS}
    assert set(torch_flash_mla.available_isas()) <= levels
    for path in ISA_OBJECTS:
        weak = [line for line in run("nm", "-C", path).splitlines() if re.search(r" [WVuw] ", line)]
        assert not weak, f"{path.name}: {weak}"


def test_library_exports_nothing() -> None:
    assert run("nm", "-D", "--defined-only", LIBRARY).strip() == ""


def test_library_needs_only_torch_and_the_c_runtime() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", LIBRARY))
    runtime = r"(libc10|libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|ld-linux.*)\.so.*"
    assert needed and all(re.fullmatch(runtime, name) for name in needed), needed


def test_import_is_quick_and_leaves_optional_packages_alone() -> None:
    code = """
import sys, time, torch
start = time.perf_counter()
import torch_flash_mla
print(time.perf_counter() - start)
print([name for name in ("transformers", "torch._inductor") if name in sys.modules])
"""
    result = run_python(code)
    seconds, modules = result.stdout.splitlines()
    assert float(seconds) < 0.5, result.stdout
    assert modules == "[]"


def test_public_names_exist() -> None:
    for name in torch_flash_mla.__all__:
        assert hasattr(torch_flash_mla, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = torch_flash_mla.nothing


def test_what_says_which_torch_is_served_agrees_with_the_list() -> None:
    """SUPPORTED_TORCH in torch_flash_mla/_series.py is the list; setup.py and tools/ read it."""
    oldest, newest = SUPPORTED_TORCH[0], SUPPORTED_TORCH[-1]
    assert sorted(SUPPORTED_TORCH, key=_series.order) == list(SUPPORTED_TORCH)
    version = re.search(r"^DEVELOPED_WITH := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert version and _series.series_of(version[1]) in SUPPORTED_TORCH
    page = (ROOT / "docs" / "installing.md").read_text()
    assert re.findall(r"^\| (\d+\.\d+) \|", page, re.M) == list(SUPPORTED_TORCH)
    for name in ("README.md", "docs/index.md", "docs/installing.md", "docs/limits.md"):
        said = re.findall(r"torch (\d+\.\d+) to (\d+\.\d+)", (ROOT / name).read_text())
        assert set(said) == {(oldest, newest)}, name


def test_requirement_admits_what_was_compiled() -> None:
    assert _series.requirement(("2.14",)) == "torch==2.14.*"
    assert _series.requirement(("2.16",)) == "torch==2.16.*"  # from the source archive
    assert _series.requirement(("2.12", "2.10", "2.11")) == "torch>=2.10,<2.13"
    assert _series.requirement(("2.10", "2.14")) == "torch>=2.10,<2.15,!=2.11.*,!=2.12.*,!=2.13.*"
    assert _series.requirement(()) == f"torch>={SUPPORTED_TORCH[0]}"


def test_another_torch_is_refused() -> None:
    """By an error that names the command which compiles the operators for it."""
    result = run_python("import torch; torch.__version__ = '2.99.0+x'; import torch_flash_mla")
    assert result.returncode == 1
    served = re.search(
        r"ImportError: torch_flash_mla .* has operators for torch (.*), but torch 2.99.0\+x is "
        r"installed\. Compile them for it from the source archive:\n.*cmake ninja\n"
        r"    pip install --no-build-isolation .* torch_flash_mla-0\.\d+\.\d+\.tar\.gz\n",
        result.stderr,
    )
    assert served, result.stderr
    assert _series.series_of(torch.__version__) in served[1].split(", ")


def test_a_torch_that_is_too_old_is_refused() -> None:
    result = run_python("import torch; torch.__version__ = '2.9.1'; import torch_flash_mla")
    assert "needs torch 2.10 or newer, but torch 2.9.1 is installed" in result.stderr


def test_an_untested_torch_is_warned_of(tmp_path: Path) -> None:
    """Its operators were compiled from the source archive."""
    package = tmp_path / "torch_flash_mla"
    shutil.copytree(Path(torch_flash_mla.__file__).parent, package)
    listed = (package / "_series.py").read_text()
    listed = re.sub("(?m)^SUPPORTED_TORCH = .*$", 'SUPPORTED_TORCH = ("2.1", "2.2")', listed)
    (package / "_series.py").write_text(listed)
    result = run_python("import torch_flash_mla; print(torch_flash_mla.__file__)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(package))
    assert re.search(
        r"UserWarning: torch_flash_mla .* was compiled for torch 2\.\d+, on which it was never "
        r"tested; it was on 2\.1, 2\.2",
        result.stderr,
    )


def test_missing_torch_is_explained() -> None:
    result = run_python("import sys; sys.modules['torch'] = None; import torch_flash_mla")
    first, last = SUPPORTED_TORCH[0], SUPPORTED_TORCH[-1]
    assert f"ImportError: torch_flash_mla needs torch {first} to {last}, which is not" in (
        result.stderr
    )
    assert f"pip install '{_series.requirement(SUPPORTED_TORCH)}'" in result.stderr


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "torch_flash_mla"
    package.mkdir()
    for name in ("__init__.py", "_series.py"):
        shutil.copy(Path(torch_flash_mla.__file__).with_name(name), package)
    result = run_python("import torch_flash_mla", cwd=tmp_path)
    assert re.search(r"_C_torch\d+.so is missing: the operators were not compiled", result.stderr)
    assert "make setup" in result.stderr


needs_sources = pytest.mark.skipif(
    not (ROOT / "torch_flash_mla").exists(), reason="a wheel is tested, beside no checkout"
)


def headers(folder: Path, minor: int) -> Path:
    """A torch of which only the version is there."""
    path = folder / "include" / "torch" / "headeronly" / "version.h"
    path.parent.mkdir(parents=True)
    path.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
    return folder


def run_setup(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
import os, runpy, sys
{before}
sys.argv = ["setup.py", "-q", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    return run_python(code)


@needs_sources
@pytest.mark.parametrize(
    ("minor", "found"),
    [
        (None, "torch was not found"),
        (0, "needs torch 2.10 or newer to build; {folder} has an older one, or no headers"),
        (9, "needs torch 2.10 or newer to build, and torch 2.9 was found"),
    ],
)
def test_building_without_the_right_torch_is_explained(
    minor: int | None, found: str, tmp_path: Path
) -> None:
    before = "sys.modules['torch'] = None"
    if minor is not None:
        folder = headers(tmp_path, minor) if minor else tmp_path
        before = f"os.environ['FLASHMLA_TORCH'] = {str(folder)!r}"
    result = run_setup("build_ext", "--inplace", before=before)
    assert result.returncode != 0
    assert found.format(folder=tmp_path) in result.stderr
    assert "pip install torch 'setuptools>=77' cmake ninja" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


@needs_sources
def test_building_for_an_untested_torch_is_warned_of(tmp_path: Path) -> None:
    """The warning comes before compiling, which is not waited for."""
    before = f"os.environ['FLASHMLA_TORCH'] = {str(headers(tmp_path, 99))!r}\n"
    before += "os.environ['PATH'] = ''; import shutil; shutil.which = lambda name: None"
    result = run_setup("build_ext", "--inplace", before=before)
    assert "WARNING: torch 2.99 is none of those that this release was tested with" in result.stderr
    assert "ninja not found" in result.stderr or "cmake not found" in result.stderr
