"""Generates text with a patched transformers model, and on demand with the stock one beside it.

    python examples/generate.py --compare
    python examples/generate.py --model PATH_OR_NAME --kv-cache-dtype q8_kv --prompt "def main("

The default model is the tiny one of this repository, trained on Python sources. Any checkpoint of
an MLA family that fits into memory works.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.cache_utils import Cache
from transformers.utils import logging

import torch_flash_mla
from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers import MLACache, patch, unpatch

SMALL = 50_000_000  # parameters; the layers of smaller models spend their time on waking threads
TINY_MODEL = Path(__file__).parent / "tiny_model"
PROMPT = """import argparse
import sys


def main(argv=None):
    parser = argparse.ArgumentParser("""


@dataclass(frozen=True)
class Run:
    """One generated text and what it cost."""

    title: str
    text: str
    prompt_tokens: int
    prompt_seconds: float  # up to the first new token
    new_tokens: int
    seconds: float  # from the first new token to the last
    cache_bytes: float  # per token, all layers

    @property
    def tokens_per_second(self) -> float:
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else float("nan")


class TimedStreamer(TextStreamer):
    """Collects the text and the time of each token; prints it as it comes, unless silent."""

    def __init__(self, tokenizer: Any, silent: bool) -> None:
        super().__init__(tokenizer, clean_up_tokenization_spaces=False)
        self.silent = silent
        self.pieces: list[str] = []
        self.times: list[float] = []  # [0]: when the prompt came, before the model saw it

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        if not self.silent:
            print(text, end="\n" if stream_end else "", flush=True)


def cache_bytes_per_token(cache: Cache) -> float:
    """Bytes that one token takes in all layers of a cache."""
    if isinstance(cache, MLACache):
        return cache.bytes_per_token
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum((t.nbytes / t.shape[2]) for x in layers for t in (x.keys, x.values))


def generate(model: Any, tokenizer: Any, args: argparse.Namespace, title: str, silent: bool) -> Run:
    """Generates once, with the same seed for every run."""
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    streamer = TimedStreamer(tokenizer, silent)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    torch.manual_seed(args.seed)
    out = model.generate(
        **inputs,
        **(sampling or {"do_sample": False}),
        max_new_tokens=args.max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return Run(
        title=title,
        text="".join(streamer.pieces),
        prompt_tokens=inputs["input_ids"].shape[1],
        prompt_seconds=streamer.times[1] - streamer.times[0],
        new_tokens=len(streamer.times) - 1,
        seconds=streamer.times[-1] - streamer.times[1],
        cache_bytes=cache_bytes_per_token(out.past_key_values),
    )


def common_length(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def summary(runs: list[Run]) -> Table:
    """One row per run."""
    table = Table()
    for column in ("", "prompt", "first token s", "new", "tokens/s", "cache B/token"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for run in runs:
        table.add_row(
            run.title,
            f"{run.prompt_tokens}",
            f"{run.prompt_seconds:.3f}",
            f"{run.new_tokens}",
            f"{run.tokens_per_second:.1f}",
            f"{run.cache_bytes:.0f}",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="checkpoint: a folder or a name")
    parser.add_argument("--kv-cache-dtype", default="q8_kv", choices=("auto", *PACKED_FORMATS))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.6, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: 1 for small models, else all cores")
    parser.add_argument("--compare", action="store_true", help="the stock model beside it")
    args = parser.parse_args(arguments)
    folder = Path(args.model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        parser.error(f"--model: {folder} holds no weights (*.safetensors)")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()

    if args.threads or model.num_parameters() < SMALL:
        torch.set_num_threads(args.threads or 1)

    console.print(f"{args.model}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")
    console.print(
        f"torch_flash_mla {torch_flash_mla.__version__} on {torch_flash_mla.cpu_isa()}, "
        f"{torch.get_num_threads()} threads, cache {args.kv_cache_dtype}"
    )
    report = patch(model, args.kv_cache_dtype)
    print(report, end="\n\n")
    runs = [generate(model, tokenizer, args, f"patched, {args.kv_cache_dtype}", silent=False)]
    if args.compare:
        unpatch(model)
        runs.append(generate(model, tokenizer, args, "stock", silent=True))
        beside = Table.grid(expand=True)
        for _ in runs:
            beside.add_column(ratio=1)
        beside.add_row(*(Panel(Text(run.text), title=run.title) for run in runs))
        console.print(beside)
        same = common_length(runs[0].text, runs[1].text)
        console.print(f"The first {same} of {len(runs[0].text)} characters are the same.")
    console.print(summary(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
