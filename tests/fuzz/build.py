"""From a spec to its call: tensors in the layouts asked for, unseen cells poisoned."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import mla_cases
from tests.fuzz import oracle
from tests.fuzz.specs import Spec
from torch_flash_mla import reference
from torch_flash_mla.formats import PACKED_FORMATS

_BANK_ROWS = 320


@dataclass
class Call:
    """An operator's name and arguments, and what is known about them."""

    spec: Spec
    operator: str
    arguments: dict[str, Any]
    # Normal noise and logits of common size: the bounds of mla_cases.py hold.
    ordinary: bool = False
    original: Tensor | None = None  # rows [B, N, D] before they were packed
    notes: dict[str, Any] = field(default_factory=dict)


@functools.cache
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32)


def noise(rng: random.Random, *shape: int) -> Tensor:
    """Normal noise: a piece of a bank, as drawing it takes longer than attending to it."""
    bank, count = _noise_bank(), math.prod(shape)
    first = rng.randrange(len(bank) - count)
    return torch.from_numpy(bank[first : first + count].reshape(shape).copy())


@functools.cache
def row_bank(kind: str, latent: int, rope: int) -> Tensor:
    """float32 [320, D] cache rows. normal; sink: every tenth times 4; centre: of one direction;
    wild: of all magnitudes."""
    rng = np.random.default_rng([latent, rope])
    rows = rng.standard_normal((_BANK_ROWS, latent + rope), dtype=np.float32)
    if kind == "sink":
        rows[::10] *= 4
    elif kind == "centre":
        rows = direction(latent, rope).numpy() + np.float32(0.1) * rows
    elif kind == "wild":
        rows *= 10 ** (6 * rng.random((_BANK_ROWS, 1), dtype=np.float32) - 3)
        rows *= 10 ** (2 * rng.random(rows.shape, dtype=np.float32) - 1)
        rows[::16] = 0
    return torch.from_numpy(rows)


@functools.cache
def direction(latent: int, rope: int) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng([latent, rope, 1]).standard_normal(latent + rope, dtype=np.float32)
    )


@functools.cache
def stored_bank(kind: str, latent: int, rope: int, name: str) -> Tensor:
    """The same in a cache's format: encoding rows takes longer than all else in a case."""
    rows = row_bank(kind, latent, rope)
    if name in PACKED_FORMATS:
        return reference.encode_rows(rows[:, :latent], rows[:, latent:], name)
    return rows.to(mla_cases.FLOAT_FORMATS[name])


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(t: Tensor) -> Tensor:
    """The same values, every second of a larger tensor."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> Tensor:
    if how == "zero":
        return torch.zeros(shape, dtype=dtype)
    if dtype == torch.uint8:
        return torch.full(shape, 0xFF if how != "bytes" else 0xFE, dtype=dtype)
    value = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38, "bytes": -math.nan}
    return torch.full(shape, value[how], dtype=torch.float32).to(dtype)


def sliced(t: Tensor, which: str, poison: str) -> Tensor:
    """A cache [blocks, page, row] inside a larger one."""
    if not which or t.numel() == 0:
        return t
    blocks, page, width = t.shape
    every = which == "all"
    wide = poisoned(
        (
            blocks * 2 if every or which == "block" else blocks,
            page + 3 if every or which == "token" else page,
            width + 5 if every or which == "row" else width,
        ),
        t.dtype,
        poison,
    )
    step = wide.shape[0] // blocks
    part = wide[::step, :page, :width]
    part.copy_(t)
    return part


def laid_out(t: Tensor, how: str) -> Tensor:
    """Queries [.., H, D] (or rows) in another layout of memory."""
    if how == "transposed" and t.dim() >= 3:
        return t.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "wide":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), math.nan, dtype=t.dtype)
        wide[..., 3 : 3 + t.shape[-1]] = t
        return wide[..., 3 : 3 + t.shape[-1]]
    if how == "gaps" and t.dim() >= 2:
        wide = torch.full((*t.shape[:-2], t.shape[-2] * 2, t.shape[-1]), math.nan, dtype=t.dtype)
        wide[..., ::2, :] = t
        return wide[..., ::2, :]
    return t


def build(spec: Spec) -> Call:
    return _BUILD[spec["kind"]](spec, random.Random(spec["data"]))


# Attention


def _attention(spec: Spec, rng: random.Random) -> Call:
    kv_b = spec["kind"] == "kv_b"
    latent, rope, heads = spec["latent"], spec["rope"], spec["heads"]
    lengths = list(spec["lengths"])
    batch = len(lengths)
    queries = (list(spec["queries"]) + [1] * batch)[:batch]
    ragged = spec["ragged"]
    if not ragged:
        queries = [queries[0] if queries else 1] * batch
    arguments: dict[str, Any] = {
        "cache_seqlens": int32(lengths),
        "head_dim_v": spec["value"] if kv_b else latent,
        "softmax_scale": spec["scale"] * (128 + rope) ** -0.5,
        "causal": spec["causal"],
        "window": spec["window"],
        "kv_cache_dtype": spec["format"] if spec["format"] in PACKED_FORMATS else "auto",
    }
    dtype = getattr(torch, spec["q_dtype"])
    main = spec["nope"] if kv_b else latent
    q = _make_queries(spec, rng, sum(queries) if ragged else batch * [*queries, 1][0], main)
    if ragged:
        arguments["cu_seqlens_q"] = int32(np.cumsum([0, *queries]).tolist())
    else:
        q = q.view(batch, [*queries, 1][0], heads, main + rope)
    if spec["logits"]["kind"] == "scaled":
        scale = arguments["softmax_scale"] * spec["logits"]["size"]
        arguments["softmax_scale"] = max(-3e38, min(3e38, scale))
    q = q.to(dtype)
    arguments |= _key_arguments(spec, rng, lengths, queries, q)
    if kv_b:
        arguments |= _weights(spec, rng, heads, main, latent, dtype)
        arguments["form"] = spec["form"]

    # q is needed for its shape only until queries that see nothing are known.
    tokens = oracle.query_tokens({"q": q, **arguments})
    sights = [
        oracle.sight(arguments, b, n, t)
        for b, (n, t) in enumerate(zip(lengths, tokens, strict=True))
    ]
    arguments |= _store(spec, rng, lengths, sights)
    if spec["poison_query"]:
        _poison_queries(spec, rng, q, sights, tokens, ragged)
    if spec["split"]:
        arguments["q_pe"] = laid_out(q[..., main:], spec["q_layout"])
        q = q[..., :main]
    arguments["q"] = laid_out(q, spec["q_layout"])
    if spec["strided"]:
        for name in ("cache_seqlens", "cache_leftpad", "topk_length", "cu_seqlens_q", "attn_sink"):
            if arguments.get(name) is not None:
                arguments[name] = strided(arguments[name])
        for name in ("block_table", "indices"):
            t = arguments.get(name)
            if t is not None and t.numel() > 0:
                arguments[name] = strided(t)
    call = Call(spec, "mla_attention_kv_b" if kv_b else "mla_attention", arguments)
    call.ordinary = spec["logits"]["kind"] in ("normal", "peaky", "sink") and spec["scale"] == 1
    if spec["indices"] and spec["indices"]["kind"] != "some":
        call.ordinary = False  # the weights of a key that is listed again and again round alike
    if spec["sink"] == "large" or (spec["mask"] and spec["mask"]["low"] < -1e5):
        call.ordinary = False  # next to nothing is left of some rows, or of their logits
    return call


def _make_queries(spec: Spec, rng: random.Random, tokens: int, main: int) -> Tensor:
    """float32 [tokens, H, main + R]."""
    heads, rope = spec["heads"], spec["rope"]
    kind, size = spec["logits"]["kind"], spec["logits"]["size"]
    q = noise(rng, tokens, heads, main + rope)
    if kind == "peaky":
        q *= 3
    elif kind == "centre" and spec["kind"] != "kv_b":
        g = direction(main, rope)
        scale = spec["scale"] * (128 + rope) ** -0.5 or 1
        q += (size / (g.square().sum() * scale)) * g
    elif kind in ("factor", "centre"):
        q *= size
    elif kind == "wild":
        q *= (
            10
            ** (
                4 * torch.from_numpy(np.random.default_rng(rng.getrandbits(30)).random(q.shape)) - 2
            ).float()
        )
    if spec["q_dtype"] == "float16":
        q = q.clamp(-65000, 65000)
    return q.clamp(-3e38, 3e38)


def _key_arguments(
    spec: Spec, rng: random.Random, lengths: list[int], queries: list[int], q: Tensor
) -> dict[str, Any]:
    """The arguments that say which keys a query sees, and the sink."""
    batch, heads, ragged = len(lengths), spec["heads"], spec["ragged"]
    result: dict[str, Any] = {}
    if spec["leftpad"] is not None:
        pads = (list(spec["leftpad"]) + [0] * batch)[:batch]
        result["cache_leftpad"] = int32([min(p, n) for p, n in zip(pads, lengths, strict=True)])
    if spec["sink"]:
        sink = noise(rng, heads)
        if spec["sink"] == "large":
            sink *= 1000
        elif spec["sink"] == "infinite" and heads:
            sink[rng.randrange(heads)] = -math.inf
        result["attn_sink"] = sink
    tokens = sum(queries) if ragged else [*queries, 1][0]
    if spec["mask"]:
        result["attn_mask"] = _mask(spec["mask"], rng, batch, heads, tokens, lengths, ragged)
    if spec["indices"]:
        topk, kind = spec["indices"]["topk"], spec["indices"]["kind"]
        of = [b for b, n in enumerate(queries) for _ in range(n)]  # the sequence of each token
        draw = np.random.default_rng(rng.getrandbits(30))
        lists = np.full((len(of), topk), -1, dtype=np.int64)
        for t, b in enumerate(of):
            n = lengths[b]
            if kind == "any":
                lists[t] = draw.integers(-3, n + 5, topk)
            elif kind == "repeated" and n:
                lists[t] = draw.integers(0, n, topk)
            else:
                chosen = draw.permutation(n)[:topk]
                lists[t, : len(chosen)] = chosen
                if kind == "padded" and len(chosen):
                    lists[t, len(chosen) :] = chosen[-1]
                elif len(chosen) < topk:
                    draw.shuffle(lists[t])
        lists[lists == -3] = -(2**31)
        shape = (tokens, topk) if ragged else (batch, tokens, topk)
        result["indices"] = torch.from_numpy(lists.astype(np.int32)).view(shape)
        if spec["indices"]["lengths"]:
            result["topk_length"] = int32([rng.randint(0, topk) for _ in lengths])
    return result


def _mask(
    mask: Spec,
    rng: random.Random,
    batch: int,
    heads: int,
    tokens: int,
    lengths: list[int],
    ragged: bool,
) -> Tensor:
    columns = max([*lengths, 0]) + mask["extra"]
    shape = [
        batch if mask["of_batch"] and not ragged else 1,
        heads if mask["of_heads"] else 1,
        tokens if mask["of_tokens"] else 1,
        columns,
    ]
    dims = mask["dims"]
    while dims < 4 and any(n != 1 for n in shape[: 4 - dims]):
        dims += 1
    shape = shape[4 - dims :]
    if ragged:
        shape = shape[-3:]
    draw = np.random.default_rng(rng.getrandbits(30))
    pattern = mask["pattern"]
    keep = np.ones(shape, dtype=bool)
    a, b = sorted((rng.randint(0, columns), rng.randint(0, columns)))
    if pattern == "holes":
        keep = draw.random(shape) < rng.choice([0.1, 0.7, 0.95])
        keep[..., columns // 4 : columns // 4 + rng.choice([0, 16, 150])] = False
    elif pattern == "interval":
        begins = draw.integers(0, columns + 1, (*shape[:-1], 1))
        keep = np.arange(columns) >= np.minimum(begins, draw.integers(0, columns + 1, begins.shape))
        keep &= np.arange(columns) < begins
    elif pattern == "middle":
        keep[..., a:b] = False
    elif pattern == "rows":
        keep = np.broadcast_to(draw.random((*shape[:-1], 1)) < 0.5, shape).copy()
    elif pattern == "columns":
        keep = np.broadcast_to(draw.random(columns) < 0.5, shape).copy()
    elif pattern == "none":
        keep[...] = False
    if mask["dtype"] == "bool":
        result = torch.from_numpy(keep)
    else:
        dtype = getattr(torch, mask["dtype"])
        hidden = -math.inf if mask["hidden"] == "-inf" else torch.finfo(dtype).min
        values = noise(rng, *shape) if math.prod(shape) < 1 << 20 else torch.zeros(shape)
        if mask["low"]:
            low = max(mask["low"], -6e4) if dtype == torch.float16 else mask["low"]
            values = torch.where(torch.from_numpy(draw.random(shape) < 0.4), low, values)
        result = values.to(dtype).masked_fill(torch.from_numpy(~keep), hidden)
    if mask["layout"] == "strided":
        return strided(result)
    if mask["layout"] == "expanded" and not ragged and result.dim() == 4:
        return result[:1].expand(batch, -1, -1, -1) if batch else result
    return result


def _weights(
    spec: Spec, rng: random.Random, heads: int, nope: int, latent: int, dtype: torch.dtype
) -> dict[str, Any]:
    rows = nope + spec["value"]
    w = noise(rng, heads, rows, latent) / math.sqrt(latent)
    if spec["w_layout"] == "expanded":
        w = w[:1].to(dtype).expand(heads, rows, latent)
        return {"w_kv_b": w if not heads else w[:1].expand(heads, rows, latent)}
    w = w.to(dtype)
    if spec["poison_weight"] and heads:
        w[rng.randrange(heads), rng.randrange(rows), rng.randrange(latent)] = math.nan
    if spec["w_layout"] == "transposed":
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    elif spec["w_layout"] == "wide":
        w = laid_out(w, "wide")
    return {"w_kv_b": w}


def _store(
    spec: Spec, rng: random.Random, lengths: list[int], sights: list[oracle.Sight]
) -> dict[str, Any]:
    """The cache, in which only what some query sees is anything but poison."""
    name, latent, rope = spec["format"], spec["latent"], spec["rope"]
    kind = spec["logits"]["kind"]
    kind = kind if kind in ("sink", "centre", "wild") else "normal"
    bank = stored_bank(kind, latent, rope, name)
    batch, poison = len(lengths), spec["poison"]
    plain = spec["layout"] == "plain"
    page = max([*lengths, 0]) + rng.choice([0, 3, 16]) or 1 if plain else spec["page"]
    columns = 1 if plain else max([-(-n // page) for n in lengths], default=0)
    shared = spec["shared"] and not plain
    if plain:
        blocks = batch + rng.choice([0, 1])
        table = np.arange(batch)[:, None]
    else:
        owners = 1 if shared else batch
        blocks = owners * columns + rng.choice([0, 1, 2])
        order = np.random.default_rng(rng.getrandbits(30)).permutation(blocks)
        table = np.resize(order[: owners * columns], (batch, columns))
    bank_row = rng.randrange(_BANK_ROWS)
    pool = poisoned((blocks * page, bank.shape[1]), bank.dtype, poison)
    seen_cells = []
    for b, (n, s) in enumerate(zip(lengths, sights, strict=True)):
        seen = np.broadcast_to(s.sees, (*s.sees.shape[:2], n)).any(axis=(0, 1))
        positions = np.flatnonzero(seen)
        cells = table[b][positions // page].astype(np.int64) * page + positions % page
        rows = (positions * 7 + (0 if shared else b * 31) + bank_row) % _BANK_ROWS
        pool[torch.from_numpy(cells)] = bank[torch.from_numpy(rows)]
        seen_cells.append(cells)
    if spec["poison_seen"] and any(map(len, seen_cells)):
        cell = int(rng.choice([c for cells in seen_cells for c in cells.tolist()]))
        if name in PACKED_FORMATS:
            pool[cell] = 0xFF
        else:
            pool[cell, rng.randrange(pool.shape[1])] = math.nan
    cache = pool.view(blocks, page, pool.shape[1])
    result: dict[str, Any] = {"block_table": None}
    if not plain:
        unused = np.random.default_rng(rng.getrandbits(30)).choice(
            [-1, 2**30, 2**31 - 1, 0, -(2**31)], (batch, columns + rng.choice([0, 2]))
        )
        for b, n in enumerate(lengths):
            used = -(-n // page)
            unused[b, :used] = table[b][:used]
        result["block_table"] = torch.from_numpy(unused.astype(np.int32))
    if spec["layout"] == "two_tensor":
        result["kv_cache"] = sliced(cache[..., :latent].contiguous(), spec["slices"], poison)
        result["k_pe_cache"] = sliced(cache[..., latent:].contiguous(), spec["slices"], poison)
        return result
    cache = sliced(cache, spec["slices"], poison)
    result["kv_cache"] = cache.unsqueeze(2) if spec["layout"] == "rank4" else cache
    return result


def _poison_queries(
    spec: Spec,
    rng: random.Random,
    q: Tensor,
    sights: list[oracle.Sight],
    tokens: list[slice],
    ragged: bool,
) -> None:
    """NaN in queries that see nothing; or in any one."""
    heads = spec["heads"]
    value = rng.choice([math.nan, math.inf])
    for b, (s, t) in enumerate(zip(sights, tokens, strict=True)):
        mine = q[t] if ragged else q[b]
        if spec["poison_query"] == "blind":
            sees = np.broadcast_to(s.sees, (mine.shape[0], heads, s.sees.shape[2])).any(axis=2)
            mine[torch.from_numpy(~sees)] = value
        elif mine.numel():
            mine[rng.randrange(mine.shape[0]), rng.randrange(heads), -1] = value


# Under the names of FlashMLA


def _flash_mla(spec: Spec, rng: random.Random) -> Call:
    """FlashMLA's functions; ``notes`` has arguments of mla_attention that mean the same."""
    call = _attention(spec, rng)
    a = call.arguments
    kind = spec["function"]
    batch, tokens, heads, width = a["q"].shape
    shared = {"attn_sink": a.get("attn_sink")}
    if kind == "dense":
        call.operator = "flash_mla_with_kvcache"
        call.arguments = {
            "q": a["q"],
            "k_cache": a["kv_cache"],
            "block_table": a["block_table"],
            "cache_seqlens": a["cache_seqlens"],
            "head_dim_v": a["head_dim_v"],
            "softmax_scale": a["softmax_scale"],
            "causal": a["causal"],
            "kv_cache_dtype": a["kv_cache_dtype"],
            **shared,
        }
        call.notes = {"parts": [a]}
        return call
    name = spec["format"]
    bank = stored_bank("normal", spec["latent"], spec["rope"], name)

    def lists(batch: int, tokens: int, rows: int) -> Tensor:
        draw = np.random.default_rng(rng.getrandbits(30))
        values = draw.integers(-2, rows + 3, (batch, tokens, spec["topk"]))
        return torch.from_numpy(values.astype(np.int32))

    def pool_of(blocks: int, page: int) -> Tensor:
        first = rng.randrange(_BANK_ROWS)
        rows = (torch.arange(blocks * page) + first) % _BANK_ROWS
        return bank[rows].view(blocks, page, 1, bank.shape[1])

    def counts(size: int) -> Tensor | None:
        if rng.random() < 0.5:
            return None
        return int32([rng.randint(0, spec["topk"]) for _ in range(size)])

    def part(q: Tensor, cache: Tensor, rows: Tensor, count: Tensor | None) -> dict[str, Any]:
        size, total = q.shape[0], cache.shape[0] * cache.shape[1]
        return {
            "q": q,
            "kv_cache": cache.reshape(1, total, cache.shape[-1]).expand(size, -1, -1),
            "block_table": None,
            "cache_seqlens": torch.full((size,), total, dtype=torch.int32),
            "head_dim_v": a["head_dim_v"],
            "softmax_scale": a["softmax_scale"],
            "indices": rows,
            "topk_length": count,
            "kv_cache_dtype": a["kv_cache_dtype"],
            **shared,
        }

    if kind == "prompt":
        kv = pool_of(1, rng.choice([0, 1, 17, 100])).squeeze(0)
        q = a["q"].reshape(batch * tokens, heads, width)
        rows = lists(len(q), 1, len(kv))
        count = counts(len(q))
        call.operator = "flash_mla_sparse_fwd"
        call.arguments = {
            "q": q,
            "kv": kv,
            "indices": rows,
            "sm_scale": a["softmax_scale"],
            "d_v": a["head_dim_v"],
            "topk_length": count,
            "indexer_topk": min(spec["indexer"], spec["topk"]),
            "return_max_logits": spec["max_logits"],
            **shared,
        }
        call.notes = {"parts": [part(q.unsqueeze(1), kv.unsqueeze(0), rows, count)]}
        return call
    pool = pool_of(rng.choice([1, 3]), rng.choice([1, 16, 20]))
    rows, count = lists(batch, tokens, pool.shape[0] * pool.shape[1]), counts(batch)
    call.operator = "flash_mla_with_kvcache"
    call.arguments = {
        "q": a["q"],
        "k_cache": pool,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": a["head_dim_v"],
        "softmax_scale": a["softmax_scale"],
        "indices": rows,
        "topk_length": count,
        "kv_cache_dtype": a["kv_cache_dtype"],
        **shared,
    }
    call.notes = {"parts": [part(a["q"], pool, rows, count)]}
    if kind == "extra":
        extra = pool_of(rng.choice([1, 2]), 16)
        more, limit = lists(batch, tokens, extra.shape[0] * extra.shape[1]), counts(batch)
        call.arguments |= {
            "extra_k_cache": extra,
            "extra_indices_in_kvcache": more,
            "extra_topk_length": limit,
        }
        call.notes["parts"].append(part(a["q"], extra, more, limit))
    return call


# The cache


def _append(spec: Spec, rng: random.Random) -> Call:
    latent, rope, name, tokens = spec["latent"], spec["rope"], spec["format"], spec["tokens"]
    dtype = getattr(torch, spec["dtype"])
    bank = row_bank("wild" if spec["rows"] != "normal" else "normal", latent, rope)
    first = rng.randrange(_BANK_ROWS)
    rows = bank[(torch.arange(tokens) * 7 + first) % _BANK_ROWS]
    if spec["rows"] == "special" and tokens:
        special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-30, 65504.0 * 127, 3.4e38]
        for _ in range(3):
            rows[rng.randrange(tokens), rng.randrange(latent + rope)] = rng.choice(special)
    rows = rows.to(dtype)
    page, plain = spec["page"], spec["layout"] == "plain"
    page = page if not plain else 7
    blocks = spec["blocks"]
    cells = blocks * page
    draw = np.random.default_rng(rng.getrandbits(30))
    if spec["slots"] == "repeated" and cells:
        slots = draw.integers(-1, cells, tokens)
    else:
        slots = np.full(tokens, -1, dtype=np.int64)
        order = draw.permutation(cells)[:tokens]
        slots[: len(order)] = order
        if spec["slots"] == "skips":
            slots[draw.random(tokens) < 0.3] = -1
    kv_c, k_pe = rows[:, :latent], rows[:, latent:]
    if spec["shape"] == "head":
        k_pe = k_pe.unsqueeze(1)
    elif spec["shape"] == "batch":
        kv_c, k_pe = kv_c.unsqueeze(0), k_pe.unsqueeze(0)
    packed = name in PACKED_FORMATS
    stored = torch.uint8 if packed else mla_cases.FLOAT_FORMATS[name]
    width = stored_bank("normal", latent, rope, name).shape[1]
    noise_bytes = torch.from_numpy(draw.integers(0, 256, (blocks, page, width * 4), dtype=np.uint8))
    cache = torch.empty(blocks, page, width, dtype=stored)
    if cache.numel():
        cache.copy_(noise_bytes.view(stored)[..., :width])
    slot_mapping = torch.from_numpy(slots)
    arguments: dict[str, Any] = {
        "kv_c": laid_out(kv_c, spec["rows_layout"]),
        "k_pe": laid_out(k_pe, spec["rows_layout"]),
        "slot_mapping": strided(slot_mapping) if spec["strided"] else slot_mapping,
        "kv_cache_dtype": name if packed else "auto",
    }
    if spec["layout"] == "two_tensor":
        arguments["kv_cache"] = sliced(cache[..., :latent].contiguous(), spec["slices"], "nan")
        arguments["k_pe_cache"] = sliced(cache[..., latent:].contiguous(), spec["slices"], "nan")
    else:
        cache = sliced(cache, spec["slices"], "nan")
        arguments["kv_cache"] = cache.unsqueeze(2) if spec["layout"] == "rank4" else cache
    return Call(spec, "concat_and_cache_mla", arguments)


def _gather(spec: Spec, rng: random.Random) -> Call:
    lengths = list(spec["lengths"])
    everything = [oracle.Sight(np.ones((1, 1, n), dtype=bool), None, None) for n in lengths]
    spec = {"logits": {"kind": spec["rows"]}, "poison_seen": False, **spec}
    arguments = _store(spec, rng, lengths, everything)
    seqlens = int32(lengths)
    arguments |= {
        "cache_seqlens": strided(seqlens) if spec["strided"] else seqlens,
        "head_dim_v": spec["latent"],
        "head_dim": spec["latent"] + spec["rope"],
        "dtype": getattr(torch, spec["dtype"]),
        "kv_cache_dtype": spec["format"] if spec["format"] in PACKED_FORMATS else "auto",
        "max_seqlen": spec["most"],
    }
    return Call(spec, "gather_cache", arguments)


def _copy(spec: Spec, rng: random.Random) -> Call:
    shape, dtype = spec["shape"], getattr(torch, spec["dtype"])
    draw = np.random.default_rng(rng.getrandbits(30))
    cache = torch.from_numpy(draw.integers(0, 2 if dtype == torch.bool else 100, shape)).to(dtype)
    if spec["slices"] == "transposed":
        cache = cache.transpose(0, -1).contiguous().transpose(0, -1)
    elif spec["slices"] == "row":
        cache = torch.cat([cache, cache], dim=-1)[..., : shape[-1]]
    elif spec["slices"] == "block":
        cache = torch.cat([cache, cache])[: shape[0]] if shape[0] < 2 else cache[1:]
    order = draw.permutation(cache.shape[0])
    sources = order[: max(1, len(order) // 2)]
    targets = order[len(sources) :][: spec["pairs"]]
    pairs = [[int(draw.choice(sources)), int(t)] for t in targets]
    mapping = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    mapping = strided(mapping) if spec["strided"] and len(pairs) else mapping
    return Call(spec, "copy_blocks", {"kv_cache": cache, "block_mapping": mapping})


def _merge(spec: Spec, rng: random.Random) -> Call:
    batch, tokens, heads, width = spec["batch"], spec["tokens"], spec["heads"], spec["width"]
    dtype = getattr(torch, spec["dtype"])
    shape = (tokens, heads, width) if spec["ragged"] else (batch, tokens, heads, width)
    lse_shape = (heads, tokens) if spec["ragged"] else (batch, heads, tokens)
    draw = np.random.default_rng(rng.getrandbits(30))
    arguments: dict[str, Any] = {}
    for part in "ab":
        lse = (noise(rng, *lse_shape) * min(spec["lse"], 1e37)).clamp(-3e38, 3e38)
        if spec["lse"] > 1e37:
            lse *= 10
        empty = torch.from_numpy(draw.random(lse_shape) < spec["empty"])
        lse[empty] = -math.inf
        out = noise(rng, *shape)
        if spec["poison"]:  # never looked at
            out[empty.transpose(-1, -2)] = math.nan
        lse = laid_out(lse, spec["lse_layout"]) if spec["lse_layout"] != "strided" else strided(lse)
        arguments[f"out_{part}"] = laid_out(out.to(dtype), spec["layout"])
        arguments[f"lse_{part}"] = lse
    if spec["sink"]:
        sink = noise(rng, heads)
        if spec["sink"] == "large":
            sink *= 1000
        elif spec["sink"] == "infinite" and heads:
            sink[rng.randrange(heads)] = -math.inf
        arguments["attn_sink"] = sink
    return Call(spec, "merge_attn_states", arguments)


# Sizes near the limits of 32 bits


def _huge(spec: Spec, rng: random.Random) -> Call:
    """The results, where there are any, are known: every key is the same."""
    what, size, name = spec["what"], spec["size"], spec["format"]
    packed = name in PACKED_FORMATS
    latent, rope = (32, 0) if packed else (8, 0)
    row = stored_bank("normal", latent, rope, name)[:1]
    table: Tensor | None = None
    length = min(size, 2**31 - 1)
    if what == "table":
        page = spec["page"]
        cache = row.expand(page, -1).contiguous().unsqueeze(0)
        # As many columns as any length can need, all of them block 0.
        table = torch.zeros(1, 1, dtype=torch.int32).expand(1, min(-(-size // page), 2**31))
    else:
        cache = row.expand(1, min(size, 2**62 // row.shape[1]), row.shape[1])
    arguments: dict[str, Any] = {
        "kv_cache": cache,
        "block_table": table,
        "cache_seqlens": int32([length]),
        "kv_cache_dtype": name if packed else "auto",
    }
    q = torch.ones(1, 1, 1, latent, dtype=torch.float32)
    if what == "gather":
        arguments |= {"head_dim_v": latent, "head_dim": latent, "dtype": torch.float32}
        # All but the last few would be zeros; a length that fits in memory is not huge.
        arguments["cache_seqlens"] = int32([rng.choice([0, 1, length])])
        arguments["kv_cache"] = row.view(1, 1, -1).expand(1, min(size, 2**31 - 1), -1)
        arguments["max_seqlen"] = rng.choice([min(size, 2**55), min(size, 2**55), None])
        return Call(spec, "gather_cache", arguments)
    if what == "append":
        tokens = size
        return Call(
            spec,
            "concat_and_cache_mla",
            {
                "kv_c": torch.ones(1, latent).expand(tokens if tokens < 2**55 else 2**31, -1),
                "k_pe": torch.ones(1, rope).expand(tokens if tokens < 2**55 else 2**31, -1),
                "kv_cache": torch.zeros(1, 4, row.shape[1], dtype=row.dtype),
                "slot_mapping": torch.full((1,), 7).expand(tokens if tokens < 2**55 else 2**31),
                "kv_cache_dtype": name if packed else "auto",
            },
        )
    if what == "merge":
        # Results of this size have no room in a worker's address space.
        tokens = min(max(size, 2**31 - 129), 2**55)
        out = torch.ones(1, 1, 1, 1).expand(1, tokens, 1, rng.choice([0, 1]))
        lse = torch.zeros(1, 1, 1).expand(1, 1, tokens)
        return Call(spec, "merge_attn_states", dict(out_a=out, out_b=out, lse_a=lse, lse_b=lse))
    arguments |= {"head_dim_v": latent, "softmax_scale": 0.25, "causal": spec["causal"]}
    if what in ("rows", "tokens", "heads", "batch"):
        count = min(size, 2**50)
        shape = {
            "rows": (1, 1 + count // 64, 64, latent),
            "tokens": (1, count, 1, latent),
            "heads": (1, 1, count, latent),
            "batch": (count, 1, 1, latent),
        }[what]
        q = q.expand(shape)
        arguments["kv_cache"] = row.expand(1, 16, -1)
        arguments["cache_seqlens"] = int32([rng.choice([0, 16])]).expand(shape[0])
        if what == "batch":
            arguments["kv_cache"] = row.expand(shape[0], 16, -1)
    elif spec["by"] == "window":
        arguments["window"] = spec["seen"]
    elif spec["by"] == "leftpad":
        arguments["cache_leftpad"] = int32([max(length - spec["seen"], 0)])
    else:
        last = torch.arange(length - spec["seen"], length, dtype=torch.int64)
        arguments["indices"] = last.to(torch.int32).view(1, 1, -1)
    arguments["q"] = q
    if spec["form"]:
        arguments |= {"form": spec["form"] if spec["by"] != "indices" else "auto"}
        arguments["w_kv_b"] = torch.eye(latent).repeat(2, 1).expand(q.shape[2], -1, -1)
        return Call(spec, "mla_attention_kv_b", arguments)
    return Call(spec, "mla_attention", arguments)


_BUILD = {
    "attention": _attention,
    "kv_b": _attention,
    "append": _append,
    "gather": _gather,
    "copy": _copy,
    "merge": _merge,
    "flash_mla": _flash_mla,
    "huge": _huge,
}
