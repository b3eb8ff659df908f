"""The operators as typed functions. This is the one file that names ``torch.ops.flashmla``.

All functions work in eager mode, under ``torch.compile``, ``torch.export`` and
``torch.jit.script``. They take CPU tensors, check every argument before anything is written, and
raise ``ValueError``, ``TypeError`` (a dtype), ``IndexError`` (a block id or slot),
``NotImplementedError`` or ``RuntimeError`` (not a strided CPU tensor) with a message that names the
argument, what came and what was expected.

Notation: B sequences, Sq query tokens each, H heads, L = kv_lora_rank, R = qk_rope_head_dim,
P = qk_nope_head_dim, V = v_head_dim, D = L + R. :mod:`torch_flash_mla.reference` states the same
functions in readable float64; docs/cache_formats.md documents the bytes of the cache.
"""

from typing import Any

import torch
from torch import Tensor


def mla_attention(
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
    """Attention of absorbed queries against the latent cache.

    Keys are rows [latent | rope] of the cache, values the first ``head_dim_v`` = L columns of the
    same rows (DeepSeek-V2, arXiv:2405.04434, section 2.1, with W_UK and W_UV absorbed into query
    and output projection). Names follow FlashMLA and vLLM.

    Differentiable in q, q_pe, attn_sink and a float kv_cache or k_pe_cache (recomputed in float32),
    through out and lse; not in attn_mask.

    Args:
        q: [B, Sq, H, D] in the order [latent | rope], or [B, Sq, H, L] with ``q_pe``. bfloat16,
            float16 or float32; the last dimension contiguous, other strides free.
        kv_cache: [num_blocks, block_size, D] or [num_blocks, block_size, 1, D]; uint8 rows of a
            packed format; or rows of L with ``k_pe_cache``. Strides of blocks and tokens are free.
        block_table: int32 [B, max_blocks], the blocks of each sequence. Entries behind
            ceil(length / block_size) are never read. None: block i is sequence i.
        cache_seqlens: int32 [B], keys of each sequence, those of the new tokens included. 0 and
            lengths below Sq are fine.
        head_dim_v: L.
        softmax_scale: any finite factor of the logits, usually (P + R) ** -0.5.
        causal: query s sees the keys before position length - Sq + s + 1 (bottom-right aligned).
        attn_mask: bool (True: keep) or bfloat16, float16, float32 (added to the logits), dimensions
            broadcastable to [B, H, Sq, S] with S >= max(cache_seqlens); column j is cache position
            j. Float values at or below the lowest of their dtype count as minus infinity.
        cache_leftpad: int32 [B], keys at the start of each sequence that nobody sees.
        indices: int32 [B, Sq, topk], the positions that each query may see, in any order; those
            outside 0 .. length - 1 (-1 by convention) are skipped, and a key that is listed several
            times counts as often.
        topk_length: int32 [B], how many leading entries of the ``indices`` count.
        attn_sink: float32 [H], a logit that joins the softmax sum and has no value.
        q_pe: [B, Sq, H, R], dtype of ``q``.
        k_pe_cache: [num_blocks, block_size, R], dtype of ``kv_cache`` (float formats only).
        window: above 0: the last ``window`` of the keys that length and ``causal`` leave.
        kv_cache_dtype: "auto" (the float dtype of ``kv_cache``) or the name of a format.
        cu_seqlens_q: int32 [B + 1] from 0 to T, for queries of ragged length: those of sequence b
            are tokens ``cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1`` of q [T, H, *], so one call
            serves prompts and decoding together. Then q_pe is [T, H, R], ``indices`` [T, topk] and
            ``attn_mask`` broadcastable to [H, T, S].

    Returns:
        out: [B, Sq, H, L], dtype of ``q``; ragged [T, H, L]. A query that sees no key gets 0.
        lse: float32 [B, H, Sq], ragged [H, T]: natural log of the softmax sum without the sink;
            minus infinity for a query that sees no key.
    """
    return torch.ops.flashmla.mla_attention(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale,
        causal,
        attn_mask,
        cache_leftpad,
        indices,
        topk_length,
        attn_sink,
        q_pe,
        k_pe_cache,
        window,
        kv_cache_dtype,
        cu_seqlens_q,
    )


def mla_attention_kv_b(
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
    """Attention of queries as the model makes them; values come out as the model wants them.

    There are two forms of the same attention: *absorbed* (queries are projected into the latent
    space, for decoding and short queries) and *expanded* (keys and values of each head are made
    from the latent in a buffer of bounded size, for prompts). For each sequence the operator takes
    the one that costs less by a model of rows, keys, history and arithmetic.

    Differentiable like :func:`mla_attention`, and in w_kv_b.

    Args:
        q: [B, Sq, H, P + R], or [B, Sq, H, P] with ``q_pe`` [B, Sq, H, R]; ragged: [T, H, *].
        w_kv_b: [H, P + V, L], dtype of ``q``: ``kv_b_proj.weight.view(H, P + V, L)``, per head the
            rows that make keys, then those that make values.
        head_dim_v: V.
        form: "auto", "absorbed" or "expanded", which refuses ``indices``: sparse attention is
            always absorbed.

    The other arguments are those of :func:`mla_attention`.

    Returns:
        out: [B, Sq, H, V], dtype of ``q``; ragged [T, H, V].
        lse: float32 [B, H, Sq]; ragged [H, T].
    """
    return torch.ops.flashmla.mla_attention_kv_b(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        w_kv_b,
        head_dim_v,
        softmax_scale,
        causal,
        attn_mask,
        cache_leftpad,
        indices,
        topk_length,
        attn_sink,
        q_pe,
        k_pe_cache,
        window,
        kv_cache_dtype,
        cu_seqlens_q,
        form,
    )


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_pe_cache: Tensor | None = None,
) -> None:
    """Writes tokens into the cache, in its format. ``kv_cache`` (and ``k_pe_cache``) are mutated.

    Not differentiable: gradients reach a cache through attention, but do not flow back from the
    cache into ``kv_c`` and ``k_pe``. Autograd sees the mutation and refuses stale backward passes.

    Args:
        kv_c: [.., L], the normed latent of each token; leading dimensions are flattened.
        k_pe: [.., R], the rotated key of each token, dtype of ``kv_c``; dimensions of size 1
            between (as in [T, 1, R]) do not matter. Float dtypes, converted to the cache's.
        kv_cache: as in :func:`mla_attention`.
        slot_mapping: int64, one per token: slot = block * block_size + offset, -1 skips the token.
            Of tokens with the same slot any one may win.
        kv_cache_dtype: "auto" or the name of a format.
        k_pe_cache: takes the rope part, in the two-tensor form.
    """
    torch.ops.flashmla.concat_and_cache_mla(
        kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_pe_cache
    )


def gather_cache(
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    head_dim_v: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_cache_dtype: str = "auto",
    max_seqlen: int | None = None,
) -> Tensor:
    """Reads the rows of each sequence back, dequantised and in order.

    Args:
        kv_cache, block_table, cache_seqlens, kv_cache_dtype: as in :func:`mla_attention`.
        head_dim_v: L.
        head_dim: D.
        dtype: float dtype of the result.
        max_seqlen: N, rows per sequence; longer sequences are cut. None: max_blocks * block_size,
            without a block table block_size.

    Returns:
        [B, N, D], zero beyond each length.
    """
    return torch.ops.flashmla.gather_cache(
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        head_dim,
        dtype,
        kv_cache_dtype,
        max_seqlen,
    )


def copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    """Copies blocks inside one cache of any dtype. ``kv_cache`` is mutated.

    Args:
        kv_cache: [num_blocks, ...].
        block_mapping: int64 [pairs, 2], (source, target). No block may be the target of two copies,
            or both a source and a target.
    """
    torch.ops.flashmla.copy_blocks(kv_cache, block_mapping)


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, attn_sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the results over each (arXiv:2501.01005, section 2.2).

    Args:
        out_a, out_b: [B, Sq, H, width], one float dtype, computed without a sink.
        lse_a, lse_b: float32 [B, H, Sq].
        attn_sink: float32 [H], joins here.

    Returns:
        out: [B, Sq, H, width]; 0 where both parts are empty.
        lse: float32 [B, H, Sq], without the sink.
    """
    return torch.ops.flashmla.merge_attn_states(out_a, lse_a, out_b, lse_b, attn_sink)


def mla_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the two attention operators, for autograd (:mod:`torch_flash_mla._autograd`).

    Args:
        grad_out, grad_lse: gradients of the results, None for zero.
        w_kv_b: None for :func:`mla_attention`.
        needs: which gradients to compute, in the order of the results; others come back empty.

    Returns:
        Gradients of q, kv_cache, w_kv_b, attn_sink, q_pe and k_pe_cache.
    """
    return torch.ops.flashmla._mla_attention_backward(
        grad_out,
        grad_lse,
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        w_kv_b,
        head_dim_v,
        softmax_scale,
        causal,
        attn_mask,
        cache_leftpad,
        indices,
        topk_length,
        attn_sink,
        q_pe,
        k_pe_cache,
        window,
        kv_cache_dtype,
        cu_seqlens_q,
        needs,
    )


def cpu_isa() -> str:
    """The instruction set in use: scalar, avx2, avx2_vnni, avx512_vnni, avx512_bf16, onednn.

    Or, if forced, avx2_vnni_evex: avx2_vnni for tests on CPUs with AVX-512. onednn, the products of
    the oneDNN inside torch, is chosen by itself where there is AMX.
    """
    return torch.ops.flashmla._isa()


def available_isas() -> list[str]:
    """The instruction sets that this build and this machine can run, lowest first."""
    return torch.ops.flashmla._isas()


def set_isa(name: str) -> None:
    """Makes ``name`` the instruction set of the whole process; "" is the best one available.

    Raises:
        ValueError: ``name`` is not one of :func:`available_isas`.
    """
    torch.ops.flashmla._force_isa(name)


def scratch_bytes() -> int:
    """Bytes of scratch memory that all threads hold for the kernels at this moment."""
    return torch.ops.flashmla._scratch_bytes()


def parallel_regions() -> int:
    """Parallel regions that the operators have begun in this process, those of ATen aside."""
    return torch.ops.flashmla._parallel_regions()


def set_steps_apart(apart: bool) -> None:
    """Whether every one of torch's threads takes part in each later call of this thread (for
    warming up) or those that are there in time."""
    torch.ops.flashmla._set_steps_apart(apart)


def onednn_stats() -> tuple[int, int, float]:
    """What the level ``onednn`` did in this process, on all threads.

    Returns:
        Matrix products made; shapes compiled, which each thread does for itself; seconds that
        those first products took.
    """
    return torch.ops.flashmla._onednn_stats()


def set_onednn_least_rows(rows: int) -> int:
    """Leaves blocks of fewer query rows to the kernels of avx512_bf16, on the level ``onednn``.

    A block is up to 128 query rows of one sequence (query tokens times heads). For measurements
    and tests.

    Returns:
        The value before.

    Raises:
        ValueError: ``rows`` is less than 1.
    """
    return torch.ops.flashmla._set_onednn_least_rows(rows)


def kernel_compiler() -> str:
    """Name and version of the compiler that built the kernels."""
    return torch.ops.flashmla._compiler()


def arithmetic(kv_cache_dtype: str, q_dtype: torch.dtype) -> str:
    """What computes attention over a format with the instruction set in use.

    Args:
        kv_cache_dtype: a packed format, or "float32", "bfloat16", "float16".
        q_dtype: dtype of the queries.

    Returns:
        "f32", "bf16", "int16" or "int8".
    """
    return torch.ops.flashmla._arithmetic(kv_cache_dtype, q_dtype)


def roof(arithmetic: str, iterations: int) -> float:
    """Runs dot products of an arithmetic on registers alone, on every thread, to be timed.

    Returns:
        The floating point (or integer) operations done: 0 if the instruction set in use has no such
        product.
    """
    return torch.ops.flashmla._roof(arithmetic, iterations)


def allocate(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of :func:`mla_attention` for its arguments (q [B, Sq, H, D] alone).

    What any operator with these arguments costs, to tell the overhead of attention from it.
    """
    return torch.ops.flashmla._allocate(*arguments, **options)


def append_nothing(*arguments: Any, **options: Any) -> None:
    """Nothing, of the arguments of :func:`concat_and_cache_mla`: what any operator costs."""
    torch.ops.flashmla._append_nothing(*arguments, **options)
