"""Times the attention of DeepSeek-V4's layers: stock transformers against patched.

One sequence, bfloat16, the dims of V4-Flash (hidden size 4096, 64 heads of 512, a window of 128),
and each kind of layer: sliding, compressed sparse (512 entries of one per 4 tokens are selected)
and heavily compressed (one entry per 128). A layer runs after a history of so many tokens, whose
keys and entries are noise, on the next token (decode) or the next ``--chunk`` tokens (prompt).
Stock and patched layers take turns on the same cache, and the tables show medians. The first has
the time of the attention function alone, which turns queries, keys and a mask into outputs; the
second has the parts of a decoding step.

    python benchmarks/shared_keys.py --history 4096 32768
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DeepseekV4Config, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

import torch_flash_mla
from torch_flash_mla.integrations.transformers import attention, patch
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

DTYPE = torch.bfloat16
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
PARTS = ("attention", "linear layers", "compressor", "indexer")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE)


class Clock:
    """Seconds of the parts of a call. A part within another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as this part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - begin
            self.seconds[part] += seconds - self._inner.pop()
            self._inner[-1] += seconds
            return result

        return run

    @contextmanager
    def on(self, layer: nn.Module) -> Iterator[None]:
        """Within, the parts of the layer are timed."""
        functions = [(v4, "eager_attention_forward"), (attention, "shared_attention")]
        before = [getattr(owner, name) for owner, name in functions]
        modules = [(x, "linear layers") for x in layer.children() if isinstance(x, nn.Linear)]
        if layer.compressor is not None:
            modules.append((layer.compressor, "compressor"))
            if hasattr(layer.compressor, "indexer"):
                modules.append((layer.compressor.indexer, "indexer"))
        for (owner, name), function in zip(functions, before, strict=True):
            setattr(owner, name, self.timed("attention", function))
        for module, part in modules:
            module.forward = self.timed(part, module.forward)
        try:
            yield
        finally:
            for (owner, name), function in zip(functions, before, strict=True):
                setattr(owner, name, function)
            for module, _ in modules:
                del module.forward  # that of the class is back


class Layer:
    """An attention layer and its cache after ``history`` tokens."""

    def __init__(self, config: DeepseekV4Config, index: int, history: int) -> None:
        self.config, self.history = config, history
        self.stock = v4.DeepseekV4Attention(config, index).to(DTYPE).eval()
        self.stock.sinks.data = torch.randn(config.num_attention_heads)
        for parameter in self.stock.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.patched = copy.copy(self.stock)
        self.patched._modules = dict(self.stock._modules)
        patch(self.patched)
        self.rotary = v4.DeepseekV4RotaryEmbedding(config)
        self.cache = DynamicCache(config=config)
        for cached in self.cache.layers:  # the first one says how long the text is
            cached.update(*(2 * [noise(1, 1, config.sliding_window, config.head_dim)]))
            cached.cumulative_length = history
        cached = self.cache.layers[index]
        widths = {"compressor": config.head_dim, "indexer": config.index_head_dim}
        for name in getattr(cached, "compressed_kv", ()):
            entries = history // cached.compress_rate
            cached.compressed_kv[name] = noise(1, entries, widths[name])
            cached.entry_count[name] = entries
            if hasattr(cached, "overlap_kv"):
                for overlap in (cached.overlap_kv, cached.overlap_gate):
                    overlap[name] = noise(1, cached.compress_rate, widths[name])
        self._cached = cached

    def time(self, layer: nn.Module, tokens: int) -> tuple[Tensor, dict[str, float]]:
        """The output of the next ``tokens`` tokens, and the seconds of the parts."""
        torch.manual_seed(1)
        hidden = noise(1, tokens, self.config.hidden_size)
        positions = self.history + torch.arange(tokens)[None]
        arguments = {
            "position_embeddings": {
                kind: self.rotary(hidden, position_ids=positions, layer_type=kind)
                for kind in ("main", "compress")
            },
            "position_ids": positions,
            "attention_mask": create_sliding_window_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                position_ids=positions,
                **{CACHE_ARGUMENT: self.cache},
            ),
            CACHE_ARGUMENT: self.cache,
        }
        # Layers replace what they change, so the next call finds the same history.
        before = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(self._cached).items()
        }
        clock = Clock()
        with clock.on(layer):
            begin = time.perf_counter()
            out, _ = layer(hidden, **arguments)
            seconds = time.perf_counter() - begin
        vars(self._cached).update(before)
        parts = clock.seconds
        return out, {"step": seconds, **parts, "rest": seconds - sum(parts.values())}


def measure(layer: Layer, tokens: int, steps: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of the parts, stock and patched, which must agree."""
    times: dict[str, list[dict[str, float]]] = {"stock": [], "patched": []}
    outs: dict[str, Tensor] = {}
    for round_ in range(steps + 1):
        for name, found in times.items():
            outs[name], seconds = layer.time(getattr(layer, name), tokens)
            if round_ > 0:  # after warming up
                found.append(seconds)
    error = (outs["patched"] - outs["stock"]).float().norm() / outs["stock"].float().norm()
    if not error < 0.03:
        raise RuntimeError(f"patched and stock results differ by {error:.1e}")
    return {
        name: {part: 1e3 * statistics.median(t[part] for t in found) for part in found[0]}
        for name, found in times.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--history", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prompt at a time")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="a small layer, to try the program")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    small = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 64,
        "q_lora_rank": 32,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
    }
    config = DeepseekV4Config(
        num_hidden_layers=3,
        layer_types=list(KINDS),
        attn_implementation="eager",
        **(small if args.small else {}),
    )

    about = f"bf16, {args.threads} threads, {torch_flash_mla.cpu_isa()}, ms (medians)"
    table = Table(title=f"Attention function of a DeepSeek-V4 layer, {about}")
    profile = Table(title=f"A decoding step of that layer, patched, {about}")
    for column in ("history", "layer", "call", "stock", "patched", "against stock"):
        left = column in ("layer", "call")
        table.add_column(column, justify="left" if left else "right")
    for column in ("history", "layer", "stock step", "step", *PARTS, "rest"):
        profile.add_column(column, justify="left" if column == "layer" else "right")
    with torch.inference_mode():
        for history in args.history:
            for index, kind in enumerate(KINDS):
                torch.manual_seed(0)
                layer = Layer(config, index, history)
                name = kind.removesuffix("_attention").replace("_", " ")
                for call, tokens in (("decode", 1), (f"prompt, {args.chunk} tokens", args.chunk)):
                    ms = measure(layer, tokens, args.steps)
                    stock, patched = ms["stock"]["attention"], ms["patched"]["attention"]
                    ratio = f"{stock / patched:.1f}x"
                    cells = (f"{history}", name, call, f"{stock:.2f}", f"{patched:.2f}", ratio)
                    table.add_row(*cells, end_section=tokens > 1)
                    if tokens == 1:
                        parts = (ms["patched"][part] for part in (*PARTS, "rest"))
                        steps = f"{ms['stock']['step']:.2f}", f"{ms['patched']['step']:.2f}"
                        profile.add_row(f"{history}", name, *steps, *(f"{x:.2f}" for x in parts))
    console = Console(width=110)
    console.print(table)
    console.print(profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
