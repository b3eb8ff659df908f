"""Shows where the time of attention goes: packing queries, staging keys, products, softmax.

The kernels' own code with a clock in it (stages.cpp), one token of one sequence at 512 + 64, one
thread. Each level's program is compiled on first use, without torch. Of each step the table has the
share of the time, and of the two products also their rate as a share of the instruction roof.

Programs and formats take turns, and the least disturbed run of each counts.

    python benchmarks/stages.py --isa avx512_bf16,avx2 --formats bfloat16,q8_0 --heads 16,64
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import torch_flash_mla
from torch_flash_mla import formats

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "stages"
STAGES = ("pack", "stage", "score", "soften", "accumulate", "finish")
FORMATS = ("bfloat16", "float16", "float32", *formats.PACKED_FORMATS)


def build(isas: list[str]) -> None:
    """Compiles the programs with the compiler that the package's kernels were built by."""
    built_by = ROOT / "build" / "kernels" / "compiler.txt"
    compiler = built_by.read_text() if built_by.exists() else os.environ.get("CXX", "c++")
    tools = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    environment = {**os.environ, "CXX": compiler, "PATH": tools}
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DFLASHMLA_STAGES=ON"]
    targets = [f"stages_{isa}" for isa in isas]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", *targets]):
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            sys.exit(f"{result.stdout}\nbuilding benchmarks/stages.cpp failed")


def measure(isa: str, format_name: str, heads: int, keys: int, seconds: float) -> dict[str, Any]:
    """The least disturbed of the runs that fit into so many seconds."""
    program = BUILD / f"stages_{isa}"
    command = [str(program), str(seconds), str(keys), f"{format_name}:{heads}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"isa": isa, **json.loads(output)}


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="share of the time; of a product: share of the roof", title_justify="left")
    for heading in ("level", "format", "arithmetic"):
        table.add_column(heading)
    for heading in ("heads", "keys", "GFLOP/s", "% of roof", *STAGES):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = {stage: f"{row['stages'][stage] / row['seconds']:.1%}" for stage in STAGES}
        for stage in ("score", "accumulate"):
            shares[stage] += f" ({row[f'{stage}_rate'] / row['roof']:.0%})"
        table.add_row(
            row["isa"],
            row["format"],
            row["arithmetic"],
            str(row["heads"]),
            str(row["keys"]),
            f"{row['rate']:.0f}",
            f"{row['rate'] / row['roof']:.1%}",
            *(shares[stage] for stage in STAGES),
        )
    console.print(table)


def names(allowed: list[str] | tuple[str, ...], text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in allowed:
            sys.exit(f"{name!r}: expected some of {', '.join(allowed)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", default=torch_flash_mla.cpu_isa())
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--heads", default="16,64,128")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, in seconds and GFLOP/s")
    arguments = parser.parse_args(argv)

    # onednn has products of its own; the rest of it is avx512_bf16.
    available = [isa for isa in torch_flash_mla.available_isas() if isa != "onednn"]
    isas = names(available, arguments.isa.replace("onednn", "avx512_bf16"))
    chosen = names(FORMATS, arguments.formats)
    heads = [int(n) for n in arguments.heads.split(",")]
    console = Console(width=None if sys.stdout.isatty() else 160)
    build(isas)

    cases = list(itertools.product(isas, chosen, heads))
    best: dict[Any, dict[str, Any]] = {}
    for case in track(cases * arguments.rounds, "measuring", console=Console(stderr=True)):
        row = measure(*case, arguments.keys, arguments.seconds)
        if case not in best or row["seconds"] < best[case]["seconds"]:
            best[case] = row
    rows = [best[case] for case in cases]
    print_table(console, rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
