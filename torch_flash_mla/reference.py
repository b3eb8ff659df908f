"""What the operators compute, in readable float64: the truth that tests and documentation refer to.

Functions take the arguments of the operators of the same name and return float64 tensors. Nothing
here is fast, and nothing here is used by the operators.

Notation: B sequences, Sq query tokens each, H heads, L latent values, R rope values, D = L + R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

# Attention


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
    """Absorbed attention: queries against cache rows, values are the first L columns of the row.

    Args:
        q: [B, Sq, H, D], or [B, Sq, H, L] with ``q_pe`` [B, Sq, H, R]; ragged: [T, H, D or L].
        kv_cache: [num_blocks, block_size, D] or [num_blocks, block_size, 1, D]; packed: uint8 rows;
            with ``k_pe_cache`` [.., R]: rows of L values.
        block_table: int [B, max_blocks]; None: row i of ``kv_cache`` is sequence i.
        cache_seqlens: int [B], keys of each sequence, those of the new tokens included.
        head_dim_v: L.
        softmax_scale: factor of the dot products.
        causal: query s of Sq sees the keys before position length - Sq + s + 1.
        attn_mask: bool (True: keep) or float (added), broadcastable to [B, H, Sq, S]; ragged:
            [H, T, S].
        cache_leftpad: int [B], keys at the start that nobody sees.
        indices: int [B, Sq, topk] (ragged: [T, topk]), the positions a query may see, -1 for none;
            a key counts as often as it is listed.
        topk_length: int [B], how many of the ``indices`` count.
        attn_sink: [H], a logit that takes part in the softmax sum and has no value.
        window: above 0: a query sees the last ``window`` of the keys that ``causal`` leaves it.
        cu_seqlens_q: int [B + 1], where the queries of each sequence start: the ragged form.

    Returns:
        out float64 [B, Sq, H, L] and lse float64 [B, H, Sq]; ragged: [T, H, L] and [H, T]. A query
        without keys gets 0 and minus infinity.
    """
    q = q.double() if q_pe is None else torch.cat([q.double(), q_pe.double()], dim=-1)
    batch = cache_seqlens.shape[0]
    if cu_seqlens_q is None:
        queries = list(q)
        chosen = None if indices is None else list(indices)
    else:
        sizes = cu_seqlens_q.diff().tolist()
        queries = list(q.split(sizes))
        chosen = None if indices is None else list(indices.split(sizes))

    out, lse = [], []
    for b in range(batch):
        length = int(cache_seqlens[b])
        keys = sequence_rows(
            kv_cache, block_table, b, length, head_dim_v, q.shape[-1], kv_cache_dtype, k_pe_cache
        )
        q_len, heads = queries[b].shape[:2]
        keep = visible_keys(
            q_len,
            length,
            causal,
            window,
            0 if cache_leftpad is None else int(cache_leftpad[b]),
            None if chosen is None else chosen[b],
            None if topk_length is None else int(topk_length[b]),
        )
        bias = torch.zeros((), dtype=torch.float64)
        if attn_mask is not None:
            mask = attn_mask[(None,) * (4 - attn_mask.dim())]
            mask = mask[b if mask.shape[0] > 1 else 0]
            if cu_seqlens_q is not None and mask.shape[1] > 1:
                mask = mask[:, int(cu_seqlens_q[b]) : int(cu_seqlens_q[b + 1])]
            bias = additive_mask(mask)[..., :length]
        if chosen is not None:  # a key counts as often as it is listed
            limit = None if topk_length is None else int(topk_length[b])
            bias = bias + listed_times(chosen[b], limit, length).double().log()
        bias = bias.masked_fill(~keep, -torch.inf).expand(heads, q_len, length)
        out_b, lse_b = attend(queries[b], keys, head_dim_v, softmax_scale, bias, attn_sink)
        out.append(out_b)
        lse.append(lse_b)
    if cu_seqlens_q is not None:
        return torch.cat(out), torch.cat(lse, dim=-1)
    if batch == 0:
        return q[..., :head_dim_v].clone(), q.new_empty(0, q.shape[2], q.shape[1])
    return torch.stack(out), torch.stack(lse)


def attend(
    q: Tensor, keys: Tensor, latent: int, scale: float, bias: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence.

    Args:
        q: float64 [Sq, H, D].
        keys: float64 [T, D]; the first ``latent`` columns are the values.
        bias: float64 [H, Sq, T], minus infinity where a query does not see a key.
        sink: [H] or None.

    Returns:
        out [Sq, H, latent] and lse [H, Sq].
    """
    hidden = bias == -torch.inf
    logits = (torch.einsum("shd,td->hst", q, keys) * scale + bias).masked_fill(hidden, -torch.inf)
    most = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(dim=-1, keepdim=True)
    most = most.masked_fill(most == -torch.inf, 0)
    p = (logits - most).exp()
    total = p.sum(dim=-1, keepdim=True)
    lse = (most + total.log()).squeeze(-1)
    with_sink = total
    if sink is not None:
        with_sink = total + (sink.double()[:, None, None] - most).exp()
    # Hidden keys may hold anything, NaN too, which no weight of 0 takes away.
    values = keys[:, :latent]
    finite = values.isfinite().all(dim=1)
    out = torch.einsum("hst,tl->hsl", p, values.masked_fill(~finite.unsqueeze(1), 0))
    seen = ~hidden.expand(p.shape)
    for t in (~finite & seen.flatten(0, 1).any(dim=0)).nonzero().flatten().tolist():
        out = out + torch.where(seen[..., t, None], p[..., t, None] * values[t], 0)
    out = out / with_sink
    return out.masked_fill(total == 0, 0).transpose(0, 1), lse


def visible_keys(
    q_len: int,
    length: int,
    causal: bool,
    window: int,
    leftpad: int,
    indices: Tensor | None,
    topk_length: int | None,
) -> Tensor:
    """bool [Sq, T]: the keys that each query of one sequence sees, masks aside."""
    position = torch.arange(length)
    limit = torch.full((q_len, 1), length)
    if causal:
        limit = length - q_len + 1 + torch.arange(q_len).unsqueeze(1)
    keep = (position < limit) & (position >= leftpad)
    if window > 0:
        keep &= position >= limit - window
    if indices is not None:
        keep &= listed_times(indices, topk_length, length) > 0
    return keep


def listed_times(indices: Tensor, topk_length: int | None, length: int) -> Tensor:
    """int [Sq, T]: how often the list of each query, a row of ``indices``, names each key."""
    positions = indices[:, :topk_length].long()
    valid = (positions >= 0) & (positions < length)
    times = torch.zeros(len(positions), length + 1, dtype=torch.long)
    times.scatter_add_(1, torch.where(valid, positions, length), torch.ones_like(positions))
    return times[:, :length]


def additive_mask(mask: Tensor) -> Tensor:
    """A bool or float mask as float64 addend. Values at or below the dtype's lowest are -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    lowest = torch.finfo(mask.dtype).min
    return mask.double().masked_fill(mask <= lowest, -torch.inf)


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
    """Attention on queries and values as the model has them, through the weight of kv_b_proj.

    Args:
        q: [B, Sq, H, P + R], or [B, Sq, H, P] with ``q_pe`` [B, Sq, H, R].
        w_kv_b: [H, P + V, L]: per head the rows that make its keys, then those of its values.
        head_dim_v: V.
        form: ignored, both forms are the same function.

    The other arguments are those of ``mla_attention``.

    Returns:
        out float64 [B, Sq, H, V] and lse float64 [B, H, Sq].
    """
    w = w_kv_b.double()
    nope, latent = w.shape[1] - head_dim_v, w.shape[2]
    if q_pe is None:
        q, q_pe = q[..., :nope], q[..., nope:]
    q_latent = torch.einsum("...hp,hpl->...hl", q.double(), w[:, :nope])
    out, lse = mla_attention(
        q_latent,
        kv_cache,
        block_table,
        cache_seqlens,
        latent,
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
    return torch.einsum("...hl,hvl->...hv", out, w[:, nope:]), lse


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result over the keys of both of two partial results.

    Args:
        out_a, out_b: [B, Sq, H, V], computed without sink; ragged: [T, H, V].
        lse_a, lse_b: [B, H, Sq]; ragged: [H, T].
        attn_sink: [H] or None.

    Returns:
        out float64 and lse float64, shaped like the inputs; lse leaves the sink out.
    """
    lse_a, lse_b = lse_a.double(), lse_b.double()
    most = torch.maximum(lse_a, lse_b)
    most = most.masked_fill(most == -torch.inf, 0)
    total = (lse_a - most).exp() + (lse_b - most).exp()
    with_sink = total
    if attn_sink is not None:
        with_sink = total + (attn_sink.double().unsqueeze(-1) - most).exp()
    out = torch.zeros(out_a.shape, dtype=torch.float64)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = ((part_lse - most).exp() / with_sink).transpose(-1, -2).unsqueeze(-1)
        empty = (part_lse == -torch.inf).transpose(-1, -2).unsqueeze(-1)
        out += (part.double() * weight).masked_fill(empty, 0)
    return out, most + total.log()


# The cache


def sequence_rows(
    kv_cache: Tensor,
    block_table: Tensor | None,
    sequence: int,
    length: int,
    latent_dim: int,
    head_dim: int,
    kv_cache_dtype: str = "auto",
    k_pe_cache: Tensor | None = None,
) -> Tensor:
    """float64 [length, D]: the dequantised rows of one sequence, in order."""
    parts = []
    for cache in (kv_cache, k_pe_cache):
        if cache is None:
            continue
        if cache.dim() == 4:
            cache = cache.squeeze(2)
        if block_table is None:
            parts.append(cache[sequence, :length])
        else:
            position = torch.arange(length)
            block = block_table[sequence].long()[position // cache.shape[1]]
            parts.append(cache[block, position % cache.shape[1]])
    if kv_cache_dtype in PACKED_FORMATS:
        return decode_rows(parts[0], kv_cache_dtype, latent_dim, head_dim - latent_dim).double()
    return torch.cat([part.double() for part in parts], dim=-1)


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
    """``dtype`` [B, N, D]: dequantised rows, zero beyond each length.

    N is ``max_seqlen``, or what the block table (without one: the cache) has room for.
    """
    if max_seqlen is None:
        max_seqlen = kv_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    out = torch.zeros(cache_seqlens.shape[0], max_seqlen, head_dim, dtype=dtype)
    for b, length in enumerate(cache_seqlens.tolist()):
        length = min(length, max_seqlen)
        rows = sequence_rows(kv_cache, block_table, b, length, head_dim_v, head_dim, kv_cache_dtype)
        out[b, :length] = rows.to(dtype)
    return out


# Packed formats: the documented bytes of docs/cache_formats.md, little endian

_BLOCK = 32  # values that share one fp16 scale in q8_0, q6_0 and q4_kv
# The 16 levels of q4_kv: Lloyd-Max for Gaussian blocks (tools/fit_q4_codebook.py), frozen.
_LEVELS = torch.tensor(
    [-127, -96, -74, -57, -42, -29, -17, -6, 6, 17, 29, 42, 57, 74, 96, 127], dtype=torch.float32
)
_SCALE_CANDIDATES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
_F16_MAX = 65504.0


def encode_rows(latent: Tensor, rope: Tensor, kv_cache_dtype: str) -> Tensor:
    """Packs rows.

    Args:
        latent: [.., L], converted to float32 first.
        rope: [.., R].
        kv_cache_dtype: a packed format.

    Returns:
        uint8 [.., row bytes].

    Raises:
        ValueError: unknown format, or L or R that it cannot hold.
    """
    row_bytes(kv_cache_dtype, latent.shape[-1], rope.shape[-1])
    latent, rope = latent.float(), rope.float()
    if kv_cache_dtype == "q8_kv":
        codes_l, scale_l = _encode_segment(latent)
        codes_r, scale_r = _encode_segment(rope)
        return torch.cat([codes_l, codes_r, _bytes(scale_l), _bytes(scale_r)], dim=-1)
    if kv_cache_dtype == "q4_kv":
        index, scales = _encode_levels(latent.unflatten(-1, (-1, _BLOCK)))
        nibbles = index[..., :16] | index[..., 16:] << 4
        codes_r, scale_r = _encode_segment(rope)
        codes_r = (codes_r.to(torch.int16) - 128).to(torch.int8)
        parts = [nibbles.flatten(-2), _bytes(scales), _bytes(codes_r), _bytes(scale_r)]
        return torch.cat(parts, dim=-1)
    blocks = torch.cat([latent, rope], dim=-1).unflatten(-1, (-1, _BLOCK))  # [.., D / 32, 32]
    if kv_cache_dtype == "q8_0":
        codes, scales = _encode_blocks(blocks, most=127, low=-127)
        return torch.cat([_bytes(codes.to(torch.int8)).flatten(-2), _bytes(scales)], dim=-1)
    codes, scales = _encode_blocks(blocks, most=31, low=-32)
    u = (codes + 32).to(torch.uint8)
    nibbles = (u[..., :16] & 15) | (u[..., 16:] & 15) << 4
    h = (u >> 4).unflatten(-1, (4, 8))
    high = h[..., 0, :] | h[..., 1, :] << 2 | h[..., 2, :] << 4 | h[..., 3, :] << 6
    return torch.cat([nibbles.flatten(-2), high.flatten(-2), _bytes(scales)], dim=-1)


def decode_rows(rows: Tensor, kv_cache_dtype: str, latent_dim: int, rope_dim: int) -> Tensor:
    """Unpacks rows: uint8 [.., row bytes] -> float32 [.., L + R].

    Raises:
        ValueError: unknown format, dims it cannot hold, or rows of another size.
    """
    size = row_bytes(kv_cache_dtype, latent_dim, rope_dim)
    if rows.shape[-1] != size:
        raise ValueError(f"rows: got {rows.shape[-1]} bytes, {kv_cache_dtype} takes {size}")
    d = latent_dim + rope_dim
    if kv_cache_dtype == "q8_kv":
        codes = rows[..., :d].float() - 128
        scales = _from_bytes(rows[..., d:], torch.float32)
        return torch.cat(
            [codes[..., :latent_dim] * scales[..., :1], codes[..., latent_dim:] * scales[..., 1:]],
            dim=-1,
        )
    if kv_cache_dtype == "q4_kv":
        sizes = [latent_dim // 2, latent_dim // _BLOCK * 2, rope_dim, 4]
        packed, scales, codes, rope_scale = rows.split(sizes, dim=-1)
        packed = packed.unflatten(-1, (-1, 16))
        level = _LEVELS[torch.cat([packed & 15, packed >> 4], dim=-1).long()]
        latent = level * _from_bytes(scales, torch.float16).float().unsqueeze(-1)
        rope = _from_bytes(codes, torch.int8).float() * _from_bytes(rope_scale, torch.float32)
        return torch.cat([latent.flatten(-2), rope], dim=-1)
    scales = _from_bytes(rows[..., size - d // _BLOCK * 2 :], torch.float16).float()
    if kv_cache_dtype == "q8_0":
        codes = _from_bytes(rows[..., :d], torch.int8).float().unflatten(-1, (-1, _BLOCK))
    else:
        nibbles = rows[..., : d // 2].unflatten(-1, (-1, 16))
        high = rows[..., d // 2 : d // 2 + d // 4].unflatten(-1, (-1, 8))
        low = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        top = torch.cat([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], dim=-1)
        codes = (low | top << 4).float() - 32
    return (codes * scales.unsqueeze(-1)).flatten(-2)


def _absmax(x: Tensor) -> Tensor:
    """Largest magnitude along the last dim, kept; 0 of nothing, NaN where a value is not finite."""
    most = torch.nn.functional.pad(x.abs(), (0, 1)).amax(dim=-1, keepdim=True)
    return most.masked_fill(~x.isfinite().all(dim=-1, keepdim=True), torch.nan)


def _encode_segment(x: Tensor) -> tuple[Tensor, Tensor]:
    """q8_kv: uint8 codes with bias 128 and one float32 scale for all of ``x`` [.., n]."""
    most = _absmax(x)
    usable = most > 1e-30
    inverse = torch.full_like(most, 127) / most  # 127 / tensor would be 127 * (1 / tensor)
    codes = (x * inverse).masked_fill(~usable, 0).round().clamp(-127, 127) + 128
    # 127 times the scale must stay finite.
    scale = (most / 127).clamp(max=float.fromhex("0x1.020406p+121")).masked_fill(most <= 1e-30, 0)
    return codes.to(torch.uint8), scale


def _encode_blocks(blocks: Tensor, most: int, low: int) -> tuple[Tensor, Tensor]:
    """Integer codes in low .. most of blocks [.., n, 32], and their float16 scales [.., n].

    Codes come from the rounded scale, so that they are the best ones for what decoding multiplies.
    """
    scale = (_absmax(blocks) / most).clamp(max=_F16_MAX).half()
    usable = scale > 0
    inverse = 1 / scale.float()
    codes = (blocks * inverse).masked_fill(~usable, 0).round().clamp(low, most)
    return codes.to(torch.int32), scale.squeeze(-1)


def _encode_levels(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """q4_kv: uint8 indices into the levels of blocks [.., n, 32], and float16 scales [.., n].

    Of a few scales at and below absmax / 127 the one with the least squared error is kept.
    """
    most = _absmax(blocks)
    best = most / 127  # stays where squares overflow, and NaN where a value is not finite
    least = torch.full_like(most, torch.inf)
    for candidate in _SCALE_CANDIDATES:
        scale = most / 127 * candidate
        inverse = torch.where(scale > 0, 1 / scale, 0)
        nearest = torch.bucketize(blocks.abs() * inverse, (_LEVELS[9:] + _LEVELS[8:-1]) / 2)
        square = (blocks.abs() - scale * _LEVELS[8:][nearest]).square().unflatten(-1, (4, 8))
        # The order of the sums is the format's: it decides between nearly equal candidates.
        s = (square[..., 0, :] + square[..., 1, :] + square[..., 2, :]) + square[..., 3, :]
        even = (s[..., 0] + s[..., 4]) + (s[..., 2] + s[..., 6])
        error = (even + ((s[..., 1] + s[..., 5]) + (s[..., 3] + s[..., 7]))).unsqueeze(-1)
        best = torch.where(error < least, scale, best)
        least = torch.where(error < least, error, least)
    stored = best.clamp(max=_F16_MAX).half()
    usable = stored > 0
    inverse = torch.where(usable, 1 / stored.float(), 0)
    y = (blocks * inverse).masked_fill(~usable, 0)
    index = torch.bucketize(y, (_LEVELS[1:] + _LEVELS[:-1]) / 2)
    return index.to(torch.uint8), stored.squeeze(-1)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _from_bytes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(dtype)  # aligned, too


__all__ = [
    "PACKED_FORMATS",
    "decode_rows",
    "encode_rows",
    "gather_cache",
    "merge_attn_states",
    "mla_attention",
    "mla_attention_kv_b",
]
