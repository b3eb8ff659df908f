"""The package with ASan and UBSan inside, built in a copy of the tree, and this program on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "fuzz-sanitize"
SOURCES = ("csrc", "torch_flash_mla", "tests")
FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md")
BUILD = {
    "FLASHMLA_KERNEL_CXX": "g++",
    "CXX": "g++",
    "FLASHMLA_SANITIZE": "address,undefined",
    "FLASHMLA_BUILD_TYPE": "Debug",
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
    ":abort_on_error=1:disable_coredump=1",
    "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
}


def execute_again() -> None:
    """Replaces this process by one whose ``torch_flash_mla`` is the sanitized one.

    Raises:
        SystemExit: it does not compile, or there is no runtime of the sanitizers.
    """
    mirror()
    build()
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not os.path.isabs(path):
            raise SystemExit(f"tests.fuzz: g++ has no {name}")
        libraries.append(path)
    arguments = [a for a in sys.argv[1:] if a != "--sanitize"]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(libraries)}
    environment.pop("PYTHONPATH", None)
    os.chdir(TREE)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *arguments], environment)


def mirror() -> None:
    """The tree's sources under TREE, as they are now; what did not change keeps its time."""
    wanted = {Path(name) for name in FILES}
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                wanted.add(path.relative_to(ROOT))
    for name in wanted:
        source, target = ROOT / name, TREE / name
        if target.exists() and target.stat().st_mtime_ns == source.stat().st_mtime_ns:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    for folder in SOURCES:
        for path in (TREE / folder).rglob("*"):
            kept = path.suffix in (".so", ".pyc") or path.relative_to(TREE) in wanted
            if path.is_file() and not kept:
                path.unlink()


def build() -> None:
    print("tests.fuzz: building with ASan and UBSan", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(
        command,
        cwd=TREE,
        env={**os.environ, **BUILD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"tests.fuzz: the sanitized build failed\n{result.stdout[-4000:]}")
