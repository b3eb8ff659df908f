"""What a run says: the machine, tables, JSON, plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torch_flash_mla
from torch_flash_mla import ops

Row = dict[str, Any]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


# key -> (heading, how a value is printed), in the order of columns.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "sequences": ("sequences", str),
    "format": ("format", str),
    "isa": ("level", str),
    "form": ("form", str),
    "arithmetic": ("arithmetic", str),
    "instruction": ("instruction", str),
    "batch": ("batch", str),
    "n_kv": ("keys", str),
    "tokens": ("tokens", str),
    "history": ("history", str),
    "heads": ("heads", str),
    "queries": ("queries", str),
    "topk": ("topk", str),
    "tensors": ("tensors", str),
    "threads": ("threads", str),
    "seconds": ("time", duration),
    "attention": ("attention alone", duration),
    "weight": ("weight, read", duration),
    "seconds_per_token": ("per token", duration),
    "gflops": ("GFLOP/s", "{:.0f}".format),
    "gbs": ("GB/s", "{:.1f}".format),
    "floor_share": ("% of floor", "{:.0%}".format),
    "other": ("other build", duration),
    "times_other": ("speed-up", "{:.2f}x".format),
    "share": ("% of roof", "{:.0%}".format),
    "roof_gflops": ("roof", "{:.0f}".format),
    "torch_gflops": ("torch", "{:.0f}".format),
    "times_torch": ("speed-up", "{:.1f}x".format),
    "torch_padded_gflops": ("torch, padded", "{:.0f}".format),
    "times_torch_padded": ("speed-up", "{:.1f}x".format),
    "against_gflops": ("against", "{:.0f}".format),
    "times_against": ("share of it", "{:.2f}".format),
    "products": ("two bmm", duration),
    "times_best": ("of best form", "{:.2f}".format),
    "times_one": ("speed-up", "{:.2f}x".format),
    "deterministic": ("deterministic", duration),
    "above": ("above empty op", duration),
}
TEXT = ("sequences", "format", "isa", "form", "arithmetic", "instruction")
# Columns that say nothing when every row holds this.
DULL = {"batch": 1, "queries": 1, "topk": 0, "tensors": 1, "history": 0}


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "cores": len(available(0)) if available else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch_flash_mla.cpu_isa(),
        "torch": torch.__version__,
        "kernel_compiler": ops.kernel_compiler(),
        "torch_flash_mla": torch_flash_mla.__version__,
    }


def machine_line(where: dict[str, Any]) -> str:
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} thread(s), best level "
        f"{where['isa']}, torch {where['torch']}, kernels built by {where['kernel_compiler']}"
    )


def print_table(console: Console, title: str, rows: list[Row]) -> None:
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    keys = [key for key in keys if any(row.get(key) != DULL.get(key, ...) for row in rows)]
    table = Table(title=title, title_justify="left")
    for key in keys:
        style = "bold" if key in ("share", "floor_share") else None
        justify = "left" if key in TEXT else "right"
        table.add_column(COLUMNS[key][0], justify=justify, style=style)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(COLUMNS[key][1](row[key]) if key in row else "-" for key in keys))
    console.print(table)


def write_json(
    path: str, command: str, where: dict[str, Any], options: dict[str, Any], rows: list[Row]
) -> None:
    """One object: machine, command, options, rows (the keys of the suites, SI units)."""
    report = {"machine": where, "command": command, "options": options, "rows": rows}
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
