"""What the cache formats cost in perplexity, measured with the tiny model.

    python examples/tiny_model/quality.py --check

Windows of 1024 held-out tokens go through the patched model in chunks, so every key but those of
the present chunk has been written to the cache and read back from it.  The table compares the
perplexity of each format with that of bfloat16 rows over exactly the same tokens; "+/-" is the
standard error of that change over the windows.  Two rows guard the method: the unpatched model
must agree with the patched one, and a cache whose rotary keys are zeroed must do visibly worse.
With ``--check`` the exit status is 1 if a limit is broken.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import data
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import torch_flash_mla
from torch_flash_mla.cache import PagedLatentCache
from torch_flash_mla.integrations.transformers import MLACache

HERE = Path(__file__).parent
CONTEXT = 1024
# Largest change of perplexity relative to bfloat16 rows.
LIMITS = {"transformers": 0.0005, "q8_kv": 0.0005, "q8_0": 0.0005, "q6_0": 0.003, "q4_kv": 0.003}
ROPE_ZEROED_AT_LEAST = 0.20


@dataclass
class Row:
    """One measured configuration."""

    name: str
    bytes_per_token: int  # of one layer
    window_nats: np.ndarray  # summed loss of each window, float64
    seconds: float


@contextmanager
def zeroed_rope() -> Iterator[None]:
    """While active, every rotary key is written to the cache as zeros."""
    append = PagedLatentCache.append

    def append_zeroed(self: PagedLatentCache, layer: int, kv_c: Tensor, k_pe: Tensor) -> None:
        append(self, layer, kv_c, torch.zeros_like(k_pe))

    PagedLatentCache.append = append_zeroed
    try:
        yield
    finally:
        PagedLatentCache.append = append


def held_out_windows(count: int | None) -> Tensor:
    """Consecutive windows of the held-out text, or ``count`` of them evenly spread over it."""
    tokens = data.held_out_tokens()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    if count is not None and count < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    return torch.from_numpy(windows)


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel,
    windows: Tensor,
    new_cache: Callable[[], Cache],
    chunk: int,
    batch: int,
) -> tuple[np.ndarray, Cache]:
    """Summed next-token loss of each window, and the last cache used."""
    totals = []
    cache = new_cache()
    for ids in windows.split(batch):
        cache = new_cache()
        total = torch.zeros(len(ids), dtype=torch.float64)
        for start in range(0, CONTEXT, chunk):
            inputs = ids[:, start : start + chunk]
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
            targets = ids[:, start + 1 : start + chunk + 1]
            logits = logits[:, : targets.shape[1]].double()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += losses.view(targets.shape).sum(1)
        totals.append(total)
    return torch.cat(totals).numpy(), cache


def measure(options: argparse.Namespace, windows: Tensor) -> list[Row]:
    """Every configuration over the same windows, the bfloat16 rows first."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    config = model.config
    runs: list[tuple[str, str]] = [("bf16" if dtype == torch.bfloat16 else "float32", "auto")]
    runs += [(name, name) for name in ("q8_kv", "q8_0", "q6_0", "q4_kv")]
    runs += [("rope zeroed", "auto"), ("transformers", "")]
    rows = []
    for name, kv_cache_dtype in runs:
        if kv_cache_dtype:
            torch_flash_mla.patch(model, kv_cache_dtype=kv_cache_dtype)
        else:
            torch_flash_mla.unpatch(model)

        def new_cache(kv_cache_dtype: str = kv_cache_dtype) -> Cache:
            if kv_cache_dtype:
                return MLACache(config, kv_cache_dtype=kv_cache_dtype)
            return DynamicCache(config=config)

        begin = time.perf_counter()
        with zeroed_rope() if name == "rope zeroed" else nullcontext():
            losses, cache = window_losses(model, windows, new_cache, options.chunk, options.batch)
        seconds = time.perf_counter() - begin
        if isinstance(cache, MLACache):
            size = cache.bytes_per_token // config.num_hidden_layers
        else:
            size = (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
        rows.append(Row(name, size, losses, seconds))
    return rows


def change(row: Row, reference: Row) -> tuple[float, float]:
    """Relative change of perplexity to ``reference`` and its standard error over the windows."""
    difference = (row.window_nats - reference.window_nats) / (CONTEXT - 1)
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    relative = math.expm1(difference.mean())
    return relative, error * (1 + relative)


def violations(rows: list[Row]) -> list[str]:
    """The limits that ``rows`` break, in words."""
    broken = []
    for row in rows[1:]:
        relative, _ = change(row, rows[0])
        if row.name == "rope zeroed":
            if not relative > ROPE_ZEROED_AT_LEAST:
                broken.append(
                    f"{row.name}: {relative:+.1%}, expected over {ROPE_ZEROED_AT_LEAST:+.0%}: "
                    "the measurement does not see the cache"
                )
        elif not abs(relative) <= LIMITS[row.name]:
            broken.append(f"{row.name}: {relative:+.3%}, expected within {LIMITS[row.name]:.2%}")
    return broken


def show(rows: list[Row], windows: Tensor, options: argparse.Namespace) -> None:
    """Print the table."""
    predicted = len(windows) * (CONTEXT - 1)
    text_bytes = tokenizer.byte_length(windows[:, 1:].flatten().tolist())
    table = Table(
        title=f"{predicted} held-out tokens, context {CONTEXT}, chunks of {options.chunk}, "
        f"{options.dtype} model"
    )
    for heading in ("cache", "bytes/token", "perplexity", "nats/byte", "change", "+/-", "seconds"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        relative, error = change(row, rows[0])
        total = row.window_nats.sum()
        table.add_row(
            row.name,
            str(row.bytes_per_token),
            f"{math.exp(total / predicted):.5f}",
            f"{total / text_bytes:.5f}",
            "" if row is rows[0] else f"{relative:+.4%}",
            "" if row is rows[0] else f"{error:.4%}",
            f"{row.seconds:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("bytes/token: one cached token in one layer.")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE), help="checkpoint folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--chunk", type=int, default=128, help="tokens per forward pass")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward pass")
    parser.add_argument("--windows", type=int, help="measure this many windows only")
    parser.add_argument("--quick", action="store_true", help="same as --windows 32")
    parser.add_argument("--check", action="store_true", help="fail if a limit is broken")
    options = parser.parse_args()
    if not 1 <= options.chunk < CONTEXT:
        parser.error(f"--chunk must be in 1 .. {CONTEXT - 1}: one chunk would never read the cache")
    return options


def main() -> int:
    """Measure, print and, if asked to, check."""
    options = parse_arguments()
    windows = held_out_windows(32 if options.quick else options.windows)
    rows = measure(options, windows)
    show(rows, windows, options)
    broken = violations(rows)
    for line in broken:
        print(f"LIMIT BROKEN  {line}")
    if options.check and not broken:
        print("all limits hold")
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
