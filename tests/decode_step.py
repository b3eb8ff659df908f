"""One layer's work in a decode step, as a function of tensors: what compilers get to see.

L = 64, R = 32, V = 24.
"""

import torch
from torch import Tensor

from torch_flash_mla import ops


def append_and_attend(
    kv_c: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    q: Tensor,
    w_kv_b: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_cache_dtype: str,
) -> tuple[Tensor, Tensor]:
    """Writes the new tokens, attends, and looks at the cache."""
    ops.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype)
    out, _ = ops.mla_attention_kv_b(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        w_kv_b,
        24,
        0.2,
        causal=True,
        kv_cache_dtype=kv_cache_dtype,
    )
    rows = ops.gather_cache(
        kv_cache, block_table, cache_seqlens, 64, 96, torch.float32, kv_cache_dtype
    )
    return out.flatten(2).sin(), rows
