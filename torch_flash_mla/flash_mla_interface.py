"""The Python interface of FlashMLA (github.com/deepseek-ai/FlashMLA), computed on the CPU.

Code written for FlashMLA runs with another import::

    from torch_flash_mla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

Names, order of the arguments, defaults and results are FlashMLA's. Where they differ from those of
:mod:`torch_flash_mla.ops`:

- ``softmax_scale`` defaults to one over the root of the width of ``q``. For absorbed queries of a
  DeepSeek model that is 576 ** -0.5, which is **wrong**: its scale is (128 + 64) ** -0.5, times the
  factor of YaRN. Pass it.
- The lse of a query without keys is plus infinity; ``ops`` returns minus infinity, which is what
  ``ops.merge_attn_states`` takes.
- ``indices`` count rows of the pool (block * block_size + offset), not positions of the sequence.

Arguments that steer a GPU (``tile_scheduler_metadata``, ``num_splits``) are accepted and not used:
work is divided anew in each call. Sizes are free here: any number of heads, dims and tokens per
block, float16 and float32 as well as bfloat16, 3-dimensional caches too. Not provided: caches in
FlashMLA's float8 formats (``NotImplementedError``), and the ``flash_attn_varlen_*`` functions,
which are ordinary attention (``torch.nn.functional.scaled_dot_product_attention``).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import ops

# float32 values of gathered keys and logits held at once: 64 MiB.
_MAX_GATHERED = 1 << 24


class FlashMLASchedMeta:
    """What FlashMLA keeps its division of the work in. Empty here."""

    def __repr__(self) -> str:
        return "FlashMLASchedMeta()"


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Something to pass to :func:`flash_mla_with_kvcache`, for code that does. Reads no argument.

    Returns:
        (FlashMLASchedMeta, None).
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    enable_batch_invariant: bool = False,
    *,
    kv_cache_dtype: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries against a paged latent cache: dense, or sparse by ``indices``.

    Args:
        q: [B, Sq, H, D] in the order [latent | rope], bfloat16, float16 or float32.
        k_cache: [num_blocks, block_size, 1, D].
        block_table: int32 [B, max_blocks]. Sparse: not read, may be None.
        cache_seqlens: int32 [B], keys of each sequence, those of the new tokens included. Sparse:
            not read, may be None.
        head_dim_v: L, the leading columns of a row that are its value.
        tile_scheduler_metadata, num_splits: not used.
        softmax_scale: factor of the logits. None: D ** -0.5, wrong for DeepSeek (see above).
        causal: each query sees the keys up to its own, bottom-right aligned. Dense only.
        is_fp8_kvcache: refused, see ``kv_cache_dtype``.
        indices: int32 [B, Sq, topk], the rows that each query sees, as block * block_size + offset,
            in any order; those outside the pool (-1 by convention) are skipped, and a row that is
            listed several times counts as often.
        attn_sink: float32 [H], a logit that joins the softmax sum and has no value.
        extra_k_cache: a second pool, of the same format. With ``indices`` only.
        extra_indices_in_kvcache: int32 [B, Sq, extra topk], the rows of it that each query sees.
        topk_length, extra_topk_length: int32 [B], how many leading entries of the lists count.
        enable_batch_invariant: refused unless ``torch.use_deterministic_algorithms(True)`` is set,
            which is what makes results independent of the batch here.
        kv_cache_dtype: an addition to FlashMLA's arguments: the format of uint8 caches ("q8_kv",
            ...), see docs/cache_formats.md.

    Returns:
        out: [B, Sq, H, L], dtype of ``q``; 0 for a query without keys.
        lse: float32 [B, H, Sq], natural log of the softmax sum without the sink; **plus** infinity
            for a query without keys.

    Raises:
        NotImplementedError: ``is_fp8_kvcache``.
        ValueError: arguments that exclude each other; and all that
            :func:`torch_flash_mla.ops.mla_attention` raises.
    """
    _require_tensors(q=q, k_cache=k_cache)
    if q.dim() != 4:
        raise ValueError(f"q: shape {list(q.shape)}, expected [B, Sq, H, D]")
    if is_fp8_kvcache:
        raise NotImplementedError(
            "is_fp8_kvcache: float8 caches are not implemented, expected False; for 8-bit caches "
            "of this package pass kv_cache_dtype='q8_kv'"
        )
    if enable_batch_invariant and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "enable_batch_invariant: got True; results do not depend on the batch after "
            "torch.use_deterministic_algorithms(True), which is one setting for the process"
        )
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if indices is None:
        for name, value in (
            ("topk_length", topk_length),
            ("extra_k_cache", extra_k_cache),
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("extra_topk_length", extra_topk_length),
        ):
            if value is not None:
                raise ValueError(f"{name}: given without indices, expected None")
        if block_table is None or cache_seqlens is None:
            missing = "block_table" if block_table is None else "cache_seqlens"
            raise ValueError(f"{missing}: got None, which is for sparse attention (indices)")
        out, lse = _attention(
            {"kv_cache": "k_cache"},
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            softmax_scale,
            causal,
            attn_sink=attn_sink,
            kv_cache_dtype=kv_cache_dtype,
        )
        return out, _plus_infinity(lse)

    if causal:
        raise ValueError("causal: got True with indices, which name the visible keys themselves")
    if extra_k_cache is not None:
        _require_tensors(extra_k_cache=extra_k_cache)
    if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
        raise ValueError("extra_k_cache, extra_indices_in_kvcache: got one without the other")
    if extra_k_cache is None and extra_topk_length is not None:
        raise ValueError("extra_topk_length: given without extra_k_cache, expected None")

    def attend(
        cache: Tensor,
        rows: Tensor,
        counts: Tensor | None,
        sink: Tensor | None,
        names: dict[str, str],
    ) -> tuple[Tensor, Tensor]:
        """Attention to rows of a pool: the pool as one long sequence, the same for all."""
        if cache.dim() not in (3, 4):
            raise ValueError(
                f"{names['kv_cache']}: shape {list(cache.shape)}, expected [num_blocks, "
                "block_size, 1, D] or [num_blocks, block_size, D]"
            )
        batch, blocks = q.shape[0], cache.shape[0]
        return _attention(
            names,
            q,
            cache,
            torch.arange(blocks, dtype=torch.int32, device="cpu").expand(batch, blocks),
            torch.full((batch,), blocks * cache.shape[1], dtype=torch.int32, device="cpu"),
            head_dim_v,
            softmax_scale,
            indices=rows,
            topk_length=counts,
            attn_sink=sink,
            kv_cache_dtype=kv_cache_dtype,
        )

    names = {"kv_cache": "k_cache"}
    if extra_k_cache is None or extra_indices_in_kvcache is None:
        out, lse = attend(k_cache, indices, topk_length, attn_sink, names)
    else:
        extra_names = {
            "kv_cache": "extra_k_cache",
            "indices": "extra_indices_in_kvcache",
            "topk_length": "extra_topk_length",
        }
        parts = (
            *attend(k_cache, indices, topk_length, None, names),
            *attend(extra_k_cache, extra_indices_in_kvcache, extra_topk_length, None, extra_names),
        )
        out, lse = ops.merge_attn_states(*parts, attn_sink=attn_sink)
    return out, _plus_infinity(lse)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    indexer_topk: int = 0,
    *,
    return_max_logits: bool = True,
) -> tuple[Tensor | None, ...]:
    """Sparse attention of the queries of one prompt: each query has its own list of keys.

    Args:
        q: [Sq, H, D] in the order [latent | rope], bfloat16, float16 or float32.
        kv: [S, 1, D], the rows of the prompt.
        indices: int32 [Sq, 1, topk], the rows that each query sees, in any order; those outside
            0 .. S - 1 are skipped, and a row that is listed several times counts as often.
        sm_scale: factor of the logits.
        d_v: L.
        attn_sink: float32 [H], a logit that joins the softmax sum and has no value.
        topk_length: int32 [Sq], how many leading entries of each list count.
        indexer_topk: above 0: also the lse over the first ``indexer_topk`` entries of each list.
        return_max_logits: an addition to FlashMLA's arguments. The largest logit is a product of
            all queries and keys more, which the attention itself does not give away: False saves
            it and returns None in its place.

    Returns:
        out: [Sq, H, L], dtype of ``q``; 0 for a query without keys.
        max_logits: float32 [Sq, H], the largest logit; minus infinity for a query without keys.
        lse: float32 [Sq, H], natural log of the softmax sum without the sink; **plus** infinity for
            a query without keys.
        lse_indexer: float32 [Sq, H], only if ``indexer_topk`` is above 0.

    Raises:
        ValueError: shapes that do not fit; and all that
            :func:`torch_flash_mla.ops.mla_attention` raises.
    """
    _require_tensors(q=q, kv=kv, indices=indices)
    if q.dim() != 3:
        raise ValueError(f"q: shape {list(q.shape)}, expected [Sq, H, D]")
    if kv.dim() != 3 or kv.shape[1] != 1:
        raise ValueError(f"kv: shape {list(kv.shape)}, expected [S, 1, D]")
    if indices.dim() != 3 or indices.shape[:2] != (q.shape[0], 1):
        raise ValueError(
            f"indices: shape {list(indices.shape)}, expected [Sq, 1, topk] with Sq = {q.shape[0]}"
        )
    if not isinstance(indexer_topk, int):
        raise TypeError(f"indexer_topk: got {type(indexer_topk).__name__}, expected an int")
    if not 0 <= indexer_topk <= indices.shape[2]:
        raise ValueError(
            f"indexer_topk: {indexer_topk}, expected 0 to {indices.shape[2]} (indices.size(2))"
        )
    q_len = q.shape[0]
    cache = kv.squeeze(1) if kv.shape[0] else kv.new_zeros(1, kv.shape[2])  # a block has a row

    def attend(rows: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every query is a sequence of its own, over the same rows."""
        out, lse = _attention(
            {"kv_cache": "kv", "head_dim_v": "d_v", "softmax_scale": "sm_scale"},
            q.unsqueeze(1),
            cache.expand(q_len, *cache.shape),
            None,
            torch.full((q_len,), kv.shape[0], dtype=torch.int32, device="cpu"),
            d_v,
            sm_scale,
            indices=rows,
            topk_length=counts,
            attn_sink=attn_sink,
        )
        return out.squeeze(1), _plus_infinity(lse.squeeze(2))

    out, lse = attend(indices, topk_length)
    max_logits = None
    if return_max_logits:
        max_logits = _max_logits(q, kv.squeeze(1), indices.squeeze(1), sm_scale, topk_length)
    if indexer_topk == 0:
        return out, max_logits, lse
    counts = None if topk_length is None else topk_length.clamp(max=indexer_topk)
    return out, max_logits, lse, attend(indices[:, :, :indexer_topk], counts)[1]


def _attention(names: dict[str, str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """:func:`torch_flash_mla.ops.mla_attention`, whose errors say ``names`` for its arguments."""
    try:
        return ops.mla_attention(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        text = str(error)
        for name, ours in names.items():
            text = re.sub(rf"\b{name}\b", ours, text)
        raise type(error)(text) from None


def _require_tensors(**arguments: object) -> None:
    """Refuses, by name, what torch makes no views of."""
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")
        if t.is_nested or t.layout != torch.strided:
            kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
            raise NotImplementedError(f"{name}: {kind}, expected a strided tensor")
        if torch.compiler.is_compiling() or t._is_zerotensor() or t.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        size = (t.storage_offset() + last + 1) * t.element_size()
        if size > t.untyped_storage().nbytes():
            raise RuntimeError(
                f"{name}: shape {list(t.shape)} and strides {list(t.stride())} reach outside its "
                f"storage of {t.untyped_storage().nbytes()} bytes"
            )


def _plus_infinity(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _max_logits(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, topk_length: Tensor | None
) -> Tensor:
    """float32 [Sq, H]: q [Sq, H, D] times the listed rows of kv [S, D], some queries at a time."""
    (q_len, heads, width), topk = q.shape, indices.shape[1]
    hidden = (indices < 0) | (indices >= kv.shape[0])
    if topk_length is not None:
        hidden |= torch.arange(topk, device="cpu") >= topk_length.unsqueeze(1)
    result = torch.full((q_len, heads), -torch.inf, device="cpu")
    if topk == 0 or kv.shape[0] == 0:
        return result
    rows = indices.masked_fill(hidden, 0)
    step = max(1, _MAX_GATHERED // (topk * (width + heads)))
    for start in range(0, q_len, step):
        part = slice(start, start + step)
        keys = kv[rows[part]].float()  # [step, topk, D]
        logits = torch.bmm(q[part].float(), keys.transpose(1, 2)) * scale
        result[part] = logits.masked_fill(hidden[part].unsqueeze(1), -torch.inf).amax(dim=-1)
    return result


__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
