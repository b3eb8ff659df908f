"""Computes a prompt once, keeps it on disk, and writes several continuations that share its memory.

    python examples/shared_prompt.py
    python examples/shared_prompt.py --model PATH_OR_NAME --prompt-file TEXT --cache prompt.mla

The first run fills the cache file, later ones read it. The table shows what each way to get at the
prompt's keys costs, and the memory of all continuations beside that of one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers import MLACache, patch

SMALL = 50_000_000  # parameters; the layers of smaller models spend their time on waking threads
TINY_MODEL = Path(__file__).parent / "tiny_model"


def compute(model: Any, ids: torch.Tensor, kv_cache_dtype: str) -> MLACache:
    """Runs the prompt [1, S] through the model, which fills the cache."""
    cache = MLACache(model.config, kv_cache_dtype)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def timed(function: Any, *args: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - begin


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="checkpoint: a folder or a name")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", *PACKED_FORMATS))
    parser.add_argument("--prompt-file", type=Path, default=TINY_MODEL / "heldout.txt")
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the file's beginning")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="file of the prompt; default: a temporary one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    if model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    patch(model, args.kv_cache_dtype)
    text = args.prompt_file.read_text(encoding="utf-8")[: 16 * args.prompt_tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]

    def text_of(tokens: torch.Tensor) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    with tempfile.TemporaryDirectory() as folder:
        path = args.cache or Path(folder) / "prompt.mla"
        table = Table(title=f"A prompt of {ids.shape[1]} tokens, cache {args.kv_cache_dtype}")
        for column in ("", "ms", "MB"):
            table.add_column(column, justify="right" if column else "left")

        def row(title: str, seconds: float | None, size: float) -> None:
            ms = "" if seconds is None else f"{1e3 * seconds:.1f}"
            table.add_row(title, ms, f"{size / 1e6:.2f}")

        if not path.exists():
            computed, seconds = timed(compute, model, ids, args.kv_cache_dtype)
            row("computed by the model", seconds, computed.nbytes)
            _, seconds = timed(computed.save, path, model)
            row("written to disk", seconds, path.stat().st_size)
        _, seconds = timed(MLACache.load, path, model)
        row("read from disk", seconds, path.stat().st_size)
        cache, seconds = timed(lambda: MLACache.load(path, model, mmap=True, verify=False))
        row("mapped, to be read when used", seconds, path.stat().st_size)
        one = cache.nbytes

        torch.manual_seed(args.seed)
        out, seconds = timed(
            lambda: model.generate(
                ids,
                past_key_values=cache,
                num_return_sequences=args.samples,
                max_new_tokens=args.max_new_tokens,
                do_sample=True,
                temperature=args.temperature,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        )
        row(f"{args.samples} continuations of {args.max_new_tokens}", seconds, cache.nbytes)
        console.print(Text(f"... {text_of(ids[0, -300:])}"))
        for sequence in out[:, ids.shape[1] :]:
            console.print(Panel(Text(text_of(sequence))))
    console.print(table)
    apart = args.samples * int(cache.get_seq_length()) * cache.bytes_per_token
    console.print(
        f"Memory of the {args.samples} continuations: {cache.nbytes / one:.2f} times that of the "
        f"prompt. Apart they would take {apart / one:.2f} times."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
