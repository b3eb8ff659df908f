"""Shows how exact attention is, per cache format and arithmetic: the table of docs/kernels.md.

50 sequences of 250 to 299 keys, 16 heads at 512 + 64, beside a computation in float64. Packed
formats: the error of the result beside that of storing the rows (1.00: nothing is added), pooled
and of the worst sequence; float formats: relative RMS error over the same cache. Log-sum-exp: the
largest absolute difference. Storing: the relative RMS error that packed rows cost by themselves,
with normal noise. Kinds of input: normal noise; peaky (queries times 3); sink (one key
times 4).

    python benchmarks/errors.py --isa avx512_bf16,avx2,scalar --formats q8_kv,q8_0
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import torch_flash_mla
from torch_flash_mla import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mla_cases import FORMATS, Case, Problem, make_problem

LENGTHS = list(range(250, 300))
KINDS: dict[str, dict[str, float]] = {
    "normal": {},
    "peaky": {"q_factor": 3.0},
    "sink": {"key_factor": 4.0},
}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # of the queries; else bfloat16


def squares(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().sum(dim=(1, 2, 3))


def measure(problem: Problem, isa: str) -> tuple[float, float, float]:
    """(pooled error, error of the worst sequence, largest error of log-sum-exp)."""
    with torch_flash_mla.force_isa(isa):
        out, lse = ops.mla_attention(**problem.arguments)
    stored, stored_lse = problem.expected()
    if problem.case.cache_format in ("bf16", "fp16", "fp32"):
        error, beside = squares(out - stored), squares(stored)
    else:  # the rounding of the output is not counted
        original, _ = problem.expected_of_original()
        error = squares(out - original) - squares(original.to(out.dtype) - original)
        beside = squares(stored - original)
    pooled = (error.sum() / beside.sum()).clamp(min=0).sqrt()
    worst = (error / beside).clamp(min=0).sqrt().max()
    return float(pooled), float(worst), float((lse.double() - stored_lse).abs().max())


def storing(problem: Problem) -> float:
    original = problem.expected_of_original()[0]
    return float((squares(problem.expected()[0] - original).sum() / squares(original).sum()).sqrt())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", default=torch_flash_mla.cpu_isa())
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args(argv)
    table = Table(title="error by kind of input: pooled, worst sequence, log-sum-exp")
    for heading in ("format", "storing", "level", "arithmetic", *KINDS):
        table.add_column(heading)
    for cache_format in arguments.formats.split(","):
        case = Case("scalar", cache_format, q_dtype=DTYPES.get(cache_format, torch.bfloat16))
        problems = [make_problem(case, LENGTHS, **factors) for factors in KINDS.values()]
        cost = f"{storing(problems[0]):.1%}" if cache_format.startswith("q") else ""
        for isa in arguments.isa.split(","):
            arithmetic = dataclasses.replace(case, isa=isa).arithmetic
            errors = ("{:.3g}, {:.3g}, {:.1e}".format(*measure(p, isa)) for p in problems)
            table.add_row(cache_format, cost, isa, arithmetic, *errors)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
