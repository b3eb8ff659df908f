"""What is built: symbols, dependencies, the cost of importing, errors of building and importing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_flash_mla

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(torch_flash_mla.__file__).with_name("_C.so")
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


def test_supported_torch_is_stated_once() -> None:
    series = torch_flash_mla.SUPPORTED_TORCH
    assert f'dependencies = ["torch=={series}.*"]' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^TORCH := {re.escape(series)}\.\d+$", (ROOT / "Makefile").read_text(), re.M)


def test_another_torch_is_refused() -> None:
    result = run_python("import torch; torch.__version__ = '2.14.1'; import torch_flash_mla")
    assert "ImportError: torch_flash_mla" in result.stderr
    assert "is built for torch 2.13.*, but torch 2.14.1 is installed" in result.stderr


def test_missing_torch_is_explained() -> None:
    result = run_python("import sys; sys.modules['torch'] = None; import torch_flash_mla")
    assert "ImportError: torch_flash_mla needs torch 2.13.*, which is not" in result.stderr
    assert "pip install 'torch==2.13.*'" in result.stderr


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "torch_flash_mla"
    package.mkdir()
    shutil.copy(Path(torch_flash_mla.__file__), package)
    result = run_python("import torch_flash_mla", cwd=tmp_path)
    assert "_C.so is missing: the operators were not compiled" in result.stderr
    assert "make setup" in result.stderr


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("sys.modules['torch'] = None", "torch was not found"),
        ("import torch; torch.__version__ = '2.12.1'", "torch 2.12.1 was found"),
    ],
)
def test_building_without_the_right_torch_is_explained(setting: str, found: str) -> None:
    code = f"""
import runpy, sys
{setting}
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run_python(code)
    assert result.returncode != 0
    assert f"needs torch 2.13.* to build, and {found}" in result.stderr
    assert "pip install 'torch==2.13.0+cpu'" in result.stderr
    assert "--no-build-isolation" in result.stderr
