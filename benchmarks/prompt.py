"""Times a prompt through two layers of DeepSeek-V2-Lite: stock transformers against patched.

Hidden size 2048, 16 heads, latent 512 + 64, dense MLPs, bfloat16, random weights large enough for
attention to look at single tokens. Of each variant the table shows the attention modules with their
projections, attention proper (the modules without their q, kv_a and o projections and norms; with
kv_b), the whole forward pass, and the most memory that a pass took beyond what was there before.

The variants take turns, so that a busy machine slows all of them, and the table shows medians. The
second is the best that stock can do: values padded to the width of keys take PyTorch's flash path.

Below it: what it takes to write the cache of the patched model to disk, and to have it back.

    python benchmarks/prompt.py --tokens 4096
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV2Config,
    DeepseekV2Model,
    DynamicCache,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

import torch_flash_mla
from torch_flash_mla.integrations.transformers import MLACache, patch

DTYPE = torch.bfloat16
LAYERS = 2


def v2_lite_config() -> DeepseekV2Config:
    """The dims of deepseek-ai/DeepSeek-V2-Lite, with two layers and without experts."""
    return DeepseekV2Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=163840,
        initializer_range=0.06,
        attn_implementation="sdpa",
    )


def padded_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA over values [B, H, S, V] padded to the width of keys."""
    width = value.shape[-1]
    value = nn.functional.pad(value, (0, key.shape[-1] - width))
    out, _ = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return out[..., :width], None


AttentionInterface.register("padded_sdpa", padded_sdpa)
AttentionMaskInterface.register("padded_sdpa", sdpa_mask)


class Stopwatch:
    """Seconds that modules have spent in ``forward``."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.seconds = 0.0
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, *args: Any) -> None:
        self.seconds -= time.perf_counter()

    def _stop(self, *args: Any) -> None:
        self.seconds += time.perf_counter()


def peak_memory(reset: bool = False) -> float:
    """MiB of resident memory at the highest point since the last ``reset`` (Linux)."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory would count as there before
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@dataclass
class Variant:
    """One way to run the model, and what its passes took."""

    name: str
    model: nn.Module
    cache: type[Cache]
    attention: list[float] = field(default_factory=list)  # seconds
    proper: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB

    def __post_init__(self) -> None:
        modules = [m for m in self.model.modules() if isinstance(m, DeepseekV2Attention)]
        around = [c for m in modules for name, c in m.named_children() if name != "kv_b_proj"]
        self._modules, self._around = Stopwatch(modules), Stopwatch(around)

    def run(self, ids: Tensor) -> tuple[Tensor, Cache]:
        """One pass over the prompt [1, S]: the hidden state [1, 2048] of its last token, and the
        cache."""
        before = peak_memory(reset=True)
        self._modules.seconds = self._around.seconds = 0.0
        begin = time.perf_counter()
        cache = self.cache(config=self.model.config)
        out = self.model(ids, past_key_values=cache)
        self.whole.append(time.perf_counter() - begin)
        self.attention.append(self._modules.seconds)
        self.proper.append(self._modules.seconds - self._around.seconds)
        self.memory.append(peak_memory() - before)
        return out.last_hidden_state[:, -1].float(), cache


def variants() -> list[Variant]:
    """Three models with the same weights."""
    torch.manual_seed(0)
    stock = DeepseekV2Model(v2_lite_config()).to(DTYPE).eval()
    padded, patched = copy.deepcopy(stock), copy.deepcopy(stock)
    padded.set_attn_implementation("padded_sdpa")
    patch(patched)
    return [
        Variant("stock, sdpa", stock, DynamicCache),
        Variant("stock, sdpa, padded values", padded, DynamicCache),
        Variant("patched", patched, MLACache),
    ]


def on_disk(cache: MLACache, model: nn.Module) -> str:
    """What writing and loading a cache take, in words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.mla"
        times = [time.perf_counter()]
        cache.save(path, model)
        times.append(time.perf_counter())
        MLACache.load(path, model)
        times.append(time.perf_counter())
        MLACache.load(path, model, mmap=True)
        times.append(time.perf_counter())
        mapped = MLACache.load(path, model, mmap=True, verify=False)
        times.append(time.perf_counter())
        mapped.fork(2)  # needs a block more: the pools grow, and move to memory
        mapped.pages.paged.reserve(2, 1)
        times.append(time.perf_counter())
        size = path.stat().st_size
    written, read, verified, mapped_only, grown = (
        1e3 * (end - begin) for begin, end in itertools.pairwise(times)
    )
    return (
        f"Cache file of {size / 1e6:.1f} MB: written in {written:.1f} ms, read and verified in "
        f"{read:.1f} ms, mapped and verified in {verified:.1f} ms, only mapped in "
        f"{mapped_only:.1f} ms, copied to memory when it first grows in {grown:.1f} ms"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    ids = torch.randint(0, 1024, (1, args.tokens), generator=torch.Generator().manual_seed(1))

    runs = variants()
    with torch.inference_mode():
        for run in runs:
            run.run(ids[:, :64])  # warm up
            for values in (run.attention, run.proper, run.whole, run.memory):
                values.clear()
        for _ in range(args.rounds):
            states, caches = zip(*(run.run(ids) for run in runs), strict=True)

    table = Table(
        title=f"A prompt of {args.tokens} tokens, {LAYERS} layers of DeepSeek-V2-Lite, bf16, "
        f"{args.threads} threads, {torch_flash_mla.cpu_isa()}"
    )
    for column in ("", "attention s", "proper s", "whole pass s", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    medians = [
        [statistics.median(values) for values in (run.attention, run.proper, run.whole, run.memory)]
        for run in runs
    ]
    for run, values in zip(runs, medians, strict=True):
        table.add_row(run.name, *(f"{x:.2f}" for x in values[:3]), f"{values[3]:.0f}")
    for run, values in zip(runs[:2], medians[:2], strict=True):
        ratios = [stock / ours for stock, ours in zip(values, medians[2], strict=True)]
        table.add_row(f"{run.name} / patched", *(f"{x:.2f}x" for x in ratios))
    Console(width=100).print(table)
    errors = [float((state - states[0]).norm() / states[0].norm()) for state in states]
    print(
        f"Hidden state of the last token, relative difference to stock: patched {errors[2]:.1e}, "
        f"padded values {errors[1]:.1e}"
    )
    print(on_disk(caches[2], runs[2].model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
