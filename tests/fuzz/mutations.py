"""One to three things of a valid call, damaged."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.build import Call
from tests.fuzz.guard import storage_bytes
from torch_flash_mla import reference

_DTYPES = [
    *[torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64],
    *[torch.uint8, torch.int8, torch.bool, torch.int16, torch.complex64, torch.float8_e4m3fn],
]
_INTS = [-1, -2, 0, 1, 2, 3, 2**31 - 1, 2**31, -(2**31), 2**40, 65536, 65537, 2**63 - 1]


class Plain(Tensor):
    """A subclass that changes nothing."""


def mutate(call: Call) -> list[str]:
    """Damages the arguments of a call. Returns what was done."""
    done = []
    for seed in call.spec["mutations"]:
        rng = random.Random(seed)
        names = [k for k, v in call.arguments.items() if isinstance(v, Tensor)]
        if rng.random() < 0.15 or not names:
            done.append(_mutate_scalar(call, rng))
            continue
        name = rng.choice(names)
        kind = rng.choice(list(_OF_TENSORS))
        try:
            changed = _OF_TENSORS[kind](call.arguments[name], rng, call)
        except Exception:  # torch does not make such a tensor of this one
            done.append(f"no {kind} of {name}")
            continue
        call.arguments[name] = changed
        done.append(f"{kind} of {name}")
    return done


def _mutate_scalar(call: Call, rng: random.Random) -> str:
    a = call.arguments
    choices: list[tuple[str, list[Any]]] = []
    for name in ("head_dim_v", "head_dim", "window", "max_seqlen", "d_v", "indexer_topk"):
        if name in a:
            near = [a[name] + d for d in (-1, 1, 32)] if isinstance(a[name], int) else []
            choices.append((name, [*_INTS, *near, 1.5, "x", True]))
    for name in ("softmax_scale", "sm_scale"):
        if name in a:
            choices.append((name, [0.0, math.nan, math.inf, 1e300, -1e30, 1, "x", None]))
    if "kv_cache_dtype" in a:
        formats = ["auto", "q8_kv", "q8_0", "q6_0", "q4_kv", "float32", "bfloat16", "float16"]
        choices.append(("kv_cache_dtype", [*formats, "", "q3", "fp8_ds_mla", "q8_kv\0", None, 3]))
    if "form" in a:
        choices.append(("form", ["auto", "absorbed", "expanded", "", "other", None]))
    if "dtype" in a:
        choices.append(("dtype", [*_DTYPES, None, "float32"]))
    if "causal" in a:
        choices.append(("causal", [True, False, None, 2]))
    for name in ("block_table", "cache_seqlens", "kv_cache", "q", "attn_mask", "attn_sink"):
        if name in a:
            choices.append((name, [None]))
    optional = ["attn_sink", "cache_leftpad", "topk_length", "indices", "q_pe", "k_pe_cache"]
    for name in (*optional, "attn_mask", "cu_seqlens_q"):
        if call.operator.startswith("mla_attention") and a.get(name) is None:
            choices.append((name, [_unasked(name, a)]))
    if not choices:
        return "nothing"
    name, values = rng.choice(choices)
    a[name] = rng.choice(values)
    shown = "a tensor" if isinstance(a[name], Tensor) else repr(a[name])
    return f"{name} = {shown}"


def _unasked(name: str, a: dict[str, Any]) -> Tensor:
    """An optional argument that was not given, more or less as it should be."""
    q = a.get("q")
    heads, batch = 3, 1
    if isinstance(q, Tensor) and q.dim() >= 2:
        heads, batch = q.shape[-2], q.shape[0]
    if name == "attn_sink":
        return torch.zeros(heads)
    if name in ("cache_leftpad", "topk_length"):
        return torch.zeros(batch, dtype=torch.int32)
    if name == "cu_seqlens_q":
        return torch.tensor([0, batch], dtype=torch.int32)
    if name == "indices":
        tokens = q.shape[1] if isinstance(q, Tensor) and q.dim() == 4 else 1
        return torch.zeros(batch, tokens, 3, dtype=torch.int32)
    if name == "attn_mask":
        return torch.ones(300, dtype=torch.bool)
    return torch.zeros(batch, 1, heads, 8)


# Each takes a tensor, random numbers and the call


def _dtype(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.to(rng.choice(_DTYPES))


def _viewed(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.contiguous().view(rng.choice(_DTYPES))


def _more_dims(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.unsqueeze(rng.randint(0, t.dim()))


def _fewer_dims(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.select(rng.randrange(t.dim()), 0) if rng.random() < 0.5 else t.flatten(0, 1)


def _size(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    d = rng.randrange(t.dim())
    n = t.shape[d]
    how = rng.choice(["shorter", "longer", "none", "half", "one"])
    if how == "longer":
        return torch.cat([t, t.narrow(d, 0, 1)], dim=d)
    return t.narrow(d, 0, {"shorter": n - 1, "none": 0, "half": n // 2, "one": 1}[how])


def _transposed(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    a, b = rng.sample(range(t.dim()), 2)
    return t.transpose(a, b)


def _same_in_other_order(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    a, b = rng.sample(range(t.dim()), 2)
    return t.transpose(a, b).contiguous().transpose(a, b)


def _every_other(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    d = rng.randrange(t.dim())
    return torch.stack([t, t], dim=d + 1).flatten(d, d + 1)[
        (slice(None),) * d + (slice(None, None, 2),)
    ]


def _expanded(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    d = rng.randrange(t.dim())
    return t.narrow(d, 0, 1).expand(t.shape)


def _overlapping(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    stride = list(t.stride())
    d = rng.randrange(t.dim())
    stride[d] = rng.choice([1, stride[d] // 2])
    return t.as_strided(t.shape, stride)


def _no_storage(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    t = t.clone()
    size = t.untyped_storage().nbytes()
    t.untyped_storage().resize_(rng.choice([0, size // 2, size - 1]))
    return t


def _offset(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    wide = torch.zeros(t.numel() + 9, dtype=t.dtype)
    first = rng.randint(1, 9)
    part = wide[first : first + t.numel()].view(t.shape)
    return part.copy_(t)


def _misaligned(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    size = t.numel() * t.element_size()
    buffer = bytearray(size + 8)
    part = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=rng.randint(1, 7))
    return part.view(t.shape).copy_(t)


def _other_argument(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    tensors = [v for v in call.arguments.values() if isinstance(v, Tensor)]
    return rng.choice(tensors)


def _overlaid(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    """The same shape, in the memory of another argument of the same dtype."""
    others = [
        v
        for v in call.arguments.values()
        if isinstance(v, Tensor) and v is not t and v.dtype == t.dtype and v.numel() >= t.numel()
    ]
    other = rng.choice(others)
    flat = other if other.is_contiguous() else other.contiguous()
    first = rng.randint(0, flat.numel() - t.numel())
    return flat.view(-1)[first : first + t.numel()].view(t.shape)


def _values(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    t = t.clone()
    flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
    at = rng.randrange(flat.numel())
    if t.is_floating_point():
        flat[at] = rng.choice([math.nan, math.inf, -math.inf, 1e38, 0.0, -1e-45])
    elif t.dtype == torch.bool:
        flat[at] = not bool(flat[at])
    elif t.dtype == torch.uint8:
        flat[at] = rng.randrange(256)
    else:
        low, high = torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max
        near = int(flat[at]) + rng.choice([-1, 1, 16, -100])
        value = rng.choice([near, near, low, high, -1, 0, 1, 2**30])
        flat[at] = max(low, min(high, value))
    return flat.view(t.shape)


def _subclass(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.as_subclass(Plain)


def _parameter(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return torch.nn.Parameter(t, requires_grad=t.is_floating_point() and rng.random() < 0.5)


def _requires_grad(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.clone().requires_grad_()


def _part_of_graph(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.clone().requires_grad_() * 1


def _negative(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return torch._neg_view(-t)


def _conjugate(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    if rng.random() < 0.5:  # has the negative bit
        return torch.complex(t.float(), -t.float()).conj().imag
    return torch.complex(t.float(), t.float()).conj()


def _zero_tensor(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def _sparse(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    how = rng.choice(["coo", "csr", "mkldnn"])
    if how == "mkldnn":
        return t.to_mkldnn()
    return t.to_sparse() if how == "coo" else t.to_sparse_csr()


def _meta(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return t.to("meta")


def _inference(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _lazy(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return torch._lazy_clone(t)


def _nested(t: Tensor, rng: random.Random, call: Call) -> Tensor:
    return torch.nested.nested_tensor([t, t])


def _list(t: Tensor, rng: random.Random, call: Call) -> Any:
    return rng.choice([t.tolist(), 3, "tensor", None, t.numpy()])


_OF_TENSORS = {
    "dtype": _dtype,
    "view": _viewed,
    "more dims": _more_dims,
    "fewer dims": _fewer_dims,
    "size": _size,
    "transposed": _transposed,
    "order": _same_in_other_order,
    "every other": _every_other,
    "expanded": _expanded,
    "overlapping": _overlapping,
    "storage": _no_storage,
    "offset": _offset,
    "misaligned": _misaligned,
    "other argument": _other_argument,
    "overlaid": _overlaid,
    "values": _values,
    "more values": _values,
    "subclass": _subclass,
    "parameter": _parameter,
    "requires grad": _requires_grad,
    "part of a graph": _part_of_graph,
    "negative bit": _negative,
    "conjugate bit": _conjugate,
    "zero tensor": _zero_tensor,
    "sparse": _sparse,
    "meta": _meta,
    "inference": _inference,
    "lazy clone": _lazy,
    "nested": _nested,
    "no tensor": _list,
}


def resolved(call: Call) -> dict[str, Any] | None:
    """The arguments as plain tensors of the same values; None if there is no telling."""
    result = {}
    for name, t in call.arguments.items():
        if isinstance(t, Tensor):
            try:
                with torch.no_grad():
                    if t.layout != torch.strided or t.device.type != "cpu" or t.is_nested:
                        return None
                    if t._is_zerotensor():
                        t = torch.zeros(t.shape, dtype=t.dtype)
                    unusual = t.is_neg() or t.is_conj() or type(t) is not Tensor
                    if unusual or t.requires_grad or t.is_inference():
                        t = t.as_subclass(Tensor).detach().resolve_neg().resolve_conj().clone()
            except RuntimeError:
                return None
        result[name] = t
    same = all(result[k] is call.arguments[k] for k in result)
    return call.arguments if same else result


def same_packed(cell: Tensor, row: Tensor, name: str) -> bool:
    """Rows that differ at most in how a NaN scale is written."""
    size = cell.numel()
    if name == "q8_kv":
        scales = (np.frombuffer(t[-8:].numpy().tobytes(), "<f4") for t in (cell, row))
        return torch.equal(cell[:-8], row[:-8]) and _same_or_nan(*scales)
    if name == "q4_kv":
        return _same_q4(cell, row)
    blocks = size // (34 if name == "q8_0" else 26)
    scales = (np.frombuffer(t[-2 * blocks :].numpy().tobytes(), "<f2") for t in (cell, row))
    return torch.equal(cell[: -2 * blocks], row[: -2 * blocks]) and _same_or_nan(*scales)


def _same_or_nan(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(((x == y) | (np.isnan(x) & np.isnan(y))).all())


def _same_q4(cell: Tensor, row: Tensor) -> bool:
    """Whatever the split into latent and rope: 18 bytes per 32 values, and scales among them."""
    size = cell.numel()
    for latent in range(32, 2 * size, 32):
        rope = size - 4 - latent * 18 // 32
        if rope < 0 or rope % 32:
            continue
        x, y = (reference.decode_rows(t[None].clone(), "q4_kv", latent, rope) for t in (cell, row))
        if _same_or_nan(x.numpy(), y.numpy()):
            return True
    return False


__all__ = ["mutate", "resolved", "same_packed", "storage_bytes"]
