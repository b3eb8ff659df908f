"""A virtual environment beside the present one, for packages that would disturb it.

    python tools/side_environment.py build/matrix torchao bitsandbytes

It holds these packages and whichever of their dependencies the present environment lacks or has in
a version they do not take; everything else, torch above all, is that of the present environment.
Making it again does nothing while the list is the same.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path


def side_environment(folder: Path, requirements: list[str]) -> Path:
    """The Python of the environment in ``folder``, which is made unless it holds these packages.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted = "\n".join([sys.version, *requirements])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    inner = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (inner / "present_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # pip sees the packages of both places, and installs into the inner one.
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    subprocess.run([*pip, *requirements, f"torch=={version('torch')}"], check=True)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    side_environment(Path(sys.argv[1]).resolve(), sys.argv[2:])
