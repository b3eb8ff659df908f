"""Headers and libraries of a torch series, to compile and link the operators against.

    python tools/fetch_torch.py 2.14 2.15          # prints the folder of each

A folder has torch's include/ and what of its lib/ a program without Python and without a GPU loads.
It is kept under $XDG_CACHE_HOME/torch_flash_mla (~/.cache/torch_flash_mla), half a gigabyte each.
The wheel that it is cut from is pip's newest of the series, may be twice as large, and is not kept.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_flash_mla"

# libtorch.so stands for all of torch and would ask for the libraries of CUDA; CMake's
# find_package(Torch) looks for it.
FROM_TORCH = re.compile(
    r"torch/(include/.*|share/cmake/.*|lib/(libtorch|libtorch_cpu|libc10|libgomp[\w.-]*)\.so[\d.]*)"
    r"|torch\.libs/libgomp.*"
)
# What libtorch_cpu.so of a CUDA build loads beside its own, to profile: a few megabytes.
OF_CUDA = {"libcudart": "nvidia-cuda-runtime", "libcupti": "nvidia-cuda-cupti"}


class FetchError(Exception):
    """A series could not be had; the message says why."""


def download(requirement: str, folder: Path) -> Path:
    """The wheel of ``requirement``, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    # A machine may hold its installations to some version. Nothing is installed here.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise FetchError(f"pip download {requirement!r}: {result.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, wanted: re.Pattern[str], folder: Path) -> list[Path]:
    """Writes the members of ``wheel`` that match to ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted.fullmatch(name) and name[-1] != "/"]
        archive.extractall(folder, names)
    return [folder / name for name in names]


def needed(library: Path) -> list[str]:
    """Names of the libraries that ``library`` loads."""
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def series_of(root: Path) -> str:
    """The series of the torch whose folder ``root`` is, read from its headers."""
    for header in ("headeronly/version.h", "csrc/api/include/torch/version.h"):
        path = root / "include" / "torch" / header
        found = dict(
            re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", path.read_text())
            if path.exists()
            else []
        )
        if len(found) == 2:
            return f"{found['MAJOR']}.{found['MINOR']}"
    raise FetchError(f"{root}: no version in its headers")


def fetch(series: str) -> Path:
    """The folder with include/ and lib/ of a series, downloaded if it is not in the cache.

    Raises:
        FetchError: pip offers no wheel of the series here, or the download failed.
    """
    kept = CACHE / series
    if kept.exists():
        return kept / "torch"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Beside its destination: a rename makes it appear whole or not at all.
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetching-") as temporary:
        folder = Path(temporary) / series
        (Path(temporary) / "torch").mkdir()
        wheel = download(f"torch=={series}.*", Path(temporary) / "torch")
        extract(wheel, FROM_TORCH, folder)
        wheel.unlink()
        for library in needed(folder / "torch" / "lib" / "libtorch_cpu.so"):
            stem, _, major = library.partition(".so.")
            if stem not in OF_CUDA:
                continue
            name = OF_CUDA[stem] + (f"-cu{major}" if int(major) < 13 else "")
            (Path(temporary) / stem).mkdir()
            wheel = download(f"{name}=={major}.*", Path(temporary) / stem)
            for path in extract(wheel, re.compile(rf".*/{re.escape(library)}"), folder / "cuda"):
                shutil.move(path, folder / "torch" / "lib" / path.name)
        shutil.rmtree(folder / "cuda", ignore_errors=True)
        found = series_of(folder / "torch")
        if found != series:
            raise FetchError(f"the headers of torch=={series}.* are those of {found}")
        if not kept.exists():  # another process may have been quicker
            folder.rename(kept)
    return kept / "torch"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("series", nargs="+")
    missing = 0
    for series in parser.parse_args(arguments).series:
        try:
            print(series, fetch(series), flush=True)
        except FetchError as error:
            missing += 1
            print(series, f"missing: {error}", file=sys.stderr, flush=True)
    return min(missing, 1)


if __name__ == "__main__":
    sys.exit(main())
