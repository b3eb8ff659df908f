"""Compiling oneDNN's products ahead of time, for the level ``onednn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import ops

# Query rows: 64 + 32 + 16, every block that a product takes; and few, which read in place some
# caches that many rows stage. Keys: a whole tile of 128 and half of one, in place and staged.
_ROWS = (112, 32, 16)
_KEYS = (192, 200)


def warmup(
    kv_cache: Tensor,
    head_dim_v: int,
    head_dim: int,
    *,
    k_pe_cache: Tensor | None = None,
    kv_cache_dtype: str = "auto",
    q_dtype: torch.dtype = torch.bfloat16,
    w_kv_b: Tensor | None = None,
    v_head_dim: int = 0,
) -> None:
    """Makes later calls over such a cache free of compilation, on the level ``onednn``.

    oneDNN compiles each shape of a product when a thread first meets it, in some 0.2 ms. Shapes
    depend on the cache, not on lengths, batch or heads. This meets them all by small calls over
    zeros, on every thread that serves the calling one: call it from the thread that will call the
    operators, after ``torch.set_num_threads``. On other levels it does nothing.

    Args:
        kv_cache: a cache as :func:`mla_attention` takes it. Its shape, strides and dtype matter,
            its contents are not read.
        head_dim_v: L, latent values of a row.
        head_dim: L + R, values of a row with its rope part.
        k_pe_cache: the rope columns, where they are a tensor of their own.
        kv_cache_dtype: "auto" or the name of a format.
        q_dtype: dtype of the queries to come.
        w_kv_b: [H, P + V, L], to cover the expanded form of :func:`mla_attention_kv_b` too.
        v_head_dim: V, with ``w_kv_b``.

    Raises:
        ValueError: as the operators do, where the arguments contradict each other.
    """
    if ops.cpu_isa() != "onednn":
        return
    threads = torch.get_num_threads()
    cache = _zeros_like(kv_cache)
    common: dict[str, Any] = {
        "k_pe_cache": None if k_pe_cache is None else _zeros_like(k_pe_cache),
        "kv_cache_dtype": kv_cache_dtype,
    }
    ops.set_steps_apart(True)
    try:
        # As many sequences (or heads) of equal cost as threads: each thread computes one.
        table = torch.arange(len(cache), dtype=torch.int32, device="cpu").repeat(threads, 1)
        for keys in _KEYS:
            lengths = torch.full((threads,), keys, dtype=torch.int32, device="cpu")
            for rows in _ROWS:
                q = torch.zeros(threads, 1, rows, head_dim, dtype=q_dtype, device="cpu")
                ops.mla_attention(q, cache, table, lengths, head_dim_v, 1.0, **common)
            if w_kv_b is not None:
                w = w_kv_b[:1].repeat(threads, 1, 1)
                width = w.shape[1] - v_head_dim + head_dim - head_dim_v
                q = torch.zeros(1, _ROWS[0], threads, width, dtype=q_dtype, device="cpu")
                shape = (table[:1], lengths[:1], w, v_head_dim, 1.0)
                ops.mla_attention_kv_b(q, cache, *shape, form="expanded", **common)
    finally:
        ops.set_steps_apart(False)


def _zeros_like(cache: Tensor) -> Tensor:
    """A cache of as many blocks as the longest sequence needs, its rows as far apart."""
    if cache.dim() not in (3, 4):
        raise ValueError(
            f"kv_cache: got shape {list(cache.shape)}, expected [num_blocks, block_size, row] or "
            "[num_blocks, block_size, 1, row]"
        )
    blocks = -(-max(_KEYS) // max(cache.shape[1], 1))
    shape = (blocks, *cache.shape[1:])
    return torch.empty_strided(shape, cache.stride(), dtype=cache.dtype).zero_()
