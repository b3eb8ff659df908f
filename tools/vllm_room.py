"""Whether this machine has the room to test with vLLM; exit status 0 for yes, 3 for no.

    python tools/vllm_room.py

``make test-vllm`` makes an environment of about 3.5 GB and runs engines that hold up to 4 GiB. CI
asks here first, and tells what it decides.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
DISK = 6 * GIB  # the environment, and what pip unpacks on the way
MEMORY = 6 * GIB
CORES = 2


def available_memory() -> int:
    """Bytes that a process could still take: what Linux reports, within the limit of a cgroup."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def main() -> int:
    """Prints one line with the decision."""
    made = (ROOT / ".venv-vllm" / "stamps" / "vllm").exists()
    wanted = [
        ("disk", 0 if made else DISK, shutil.disk_usage(ROOT).free),
        ("memory", MEMORY, available_memory()),
    ]
    short = [
        f"{available / GIB:.1f} GiB of {name}, needs {needed / GIB:.0f}"
        for name, needed, available in wanted
        if available < needed
    ]
    cores = len(os.sched_getaffinity(0))
    if cores < CORES:
        short.append(f"{cores} core, needs {CORES}")
    if short:
        print(f"no room for the tests with vLLM: {'; '.join(short)}")
        return 3
    summary = ", ".join(f"{available / GIB:.1f} GiB of {name}" for name, _, available in wanted)
    print(f"room for the tests with vLLM: {summary}, {cores} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
