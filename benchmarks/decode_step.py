"""Times a decoding step of the tiny model: stock and patched, eager and compiled.

One sequence, one new token per step, greedy, caches of fixed size (StaticCache; MLACache with
``max_cache_len``). Every variant decodes the same prompt for ``--steps`` tokens in each round; the
variants take turns, and the table shows the median step of the best round. It also counts the
graphs that were compiled (one per variant: no step recompiles) and compares the tokens with those
of the stock model in eager mode.

    python benchmarks/decode_step.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, StaticCache
from transformers.utils import logging

import torch_flash_mla
from torch_flash_mla.integrations.transformers import MLACache, patch
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

TINY_MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_model"
PROMPT = "def read(self, size=-1):\n    "


@dataclass
class Variant:
    """One way to run a step, and what it did."""

    name: str
    model: PreTrainedModel
    new_cache: Callable[[], Cache]
    graphs: CompileCounterWithBackend | None = None
    step: Callable[..., Any] = field(init=False)
    tokens: list[int] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)  # ms per step, one per round

    def __post_init__(self) -> None:
        self.step = self.model
        if self.graphs is not None:
            self.step = torch.compile(self.model.forward, backend=self.graphs, fullgraph=True)

    def run(self, ids: torch.Tensor, steps: int) -> None:
        """Decodes once, from an empty cache."""
        past = {CACHE_ARGUMENT: self.new_cache()}
        token = self.model(ids, **past).logits[:, -1:].argmax(-1)
        tokens, times = [token], []
        for _ in range(steps):
            begin = time.perf_counter()
            token = self.step(token, **past).logits[:, -1:].argmax(-1)
            times.append(1e3 * (time.perf_counter() - begin))
            tokens.append(token)
        self.tokens = torch.cat(tokens, dim=1)[0].tolist()
        self.medians.append(statistics.median(times))


def variants(width: int, dtype: torch.dtype) -> list[Variant]:
    stock, patched = (
        AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype).eval() for _ in range(2)
    )
    patch(patched)
    config = stock.config
    result = []
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        for name, model, new_cache in (
            ("stock, StaticCache", stock, lambda: StaticCache(config, width)),
            ("patched, StaticCache", patched, lambda: StaticCache(config, width)),
            ("patched, MLACache", patched, lambda: MLACache(config, max_cache_len=width)),
        ):
            graphs = CompileCounterWithBackend("inductor") if compiled else None
            result.append(Variant(f"{name}, {mode}", model, new_cache, graphs))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)

    ids = AutoTokenizer.from_pretrained(TINY_MODEL)(PROMPT, return_tensors="pt")["input_ids"]
    width = -(-(ids.shape[1] + args.steps + 1) // 64) * 64
    runs = variants(width, getattr(torch, args.dtype))
    table = Table(
        title=f"Tiny model, {args.steps} steps in a cache of {width} tokens, {args.dtype}, "
        f"{args.threads} threads, {torch_flash_mla.cpu_isa()}"
    )
    for column in ("", "ms per token", "tokens/s", "graphs", "same tokens"):
        table.add_column(column, justify="left" if column == "" else "right")
    with torch.no_grad():
        for variant in runs:  # compiles, and warms up
            variant.run(ids, args.steps)
            variant.medians.clear()
        for _ in range(args.rounds):
            for variant in runs:
                variant.run(ids, args.steps)
    for variant in runs:
        ms = min(variant.medians)
        pairs = zip(variant.tokens, runs[0].tokens, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(variant.tokens))
        table.add_row(
            variant.name,
            f"{ms:.2f}",
            f"{1e3 / ms:.0f}",
            "" if variant.graphs is None else str(variant.graphs.frame_count),
            f"first {same} of {len(variant.tokens)}",
        )
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
