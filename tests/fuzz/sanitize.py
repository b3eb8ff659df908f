"""The package with sanitizers inside, built in a copy of the tree, and this program on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "torch_flash_mla", "tests")
FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Sanitizers:
    """A build with some of them."""

    names: str  # as -fsanitize= takes them
    libraries: tuple[str, ...]  # loaded before everything else
    environment: dict[str, str]

    @property
    def tree(self) -> Path:
        return ROOT / "build" / f"fuzz-{self.names.split(',')[0]}"


ADDRESS = Sanitizers(
    "address,undefined",
    ("libasan.so", "libubsan.so"),
    {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
        ":abort_on_error=1:disable_coredump=1",
        "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
    },
)
# torch is not instrumented, nor is its OpenMP: what happens on its threads happens unseen, in an
# order that looks like none. So threads are Python's, with one thread of torch each.
THREAD = Sanitizers(
    "thread",
    ("libtsan.so",),
    {
        "TSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:die_after_fork=0:report_bugs=1"
        ":ignore_noninstrumented_modules=1:allocator_may_return_null=1",
        "OMP_NUM_THREADS": "1",
    },
)


def running(*sanitizers: Sanitizers) -> bool:
    """Whether this process has one of these, or any, inside."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    return any(s.libraries[0] in preloaded for s in sanitizers or (ADDRESS, THREAD))


def execute_again(sanitizers: Sanitizers, option: str) -> None:
    """Replaces this process by one whose ``torch_flash_mla`` is the sanitized one.

    Raises:
        SystemExit: it does not compile, or there is no runtime of the sanitizers.
    """
    libraries = runtime(sanitizers)
    if not libraries:
        raise SystemExit(f"tests.fuzz: g++ has no {' or no '.join(sanitizers.libraries)}")
    mirror(sanitizers.tree)
    build(sanitizers)
    arguments = [a for a in sys.argv[1:] if a != option]
    environment = {**os.environ, **sanitizers.environment, "LD_PRELOAD": " ".join(libraries)}
    environment.pop("PYTHONPATH", None)
    os.chdir(sanitizers.tree)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *arguments], environment)


def runtime(sanitizers: Sanitizers) -> list[str]:
    """Where g++ has what is loaded before everything else; empty if it lacks any of it."""
    libraries = []
    for name in sanitizers.libraries:
        path = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not os.path.isabs(path):
            return []
        libraries.append(path)
    return libraries


def mirror(tree: Path) -> None:
    """The sources under ``tree``, as they are now; what did not change keeps its time."""
    wanted = {Path(name) for name in FILES}
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                wanted.add(path.relative_to(ROOT))
    for name in wanted:
        source, target = ROOT / name, tree / name
        if target.exists() and target.stat().st_mtime_ns == source.stat().st_mtime_ns:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    for folder in SOURCES:
        for path in (tree / folder).rglob("*"):
            kept = path.suffix in (".so", ".pyc") or path.relative_to(tree) in wanted
            if path.is_file() and not kept:
                path.unlink()


def build(sanitizers: Sanitizers) -> None:
    print(f"tests.fuzz: building with -fsanitize={sanitizers.names}", file=sys.stderr, flush=True)
    settings = {
        "FLASHMLA_KERNEL_CXX": "g++",
        "CXX": "g++",
        "FLASHMLA_SANITIZE": sanitizers.names,
        "FLASHMLA_BUILD_TYPE": "Debug",
    }
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=sanitizers.tree,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"tests.fuzz: the sanitized build failed\n{result.stdout[-4000:]}")
