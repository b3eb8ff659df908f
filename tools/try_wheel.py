"""Runs the tests against a wheel, beside one version of torch.

    python tools/try_wheel.py 2.14.1 dist/torch_flash_mla-*.whl             # make test TORCH=2.14.1
    python tools/try_wheel.py 2.14.1 dist/torch_flash_mla-*.whl -- -k q4    # options for pytest

Makes an environment under build/ with that torch, the wheel and what the tests need, copies the
tests to where no checkout of the package is, runs them, and removes both. An index may offer no
torch but a CUDA build: then this downloads 3 GB, and takes 8 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = """
import platform, sys, torch, torch_flash_mla as mla
assert mla.__file__.startswith(sys.prefix), mla.__file__
print(f"torch {torch.__version__}, Python {platform.python_version()}, {mla.library_path}, "
      f"level {mla.cpu_isa()}")
"""


def copy_sources(folder: Path) -> None:
    """What git tracks, but for the package: the tests shall find the installed one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\0"):
        if name and not name.startswith("torch_flash_mla/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", help="a version, such as 2.14.1")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to use")
    parser.add_argument("--keep", action="store_true", help="the environment, for the next time")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args(arguments)

    folder = ROOT / "build" / f"torch-{options.torch}"
    python = folder / "venv" / "bin" / "python"
    # The version is asked for by name: what the machine would rather install does not matter.
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PIP_CONSTRAINT": os.devnull,
    }

    def run(*command: str | Path, cwd: Path = ROOT) -> int:
        return subprocess.run([str(c) for c in command], cwd=cwd, env=environment).returncode

    def pip(*requirements: str) -> None:
        if run(python, "-m", "pip", "install", "-q", "--no-cache-dir", *requirements) != 0:
            sys.exit(f"torch {options.torch} or what the tests need cannot be installed here")

    try:
        if not python.exists() and run(options.python, "-m", "venv", folder / "venv") != 0:
            sys.exit(f"{options.python} makes no virtual environment")
        pip(f"torch=={options.torch}")
        # One call: pip must not exchange torch to please another package.
        pip(f"{options.wheel.resolve()}[test,transformers]", f"torch=={options.torch}")
        # An environment that was kept may have another wheel of the same version.
        pip("--force-reinstall", "--no-deps", str(options.wheel.resolve()))
        sources = folder / "sources"
        shutil.rmtree(sources, ignore_errors=True)
        copy_sources(sources)
        if run(python, "-c", IDENTITY, cwd=sources) != 0:
            return 1
        return run(python, "-m", "pytest", *options.pytest, cwd=sources)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
