"""Gradients of the attention operators, by recomputing the attention with ATen in float32.

``csrc/ops/autograd.cpp`` records the calls that need gradients; their backward pass is the operator
implemented here. It is an operator of its own: it reads lengths and walks the sequences one by one,
which a traced graph could not, and keeps at most a bounded block of probabilities at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_flash_mla import ops

# Probabilities held at once: 64 MiB of float32.
_MAX_PROBABILITIES = 1 << 24


@torch.autocast("cpu", enabled=False)
def _backward(
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
    """See :func:`torch_flash_mla.ops.mla_attention_backward`."""
    heads = q.shape[-2]
    starts = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    # Queries are [.., main | rope], where main is the latent query or what W_UK makes it from.
    main = head_dim_v if w_kv_b is None else w_kv_b.shape[1] - head_dim_v
    latent = head_dim_v if w_kv_b is None else w_kv_b.shape[2]
    rope = q.shape[-1] - main if q_pe is None else q_pe.shape[-1]
    w_uk = w_uv = None
    if w_kv_b is not None:
        w_uk, w_uv = w_kv_b.float().split([main, head_dim_v], dim=1)

    need_q, need_cache, need_w, need_sink, need_q_pe, need_k_pe = needs
    grad_q = q.new_zeros(q.shape) if need_q else None
    grad_q_pe = q_pe.new_zeros(q_pe.shape) if need_q_pe and q_pe is not None else None
    grad_w = torch.zeros(w_kv_b.shape, device="cpu") if need_w and w_kv_b is not None else None
    grad_sink = torch.zeros(heads, device="cpu") if need_sink and attn_sink is not None else None
    grad_cache = torch.zeros(kv_cache.shape, device="cpu") if need_cache else None
    grad_k_pe = (
        torch.zeros(k_pe_cache.shape, device="cpu")
        if need_k_pe and k_pe_cache is not None
        else None
    )
    sink = None if attn_sink is None else attn_sink.float()

    for b, length in enumerate(cache_seqlens.tolist()):
        if length == 0:
            continue
        # The query tokens of this sequence, as a slice of tensors [T, ..] or a row of [B, Sq, ..].
        here = b if starts is None else slice(starts[b], starts[b + 1])
        q_len = q[here].shape[0]
        keys = _keys(
            kv_cache, k_pe_cache, block_table, cache_seqlens, b, latent, rope, kv_cache_dtype
        )
        grad_keys = torch.zeros_like(keys) if need_cache or need_k_pe else None
        leftpad = 0 if cache_leftpad is None else int(cache_leftpad[b])
        chunk = max(1, _MAX_PROBABILITIES // max(1, heads * length))
        for begin in range(0, q_len, chunk):
            tokens = slice(begin, min(begin + chunk, q_len))
            mask = None if attn_mask is None else _mask_rows(attn_mask, b, starts, tokens)
            bias = _bias(tokens, q_len, length, causal, window, leftpad, mask)
            if indices is not None:
                limit = None if topk_length is None else int(topk_length[b])
                chosen = indices[here][tokens, :limit]
                bias = bias + _listed_times(chosen, length).log().unsqueeze(1)
            q_main = q[here][tokens, :, :main].float()
            q_rope = (q[here][tokens, :, main:] if q_pe is None else q_pe[here][tokens]).float()
            q_latent = q_main if w_uk is None else torch.einsum("shp,hpl->shl", q_main, w_uk)
            shape = (q_main.shape[0], heads)
            g_out = torch.zeros(*shape, head_dim_v, device="cpu")
            if grad_out is not None:
                g_out = grad_out[here][tokens].float()
            g_lse = torch.zeros(shape, device="cpu")
            if grad_lse is not None:
                of_sequence = grad_lse[b] if starts is None else grad_lse[:, here]
                g_lse = of_sequence[:, tokens].float().T
            g_latent = g_out if w_uv is None else torch.einsum("shv,hvl->shl", g_out, w_uv)
            out, g_q, g_k, g_sink = _attention_gradients(
                torch.cat([q_latent, q_rope], dim=-1),
                keys,
                latent,
                softmax_scale,
                bias,
                sink,
                g_latent,
                g_lse,
            )
            g_main, g_rope = g_q.split([latent, rope], dim=-1)
            if grad_w is not None:
                grad_w[:, :main] += torch.einsum("shp,shl->hpl", q_main, g_main)
                grad_w[:, main:] += torch.einsum("shv,shl->hvl", g_out, out)
            if grad_q is not None:
                if w_uk is not None:
                    g_main = torch.einsum("shl,hpl->shp", g_main, w_uk)
                grad_q[here][tokens, :, :main] = g_main.to(q.dtype)
                if q_pe is None:
                    grad_q[here][tokens, :, main:] = g_rope.to(q.dtype)
            if grad_q_pe is not None:
                grad_q_pe[here][tokens] = g_rope.to(q.dtype)
            if grad_sink is not None and g_sink is not None:
                grad_sink += g_sink
            if grad_keys is not None:
                grad_keys += g_k
        if grad_keys is not None:
            block, offset = _positions(kv_cache, block_table, b, length)
            width = latent if k_pe_cache is not None else latent + rope
            if grad_cache is not None:  # sequences may share blocks
                rows = grad_keys[:, :width].reshape(length, *kv_cache.shape[2:])
                grad_cache.index_put_((block, offset), rows, accumulate=True)
            if grad_k_pe is not None and k_pe_cache is not None:
                rows = grad_keys[:, latent:].reshape(length, *k_pe_cache.shape[2:])
                grad_k_pe.index_put_((block, offset), rows, accumulate=True)

    results = (
        (grad_q, q),
        (grad_cache, kv_cache),
        (grad_w, w_kv_b),
        (grad_sink, attn_sink),
        (grad_q_pe, q_pe),
        (grad_k_pe, k_pe_cache),
    )
    return tuple(
        q.new_empty(0) if grad is None or like is None else grad.to(like.dtype)
        for grad, like in results
    )


def _positions(
    kv_cache: Tensor, block_table: Tensor | None, b: int, length: int
) -> tuple[Tensor, Tensor]:
    """Block and offset of each token of sequence ``b``."""
    position = torch.arange(length, device="cpu")
    if block_table is None:
        return torch.full_like(position, b), position
    block_size = kv_cache.shape[1]
    return block_table[b].long()[position // block_size], position % block_size


def _keys(
    kv_cache: Tensor,
    k_pe_cache: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    b: int,
    latent: int,
    rope: int,
    kv_cache_dtype: str,
) -> Tensor:
    """float32 [length, L + R]: the dequantised rows of sequence ``b``."""
    length = int(cache_seqlens[b])
    if kv_cache.dtype == torch.uint8:
        return ops.gather_cache(
            kv_cache if block_table is not None else kv_cache[b : b + 1],
            None if block_table is None else block_table[b : b + 1],
            cache_seqlens[b : b + 1],
            latent,
            latent + rope,
            torch.float32,
            kv_cache_dtype,
            length,
        )[0]
    at = _positions(kv_cache, block_table, b, length)
    parts = [cache[at].reshape(length, -1) for cache in (kv_cache, k_pe_cache) if cache is not None]
    return torch.cat(parts, dim=-1).float()


def _mask_rows(attn_mask: Tensor, b: int, starts: list[int] | None, tokens: slice) -> Tensor:
    """[tokens or 1, H or 1, S]: the rows of a mask for some queries of sequence ``b``."""
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = mask[b if mask.shape[0] > 1 else 0]
    if mask.shape[1] > 1:
        first = 0 if starts is None else starts[b]
        mask = mask[:, first + tokens.start : first + tokens.stop]
    return mask.transpose(0, 1)


def _bias(
    tokens: slice,
    q_len: int,
    length: int,
    causal: bool,
    window: int,
    leftpad: int,
    mask: Tensor | None,
) -> Tensor:
    """float32 [tokens, H or 1, length]: what is added to the logits; minus infinity hides a key."""
    position = torch.arange(length, device="cpu")
    last = torch.full((tokens.stop - tokens.start, 1), length, device="cpu")
    if causal:
        last = (
            torch.arange(tokens.start, tokens.stop, device="cpu").unsqueeze(1) + length - q_len + 1
        )
    keep = (position < last) & (position >= leftpad)
    if window > 0:
        keep &= position >= last - window
    bias = torch.zeros(keep.shape, device="cpu").masked_fill(~keep, -torch.inf).unsqueeze(1)
    if mask is None:
        return bias
    mask = mask[..., :length]
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    lowest = torch.finfo(mask.dtype).min
    return bias + mask.float().masked_fill(mask <= lowest, -torch.inf)


def _listed_times(chosen: Tensor, length: int) -> Tensor:
    """float32 [tokens, length]: how often each query's list, a row of ``chosen``, names a key."""
    valid = (chosen >= 0) & (chosen < length)
    times = torch.zeros(chosen.shape[0], length + 1, device="cpu")
    column = chosen.where(valid, length).long()
    return times.scatter_add_(1, column, torch.ones(column.shape, device="cpu"))[:, :length]


def _attention_gradients(
    q: Tensor,
    keys: Tensor,
    latent: int,
    scale: float,
    bias: Tensor,
    sink: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The result and the gradients of attention for some queries of one sequence, all float32.

    Args:
        q: [s, H, D].
        keys: [n, D]; the first ``latent`` columns are the values.
        bias: [s, H or 1, n].
        sink: [H] or None.
        grad_out: [s, H, latent].
        grad_lse: [s, H].

    Returns:
        out [s, H, latent] and the gradients of q, keys and sink.
    """
    hidden = bias == -torch.inf
    keys = keys.masked_fill(hidden.all(dim=(0, 1)).unsqueeze(1), 0)  # may hold anything, NaN too
    values = keys[:, :latent]
    logits = (q @ keys.T).mul_(scale).add_(bias).masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(dim=-1, keepdim=True)
    total = lse if sink is None else torch.logaddexp(lse, sink[:, None])
    p = (logits - total.masked_fill(lse == -torch.inf, 0)).exp()  # a query without keys: all 0
    out = p @ values
    delta = (grad_out * out).sum(dim=-1, keepdim=True)
    grad_logits = (grad_out @ values.T).sub_(delta).mul_(p)
    share = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()  # the softmax without the sink
    grad_logits += share * grad_lse.unsqueeze(-1).masked_fill(lse == -torch.inf, 0)
    grad_q = (grad_logits @ keys).mul_(scale)
    grad_keys = torch.einsum("shn,shd->nd", grad_logits, q).mul_(scale)
    grad_keys[:, :latent] += torch.einsum("shn,shl->nl", p, grad_out)
    grad_sink = None
    if sink is not None:
        total = total.masked_fill(lse == -torch.inf, torch.inf)  # no sink counts without keys
        grad_sink = -((sink[:, None] - total).exp() * delta).sum(dim=(0, 2))
    return out, grad_q, grad_keys, grad_sink


torch.library.impl("flashmla::_mla_attention_backward", "cpu", _backward)
