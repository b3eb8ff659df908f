"""The archives of a release: built from each other, installed where there is no checkout, used.

Adds about a minute and a half to `make test SLOW=1` on two cores, most of it compiling.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torch_flash_mla

ROOT = Path(__file__).resolve().parents[1]
SERIES = torch_flash_mla.SUPPORTED_TORCH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMOKE = """
import importlib.metadata, sys
import torch
import torch_flash_mla as mla
from torch_flash_mla import reference

assert mla.__file__.startswith(sys.prefix), mla.__file__
assert importlib.metadata.version("torch_flash_mla") == mla.__version__
for name in mla.__all__:
    getattr(mla, name)

torch.manual_seed(0)
cache = mla.PagedLatentCache(1, 64, 32, dtype=torch.float32)
cache.reserve(1, 100)
cache.append(0, torch.randn(1, 100, 64), torch.randn(1, 100, 32))
arguments = (cache.kv_cache(0), cache.block_table, cache.cache_seqlens, 64, 0.1)
for isa in mla.available_isas():
    with mla.force_isa(isa):
        q = torch.randn(1, 2, 5, 96)
        out, lse = mla.mla_attention(q, *arguments)
        expected, expected_lse = reference.mla_attention(q, *arguments)
        assert (out - expected).norm() < 1e-5 * expected.norm()
        assert (lse - expected_lse).abs().max() < 1e-4

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
model = DeepseekV3ForCausalLM(DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, pad_token_id=0,
    num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=1, kv_lora_rank=32,
    q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16, eos_token_id=None,
)).eval()
ids = torch.tensor([[5, 6, 7]])
stock = model.generate(ids, max_new_tokens=5, do_sample=False)
assert mla.patch(model).patched
assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), stock)
print("used", mla.cpu_isa())
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "tools" / "build_wheel.py"), "--outdir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (path,) = archives.glob("*.whl")
    return path


def test_source_archive(archives: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the sources is what git tracks")
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "torch_flash_mla"], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert tracked
    assert set(tracked) <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    assert not any(name.startswith(("tests/", "examples/", "build/")) for name in names)


def test_wheel_serves_many_pythons_and_systems(wheel: Path) -> None:
    """One file for all versions of Python, and for every C library that torch's wheels run on."""
    tag = re.fullmatch(r"torch_flash_mla-.*-cp310-abi3-manylinux_2_(\d+)_\w+\.whl", wheel.name)
    assert tag, wheel.name
    libc, version = platform.libc_ver()
    # A newer C library or its compiler may bring symbols of their own.
    if libc == "glibc" and tuple(map(int, version.split("."))) <= (2, 36):
        assert int(tag[1]) <= 28
    names = zipfile.ZipFile(wheel).namelist()
    assert {"torch_flash_mla/_C.so", "torch_flash_mla/py.typed"} <= set(names)
    cmake = "torch_flash_mla/share/cmake/torch_flash_mla/torch_flash_mla-config"
    assert {f"{cmake}.cmake", f"{cmake}-version.cmake"} <= set(names)
    assert "torch_flash_mla/include/torch_flash_mla/ops.h" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert [name for name in names if ".so" in name] == ["torch_flash_mla/_C.so"]
    assert not any(name.startswith(("tests/", "examples/", "csrc/")) for name in names)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A virtual environment with the wheel alone: not even torch yet."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    executable = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(executable)]
    # PYTHONPATH could show pip the checkout: already installed, it would say.
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*pip, "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, env=alone, cwd=folder)
    (folder / "elsewhere").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(executable), "-I", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder / "elsewhere")

    return run


def test_installed_without_torch(python: Run) -> None:
    result = python("-c", "import torch_flash_mla")
    assert f"ImportError: torch_flash_mla needs torch {SERIES}.*, which is not installed" in (
        result.stderr
    )
    assert f"pip install 'torch=={SERIES}.*'" in result.stderr


@pytest.mark.parametrize("version", ["2.12.1", "2.14.0+cu130", "3.0.0a0+git1234567"])
def test_installed_beside_another_torch(python: Run, tmp_path: Path, version: str) -> None:
    """The version is looked at before anything is loaded, so no symbol can be missing."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch_flash_mla"
    result = python("-c", code)
    assert result.returncode == 1
    expected = f"is built for torch {SERIES}.*, but torch {version} is installed"
    assert expected in result.stderr
    assert "undefined symbol" not in result.stderr


def test_installed_and_used(python: Run, wheel: Path, tmp_path: Path) -> None:
    """torch comes from the environment of the tests, the package from the wheel alone."""
    purelib = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    borrowed = Path(torch.__file__).resolve().parents[1]
    (Path(purelib) / "borrowed.pth").write_text(f"{borrowed}\n")
    check = python("-m", "pip", "-q", "install", "--no-index", str(wheel))  # torch is accepted
    assert check.returncode == 0, check.stderr
    result = python("-c", SMOKE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("used ")

    for name in ("conftest.py", "programs.py", "mla_cases.py", "test_flash_mla_interface.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert re.search(r"\d\d+ passed", tests.stdout), tests.stdout
