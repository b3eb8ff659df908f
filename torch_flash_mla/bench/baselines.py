"""What the operators are measured beside: PyTorch's own attention, used as well as it can be, and
any external command.

PyTorch has no quantised latent cache: its contenders read dense rows of the queries' dtype
(bfloat16 where ours read a packed format), already gathered from the pages, which favours PyTorch.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable

import torch
from torch.nn import functional

from torch_flash_mla.bench.cases import Decode, Prefill, query_dtype

# What the formats are called in other benchmarks; the best of them counts.
LABELS = {
    "bf16": ["bf16 direct"],
    "fp16": ["f16->f32"],
    "q8_kv": ["q8kv direct", "q8kv int8"],
    "q8_0": ["q8_0->bf16"],
    "q6_0": ["q6_0->int8"],
}


def sdpa_decode(case: Decode) -> Callable[[], object]:
    """Heads as queries of one head, values as wide as keys and cut afterwards: torch's flash path.

    (With ``enable_gqa`` and narrower values torch takes a path about 80 times slower.) No mask:
    each query token sees all keys.
    """
    cache, dims = case.cache, case.cache.dims
    dtype = query_dtype(cache.format_name)
    keys = cache.dense(dtype)[:, None]
    batch = keys.shape[0]
    q = torch.randn(batch, 1, case.queries * case.heads, keys.shape[-1]).to(dtype)
    scale = dims.scale

    def call() -> object:
        out = functional.scaled_dot_product_attention(q, keys, keys, scale=scale)
        return out[..., : dims.latent]

    return call


def sdpa_prefill(case: Prefill, pad: bool) -> Callable[[], object]:
    """Keys and values of every head from the latent, as kv_b_proj makes them, then attention.

    Args:
        pad: values are padded to the width of keys, which torch's flash path asks for, and cut
            afterwards; else called as transformers does it.
    """
    dims, heads, n = case.cache.dims, case.heads, case.tokens
    dtype = query_dtype(case.cache.format_name)
    rows = case.cache.dense(dtype)
    length = rows.shape[1]
    weight = case.weight().flatten(0, 1)
    q = torch.randn(case.batch, heads, n, dims.nope + dims.rope).to(dtype)
    mask = None
    if case.history:
        mask = torch.ones(n, length, dtype=torch.bool).tril(case.history)[None, None]

    def call() -> object:
        latent, rope = rows.split([dims.latent, dims.rope], dim=-1)
        both = functional.linear(latent, weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        nope, v = both.split([dims.nope, dims.value], dim=-1)
        k = torch.cat([nope, rope[:, None].expand(-1, heads, -1, -1)], dim=-1)
        if pad:
            v = functional.pad(v, (0, k.shape[-1] - v.shape[-1]))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=dims.scale
        )
        return out[..., : dims.value]

    return call


def rate_of_command(command: str, format_name: str, **values: object) -> float:
    """Largest "N GF/s" that an external command prints for a case, 0 when it prints none.

    ``{label}`` in the command is the format's name in other benchmarks (tried one after another),
    ``{format}`` our own; ``values`` fill ``{heads}``, ``{n_kv}``, ``{queries}``, ``{isa}``.
    """
    best = 0.0
    labels = LABELS.get(format_name, []) if "{label}" in command else [""]
    for label in labels:
        line = command.format(label=label, format=format_name, **values)
        done = subprocess.run(shlex.split(line), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"--against: {line!r} failed:\n{done.stderr[-2000:]}")
        best = max([best, *(float(x) for x in re.findall(r"([\d.]+) GF/s", done.stdout))])
    return best
