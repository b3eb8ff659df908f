"""Times one attention layer of DeepSeek in decoding: stock transformers against patched.

One step of one sequence, bfloat16, projections, cache update and attention included: DeepSeek-V2-
Lite (hidden size 2048, 16 heads) or V3 (7168, 128 heads), latent 512 + 64. A step runs copies of
the layer one after the other, as in a model, so that weights come from memory, and counts as one
layer's share. The variants take turns, so that a busy machine slows all of them, and the table
shows the median of each, and of its parts: the layer's own linear layers (stock: kv_b_proj over the
whole history too), the operator, the update of the cache, and the rest.

    python benchmarks/layer.py --history 1024 4096
    python benchmarks/layer.py --model v3 --threads 1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.integrations.transformers import MLACache, patch
from torch_flash_mla.integrations.transformers.attention import patch_state
from torch_flash_mla.integrations.transformers.cache import cache_layer_of
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

DTYPE = torch.bfloat16
LEAST_BYTES = 512 << 20  # of all copies of a layer: no cache holds them
PARTS = ("linear layers", "operator", "cache")

MLA = {
    "num_hidden_layers": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "attn_implementation": "sdpa",
}


def v2_lite_config() -> DeepseekV2Config:
    """The dims of deepseek-ai/DeepSeek-V2-Lite that one attention layer depends on."""
    return DeepseekV2Config(
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        **MLA,
    )


def v3_config() -> DeepseekV3Config:
    """The dims of deepseek-ai/DeepSeek-V3."""
    return DeepseekV3Config(
        hidden_size=7168,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        **MLA,
    )


@dataclass(frozen=True)
class Model:
    """An attention layer of transformers."""

    title: str
    config: Callable[[], PretrainedConfig]
    attention: type[nn.Module]
    rotary: type[nn.Module]


MODELS = {
    "v2-lite": Model(
        "DeepSeek-V2-Lite", v2_lite_config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding
    ),
    "v3": Model("DeepSeek-V3", v3_config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
}


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as this part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - begin
            return result

        return run

    @contextmanager
    def on(self, layers: list[nn.Module], cache: Cache) -> Iterator[None]:
        """Within, the parts of these layers and their cache are timed."""
        places: list[tuple[Any, str, str]] = [
            (cache, "update", "cache"),
            (ops, "mla_attention_kv_b", "operator"),
        ]
        for layer in layers:
            # A patched layer reads the weight of kv_b_proj where that is a plain linear layer.
            stock = patch_state(layer) is None
            places += [
                (module, "forward", "linear layers")
                for name, module in layer._modules.items()
                if isinstance(module, nn.Linear) and (stock or name != "kv_b_proj")
            ]
        before = [getattr(owner, name) for owner, name, _ in places]
        for (owner, name, part), function in zip(places, before, strict=True):
            setattr(owner, name, self.timed(part, function))
        try:
            yield
        finally:
            for (owner, name, _), function in zip(places, before, strict=True):
                if owner is ops:
                    setattr(owner, name, function)
                else:
                    delattr(owner, name)  # the method of the class is back


class Stack:
    """Attention layers that follow one another, as in a model, after ``history`` tokens."""

    def __init__(self, model: Model, layers: list[nn.Module], cache: Cache, history: int) -> None:
        config = model.config()
        self._layers, self._cache = layers, cache
        for index in range(len(layers)):
            key, _ = cache.update(
                torch.randn(1, 1, history, config.kv_lora_rank, dtype=DTYPE),
                torch.randn(1, 1, history, config.qk_rope_head_dim, dtype=DTYPE),
                index,
            )
            pages = cache_layer_of(key)
            if pages is not None:
                pages.take()  # no attention looks at this step
        self._hidden = torch.randn(1, 1, config.hidden_size, dtype=DTYPE)
        self._arguments = {
            "attention_mask": None,
            "position_embeddings": model.rotary(config)(self._hidden, torch.tensor([[history]])),
            CACHE_ARGUMENT: cache,
        }

    def step(self) -> dict[str, float]:
        """Seconds of a layer in one decoding step, and of its parts."""
        clock = Clock()
        with clock.on(self._layers, self._cache):
            begin = time.perf_counter()
            for layer in self._layers:
                layer(self._hidden, **self._arguments)
            seconds = time.perf_counter() - begin
        self._cache.crop(-1)  # the next step sees the same history
        rest = seconds - sum(clock.seconds.values())
        parts = {"step": seconds, **clock.seconds, "rest": rest}
        return {part: value / len(self._layers) for part, value in parts.items()}


def sharing(layer: nn.Module) -> nn.Module:
    """A layer with the same parameters, patched."""
    other = copy.copy(layer)
    other._modules = dict(layer._modules)
    patch(other)
    return other


def measure(model: Model, history: int, steps: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a layer's step and of its parts, per variant."""
    torch.manual_seed(0)
    config = model.config()
    first = model.attention(config, layer_idx=0).to(DTYPE).eval()
    config.num_hidden_layers = 1 + LEAST_BYTES // sum(p.nbytes for p in first.parameters())
    layers = [first]
    for index in range(1, config.num_hidden_layers):
        layers.append(copy.deepcopy(first))
        layers[-1].layer_idx = index
    patched = [sharing(layer) for layer in layers]
    variants = {
        "stock": Stack(model, layers, DynamicCache(config=config), history),
        "patched, same cache": Stack(model, patched, DynamicCache(config=config), history),
        "patched, bf16 pages": Stack(model, patched, MLACache(config), history),
        "patched, q8_kv pages": Stack(model, patched, MLACache(config, "q8_kv"), history),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for round_ in range(steps + 2):
        for name, stack in variants.items():
            seconds = stack.step()
            if round_ >= 2:  # after warming up
                times[name].append(seconds)
    return {
        name: {part: 1e3 * statistics.median(t[part] for t in found) for part in found[0]}
        for name, found in times.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="v2-lite")
    parser.add_argument("--history", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    model = MODELS[args.model]

    table = Table(
        title=f"{model.title} attention layer, one decoding step, bf16, {args.threads} threads, "
        f"{torch_flash_mla.cpu_isa()}, ms (medians)"
    )
    for column in ("history", "", "step", "against stock", *PARTS, "rest"):
        table.add_column(column, justify="left" if column == "" else "right")
    with torch.inference_mode():
        for history in args.history:
            medians = measure(model, history, args.steps)
            for name, ms in medians.items():
                first = name == "stock"
                table.add_row(
                    f"{history}" if first else "",
                    name,
                    f"{ms['step']:.2f}",
                    "" if first else f"{medians['stock']['step'] / ms['step']:.1f}x",
                    *("" if ms[part] == 0 else f"{ms[part]:.3f}" for part in (*PARTS, "rest")),
                    end_section=name == list(medians)[-1],
                )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
