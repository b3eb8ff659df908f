"""The documented rules of the operators' arguments (torch_flash_mla/ops.py), apart from their code.

`judge` says whether a call must be answered, must be refused, or may be either: the last where the
documentation leaves it to the operator (bits that torch resolves lazily, misaligned storage, memory
that inputs and outputs share).
"""

from __future__ import annotations

import inspect
import itertools
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

import torch_flash_mla
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

VALID, INVALID, EITHER = "valid", "invalid", "either"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LARGEST_WIDTH = 65536


class Refuse(Exception):
    """A call that must be refused, and why."""


class Unsure(Exception):
    """One that may be."""


@cache
def argument_names(operator: str) -> list[str]:
    return list(inspect.signature(getattr(torch_flash_mla, operator)).parameters)


def judge(operator: str, a: dict[str, Any]) -> tuple[str, str]:
    try:
        _RULES[operator](a)
    except Refuse as why:
        return INVALID, str(why)
    except Unsure as why:
        return EITHER, str(why)
    return VALID, ""


def refuse(condition: bool, why: str) -> None:
    if condition:
        raise Refuse(why)


def tensor(name: str, t: Any) -> Tensor:
    """A strided CPU tensor that can be read as it is."""
    refuse(not isinstance(t, Tensor), f"{name} is no tensor")
    refuse(t.device.type != "cpu", f"{name} is on {t.device}")
    if t.layout != torch.strided:
        raise Refuse(f"{name} is {t.layout}")
    if t._is_zerotensor() or t.is_neg() or t.is_conj():
        raise Unsure(f"{name} has bits that torch resolves")
    unusual = t.is_nested or t.is_quantized or t.dtype.is_complex
    refuse(unusual, f"{name} is nested, quantised or complex")
    return t


def usual(name: str, t: Tensor) -> None:
    """Raised last, when all else is right."""
    if type(t) not in (Tensor, torch.nn.Parameter):
        raise Unsure(f"{name} is a {type(t)}")
    if t.is_inference():
        raise Unsure(f"{name} is an inference tensor")
    if t.numel() and t.data_ptr() % t.element_size():
        raise Unsure(f"{name} is misaligned")
    if t.requires_grad:
        raise Unsure(f"{name} requires grad")


def reachable(name: str, t: Tensor) -> None:
    if t.numel() == 0 or t._is_zerotensor():
        return
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    refuse(
        (last + 1) * t.element_size() > t.untyped_storage().nbytes(), f"{name} leaves its storage"
    )


def rows_contiguous(name: str, t: Tensor) -> None:
    strided = t.numel() > 0 and t.shape[-1] > 1 and t.stride(-1) != 1
    refuse(strided, f"{name} has strided rows")


def integer(name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise Unsure(f"{name} is no int")
    return x


def width(name: str, x: Any, least: int) -> int:
    refuse(not least <= integer(name, x) <= LARGEST_WIDTH, f"{name} is {x}")
    return int(x)


def dtype_of(name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    refuse(t.dtype not in dtypes, f"{name} is {t.dtype}")


def int_vector(name: str, t: Any, size: int) -> list[int]:
    t = tensor(name, t)
    dtype_of(name, t, torch.int32)
    refuse(tuple(t.shape) != (size,), f"{name} has shape {list(t.shape)}")
    reachable(name, t)
    return [int(x) for x in t]


def cache_of(a: dict[str, Any], latent: int, rope: int) -> tuple[int, int]:
    """Checks cache tensors. Returns blocks and the size of one."""
    kv_cache, k_pe = tensor("kv_cache", a["kv_cache"]), a.get("k_pe_cache")
    name = a.get("kv_cache_dtype", "auto")
    packed = name in PACKED_FORMATS
    if packed:
        dtype_of("kv_cache", kv_cache, torch.uint8)
        refuse(bool(latent % 32 or rope % 32), "widths are no multiples of 32")
        refuse(k_pe is not None, "k_pe_cache beside packed rows")
        row = row_bytes(name, latent, rope)
    elif name == "auto" or name in FLOAT_NAMES:
        dtype_of("kv_cache", kv_cache, *(FLOATS if name == "auto" else [FLOAT_NAMES[name]]))
        row = latent + (0 if k_pe is not None else rope)
    else:
        raise Refuse(f"kv_cache_dtype is {name!r}")
    for cache_name, t, size in (("kv_cache", kv_cache, row), ("k_pe_cache", k_pe, rope)):
        if t is None:
            continue
        tensor(cache_name, t)
        dtype_of(cache_name, t, kv_cache.dtype)
        dims = t.dim() == 3 or (t.dim() == 4 and t.shape[2] == 1)
        refuse(not dims or t.shape[-1] != size, f"{cache_name} has shape {list(t.shape)}")
        refuse(t.shape[1] < 1 or t.shape[:2] != kv_cache.shape[:2], f"{cache_name}: blocks")
        rows_contiguous(cache_name, t)
        reachable(cache_name, t)
    return kv_cache.shape[0], kv_cache.shape[1]


def sequences(a: dict[str, Any], batch: int, blocks: int, page: int) -> list[int]:
    """Checks lengths and blocks. Returns the lengths."""
    table = a["block_table"]
    lengths = int_vector("cache_seqlens", a["cache_seqlens"], batch)
    if table is None:
        refuse(batch > blocks, "fewer rows of kv_cache than sequences")
        capacity = page
    else:
        table = tensor("block_table", table)
        dtype_of("block_table", table, torch.int32)
        refuse(table.dim() != 2 or table.shape[0] != batch, "block_table's shape")
        reachable("block_table", table)
        capacity = table.shape[1] * page
    for b, n in enumerate(lengths):
        refuse(not 0 <= n <= capacity, f"cache_seqlens[{b}] is {n}")
        if table is not None:
            used = table[b, : -(-n // page)]
            refuse(bool(((used < 0) | (used >= blocks)).any()), f"block_table[{b}] names no block")
    return lengths


def attention(a: dict[str, Any]) -> None:
    """Both attention operators."""
    q, w = tensor("q", a["q"]), a.get("w_kv_b")
    dtype_of("q", q, *FLOATS)
    ragged = a.get("cu_seqlens_q") is not None
    refuse(q.dim() != (3 if ragged else 4), "q's dimensions")
    rows_contiguous("q", q)
    reachable("q", q)
    value = width("head_dim_v", a["head_dim_v"], 1)
    main = latent = value
    heads = q.shape[-2]
    if w is not None or "w_kv_b" in a:
        w = tensor("w_kv_b", w)
        dtype_of("w_kv_b", w, q.dtype)
        refuse(w.dim() != 3 or w.shape[0] != heads, "w_kv_b's shape")
        reachable("w_kv_b", w)
        main, latent = w.shape[1] - value, w.shape[2]
        refuse(main < 1, "w_kv_b has no rows for keys")
        width("w_kv_b's latent", latent, 1)
        form = a.get("form", "auto")
        refuse(form not in ("auto", "absorbed", "expanded"), "form")
        refuse(form == "expanded" and a.get("indices") is not None, "form and indices")
    q_pe = a.get("q_pe")
    if q_pe is not None:
        refuse(q.shape[-1] != main, "q beside q_pe")
        q_pe = tensor("q_pe", q_pe)
        dtype_of("q_pe", q_pe, q.dtype)
        refuse(q_pe.dim() != q.dim() or q_pe.shape[:-1] != q.shape[:-1], "q_pe's shape")
        rows_contiguous("q_pe", q_pe)
        reachable("q_pe", q_pe)
        rope = q_pe.shape[-1]
    else:
        rope = q.shape[-1] - main
    width("rope", rope, 0)
    scale = a["softmax_scale"]
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise Unsure("softmax_scale is no float")
    refuse(not math.isfinite(scale) or abs(scale) > 3.4028234e38, "softmax_scale")
    refuse(integer("window", a.get("window", 0)) < 0, "window")
    if not isinstance(a.get("causal", False), bool):
        raise Unsure("causal")
    tokens = q.shape[-3]
    if ragged:
        cu = tensor("cu_seqlens_q", a["cu_seqlens_q"])
        dtype_of("cu_seqlens_q", cu, torch.int32)
        refuse(cu.dim() != 1 or cu.shape[0] < 1, "cu_seqlens_q's shape")
        reachable("cu_seqlens_q", cu)
        starts = cu.tolist()
        rising = all(x <= y for x, y in itertools.pairwise(starts))
        refuse(starts[0] != 0 or starts[-1] != tokens or not rising, "cu_seqlens_q")
        batch = len(starts) - 1
    else:
        batch = q.shape[0]
    blocks, page = cache_of(a, latent, rope)
    lengths = sequences(a, batch, blocks, page)
    if a.get("cache_leftpad") is not None:
        pads = int_vector("cache_leftpad", a["cache_leftpad"], batch)
        refuse(any(not 0 <= p <= n for p, n in zip(pads, lengths, strict=True)), "cache_leftpad")
    mask_of(a.get("attn_mask"), 1 if ragged else batch, heads, tokens, max(lengths, default=0))
    lists_of(a, (tokens,) if ragged else (batch, tokens), batch)
    sink = a.get("attn_sink")
    if sink is not None:
        sink = tensor("attn_sink", sink)
        dtype_of("attn_sink", sink, torch.float32)
        refuse(tuple(sink.shape) != (heads,), "attn_sink's shape")
        reachable("attn_sink", sink)
    everything_usual(a)


def mask_of(mask: Any, batch: int, heads: int, tokens: int, longest: int) -> None:
    if mask is None:
        return
    mask = tensor("attn_mask", mask)
    dtype_of("attn_mask", mask, torch.bool, *FLOATS)
    refuse(not 1 <= mask.dim() <= 4, "attn_mask's dimensions")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = all(n in (1, m) for n, m in zip(shape, (batch, heads, tokens), strict=False))
    refuse(not fits or shape[3] < longest, "attn_mask's shape")
    reachable("attn_mask", mask)


def lists_of(a: dict[str, Any], shape: tuple[int, ...], batch: int) -> None:
    indices, counts = a.get("indices"), a.get("topk_length")
    if indices is None:
        refuse(counts is not None, "topk_length without indices")
        return
    indices = tensor("indices", indices)
    dtype_of("indices", indices, torch.int32)
    refuse(indices.dim() != len(shape) + 1 or tuple(indices.shape[:-1]) != shape, "indices' shape")
    reachable("indices", indices)
    if counts is not None:
        values = int_vector("topk_length", counts, batch)
        refuse(any(not 0 <= n <= indices.shape[-1] for n in values), "topk_length")


def everything_usual(a: dict[str, Any]) -> None:
    for name, t in a.items():
        if isinstance(t, Tensor):
            usual(name, t)


def append(a: dict[str, Any]) -> None:
    slots = tensor("slot_mapping", a["slot_mapping"])
    dtype_of("slot_mapping", slots, torch.int64)
    reachable("slot_mapping", slots)
    kv_c, k_pe = tensor("kv_c", a["kv_c"]), tensor("k_pe", a["k_pe"])
    dtype_of("kv_c", kv_c, *FLOATS)
    dtype_of("k_pe", k_pe, kv_c.dtype)
    for name, t in (("kv_c", kv_c), ("k_pe", k_pe)):
        refuse(t.dim() < 2, f"{name}'s dimensions")
        refuse(math.prod(t.shape[:-1]) != slots.numel(), f"{name}'s tokens")
        reachable(name, t)
    width("kv_c's width", kv_c.shape[-1], 1)
    width("k_pe's width", k_pe.shape[-1], 0)
    blocks, page = cache_of(a, kv_c.shape[-1], k_pe.shape[-1])
    refuse(bool(((slots < -1) | (slots >= blocks * page)).any()), "slot_mapping")
    written = [t for t in (a["kv_cache"], a.get("k_pe_cache")) if t is not None]
    for t in written:
        cells_apart("kv_cache", t)
    sources = [kv_c, k_pe, slots]
    if any(share_memory(t, s) for t in written for s in sources):
        raise Unsure("what is read is written")
    if len(written) == 2 and share_memory(*written):
        raise Unsure("kv_cache and k_pe_cache share memory")
    everything_usual(a)


def cells_apart(name: str, t: Tensor) -> None:
    """No cell is in two places."""
    if t.numel() == 0:
        return
    dims = sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)
    reach = 0
    for stride, n in dims:
        refuse(stride == 0, f"{name} repeats cells")
        if stride <= reach:
            raise Unsure(f"{name} may repeat cells")
        reach += stride * (n - 1)


def share_memory(x: Tensor, y: Tensor) -> bool:
    if x.numel() == 0 or y.numel() == 0:
        return False
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def gather(a: dict[str, Any]) -> None:
    latent = width("head_dim_v", a["head_dim_v"], 1)
    rope = width("rope", integer("head_dim", a["head_dim"]) - latent, 0)
    refuse(not isinstance(a["dtype"], torch.dtype) or a["dtype"] not in FLOATS, "dtype")
    blocks, page = cache_of(a, latent, rope)
    lengths = tensor("cache_seqlens", a["cache_seqlens"])
    refuse(lengths.dim() != 1, "cache_seqlens' shape")
    sequences(a, lengths.shape[0], blocks, page)
    most = a.get("max_seqlen")
    refuse(most is not None and integer("max_seqlen", most) < 0, "max_seqlen")
    if most is not None and most > 1 << 24:
        raise Unsure("max_seqlen may be more than there is memory for")
    everything_usual(a)


def copy(a: dict[str, Any]) -> None:
    cache_ = tensor_of_any("kv_cache", a["kv_cache"])
    mapping = tensor("block_mapping", a["block_mapping"])
    refuse(cache_.dim() < 2, "kv_cache's dimensions")
    reachable("kv_cache", cache_)
    dtype_of("block_mapping", mapping, torch.int64)
    refuse(mapping.dim() != 2 or mapping.shape[1] != 2, "block_mapping's shape")
    reachable("block_mapping", mapping)
    sources, targets = mapping[:, 0].tolist(), mapping[:, 1].tolist()
    refuse(any(not 0 <= x < cache_.shape[0] for x in sources + targets), "block_mapping")
    refuse(len(set(targets)) < len(targets) or bool(set(sources) & set(targets)), "targets")
    cells_apart("kv_cache", cache_)
    if share_memory(cache_, mapping):
        raise Unsure("block_mapping lies in the cache")
    everything_usual(a)


def tensor_of_any(name: str, t: Any) -> Tensor:
    """As `tensor`, of any dtype."""
    refuse(not isinstance(t, Tensor), f"{name} is no tensor")
    if t._is_zerotensor() or t.is_neg() or t.is_conj():
        raise Unsure(f"{name} has bits that torch resolves")
    refuse(t.device.type != "cpu" or t.layout != torch.strided, f"{name} is {t.layout}")
    refuse(t.is_nested or t.is_quantized, f"{name} is nested or quantised")
    return t


def merge(a: dict[str, Any]) -> None:
    out_a = tensor("out_a", a["out_a"])
    dtype_of("out_a", out_a, *FLOATS)
    refuse(out_a.dim() not in (3, 4), "out_a's dimensions")
    shape = out_a.shape
    lses = (shape[-2], shape[-3]) if out_a.dim() == 3 else (shape[0], shape[-2], shape[-3])
    for part in "ab":
        out, lse = tensor("out", a[f"out_{part}"]), tensor("lse", a[f"lse_{part}"])
        dtype_of("out", out, out_a.dtype)
        refuse(out.shape != shape, "out's shape")
        rows_contiguous("out", out)
        reachable("out", out)
        dtype_of("lse", lse, torch.float32)
        refuse(tuple(lse.shape) != lses, "lse's shape")
        reachable("lse", lse)
        if not bool((lse < math.inf).all()):
            raise Unsure("lse holds what no attention returns")
    sink = a.get("attn_sink")
    if sink is not None:
        sink = tensor("attn_sink", sink)
        dtype_of("attn_sink", sink, torch.float32)
        refuse(tuple(sink.shape) != (shape[-2],), "attn_sink's shape")
        reachable("attn_sink", sink)
    everything_usual(a)


def anything(a: dict[str, Any]) -> None:
    raise Unsure("no rules of its own")


_RULES = {
    "mla_attention": attention,
    "mla_attention_kv_b": attention,
    "concat_and_cache_mla": append,
    "gather_cache": gather,
    "copy_blocks": copy,
    "merge_attn_states": merge,
    "flash_mla_with_kvcache": anything,
    "flash_mla_sparse_fwd": anything,
}
