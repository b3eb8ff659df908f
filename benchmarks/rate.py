"""Rate of the attention operator: GFLOP/s and GB/s per cache format, heads and length, one thread.

    python benchmarks/rate.py [--formats bf16,q8_kv] [--heads 16,128] [--lengths 4096] [--threads 1]
    python benchmarks/rate.py --against 'path/to/run.sh avx512 "{label}" {heads} {n_kv}'

One decode step of DeepSeek dimensions (latent 512, rope 64) per call; flop = 2 * heads * n_kv * (2 * 512 + 64).
``--against`` runs another command in the same session, interleaved with our own measurements: ``{label}`` is the
format's name in the measurement prototype, ``{heads}`` and ``{n_kv}`` the case; the largest number before "GF/s" in its
output counts. The best of ``--rounds`` rounds is reported for both sides, since other work on a machine only slows down.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import torch_flash_mla
from torch_flash_mla import ops

LATENT, ROPE = 512, 64
FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The prototype's labels of what computes the same product; the best of them counts.
LABELS = {
    "bf16": ["bf16 direct"],
    "fp16": ["f16->f32"],
    "fp32": [],
    "q8_kv": ["q8kv direct", "q8kv int8"],
    "q8_0": ["q8_0->bf16"],
    "q6_0": ["q6_0->int8"],
}


def make_case(name: str, heads: int, n_kv: int, batch: int = 1, block_size: int = 64):
    """Arguments of one decode step: ``batch`` sequences of ``n_kv`` tokens in shuffled pages."""
    torch.manual_seed(0)
    blocks = (n_kv + block_size - 1) // block_size
    table = torch.randperm(batch * blocks).reshape(batch, blocks).to(torch.int32)
    dtype = FLOAT_DTYPES.get(name)
    row = LATENT + ROPE if dtype else ops.row_bytes(name, LATENT, ROPE)
    cache = torch.empty(batch * blocks, block_size, row, dtype=dtype or torch.uint8)
    latent, rope = torch.randn(batch * n_kv, LATENT), torch.randn(batch * n_kv, ROPE)
    token = torch.arange(n_kv)
    slots = (table[:, token // block_size].long() * block_size + token % block_size).flatten()
    kv_cache_dtype = "auto" if dtype else name
    ops.concat_and_cache_mla(latent, rope, cache, slots, kv_cache_dtype)
    q = torch.randn(batch, 1, heads, LATENT + ROPE).to(torch.float16 if name == "fp16" else torch.bfloat16)
    if name == "fp32":
        q = q.float()
    lengths = torch.full((batch,), n_kv, dtype=torch.int32)
    return (q, cache, table, lengths, LATENT, (128 + 64) ** -0.5), {"kv_cache_dtype": kv_cache_dtype}


def seconds_per_call(name: str, heads: int, n_kv: int, budget: float) -> float:
    """Median time of a call over about ``budget`` seconds."""
    args, kwargs = make_case(name, heads, n_kv)
    ops.mla_attention(*args, **kwargs)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        ops.mla_attention(*args, **kwargs)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def rate_of_command(command: str, name: str, heads: int, n_kv: int) -> float:
    """Largest "N GF/s" that the command prints for this case, 0 when it knows no such case."""
    best = 0.0
    for label in LABELS[name]:
        line = command.format(label=label, heads=heads, n_kv=n_kv)
        text = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout
        best = max([best, *(float(x) for x in re.findall(r"([\d.]+) GF/s", text))])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp16,fp32,q8_kv,q8_0,q6_0")
    parser.add_argument("--heads", default="16,128")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--isa", default="auto", help="force an instruction set")
    parser.add_argument("--against", default="", help="a command to run beside, see above")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cases = [
        (name, int(heads), int(n_kv))
        for n_kv in args.lengths.split(",")
        for name in args.formats.split(",")
        for heads in args.heads.split(",")
    ]
    ours: dict[tuple[str, int, int], float] = {}
    theirs: dict[tuple[str, int, int], float] = {}
    console = Console()
    with torch_flash_mla.force_isa(args.isa):
        isa = torch_flash_mla.cpu_isa()
        rounds = [(r, case) for r in range(args.rounds) for case in cases]
        for _, case in track(rounds, description="measuring", console=Console(file=sys.stderr)):
            name, heads, n_kv = case
            flop = 2 * heads * n_kv * (2 * LATENT + ROPE)
            rate = flop / seconds_per_call(name, heads, n_kv, args.seconds) / 1e9
            ours[case] = max(ours.get(case, 0.0), rate)
            if args.against:
                theirs[case] = max(theirs.get(case, 0.0), rate_of_command(args.against, *case))

    table = Table(title=f"mla_attention, one decode step, {isa}, {args.threads} thread(s)")
    for column in ("format", "heads", "n_kv", "ms", "GFLOP/s", "GB/s"):
        table.add_column(column, justify="right" if column != "format" else "left")
    if args.against:
        table.add_column("against GFLOP/s", justify="right")
        table.add_column("share", justify="right")
    for case in cases:
        name, heads, n_kv = case
        seconds = 2 * heads * n_kv * (2 * LATENT + ROPE) / ours[case] / 1e9
        dtype = FLOAT_DTYPES.get(name)
        row = (LATENT + ROPE) * dtype.itemsize if dtype else ops.row_bytes(name, LATENT, ROPE)
        cells = [name, str(heads), str(n_kv), f"{seconds * 1e3:.3f}", f"{ours[case]:.0f}"]
        cells.append(f"{n_kv * row / seconds / 1e9:.1f}")
        if args.against:
            other = theirs[case]
            cells += [f"{other:.0f}", f"{ours[case] / other:.2f}"] if other else ["-", "-"]
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
