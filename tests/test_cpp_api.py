"""From C++: find_package(torch_flash_mla), the header, and the programs of examples/cpp, which must
print what Python computes.

Adds about a minute and a half to `make test SLOW=1` on two cores: half a minute of compiling, the
rest is the fixture `exported` if test_export.py has not filled it yet. The fast tests take 10
seconds, for CMake's compiler checks.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from cpp_examples import PACKAGE_TOLERANCE, attention_demo, decode
from cpp_operators import check_operators, values
from programs import ROOT, load_program, run

import torch_flash_mla
from torch_flash_mla import formats

pytestmark = pytest.mark.xdist_group("builds")

PACKAGE = Path(torch_flash_mla.__file__).parent
LIBRARY = Path(torch_flash_mla.library_path).name
PREFIX = f"{torch.utils.cmake_prefix_path};{torch_flash_mla.cmake_prefix_path}"

export = load_program("examples/cpp/export.py")

# Then find_package(Torch) is an error of its own. tests/test_wheel.py goes without CMake.
needs_cmake_of_torch = pytest.mark.skipif(
    torch.version.cuda is not None and shutil.which("nvcc") is None,
    reason="the CMake files of a CUDA build of torch want the CUDA toolkit",
)


# find_package


def configure(folder: Path, prefix: str, version: str = "", fails: bool = False) -> str:
    """Output of CMake for a project that only looks for the package."""
    (folder / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.18)
project(looks LANGUAGES CXX)
find_package(torch_flash_mla {version} REQUIRED)
message(STATUS "found ${{torch_flash_mla_VERSION}} ${{torch_flash_mla_INCLUDE_DIRS}}")
""")
    shutil.rmtree(folder / "build", ignore_errors=True)
    return run(
        *("cmake", "-S", folder, "-B", folder / "build", "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={prefix}",
        fails=fails,
    )


@needs_cmake_of_torch
def test_find_package(tmp_path: Path) -> None:
    output = configure(tmp_path, PREFIX, "0.1")
    assert f"found {torch_flash_mla.__version__} {PACKAGE}/include" in output
    assert (PACKAGE / "include" / "torch_flash_mla" / "ops.h").exists()


@pytest.mark.parametrize(
    ("version", "libraries", "message"),
    [
        ("9.9", [LIBRARY], r'compatible with requested version\s+"9.9"'),
        pytest.param(
            *("", [], rf"{LIBRARY} is missing: the operators were not compiled"),
            marks=needs_cmake_of_torch,
        ),
        pytest.param(
            "",
            ["_C_torch10.so", "_C_torch299.so"],
            rf"no operators for torch 2\.\d+.*: {LIBRARY} is none of _C_torch10.so, _C_torch299.so",
            marks=needs_cmake_of_torch,
        ),
    ],
    ids=["version", "library", "torch"],
)
def test_find_package_says_what_is_wrong(
    version: str, libraries: list[str], message: str, tmp_path: Path
) -> None:
    """In a copy of the package, with the libraries of some series."""
    copied = tmp_path / "torch_flash_mla"
    shutil.copytree(PACKAGE / "share", copied / "share")
    (copied / "__init__.py").symlink_to(PACKAGE / "__init__.py")
    for name in libraries:
        (copied / name).touch()
    prefix = f"{torch.utils.cmake_prefix_path};{copied}/share/cmake"
    output = " ".join(configure(tmp_path, prefix, version, fails=True).split())
    assert re.search(message, output), output


# The programs


@pytest.fixture(scope="module", params=["", "-Wl,--as-needed"], ids=["plain", "as-needed"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built programs; the second time with a linker that drops what no symbol
    refers to."""
    folder = tmp_path_factory.getbasetemp() / "cpp_examples"
    run(
        *("cmake", "-S", ROOT / "examples" / "cpp", "-B", folder, "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={PREFIX}",
        f"-DCMAKE_EXE_LINKER_FLAGS={request.param}",
        "-DCMAKE_CXX_FLAGS=-Werror",
    )
    run("cmake", "--build", folder, "--parallel", os.environ.get("MAX_JOBS", "2"))
    return folder


@pytest.mark.slow
@needs_cmake_of_torch
def test_operators(programs: Path) -> None:
    check_operators(run(programs / "operators"))


@pytest.mark.slow
@needs_cmake_of_torch
@pytest.mark.parametrize(
    ("program", "file"), [("script_module", "attention.pt"), ("package", "attention.pt2")]
)
def test_saved_layers(programs: Path, exported: Path, program: str, file: str) -> None:
    output = run(programs / program, exported / file)
    rows = [values(line.split(":")[1]) for line in output.splitlines()]
    expected = attention_demo(export.attention_layer())
    # A package computes norms in another order than eager mode: an 8-bit code may round otherwise.
    assert (torch.stack(rows) - expected).abs().max() <= 5e-3 * expected.abs().max()


@pytest.mark.slow
@needs_cmake_of_torch
def test_decode_prints_the_tokens_of_python(programs: Path, exported: Path) -> None:
    """Those of the same package run by Python; the model in eager mode agrees."""
    text, tokens = run(programs / "decode", exported / "tiny_model.pt2", "def read(", "48").split(
        "\ntokens: "
    )
    tokens = [int(word) for word in tokens.split()]
    assert tokens[:9] == list(b"def read(")
    assert len(tokens) == 9 + 48
    package = torch._inductor.aoti_load_package(str(exported / "tiny_model.pt2"))
    same, logits = decode(package, b"def read(", 48)
    assert tokens == same
    _, expected = decode(export.decoder_step(), b"def read(", 48, follow=tokens)
    assert (logits - expected).abs().max() <= PACKAGE_TOLERANCE * expected.abs().max()
    tokenizer = load_program("examples/tiny_model/tokenizer.py")
    assert text == tokenizer.decode(tokens)


@pytest.mark.slow
@needs_cmake_of_torch
def test_a_program_without_the_library_is_told_so(programs: Path, tmp_path: Path) -> None:
    (compiled,) = (programs / "CMakeFiles" / "operators.dir").glob("*.o")
    libraries = Path(torch.__file__).parent / "lib"
    run(
        *os.environ.get("CXX", "c++").split(),
        *(compiled, "-o", tmp_path / "alone", f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
        *("-ltorch_cpu", "-lc10"),
    )
    output = run(tmp_path / "alone", fails=True)
    assert "flashmla::_isa is not registered: the library of torch_flash_mla, _C_torch" in output


def test_row_bytes_are_those_of_python() -> None:
    """row_bytes of the header is this operator; Python computes its own."""
    for name in formats.PACKED_FORMATS:
        for latent, rope in ((512, 64), (256, 32), (64, 0)):
            expected = formats.row_bytes(name, latent, rope)
            assert torch.ops.flashmla._row_bytes(name, latent, rope) == expected
    for arguments, message in (
        (("float32", 64, 32), 'kv_cache_dtype: "float32", expected a packed format'),
        (("q8", 64, 32), 'kv_cache_dtype: "q8", expected a packed format'),
        (("q4_kv", 64, 33), "packs multiples of 32 values, but latent_dim is 64 and rope_dim 33"),
        (("q8_0", 0, 32), "latent_dim: 0, expected 1 to"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.flashmla._row_bytes(*arguments)
