"""The kernels without torch (cpp/kernel_test.cpp): as built, under sanitizers, on older CPUs; and
with a clock in them (benchmarks/stages.cpp)."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from programs import ROOT, load_program
from programs import run as run_program

import torch_flash_mla
from tests.fuzz import sanitize

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("builds")]

ARCHIVE = ROOT / "build" / "kernels" / "libflashmla_kernels.a"
EMULATOR = shutil.which("qemu-x86_64")


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command that must succeed, without what qemu warns of, once per thread."""
    output = run_program(*command, timeout=1800, **environment)
    return re.sub(r"qemu-x86_64: warning: TCG doesn't .*\n", "", output)


def levels(output: str) -> list[str]:
    """The levels that passed."""
    return re.findall(r"^(\w+): passed", output, re.MULTILINE)


def link(archive: Path, to: Path, *compiler: str) -> Path:
    """The test with the kernels of an archive."""
    options = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-pthread")
    run(*compiler, *options, "tests/cpp/kernel_test.cpp", archive, "-o", to)
    return to


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test linked with the archive that is in the library."""
    if not ARCHIVE.exists():
        pytest.skip("built elsewhere")
    compiler = os.environ.get("CXX", "c++").split()
    return link(ARCHIVE, tmp_path_factory.mktemp("kernels") / "kernel_test", *compiler, "-O2")


def test_every_level(program: Path) -> None:
    assert levels(run(program)) == torch_flash_mla.available_isas()


@pytest.mark.parametrize("sanitizers", [sanitize.ADDRESS, sanitize.THREAD], ids=lambda s: s.names)
def test_sanitizers(sanitizers: sanitize.Sanitizers, tmp_path: Path) -> None:
    """The fuzzer's build with them, whose archive this program is linked with."""
    if not sanitize.runtime(sanitizers):
        pytest.skip(f"g++ has no runtime of -fsanitize={sanitizers.names}")
    sanitize.mirror(sanitizers.tree)
    sanitize.build(sanitizers)
    program = link(
        sanitizers.tree / "build" / "kernels" / ARCHIVE.name,
        tmp_path / "kernel_test",
        *("g++", "-O1", f"-fsanitize={sanitizers.names}", "-Wno-restrict"),
    )
    output = run(program, "16", TSAN_OPTIONS="halt_on_error=1", UBSAN_OPTIONS="halt_on_error=1")
    assert levels(output) == torch_flash_mla.available_isas()


@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64; Debian: apt install qemu-user")
@pytest.mark.parametrize(
    ("cpu", "expected"), [("Nehalem", ["scalar"]), ("Haswell", ["scalar", "avx2"])]
)
def test_levels_of_older_cpus(cpu: str, expected: list[str], program: Path) -> None:
    """No instruction outside of a level's own, and none before the level is chosen."""
    version = re.search(r"version (\d+)\.(\d+)", run(EMULATOR, "--version"))
    assert version is not None
    if expected != ["scalar"] and tuple(map(int, version.groups())) < (7, 2):
        pytest.skip("AVX2 is emulated by qemu 7.2 and newer")
    assert levels(run(EMULATOR, "-cpu", cpu, program, "4")) == expected


def test_stages(tmp_path: Path) -> None:
    """Every level's program runs, and the steps add up to the whole."""
    isas = [isa for isa in torch_flash_mla.available_isas() if isa != "onednn"]
    report = tmp_path / "stages.json"
    arguments = ["--isa", ",".join(isas), "--heads", "3", "--keys", "100", "--json", str(report)]
    arguments += ["--rounds", "1", "--seconds", "0.01"]
    benchmark = load_program("benchmarks/stages.py")
    assert benchmark.main(arguments) == 0
    rows = json.loads(report.read_text())
    assert len(rows) == len(isas) * len(benchmark.FORMATS)
    for row in rows:
        assert all(seconds > 0 for seconds in row["stages"].values())
        assert sum(row["stages"].values()) <= row["seconds"] * 1.01
        assert row["rate"] < row["roof"]
