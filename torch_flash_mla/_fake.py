"""Shapes and dtypes of the operators' results without data, for torch.compile and torch.export.

Shapes may be symbolic: nothing here branches on a size. ``csrc/ops/library.cpp`` names this module
as the one that completes the operators, so the backward pass is registered from here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_flash_mla import _autograd  # noqa: F401


def _check_device(name: str, first: Tensor | None, **others: Tensor | None) -> None:
    """A meta tensor among real ones would bring torch here, and back without a result."""
    if first is None:
        raise RuntimeError(f"{name}: undefined tensor")
    for other_name, other in others.items():
        if other is not None and other.device != first.device:
            raise RuntimeError(
                f"{other_name}: on device {other.device}, expected {first.device} as {name}"
            )


@torch.library.register_fake("flashmla::mla_attention")
def _mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    q_pe: Tensor | None = None,
    k_pe_cache: Tensor | None = None,
    window: int = 0,
    kv_cache_dtype: str = "auto",
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_device(
        "q",
        q,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        attn_mask=attn_mask,
        cache_leftpad=cache_leftpad,
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        q_pe=q_pe,
        k_pe_cache=k_pe_cache,
        cu_seqlens_q=cu_seqlens_q,
    )
    return _attention_results(q, head_dim_v)


@torch.library.register_fake("flashmla::mla_attention_kv_b")
def _mla_attention_kv_b(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    w_kv_b: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    q_pe: Tensor | None = None,
    k_pe_cache: Tensor | None = None,
    window: int = 0,
    kv_cache_dtype: str = "auto",
    cu_seqlens_q: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_device(
        "q",
        q,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        w_kv_b=w_kv_b,
        attn_mask=attn_mask,
        cache_leftpad=cache_leftpad,
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        q_pe=q_pe,
        k_pe_cache=k_pe_cache,
        cu_seqlens_q=cu_seqlens_q,
    )
    return _attention_results(q, head_dim_v)


def _attention_results(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    *batch, q_len, heads, _ = q.shape  # ragged: no batch
    out = q.new_empty(*batch, q_len, heads, head_dim_v)
    return out, q.new_empty(*batch, heads, q_len, dtype=torch.float32)


@torch.library.register_fake("flashmla::concat_and_cache_mla")
def _concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_pe_cache: Tensor | None = None,
) -> None:
    _check_device(
        "kv_cache",
        kv_cache,
        kv_c=kv_c,
        k_pe=k_pe,
        slot_mapping=slot_mapping,
        k_pe_cache=k_pe_cache,
    )


@torch.library.register_fake("flashmla::gather_cache")
def _gather_cache(
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    head_dim_v: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_cache_dtype: str = "auto",
    max_seqlen: int | None = None,
) -> Tensor:
    _check_device("kv_cache", kv_cache, block_table=block_table, cache_seqlens=cache_seqlens)
    if max_seqlen is None:
        blocks = 1 if block_table is None else block_table.shape[1]
        max_seqlen = blocks * kv_cache.shape[1]
    return kv_cache.new_empty(cache_seqlens.shape[0], max_seqlen, head_dim, dtype=dtype)


@torch.library.register_fake("flashmla::copy_blocks")
def _copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    _check_device("kv_cache", kv_cache, block_mapping=block_mapping)


@torch.library.register_fake("flashmla::merge_attn_states")
def _merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, attn_sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_device("out_a", out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b, attn_sink=attn_sink)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("flashmla::_mla_attention_backward")
def _mla_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    w_kv_b: Tensor | None,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    attn_mask: Tensor | None,
    cache_leftpad: Tensor | None,
    indices: Tensor | None,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    q_pe: Tensor | None,
    k_pe_cache: Tensor | None,
    window: int,
    kv_cache_dtype: str,
    cu_seqlens_q: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (q, kv_cache, w_kv_b, attn_sink, q_pe, k_pe_cache)
    return tuple(
        q.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs, needs, strict=True)
    )
