"""One long context over several processes: each keeps a share of its pages.

    python -m torch.distributed.run --standalone --nproc-per-node=2 examples/context_parallel.py
    ... examples/context_parallel.py --model PATH_OR_NAME --prompt-file TEXT --prompt-tokens 100000

On several machines the same command runs on each, with --nnodes and --rdzv-endpoint of torchrun
instead of --standalone (docs/context_parallel.md). Rank 0 prints the text, the memory of each rank,
and what the ranks send each other.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.integrations.transformers import MLACache, patch

TINY_MODEL = Path(__file__).parent / "tiny_model"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="checkpoint: a folder or a name")
    parser.add_argument("--kv-cache-dtype", default="q8_kv", choices=("auto", *PACKED_FORMATS))
    parser.add_argument("--prompt-file", type=Path, default=TINY_MODEL / "heldout.txt")
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the file's beginning")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    # One machine for all ranks, unless torchrun says otherwise.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    text = args.prompt_file.read_text(encoding="utf-8")[: 16 * args.prompt_tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]

    # The whole difference to one process: which group the cache belongs to.
    patch(model)
    cache = MLACache(model.config, args.kv_cache_dtype, process_group=dist.group.WORLD)

    def step(tokens: torch.Tensor) -> tuple[Any, float, float]:
        """What follows ``tokens``, seconds, and bytes sent per token and layer."""
        sent, start = cache.bytes_sent, time.perf_counter()
        with torch.no_grad():
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        seconds = time.perf_counter() - start
        per_token = (cache.bytes_sent - sent) / tokens.shape[1] / len(cache.layers)
        return logits, seconds, per_token

    logits, prompt_seconds, prompt_bytes = step(ids)
    written, seconds, step_bytes = [], 0.0, 0.0
    for _ in range(args.max_new_tokens):
        written.append(logits[:, -1:].argmax(-1).view(1, 1))
        logits, took, step_bytes = step(written[-1])
        seconds += took

    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, cache.nbytes)
    if rank == 0:
        print(tokenizer.decode(torch.cat(written, 1)[0], skip_special_tokens=True))
        whole = int(cache.get_seq_length()) * cache.bytes_per_token
        print(f"--- {cache.get_seq_length()} tokens take {whole / 1e6:.2f} MB, over {size} ranks:")
        for other, nbytes in enumerate(shares):
            print(f"rank {other}: {nbytes / 1e6:.2f} MB allocated")
        print(
            f"each rank sends every other one {prompt_bytes:.0f} bytes per token and layer in the "
            f"prompt, {step_bytes:.0f} per new token and layer"
        )
        print(
            f"prompt {prompt_seconds:.2f} s, then {1e3 * seconds / args.max_new_tokens:.1f} ms per "
            "token"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
