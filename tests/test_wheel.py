"""The archives of a release: built from each other, installed where there is no checkout, used; and
the libraries of other series of torch, run on that series' libtorch without Python.

`make test-wheel` is this for every series, or for SERIES='2.10 2.12'. Without it, in
`make test SLOW=1`, it is for the installed one: each of the others costs a minute of compiling on
two cores and, the first time, a download of up to a gigabyte by tools/fetch_torch.py.
`make test TORCH=2.14.1` is what tests the Python side beside another torch.
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
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cpp_operators import check_operators
from programs import ROOT
from programs import run as run_program

from torch_flash_mla import SUPPORTED_TORCH, _series

HERE = _series.series_of(torch.__version__)
OTHERS = [series for series in SUPPORTED_TORCH if series != HERE]
CHOSEN = os.environ.get("FLASHMLA_TEST_SERIES", HERE)
WANTED = [s for s in SUPPORTED_TORCH if CHOSEN == "all" or s in {HERE, *CHOSEN.split()}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("builds")]

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


@dataclass
class Archives:
    folder: Path  # with the source archive and the wheel that was built from it
    missing: dict[str, str]  # series that the wheel is without, and why

    @property
    def wheel(self) -> Path:
        (path,) = self.folder.glob("*.whl")
        return path

    @property
    def served(self) -> tuple[str, ...]:
        return tuple(series for series in SUPPORTED_TORCH if series not in self.missing)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "tools" / "build_wheel.py"), "--outdir", str(folder)]
    result = subprocess.run(
        [*command, "--series", *WANTED], capture_output=True, text=True, cwd=folder
    )
    assert result.returncode == 0, result.stdout + result.stderr
    missing = re.findall(r"^NOT IN THE WHEEL: torch ([\d.]+)\. (.*)", result.stderr, re.M)
    unwanted = {series: "`make test-wheel` builds for it" for series in OTHERS}
    return Archives(folder, {s: r for s, r in unwanted.items() if s not in WANTED} | dict(missing))


@pytest.fixture(scope="module")
def wheel(archives: Archives) -> Path:
    return archives.wheel


def test_source_archive(archives: Archives) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the sources is what git tracks")
    (path,) = archives.folder.glob("*.tar.gz")
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
    assert "torch_flash_mla/py.typed" in names
    cmake = "torch_flash_mla/share/cmake/torch_flash_mla/torch_flash_mla-config"
    assert {f"{cmake}.cmake", f"{cmake}-version.cmake"} <= set(names)
    assert "torch_flash_mla/include/torch_flash_mla/ops.h" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "examples/", "csrc/")) for name in names)


def test_wheel_has_the_operators_of_each_series(archives: Archives) -> None:
    """Or of all but those that could not be had; what it demands of pip says the same."""
    assert HERE in archives.served
    with zipfile.ZipFile(archives.wheel) as content:
        libraries = {name for name in content.namelist() if ".so" in name}
        (metadata,) = (name for name in content.namelist() if name.endswith("/METADATA"))
        text = content.read(metadata).decode()
    expected = {f"torch_flash_mla/{_series.library_name(series)}" for series in archives.served}
    assert libraries == expected
    (required,) = re.findall(r"^Requires-Dist: torch\b(?!_|-)(.*)$", text, re.M)
    demanded = _series.requirement(archives.served).removeprefix("torch")
    assert sorted(required.strip().split(",")) == sorted(demanded.split(","))


@pytest.mark.parametrize("series", OTHERS)
def test_other_series(series: str, archives: Archives, tmp_path: Path) -> None:
    """Its library on its own libtorch, without Python and without a GPU's packages: it loads, its
    schemas are those of this process, and the example in C++ prints what is computed here."""
    if series in archives.missing:
        pytest.skip(f"torch {series} NOT TESTED: {archives.missing[series]}")
    fetched = run_program(sys.executable, ROOT / "tools" / "fetch_torch.py", series)
    torch_root = Path(fetched.split()[1])
    with zipfile.ZipFile(archives.wheel) as content:
        content.extractall(tmp_path)
    package = tmp_path / "torch_flash_mla"
    library = package / _series.library_name(series)

    def build(source: Path, *linked: str | Path) -> Path:
        include = (torch_root / "include", torch_root / "include/torch/csrc/api/include")
        run_program(
            *os.environ.get("CXX", "c++").split(),
            *("-std=c++20", f"-I{package / 'include'}", *(f"-isystem{path}" for path in include)),
            *(source, "-o", tmp_path / source.stem, f"-Wl,-rpath,{torch_root / 'lib'}", "-ldl"),
            *("-Wl,--no-as-needed", *linked),
            *(torch_root / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")),
        )
        return tmp_path / source.stem

    schemas = run_program(build(ROOT / "tests" / "cpp" / "schemas.cpp"), library).splitlines()
    names = (name for name in torch._C._dispatch_get_all_op_names() if name[:10] == "flashmla::")
    assert schemas == sorted(str(torch._C._get_schema(name, "")) for name in names)
    check_operators(run_program(build(ROOT / "examples" / "cpp" / "operators.cpp", library)))


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
    first, last = SUPPORTED_TORCH[0], SUPPORTED_TORCH[-1]
    assert f"torch_flash_mla needs torch {first} to {last}, which is not" in result.stderr
    assert "pip install 'torch>=2." in result.stderr


@pytest.mark.parametrize("version", ["2.9.1", "2.99.0+cu140", "3.0.0a0+git1234567"])
def test_installed_beside_another_torch(
    python: Run, archives: Archives, tmp_path: Path, version: str
) -> None:
    """The version is looked at before anything is loaded, so no symbol can be missing."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch_flash_mla"
    result = python("-c", code)
    assert result.returncode == 1
    assert f", but torch {version} is installed" in result.stderr
    if version != "2.9.1":
        assert f"has operators for torch {', '.join(archives.served)}, but" in result.stderr
        # What it says to do names the other archive.
        (source,) = archives.folder.glob("*.tar.gz")
        assert re.search(rf"pip install --no-build-isolation .*{source.name}\n", result.stderr)
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
