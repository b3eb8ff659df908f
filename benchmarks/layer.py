"""Times one attention layer of DeepSeek-V2-Lite in decoding: stock transformers against patched.

One step of one sequence: hidden size 2048, 16 heads, latent 512 + 64, bfloat16, projections, cache
update and attention included. The variants take turns, so that a busy machine slows all of them,
and the table shows the median of each.

    python benchmarks/layer.py --history 1024 4096
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV2Config, DynamicCache
from transformers.cache_utils import Cache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)

import torch_flash_mla
from torch_flash_mla.integrations.transformers import MLACache, patch
from torch_flash_mla.integrations.transformers.cache import cache_layer_of

DTYPE = torch.bfloat16


def v2_lite_config() -> DeepseekV2Config:
    """The dims of deepseek-ai/DeepSeek-V2-Lite that one attention layer depends on."""
    return DeepseekV2Config(
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=163840,
        attn_implementation="sdpa",
    )


def stepper(layer: DeepseekV2Attention, cache: Cache, history: int) -> Callable[[], float]:
    """A function that runs one decoding step after ``history`` tokens and returns its seconds."""
    config = v2_lite_config()
    key, _ = cache.update(
        torch.randn(1, 1, history, config.kv_lora_rank, dtype=DTYPE),
        torch.randn(1, 1, history, config.qk_rope_head_dim, dtype=DTYPE),
        0,
    )
    pages = cache_layer_of(key)
    if pages is not None:
        pages.take()  # no attention looks at this step
    hidden = torch.randn(1, 1, config.hidden_size, dtype=DTYPE)
    rotary = DeepseekV2RotaryEmbedding(config)(hidden, torch.tensor([[history]]))

    def step() -> float:
        begin = time.perf_counter()
        layer(hidden, None, cache, rotary)
        seconds = time.perf_counter() - begin
        cache.crop(-1)  # the next step sees the same history
        return seconds

    return step


def measure(history: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step, per variant."""
    torch.manual_seed(0)
    config = v2_lite_config()
    stock = DeepseekV2Attention(config, layer_idx=0).to(DTYPE).eval()
    patched = DeepseekV2Attention(config, layer_idx=0).to(DTYPE).eval()
    patch(patched)
    variants = {
        "stock": stepper(stock, DynamicCache(config=config), history),
        "patched, same cache": stepper(patched, DynamicCache(config=config), history),
        "patched, bf16 pages": stepper(patched, MLACache(config), history),
        "patched, q8_kv pages": stepper(patched, MLACache(config, "q8_kv"), history),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(steps + 2):
        for name, step in variants.items():
            seconds = step()
            if round_ >= 2:  # after warming up
                times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--history", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)

    table = Table(
        title=f"DeepSeek-V2-Lite attention layer, one decoding step, bf16, {args.threads} threads, "
        f"{torch_flash_mla.cpu_isa()}"
    )
    for column in ("tokens of history", "", "ms (median)", "against stock"):
        table.add_column(column, justify="left" if column == "" else "right")
    with torch.inference_mode():
        for history in args.history:
            medians = measure(history, args.steps)
            for name, ms in medians.items():
                first = name == "stock"
                table.add_row(
                    f"{history}" if first else "",
                    name,
                    f"{ms:.2f}",
                    "" if first else f"{medians['stock'] / ms:.1f}x",
                    end_section=name == list(medians)[-1],
                )
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
