"""Loading the example programs, and running things in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# cmake and ninja usually come from pip: they lie beside this Python, which need not be on PATH.
TOOLS = os.pathsep.join(
    [os.environ["PATH"], sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
)


def load_program(path: str) -> ModuleType:
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the program look their module up by name
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, fails: bool = False, timeout: float = 600, **environment: str) -> str:
    """Output of a command that must succeed, or must fail."""
    result = subprocess.run(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": TOOLS, **environment},
        timeout=timeout,
    )
    assert (result.returncode != 0) is fails, f"{result.args}\n{result.stdout[-4000:]}"
    return result.stdout


def run_python(code: str, *arguments: str | Path, fails: bool = False) -> str:
    """Output of a new Python, with the packages and test helpers of this one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return run(sys.executable, "-W", "ignore", "-c", code, *arguments, fails=fails, PYTHONPATH=path)
