"""What attention must be, in float64, and how far off a level's arithmetic may be.

`attention` computes what `torch_flash_mla.reference` does, with numpy, as quickly as small cases
allow, and beside each row what rounding can do to it. It selects: what a query does not see takes
no part in any sum, whatever it holds. tests/test_fuzz.py holds it against the reference.

The bounds follow from the arithmetics of docs/kernels.md, for every size and every magnitude of the
logits, where those of mla_cases.py (`check_table`) are measured on normal noise. A logit may be off
by some amount `shift`; what that does to the softmax is taken exactly, by the largest and least
weight that each key can have. Products round, each number by itself: such errors add up as
independent ones, of which three times the root of the sum of squares is not exceeded, or at worst
in absolute value.

Rows are [Sq, H]; n is the length of a sequence.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests import mla_cases
from torch_flash_mla.formats import PACKED_FORMATS

Array = NDArray[Any]
Arguments = dict[str, Any]

# What a row must be.
EMPTY, FINITE, NAN, ANY = range(4)

_F32 = 2.0**-24
_BF16 = 2.0**-8
# Where float32 products or their sums may leave its range, in the units of log2 that kernels use.
_RANGE = 1e37
_LEVELS = np.array(
    [-127, -96, -74, -57, -42, -29, -17, -6, 6, 17, 29, 42, 57, 74, 96, 127], dtype=np.float32
)
# A smaller scale of the values of a token is taken for this one.
_LEAST_SCALE = 1e-30
# Per format, the largest code of each segment.
_LARGEST_CODE = {"q8_kv": (127, 127), "q8_0": (128, 128), "q6_0": (32, 32), "q4_kv": (127, 128)}


def to_numpy(t: Tensor) -> Array:
    """float64, or bool and integers as they are."""
    return (t.double() if t.is_floating_point() else t).numpy()


def decode(rows: Array, name: str, latent: int, rope: int) -> tuple[Array, Array]:
    """float32 values [n, L + R] of packed rows, and [n, 2] the largest that a segment's codes
    can say: NaN where a scale is negative, which no encoder writes."""
    n, width = len(rows), latent + rope
    peak = np.zeros((n, 2))

    def scales(first: int, end: int, dtype: str) -> Array:
        return np.ascontiguousarray(rows[:, first:end]).view(dtype).astype(np.float32)

    def peaks(blocks: Array, seg: int) -> None:
        if blocks.shape[1]:
            most = np.where(np.signbit(blocks).any(axis=1), np.nan, blocks.max(axis=1))
            peak[:, seg] = most * float(_LARGEST_CODE[name][seg])

    with np.errstate(all="ignore"):
        if name == "q8_kv":
            s = scales(width, width + 8, "<f4")
            peaks(s[:, :1], 0), peaks(s[:, 1:], 1)
            codes = rows[:, :width].astype(np.float32) - 128
            return codes * np.repeat(s, [latent, rope], axis=1), peak
        if name == "q4_kv":
            half, blocks = latent // 2, latent // 32
            packed = rows[:, :half].reshape(n, blocks, 16)
            levels = _LEVELS[np.concatenate([packed & 15, packed >> 4], axis=2)]
            s = scales(half, half + 2 * blocks, "<f2")
            first = half + 2 * blocks
            codes = np.ascontiguousarray(rows[:, first : first + rope]).view(np.int8)
            of_rope = scales(first + rope, first + rope + 4, "<f4")
            peaks(s, 0)
            if rope:
                peaks(of_rope, 1)
            latents = (levels * s[:, :, None]).reshape(n, latent)
            return np.concatenate([latents, codes.astype(np.float32) * of_rope], axis=1), peak
        blocks = width // 32
        s = scales(rows.shape[1] - 2 * blocks, rows.shape[1], "<f2")
        peaks(s[:, : latent // 32], 0), peaks(s[:, latent // 32 :], 1)
        if name == "q8_0":
            values = np.ascontiguousarray(rows[:, :width]).view(np.int8).astype(np.float32)
            values = values.reshape(n, blocks, 32)
        else:
            nibbles = rows[:, : width // 2].reshape(n, blocks, 16)
            high = rows[:, width // 2 : width // 2 + width // 4].reshape(n, blocks, 8)
            low = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
            top = np.concatenate([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], axis=2)
            values = (low | top << 4).astype(np.float32) - 32
        return (values * s[:, :, None]).reshape(n, width), peak


def _cells(a: Arguments, b: int, n: int) -> list[Tensor]:
    """The cells of a sequence as they are stored, one part per cache."""
    parts = []
    for cache in (a["kv_cache"], a.get("k_pe_cache")):
        if cache is None:
            continue
        if cache.dim() == 4:
            cache = cache.squeeze(2)
        if a["block_table"] is None:
            parts.append(cache[b, :n])
        else:
            position = torch.arange(n)
            block = a["block_table"][b][position // cache.shape[1]].long()
            parts.append(cache[block, position % cache.shape[1]])
    return parts


def sequence_rows(
    a: Arguments, b: int, n: int, latent: int, rope: int
) -> tuple[Array, Array | None]:
    """float64 [n, L + R], and the peaks of packed rows."""
    parts = _cells(a, b, n)
    name = a.get("kv_cache_dtype", "auto")
    if name in PACKED_FORMATS:
        values, peak = decode(parts[0].numpy(), name, latent, rope)
        return values.astype(np.float64), peak
    return np.concatenate([to_numpy(part.detach()) for part in parts], axis=1), None


@dataclass
class Sight:
    """Which keys the queries of one sequence see: all broadcastable to [Sq, H, n]."""

    sees: Array  # bool
    bias: Array | None  # the additive mask, 0 where it hides
    count: Array | None  # how often a list names the key


def sight(a: Arguments, b: int, n: int, tokens: slice) -> Sight:
    """``tokens``: those of sequence ``b`` among all, or in its row of a batch."""
    q_len = tokens.stop - tokens.start
    ragged = a.get("cu_seqlens_q") is not None
    position = np.arange(n)
    limit = np.full((q_len, 1), n)
    if a.get("causal"):
        limit = n - q_len + 1 + np.arange(q_len)[:, None]
    sees = position < limit
    if a.get("cache_leftpad") is not None:
        sees &= position >= int(a["cache_leftpad"][b])
    if a.get("window", 0) > 0:
        sees &= position >= limit - a["window"]
    count = None
    if a.get("indices") is not None:
        lists = a["indices"][tokens] if ragged else a["indices"][b]
        if a.get("topk_length") is not None:
            lists = lists[:, : int(a["topk_length"][b])]
        places = lists.numpy().astype(np.int64)
        places = np.where((places < 0) | (places >= n), n, places)
        places += np.arange(q_len)[:, None] * (n + 1)
        count = np.bincount(places.ravel(), minlength=q_len * (n + 1))
        count = count.reshape(q_len, n + 1)[:, :n]
        sees &= count > 0
        count = count[:, None]
    sees = sees[:, None]
    if a.get("attn_mask") is None:
        return Sight(sees, None, count)
    mask = a["attn_mask"].detach()
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[b if mask.shape[0] > 1 else 0]
    if ragged and mask.shape[1] > 1:
        mask = mask[:, tokens]
    mask = mask[..., :n].transpose(0, 1)
    if mask.dtype == torch.bool:
        return Sight(sees & mask.numpy(), None, count)
    values = to_numpy(mask)
    hidden = values <= torch.finfo(mask.dtype).min
    return Sight(sees & ~hidden, np.where(hidden, 0, values), count)


def query_tokens(a: Arguments, heads_dim: int = -2) -> list[slice]:
    """The tokens of each sequence."""
    if a.get("cu_seqlens_q") is not None:
        starts = a["cu_seqlens_q"].tolist()
        return [slice(i, j) for i, j in itertools.pairwise(starts)]
    return [slice(0, a["q"].shape[1])] * a["cache_seqlens"].shape[0]


@dataclass
class Expected:
    """The results of one sequence. Bounds: of a row's error, by its norm."""

    out: Array  # [Sq, H, V]
    lse: Array  # [Sq, H]
    out_bound: Array
    lse_bound: Array
    status: Array  # [Sq, H]: EMPTY, FINITE, NAN or ANY


@dataclass(frozen=True)
class Precision:
    """How a level computes a call."""

    arithmetic: str  # F32, BF16, INT16, INT8
    cache_format: str
    out: float  # unit roundoff of the results
    projections: float | None  # that of products with w_kv_b
    absorbed: bool  # queries may be projected,
    expanded: bool  # or keys and values of heads be made


def precision(a: Arguments, isa: str) -> Precision:
    q = a["q"]
    name = a.get("kv_cache_dtype", "auto")
    if name not in PACKED_FORMATS:
        name = {v: k for k, v in mla_cases.FLOAT_FORMATS.items()}[a["kv_cache"].dtype]
    how = mla_cases.arithmetic(isa, name, q.dtype)
    out = mla_cases.UNIT_ROUNDOFF[q.dtype]
    if a.get("w_kv_b") is None:
        return Precision(how, name, out, None, False, False)
    working = _BF16 if q.dtype == torch.bfloat16 else _F32
    # f32 rows over a cache of 16 bits are computed in f32.
    if name not in PACKED_FORMATS and q.dtype == torch.float16:
        how = "F32"
    longest = max((t.stop - t.start for t in query_tokens(a)), default=0)
    form = a.get("form", "auto")
    if form == "expanded":  # over rows that are numbers by then
        how = mla_cases.arithmetic(isa, "bf16" if working == _BF16 else "fp32", q.dtype)
        working = _F32 if how == "F32" else working
    expanded = form == "expanded" or (form == "auto" and longest >= 32 and a.get("indices") is None)
    return Precision(how, name, out, working, form != "expanded", expanded)


def attention(a: Arguments, isa: str) -> list[Expected]:
    """The results of each sequence of `mla_attention`, or with ``w_kv_b`` `mla_attention_kv_b`."""
    how = precision(a, isa)
    w = a.get("w_kv_b")
    q, q_pe = a["q"].detach(), a.get("q_pe")
    main = a["head_dim_v"] if w is None else w.shape[1] - a["head_dim_v"]
    latent = a["head_dim_v"] if w is None else w.shape[2]
    queries = to_numpy(q)
    if q_pe is not None:
        queries = np.concatenate([queries, to_numpy(q_pe.detach())], axis=-1)
    rope = queries.shape[-1] - main
    heads = queries.shape[-2]
    sink = None if a.get("attn_sink") is None else to_numpy(a["attn_sink"].detach())
    weights = None if w is None else to_numpy(w.detach())
    scale = float(np.float32(a["softmax_scale"]))
    results = []
    with np.errstate(all="ignore"):
        for b, tokens in enumerate(query_tokens(a)):
            mine = queries[tokens] if q.dim() == 3 else queries[b]
            n = int(a["cache_seqlens"][b])
            keys, peak = sequence_rows(a, b, n, latent, rope)
            seen = sight(a, b, n, tokens)
            results.append(
                _attend(mine, keys, peak, seen, scale, sink, latent, heads, weights, how)
            )
    return results


def largest_logit(tolerance: float) -> float:
    """Up to which rounding to float32, of products and of sums, moves a weight by no more.

    Where all logits of a row are larger, so is its log-sum-exp.
    """
    return tolerance / (4 * _F32)


def _attend(
    q: Array,
    keys: Array,
    peak: Array | None,
    seen: Sight,
    scale: float,
    sink: Array | None,
    latent: int,
    heads: int,
    w: Array | None,
    how: Precision,
) -> Expected:
    q_len, n = q.shape[0], len(keys)
    sees = np.broadcast_to(seen.sees, (q_len, heads, n))
    nan_key, bad_key = np.isnan(keys).any(axis=1), ~np.isfinite(keys).all(axis=1)
    if peak is not None:
        bad_key = bad_key | np.isnan(peak).any(axis=1)
    nan_q, bad_q = np.isnan(q).any(axis=2), ~np.isfinite(q).all(axis=2)
    some = sees.any(axis=2)
    status = np.where(some, FINITE, EMPTY)
    if w is not None:
        nan_w, bad_w = np.isnan(w).any(axis=(1, 2)), ~np.isfinite(w).all(axis=(1, 2))
        nan_q, bad_q = nan_q | nan_w, bad_q | bad_w
        w = np.where(np.isfinite(w), w, 0)
    bad = bad_q | (sees & bad_key).any(axis=2)
    # In the kernels' units of log2 an addend below this is minus infinity, which hides a key.
    near = True if seen.bias is None else ~(seen.bias < -np.finfo(np.float32).max / np.log2(np.e))
    nan = nan_q | (sees & near & nan_key).any(axis=2)
    # An infinity may come out as one, as NaN, or leave a finite weight of 0: only NaN stays NaN.
    infinite = (bad_q & ~nan_q) | (sees & (bad_key & ~nan_key)).any(axis=2)
    if w is not None:  # NaN in the rows of values alone reaches those values alone
        infinite |= bad_w
    if seen.bias is not None:  # a mask that says nothing, or hides all other keys for good
        odd = ~np.isfinite(seen.bias)
        bad |= (sees & odd).any(axis=2)
        infinite |= (sees & odd).any(axis=2)
        seen = Sight(seen.sees, np.where(odd, 0, seen.bias), seen.count)
    if sink is not None:
        odd = np.isnan(sink) | (sink == np.inf)
        bad, infinite = bad | odd, infinite | odd
        sink = np.where(odd, 0, sink)
    status[some & bad] = ANY
    status[some & nan & ~infinite] = NAN
    unused = bad_key | ~sees.any(axis=(0, 1))
    keys = np.where(unused[:, None], 0, keys)
    peak = None if peak is None else np.where(unused[:, None], 0, peak)
    q = np.where(bad_q[:, :, None], 0, q)

    width = keys.shape[1]
    rope = width - latent
    nope = q.shape[2] - rope
    shift = np.zeros((q_len, heads, n))  # what rounding may do to a logit
    largest = np.zeros((q_len, heads, n))  # of what is added up for a logit
    of_values = np.abs(keys[:, :latent]).max(axis=1, initial=0)  # the same of a key's values
    if w is not None:
        value = w.shape[1] - nope
        uk, uv = w[:, :nope], w[:, nope:]
        q_model = q[:, :, :nope].transpose(1, 0, 2)  # [H, Sq, P]
        q_latent = (q_model @ uk).transpose(1, 0, 2)
        made = (np.abs(q_model) @ np.abs(uk)).transpose(1, 0, 2)
        q = np.concatenate([q_latent, q[:, :, nope:]], axis=2)
        lat = keys[:, :latent]
        unit = how.projections
        assert unit is not None
        # Queries are rounded to the working type once they are projected; or keys are.
        shift += 3 * unit * np.sqrt(np.square(q_latent) @ np.square(lat).T)
        added = made @ np.abs(lat).T
        shift += (8 + 2 * math.sqrt(nope)) * _F32 * added
        if how.absorbed:
            largest = np.maximum(largest, made.max(axis=2, initial=0)[:, :, None])
        if how.expanded:  # rotary keys too
            of_rows = np.abs(lat) @ np.abs(w).transpose(0, 2, 1)  # [H, n, P + V]
            largest = np.maximum(largest, np.maximum(added, of_rows[:, :, :nope].max(axis=2)))
            of_values = np.maximum(of_values, of_rows[:, :, nope:].max(axis=2))
            shift += 3 * unit * np.sqrt(np.square(q[:, :, latent:]) @ np.square(keys[:, latent:]).T)
            of_heads = lat @ uk.transpose(0, 2, 1)  # [H, n, P]
            squares = np.square(q_model) @ np.square(of_heads).transpose(0, 2, 1)
            shift += 3 * unit * np.sqrt(squares).transpose(1, 0, 2)
            shift += (8 + 2 * math.sqrt(latent)) * _F32 * added

    dots = q @ keys.T
    size = np.abs(q) @ np.abs(keys).T
    logits = scale * dots
    if seen.bias is not None:
        logits = logits + seen.bias
    logits = np.where(sees, logits, -np.inf)
    most = logits.max(axis=2, initial=-np.inf)
    most = np.where(some, most, 0)
    relative = logits - most[:, :, None]

    # What rounding may do to a logit.
    shift += (8 + 2 * math.sqrt(width)) * _F32 * size
    if peak is not None and how.arithmetic.startswith("INT"):
        shift += _rounded_codes(q, keys, peak, latent, abs(scale), how)
    shift = abs(scale) * shift + 8 * _F32 * np.abs(np.where(sees, logits, 0))
    shift += 4 * _F32 * np.abs(np.where(sees, relative, 0)) + 2e-6
    if seen.bias is not None:
        shift += 4 * _F32 * np.abs(seen.bias)
    if peak is not None and how.arithmetic.startswith("INT"):
        # Exponents have the logarithm of a value's scale in them, as far from 0 as 127.
        shift += 2 * _F32 * 127
    shift = np.where(sees, shift, 0)
    largest = max(abs(scale), 1) * np.maximum(largest, size)
    if seen.bias is not None:
        largest = np.maximum(largest, np.abs(seen.bias))
    beyond = (np.where(sees, largest, 0) > _RANGE).any(axis=2)

    # The softmax, and how far the weight of each key may move.
    if seen.count is not None:
        relative = relative + np.log(seen.count)
    of_sink = np.full((q_len, heads), -np.inf) if sink is None else sink - most
    uncertain = 0.0 if sink is None else 8 * _F32 * (np.abs(sink) + np.abs(most)) + 2e-6
    uncertain = np.where(np.isfinite(of_sink), uncertain, 0)
    e = np.exp(relative)
    total = e.sum(axis=2)
    beyond |= (e * of_values).sum(axis=2) > _RANGE  # weights are relative to the largest
    lse = np.where(some, most + np.log(np.where(some, total, 1)), -np.inf)
    if shift.max(initial=0) < 0.1 and uncertain.max(initial=0) < 0.1:
        p = e / np.where(some, total + np.exp(of_sink), 1)[:, :, None]
        furthest = np.maximum(shift.max(axis=2, initial=0), uncertain)[:, :, None]
        moved = 1.12 * (shift + furthest) * np.minimum(p, 1 - p)
        lse_bound = 1.06 * (e * shift).sum(axis=2) / np.where(some, total, 1)
    else:
        p, moved, lse_bound = _moved_far(relative, shift, of_sink, uncertain, some)
        moved = np.where(sees, moved, 0)
    square_added, all_added = _added(e / np.where(some, total, 1)[:, :, None], seen.count)
    lse_bound += 4 * _F32 * np.abs(lse) + 4e-6 + np.minimum(3 * np.sqrt(square_added), all_added)

    values = keys[:, :latent]
    out = p @ values
    square = np.square(values).sum(axis=1)
    norm = np.sqrt(square)
    out_norm = np.linalg.norm(out, axis=2)
    apart = np.sqrt(np.maximum(square - 2 * (out @ values.T) + np.square(out_norm)[:, :, None], 0))
    bound = (moved * apart).sum(axis=2)
    if sink is not None:
        bound += np.minimum(moved.sum(axis=2), 1) * out_norm
    # Sums of weights and of values, and weights as codes.
    sums = np.minimum(3 * np.sqrt(2 * square_added), 2 * all_added)
    bound += (8 * _F32 + sums) * (p @ norm)
    if how.arithmetic == "BF16" or how.expanded:
        bound += _independent(_BF16 * p if how.out == _BF16 else _F32 * p, norm)
    if peak is not None:
        bound += _LEAST_SCALE * 128 * math.sqrt(latent)
    if peak is not None and how.arithmetic.startswith("INT"):
        bound += _rounded_values(p, seen.count, norm, peak[:, 0], latent, how)

    if w is not None:
        by_head = out.transpose(1, 0, 2)  # [H, Sq, L]
        columns = np.square(uv).sum(axis=1)  # [H, L]
        through = _spectral(uv)
        unit = how.projections
        assert unit is not None
        bound *= through
        bound += 3 * unit * np.sqrt((np.square(by_head) @ columns[:, :, None])[:, :, 0]).T
        bound += (8 + 2 * math.sqrt(latent)) * _F32 * out_norm * np.sqrt(columns.sum(axis=1))
        if how.expanded:
            bound += _independent(2 * unit * p, norm) * through
        rows_of_values = uv.transpose(0, 2, 1)
        of_results = np.abs(by_head) @ np.abs(rows_of_values)
        beyond |= of_results.max(axis=2, initial=0).T > _RANGE
        out = (by_head @ rows_of_values).transpose(1, 0, 2)
        out_norm = np.linalg.norm(out, axis=2)
        latent = value
    status[beyond & (status == FINITE)] = ANY
    bound += how.out * out_norm + math.sqrt(latent) * 2.0**-25 * (how.out == 2.0**-11)
    return Expected(
        np.where(some[:, :, None], out, 0), lse, 1.05 * bound + 1e-30, lse_bound, status
    )


def _spectral(w: Array) -> Array:
    """Bound of the largest singular value of each of [H, V, L]: a little above it."""
    size = np.sqrt(np.square(w).sum(axis=(1, 2)))
    w = w / np.maximum(size, 1e-300)[:, None, None]
    gram = w @ w.transpose(0, 2, 1)
    for _ in range(2):
        gram = gram @ gram
    return size * np.square(gram).sum(axis=(1, 2)) ** (1 / 16)


def _moved_far(
    logits: Array, shift: Array, sink: Array, uncertain: Array, some: Array
) -> tuple[Array, Array, Array]:
    """Weights, how far they may move, and the log-sum-exp: by the extremes of each key's weight."""
    total, _ = _log_sums(logits, sink)
    p = np.where(some[:, :, None], np.exp(logits - total[:, :, None]), 0)
    above, below = logits + shift, logits - shift
    _, least_rest = _log_sums(below, sink - uncertain)
    _, most_rest = _log_sums(above, sink + uncertain)
    moved = np.maximum(_part(above, least_rest) - p, p - _part(below, most_rest))
    nothing = np.full(some.shape, -np.inf)
    low, middle, high = (_log_sums(x, nothing)[0] for x in (below, logits, above))
    return p, np.maximum(moved, 0), np.maximum(high - middle, middle - low)


def _log_sums(x: Array, other: Array) -> tuple[Array, Array]:
    """Log of the sum of exp(x) over the last dim and exp(other): of all, and without each key."""
    n = x.shape[2]
    everything = np.concatenate([x, other[:, :, None]], axis=2)
    at = everything.argmax(axis=2)[:, :, None]
    most = np.take_along_axis(everything, at, axis=2)
    most = np.where(np.isfinite(most), most, 0)
    total = most + np.log(np.exp(everything - most).sum(axis=2, keepdims=True))
    # Where a key is more than half of the sum, the others are summed again.
    rest = total + np.log1p(-np.minimum(np.exp(everything - total), 0.6))
    np.put_along_axis(everything, at, -np.inf, axis=2)
    second = everything.max(axis=2, keepdims=True)
    second = np.where(np.isfinite(second), second, 0)
    others = second + np.log(np.exp(everything - second).sum(axis=2, keepdims=True))
    np.put_along_axis(rest, at, others, axis=2)
    return total[:, :, 0], rest[:, :, :n]


def _part(x: Array, rest: Array) -> Array:
    """exp(x) / (exp(x) + exp(rest))"""
    return np.where(x == -np.inf, 0, 1 / (1 + np.exp(rest - x)))


def _added(p: Array, count: Array | None) -> tuple[Array, Array]:
    """What adding up weights may do to their sum, relative to it: the sum of the squares of what is
    independent, and all of it at worst.

    An addition is off by half an ulp of the sum at most, and by no more than what is added. Terms
    that differ by less than an ulp of the sum round to the same side: those of a key that is listed
    again and again, and all that are less than one.
    """
    times = np.ones(1) if count is None else np.maximum(count, 1)
    each = p / times
    off = times * np.minimum(each, _F32)
    ulps = np.floor(each / (2 * _F32))
    order = np.argsort(ulps, axis=2)
    ulps, off = np.take_along_axis(ulps, order, axis=2), np.take_along_axis(off, order, axis=2)
    begins = np.ones(ulps.shape, dtype=bool)
    begins[:, :, 1:] = ulps[:, :, 1:] != ulps[:, :, :-1]
    group = begins.ravel().cumsum() - 1
    of_group = np.bincount(group, off.ravel())[group].reshape(off.shape)
    return (off * of_group).sum(axis=2), off.sum(axis=2)


def _independent(part: Array, norm: Array) -> Array:
    """Bound of a sum of vectors of lengths ``norm`` [n] times errors of at most ``part``."""
    lengths = part * norm
    return np.minimum(3 * np.sqrt(np.square(lengths).sum(axis=2)), lengths.sum(axis=2))


def _steps(peak: Array, how: Precision) -> Array:
    """What a code of a row of the arithmetic stands for, per token and segment."""
    exact = how.cache_format == "q8_kv"
    if how.arithmetic == "INT16" and not exact:
        return peak / 11585
    return peak / (_LARGEST_CODE[how.cache_format][0] if exact else 127)


def _rounded_codes(
    q: Array, keys: Array, peak: Array, latent: int, scale: float, how: Precision
) -> Array:
    """[Sq, H, n] what codes of queries and keys do to a logit, before the softmax scale.

    Errors of half a code at most are independent: six standard deviations, or all of them at worst.
    Those of queries are also computed, as 16-bit numbers beside a step that is nearly a multiple of
    theirs are all off to the same side. Int8 computes a logit more finely once its error is
    expected to exceed 0.05 (log2).
    """
    variance = expected = rounded = computed = finely = 0.0
    worst = 0.0
    step_k = _steps(peak, how)
    for seg, part in enumerate((slice(0, latent), slice(latent, None))):
        mine, of_keys = q[:, :, part], keys[:, part]
        length = mine.shape[2]
        if length == 0:
            continue
        step = _query_steps(mine, how)
        codes = mine / np.where(step > 0, step, 1)[:, :, None]
        left = codes - np.round(codes)
        computed = computed + step[:, :, None] * (left @ of_keys.T)
        left = left - np.round(left * 254) / 254
        finely = finely + step[:, :, None] * (left @ of_keys.T)
        square = np.square(of_keys).sum(axis=1)
        variance = variance + np.square(step)[:, :, None] * square / 12
        worst = worst + step[:, :, None] / 2 * np.abs(of_keys).sum(axis=1)
        expected = expected + np.square(step[:, :, None] * step_k[:, seg]) * (1600 / 12 * length)
        if how.cache_format != "q8_kv":
            squares = np.square(mine).sum(axis=2)[:, :, None]
            rounded = rounded + squares * np.square(1.5 * step_k[:, seg]) / 12
    deviation = np.sqrt(variance)
    error = np.minimum(np.maximum(6 * deviation, np.abs(computed) + 2 * deviation), worst)
    if how.arithmetic == "INT8":
        fine = scale * np.sqrt(expected) > 0.05 * math.log(2) * 1.02
        most = np.maximum(6 * deviation, np.abs(finely) * 254 + 2 * deviation)
        error = np.where(fine, np.minimum(most, worst) / 254, error)
    return error + 6 * np.sqrt(rounded)


def _query_steps(q: Array, how: Precision) -> Array:
    """What a code of each query of a segment [Sq, H, d] stands for."""
    most = np.abs(q).max(axis=2)
    if how.arithmetic == "INT8":
        return most / 127
    largest, length = (127, 512) if how.cache_format == "q8_kv" else (11585, 64)
    # Products of codes fit int32, where each code is half of one off.
    room = 2.0**31 * (1023 / 1024) / largest - min(length, q.shape[2]) / 2
    return np.maximum(most / 32767, _sums(np.abs(q), length) / room)


def _sums(x: Array, length: int) -> Array:
    """The largest sum of ``length`` neighbours of [.., d]."""
    parts = [x[..., i : i + length].sum(axis=-1) for i in range(0, x.shape[-1], length)]
    return np.maximum.reduce(parts)


def _rounded_values(
    p: Array, count: Array | None, norm: Array, peak: Array, latent: int, how: Precision
) -> Array:
    """Weights are codes relative to the largest times its value scale; values may be, too.

    A key that a list names several times has a code each time, and the same error.
    """
    times = np.ones(1) if count is None else np.maximum(count, 1)
    top = 255 if how.arithmetic == "INT8" else 1448
    step = _steps(np.stack([peak, peak], axis=1), how)[:, 0]
    largest = (p / times * step).max(axis=2, initial=0)
    usable = np.maximum(step, _LEAST_SCALE)
    part = np.where(p > 0, 0.5 / top * times * largest[:, :, None] / usable, 0)
    bound = 1.1 * _independent(part, norm)
    if how.cache_format != "q8_kv":  # of equal values, equal errors
        bound += 1.5 * math.sqrt(latent / 12) * (p @ step)
    return bound


def differentiable(a: Arguments) -> tuple[Tensor, Tensor]:
    """Results of one call through autograd, from tensors of float64 (packed caches aside)."""
    q, q_pe, w, sink = (a.get(n) for n in ("q", "q_pe", "w_kv_b", "attn_sink"))
    ragged = a.get("cu_seqlens_q") is not None
    main = a["head_dim_v"] if w is None else w.shape[1] - a["head_dim_v"]
    latent = a["head_dim_v"] if w is None else w.shape[2]
    q = q.double() if q_pe is None else torch.cat([q, q_pe], dim=-1).double()
    rope = q.shape[-1] - main
    if w is not None:
        w = w.double()
        projected = torch.einsum("...hp,hpl->...hl", q[..., :main], w[:, :main])
        q = torch.cat([projected, q[..., main:]], dim=-1)
    outs, lses = [], []
    for b, tokens in enumerate(query_tokens(a)):
        mine = q[tokens] if ragged else q[b]
        n = int(a["cache_seqlens"][b])
        if a["kv_cache"].is_floating_point():
            keys = torch.cat(_cells(a, b, n), dim=-1)
        else:
            keys = torch.from_numpy(sequence_rows(a, b, n, latent, rope)[0])
        seen = sight(a, b, n, tokens)
        sees = torch.from_numpy(np.broadcast_to(seen.sees, (*mine.shape[:2], n)).copy())
        keys = keys.double().masked_fill(~sees.any(0).any(0)[:, None], 0)
        logits = a["softmax_scale"] * (mine @ keys.T)
        if seen.bias is not None:
            logits = logits + torch.from_numpy(seen.bias)
        if seen.count is not None:
            logits = logits + torch.from_numpy(np.log(np.maximum(seen.count, 1)))
        empty = ~sees.any(-1)
        logits = logits.masked_fill(~sees, -1e300)
        most = torch.nn.functional.pad(logits, (0, 1), value=-1e300).amax(-1).detach()
        most = most.masked_fill(empty, 0)
        if sink is not None:
            most = torch.maximum(most, sink.detach().double())
        p = (logits - most[..., None]).exp().masked_fill(~sees, 0)
        total = p.sum(-1)
        # A sum too small beside a large sink would have no logarithm.
        lse = torch.logsumexp(logits, dim=-1) if n else most
        lse = lse.masked_fill(empty, -torch.inf)
        if sink is not None:
            total = total + (sink.double() - most).exp()
        out = (p @ keys[:, :latent]) / total.masked_fill(empty, 1)[..., None]
        outs.append(out.masked_fill(empty[..., None], 0))
        lses.append(lse.T)
    if not outs:
        return q.new_zeros(*a["q"].shape[:-1], a["head_dim_v"]), q.new_zeros(0)
    out = torch.cat(outs) if ragged else torch.stack(outs)
    if w is not None:
        out = torch.einsum("...hl,hvl->...hv", out, w[:, main:])
    return out, torch.cat(lses, dim=-1) if ragged else torch.stack(lses)


def check_attention(a: Arguments, out: Tensor, lse: Tensor, expected: list[Expected]) -> str | None:
    """What is wrong with the results, or None."""
    ragged = a.get("cu_seqlens_q") is not None
    q = a["q"]
    shape = (*q.shape[:-1], a["head_dim_v"])
    lse_shape = (q.shape[1], q.shape[0]) if ragged else (q.shape[0], q.shape[2], q.shape[1])
    if out.dtype != q.dtype or tuple(out.shape) != shape:
        return f"out: {out.dtype} {list(out.shape)}, expected {q.dtype} {list(shape)}"
    if lse.dtype != torch.float32 or tuple(lse.shape) != lse_shape:
        return f"lse: {lse.dtype} {list(lse.shape)}, expected float32 {list(lse_shape)}"
    outs, lses = to_numpy(out.detach()), to_numpy(lse.detach())
    for b, (tokens, e) in enumerate(zip(query_tokens(a), expected, strict=True)):
        mine = outs[tokens] if ragged else outs[b]
        my_lse = (lses[:, tokens] if ragged else lses[b]).T
        problem = _check_rows(mine, my_lse, e, torch.finfo(out.dtype).max)
        if problem:
            return f"{problem} of sequence {b}"
    return None


def _check_rows(out: Array, lse: Array, e: Expected, largest: float) -> str | None:
    """One sequence. Values above ``largest`` are infinite in the dtype of the results."""
    with np.errstate(all="ignore"):
        above = np.abs(e.out) + e.out_bound[:, :, None] >= largest
        out = np.where(above & (out == np.copysign(np.inf, e.out)), e.out, out)
        error = np.linalg.norm(out - e.out, axis=2)
        lse_error = np.abs(lse - e.lse)
    empty = (e.status == EMPTY) & ((out != 0).any(axis=2) | (lse != -np.inf))
    if empty.any():
        s, h = np.argwhere(empty)[0]
        what = "nan" if np.isnan(out[s, h]).any() else "not 0"
        return (
            f"row without keys is {what}: out {out[s, h, :3]}, lse {lse[s, h]} at token {s}, "
            f"head {h}"
        )
    finite = e.status == FINITE
    nan = finite & (np.isnan(out).any(axis=2) | np.isnan(lse))
    if nan.any():
        s, h = np.argwhere(nan)[0]
        return f"nan: lse {lse[s, h]}, expected {e.lse[s, h]} at token {s}, head {h}"
    wrong = finite & ~(lse_error <= e.lse_bound)
    if wrong.any():
        s, h = np.argwhere(wrong)[0]
        return (
            f"lse {lse[s, h]}, expected {e.lse[s, h]} +- {e.lse_bound[s, h]:.2e} at token {s}, "
            f"head {h}"
        )
    wrong = finite & ~(error <= e.out_bound)
    if wrong.any():
        s, h = np.argwhere(wrong)[0]
        return (
            f"out off by {error[s, h]:.3e}, at most {e.out_bound[s, h]:.3e} of "
            f"{np.linalg.norm(e.out[s, h]):.3e} at token {s}, head {h}"
        )
    kept = (e.status == NAN) & ~(np.isnan(out).all(axis=2) & np.isnan(lse))
    if kept.any():
        s, h = np.argwhere(kept)[0]
        return f"no nan where the query sees one: lse {lse[s, h]} at token {s}, head {h}"
    return None
