"""What the operators refuse, and that they refuse it before anything is written. No input may crash
or read outside a tensor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

B, SQ, H, L, R, P, V = 2, 3, 4, 64, 32, 16, 24
BLOCKS, BLOCK_SIZE, MAX_BLOCKS = 6, 8, 3
ERRORS = (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_arguments() -> dict[str, Any]:
    return {
        "q": torch.randn(B, SQ, H, L + R),
        "kv_cache": torch.randn(BLOCKS, BLOCK_SIZE, L + R),
        "block_table": int32([0, 2, 999_999_999], [3, 1, -5]),
        "cache_seqlens": int32(13, 16),
        "head_dim_v": L,
        "softmax_scale": 0.1,
    }


def kv_b_arguments() -> dict[str, Any]:
    return attention_arguments() | {
        "q": torch.randn(B, SQ, H, P + R),
        "w_kv_b": torch.randn(H, P + V, L),
        "head_dim_v": V,
    }


def ragged_arguments() -> dict[str, Any]:
    return attention_arguments() | {
        "q": torch.randn(B * SQ, H, L + R),
        "cu_seqlens_q": int32(0, 2, B * SQ),
    }


def append_arguments() -> dict[str, Any]:
    return {
        "kv_c": torch.randn(4, L),
        "k_pe": torch.randn(4, R),
        "kv_cache": torch.randn(BLOCKS, BLOCK_SIZE, L + R),
        "slot_mapping": torch.tensor([0, -1, 47, 9]),
    }


def gather_arguments() -> dict[str, Any]:
    arguments = attention_arguments()
    del arguments["q"], arguments["softmax_scale"]
    return arguments | {"head_dim": L + R, "dtype": torch.float32}


def merge_arguments() -> dict[str, Any]:
    return {
        "out_a": torch.randn(B, SQ, H, L),
        "lse_a": torch.randn(B, H, SQ),
        "out_b": torch.randn(B, SQ, H, L),
        "lse_b": torch.randn(B, H, SQ),
    }


def copy_arguments() -> dict[str, Any]:
    return {
        "kv_cache": torch.randn(BLOCKS, BLOCK_SIZE, L + R),
        "block_mapping": torch.tensor([[0, 1], [0, 2]]),
    }


ARGUMENTS = {
    "mla_attention": attention_arguments,
    "mla_attention_kv_b": kv_b_arguments,
    "ragged": ragged_arguments,
    "concat_and_cache_mla": append_arguments,
    "gather_cache": gather_arguments,
    "merge_attn_states": merge_arguments,
    "copy_blocks": copy_arguments,
}


def operator(name: str) -> Callable[..., Any]:
    return getattr(ops, "mla_attention" if name == "ragged" else name)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def freed(*shape: int) -> Tensor:
    t = torch.randn(shape)
    t.untyped_storage().resize_(0)
    return t


def every_other_column(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


Q = (B, SQ, H, L + R)
CACHE = (BLOCKS, BLOCK_SIZE, L + R)
INDICES = torch.zeros(B, SQ, 5, dtype=torch.int32)

# Changed arguments of mla_attention -> error and what its message names.
QUERY_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(Q, dtype=torch.float64)}, TypeError, r"q: dtype Double, expected Float"),
    ({"q": torch.zeros(Q, dtype=torch.int32)}, TypeError, r"q: dtype Int"),
    ({"q": torch.zeros(SQ, H, L + R)}, ValueError, r"q: shape \[3, 4, 96\] has 3 dimensions"),
    ({"q": torch.zeros(1, *Q)}, ValueError, r"q: shape .* has 5 dimensions"),
    ({"q": every_other_column(*Q)}, ValueError, r"q: strides .* expected the last dimension"),
    ({"q": freed(*Q)}, RuntimeError, r"q: shape .* reach outside its storage of 0 bytes"),
    ({"q": torch.zeros(Q).to_sparse()}, NotImplementedError, r"q: layout Sparse"),
    ({"q_pe": torch.zeros(B, SQ, H, R)}, ValueError, r"q: rows of 96, expected 64 as q_pe"),
    (
        {"q": torch.zeros(B, SQ, H, L), "q_pe": torch.zeros(B, SQ, 1, R)},
        ValueError,
        r"q_pe: shape \[2, 3, 1, 32\], expected \[B, Sq, H, R\] with the tokens and heads of q",
    ),
    (
        {"q": torch.zeros(B, SQ, H, L), "q_pe": torch.zeros(B, SQ, H, R).half()},
        TypeError,
        r"q_pe: dtype Half, expected Float as in q",
    ),
    (
        {"q": torch.zeros(B, SQ, H, L), "q_pe": every_other_column(B, SQ, H, R)},
        ValueError,
        r"q_pe: strides",
    ),
    (
        {"q": torch.zeros(B, SQ, H, L), "q_pe": meta(B, SQ, H, R)},
        RuntimeError,
        r"q_pe: on device meta",
    ),
    ({"head_dim_v": 0}, ValueError, r"head_dim_v: 0, expected 1 to 65536"),
    ({"head_dim_v": -1}, ValueError, r"head_dim_v: -1"),
    ({"head_dim_v": 1 << 40}, ValueError, r"head_dim_v: 1099511627776"),
    ({"head_dim_v": 97}, ValueError, r"q: rows of 96, expected at least 97"),
]

# The same for arguments that both attention operators share.
KEY_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_cache": torch.zeros(CACHE).double()}, TypeError, r"kv_cache: dtype Double"),
    ({"kv_cache": torch.zeros(8, L + R)}, ValueError, r"kv_cache: shape \[8, 96\], expected"),
    ({"kv_cache": torch.zeros(6, 8, 2, L + R)}, ValueError, r"kv_cache: shape \[6, 8, 2, 96\]"),
    ({"kv_cache": torch.zeros(6, 8, 95)}, ValueError, r"kv_cache: rows of 95, expected 96"),
    ({"kv_cache": torch.zeros(6, 0, 96)}, ValueError, r"kv_cache: block_size 0"),
    ({"kv_cache": torch.zeros(0, 8, 96)}, IndexError, r"block_table\[0\]\[0\]: block 0"),
    ({"kv_cache": every_other_column(*CACHE)}, ValueError, r"kv_cache: strides"),
    ({"kv_cache": meta(*CACHE)}, RuntimeError, r"kv_cache: on device meta, expected cpu"),
    ({"kv_cache": freed(*CACHE)}, RuntimeError, r"kv_cache: .* outside its storage"),
    ({"kv_cache": torch.zeros(CACHE).to_sparse()}, NotImplementedError, r"kv_cache: layout"),
    ({"kv_cache": torch.zeros(CACHE).byte()}, TypeError, r"kv_cache: dtype Byte .* must be named"),
    ({"kv_cache_dtype": "q8_kv"}, TypeError, r"kv_cache: dtype Float, expected Byte"),
    ({"kv_cache_dtype": "float16"}, TypeError, r"kv_cache: dtype Float, expected Half"),
    ({"kv_cache_dtype": "int3"}, ValueError, r'kv_cache_dtype: "int3" is unknown, .*auto.*q8_kv'),
    ({"kv_cache_dtype": ""}, ValueError, r'kv_cache_dtype: "" is unknown'),
    ({"kv_cache_dtype": "fp8_ds_mla"}, NotImplementedError, r"kv_cache_dtype: \"fp8_ds_mla\""),
    (
        {"kv_cache": torch.zeros(6, 8, 96).byte(), "kv_cache_dtype": "q8_kv"},
        ValueError,
        r"kv_cache: rows of 96, expected 104 \(bytes of a packed row\)",
    ),
    (
        {
            "kv_cache": torch.zeros(6, 8, 104).byte(),
            "kv_cache_dtype": "q8_kv",
            "k_pe_cache": torch.zeros(6, 8, R).byte(),
        },
        ValueError,
        r"k_pe_cache: given, but rows of q8_kv hold the rope part",
    ),
    ({"k_pe_cache": torch.zeros(6, 8, R)}, ValueError, r"kv_cache: rows of 96, expected 64"),
    (
        {"kv_cache": torch.zeros(6, 8, L), "k_pe_cache": torch.zeros(6, 8, R + 1)},
        ValueError,
        r"k_pe_cache: rows of 33, expected 32",
    ),
    (
        {"kv_cache": torch.zeros(6, 8, L), "k_pe_cache": torch.zeros(5, 8, R)},
        ValueError,
        r"k_pe_cache: shape \[5, 8, 32\], expected the blocks of kv_cache",
    ),
    (
        {"kv_cache": torch.zeros(6, 8, L), "k_pe_cache": torch.zeros(6, 8, R).half()},
        TypeError,
        r"k_pe_cache: dtype Half, expected Float as in kv_cache",
    ),
    (
        {"block_table": torch.zeros(2, 3).long()},
        TypeError,
        r"block_table: dtype Long, expected Int",
    ),
    ({"block_table": int32(0, 1)}, ValueError, r"block_table: shape \[2\] has 1 dimensions"),
    ({"block_table": int32([0, 1])}, ValueError, r"block_table: shape .* B = 2"),
    ({"block_table": meta(2, 3)}, RuntimeError, r"block_table: on device meta"),
    (
        {"block_table": int32([0, 6, 0], [0, 0, 0])},
        IndexError,
        r"block_table\[0\]\[1\]: block 6, expected 0 to 5",
    ),
    ({"block_table": int32([0, 0, 0], [0, -1, 0])}, IndexError, r"block_table\[1\]\[1\]: block -1"),
    ({"block_table": int32([], [])}, ValueError, r"cache_seqlens\[0\]: 13, expected 0 to 0"),
    ({"block_table": None}, ValueError, r"cache_seqlens\[0\]: 13, expected 0 to 8 \(block_size\)"),
    (
        {"block_table": None, "kv_cache": torch.zeros(1, 16, L + R)},
        ValueError,
        r"kv_cache: 1 rows, expected one per sequence \(2\)",
    ),
    ({"cache_seqlens": torch.tensor([13, 16])}, TypeError, r"cache_seqlens: dtype Long"),
    (
        {"cache_seqlens": int32(13)},
        ValueError,
        r"cache_seqlens: shape \[1\], expected \[B\] = \[2\]",
    ),
    ({"cache_seqlens": int32(13, -1)}, ValueError, r"cache_seqlens\[1\]: -1, expected 0 to 24"),
    ({"cache_seqlens": int32(25, 0)}, ValueError, r"cache_seqlens\[0\]: 25, expected 0 to 24"),
    ({"cache_seqlens": int32(2**31 - 1, 0)}, ValueError, r"cache_seqlens\[0\]: 2147483647"),
    ({"cache_seqlens": int32(24, 0)}, IndexError, r"block_table\[0\]\[2\]: block 999999999"),
    ({"cache_leftpad": int32(0)}, ValueError, r"cache_leftpad: shape \[1\]"),
    ({"cache_leftpad": torch.zeros(2)}, TypeError, r"cache_leftpad: dtype Float, expected Int"),
    ({"cache_leftpad": int32(14, 0)}, ValueError, r"cache_leftpad\[0\]: 14, expected 0 to .* = 13"),
    ({"cache_leftpad": int32(0, -1)}, ValueError, r"cache_leftpad\[1\]: -1"),
    ({"attn_mask": torch.zeros(16).byte()}, TypeError, r"attn_mask: dtype Byte, expected Bool"),
    (
        {"attn_mask": torch.zeros(15)},
        ValueError,
        r"attn_mask: .* 15 columns, expected at least .*16",
    ),
    (
        {"attn_mask": torch.zeros(2, SQ, 16)},
        ValueError,
        r"attn_mask: .* \[B, H, Sq, S\] with 2 sequences, 4 heads and 3 query tokens",
    ),
    ({"attn_mask": torch.zeros(3, 1, 1, 16)}, ValueError, r"attn_mask: shape \[3, 1, 1, 16\]"),
    ({"attn_mask": torch.zeros(1, 1, 1, 1, 16)}, ValueError, r"attn_mask: shape"),
    ({"attn_mask": torch.zeros(())}, ValueError, r"attn_mask: shape \[\]"),
    ({"attn_mask": meta(16)}, RuntimeError, r"attn_mask: on device meta"),
    (
        {"attn_sink": torch.zeros(H - 1)},
        ValueError,
        r"attn_sink: shape \[3\], expected \[H\] = \[4\]",
    ),
    ({"attn_sink": torch.zeros(H).half()}, TypeError, r"attn_sink: dtype Half, expected Float"),
    ({"softmax_scale": float("nan")}, ValueError, r"softmax_scale: nan, expected a finite"),
    ({"softmax_scale": float("inf")}, ValueError, r"softmax_scale: inf"),
    ({"softmax_scale": 1e300}, ValueError, r"softmax_scale: 1e\+300"),
    ({"window": -1}, ValueError, r"window: -1, expected 0 \(none\) or more"),
    ({"indices": int32([[0]])}, ValueError, r"indices: shape \[1, 1, 1\], expected .*Sq, topk\]"),
    ({"indices": int32([0])}, ValueError, r"indices: shape \[1, 1\], expected \[B, Sq, topk\]"),
    ({"indices": torch.zeros(B, SQ, 5)}, TypeError, r"indices: dtype Float, expected Int"),
    ({"topk_length": int32(0, 0)}, ValueError, r"topk_length: given without indices"),
    ({"indices": INDICES, "topk_length": int32(5)}, ValueError, r"topk_length: shape \[1\]"),
    (
        {"indices": INDICES, "topk_length": int32(5, 6)},
        ValueError,
        r"topk_length\[1\]: 6, expected 0 to 5 \(indices.size\(-1\)\)",
    ),
    ({"indices": INDICES, "topk_length": int32(-1, 0)}, ValueError, r"topk_length\[0\]: -1"),
    ({"indices": meta(B, SQ, 5)}, RuntimeError, r"indices: on device meta"),
    ({"cu_seqlens_q": int32(0, 3, 6)}, ValueError, r"q: shape .* \[T, H, head_dim\] as cu_seq"),
]

KV_B_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"form": "expanded", "indices": INDICES}, ValueError, r'form: "expanded" shares the keys'),
    ({"form": "other"}, ValueError, r'form: "other" is unknown'),
    ({"w_kv_b": torch.zeros(H * (P + V), L)}, ValueError, r"w_kv_b: shape \[160, 64\] has 2"),
    ({"w_kv_b": torch.zeros(H + 1, P + V, L)}, ValueError, r"w_kv_b: 5 heads, expected 4 as in q"),
    ({"w_kv_b": torch.zeros(H, P + V, L).half()}, TypeError, r"w_kv_b: dtype Half, expected Float"),
    ({"w_kv_b": torch.zeros(H, V, L)}, ValueError, r"w_kv_b: .* V = head_dim_v = 24 and P >= 1"),
    ({"w_kv_b": torch.zeros(H, P + V, L - 1)}, ValueError, r"kv_cache: rows of 96, expected 95"),
    ({"w_kv_b": meta(H, P + V, L)}, RuntimeError, r"w_kv_b: on device meta"),
    ({"q": torch.zeros(B, SQ, H, P - 1)}, ValueError, r"q: rows of 15, expected at least 16"),
    ({"head_dim_v": P + V}, ValueError, r"w_kv_b: shape .* V = head_dim_v = 40"),
]

APPEND_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"slot_mapping": int32(0, 1, 2, 3)}, TypeError, r"slot_mapping: dtype Int, expected Long"),
    (
        {"slot_mapping": torch.tensor([0, 1])},
        ValueError,
        r"kv_c: .* 4 tokens, expected 2 as in slot",
    ),
    (
        {"slot_mapping": torch.tensor([0, 1, 2, 48])},
        IndexError,
        r"slot_mapping: slot 48 of token 3, expected -1 \(skip\) to 47",
    ),
    (
        {"slot_mapping": torch.tensor([0, -2, 2, 3])},
        IndexError,
        r"slot_mapping: slot -2 of token 1",
    ),
    ({"slot_mapping": torch.full((4,), 1 << 62)}, IndexError, r"slot_mapping: slot 46116860184"),
    ({"kv_c": torch.zeros(4, L).int()}, TypeError, r"kv_c: dtype Int"),
    ({"kv_c": torch.zeros(4)}, ValueError, r"kv_c: shape \[4\], expected \[tokens, width\]"),
    ({"kv_c": torch.zeros(4, L - 1)}, ValueError, r"kv_cache: rows of 96, expected 95"),
    ({"kv_c": torch.zeros(4, 0)}, ValueError, r"head_dim_v: 0|kv_c"),
    ({"k_pe": torch.zeros(3, R)}, ValueError, r"k_pe: .* 3 tokens, expected 4"),
    ({"k_pe": torch.zeros(4, R).half()}, TypeError, r"k_pe: dtype Half, expected Float as in kv_c"),
    ({"k_pe": meta(4, R)}, RuntimeError, r"k_pe: on device meta"),
    ({"kv_cache": torch.zeros(6, 8, 95)}, ValueError, r"kv_cache: rows of 95"),
    ({"kv_cache": torch.zeros(96).expand(6, 8, 96)}, RuntimeError, r"kv_cache: .* share memory"),
    (
        {"kv_cache": torch.zeros(6, 8, 96).byte()},
        TypeError,
        r"kv_cache: dtype Byte .* must be named",
    ),
    ({"k_pe_cache": torch.zeros(6, 8, R)}, ValueError, r"kv_cache: rows of 96, expected 64"),
    (
        {
            "kv_c": torch.zeros(4, 48),
            "kv_cache": torch.zeros(6, 8, 88).byte(),
            "kv_cache_dtype": "q8_kv",
        },
        ValueError,
        r"kv_cache_dtype: q8_kv packs multiples of 32 values, but the latent has 48",
    ),
]

GATHER_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float64}, TypeError, r"dtype: dtype Double, expected Float"),
    ({"head_dim": L - 1}, ValueError, r"head_dim - head_dim_v: -1"),
    ({"head_dim": L + R + 1}, ValueError, r"kv_cache: rows of 96, expected 97"),
    ({"max_seqlen": -1}, ValueError, r"max_seqlen: -1, expected 0 or more"),
    ({"cache_seqlens": int32([13, 16])}, ValueError, r"cache_seqlens: shape \[1, 2\] has 2"),
    ({"cache_seqlens": int32(13, 25)}, ValueError, r"cache_seqlens\[1\]: 25, expected 0 to 24"),
]

MERGE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"out_a": torch.zeros(B, SQ, H, L).double()}, TypeError, r"out_a: dtype Double"),
    ({"out_a": torch.zeros(H, L)}, ValueError, r"out_a: shape \[4, 64\] has 2 dimensions"),
    ({"out_a": torch.zeros(SQ, H, L)}, ValueError, r"out_b: .* expected the shape of out_a"),
    (
        {"out_b": torch.zeros(B, SQ, H, L + 1)},
        ValueError,
        r"out_b: shape .* expected the shape of out_a",
    ),
    ({"out_b": torch.zeros(B, SQ, H, L).half()}, TypeError, r"out_b: dtype Half, expected Float"),
    ({"out_b": every_other_column(B, SQ, H, L)}, ValueError, r"out_b: strides"),
    (
        {"lse_a": torch.zeros(B, SQ, H)},
        ValueError,
        r"lse_a: shape \[2, 3, 4\], expected \[B, H, Sq\]",
    ),
    ({"lse_b": torch.zeros(B, H, SQ).half()}, TypeError, r"lse_b: dtype Half, expected Float"),
    ({"attn_sink": torch.zeros(H + 1)}, ValueError, r"attn_sink: shape \[5\]"),
]

COPY_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_cache": torch.zeros(8)}, ValueError, r"kv_cache: shape \[8\]"),
    ({"kv_cache": torch.zeros(8).expand(6, 8)}, RuntimeError, r"kv_cache: .* share memory"),
    ({"block_mapping": int32([0, 1])}, TypeError, r"block_mapping: dtype Int, expected Long"),
    ({"block_mapping": torch.tensor([0, 1])}, ValueError, r"block_mapping: shape \[2\] has 1"),
    ({"block_mapping": torch.tensor([[0, 1, 2]])}, ValueError, r"block_mapping: shape \[1, 3\]"),
    ({"block_mapping": torch.tensor([[0, 6]])}, IndexError, r"block_mapping\[0\]\[1\]: block 6"),
    ({"block_mapping": torch.tensor([[-1, 0]])}, IndexError, r"block_mapping\[0\]\[0\]: block -1"),
    ({"block_mapping": torch.tensor([[0, 1], [2, 1]])}, ValueError, r"target of two copies"),
    ({"block_mapping": torch.tensor([[0, 1], [1, 2]])}, ValueError, r"block 1 is both a source"),
]

RAGGED_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens_q": None}, ValueError, r"q: .* has 3 dimensions, expected \[B, Sq, H, head"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 6])}, TypeError, r"cu_seqlens_q: dtype Long, expected I"),
    ({"cu_seqlens_q": int32([0, 2, 6])}, ValueError, r"cu_seqlens_q: shape \[1, 3\], expected \[B"),
    ({"cu_seqlens_q": int32()}, ValueError, r"cu_seqlens_q: shape \[0\], expected \[B \+ 1\]"),
    ({"cu_seqlens_q": int32(1, 2, 6)}, ValueError, r"cu_seqlens_q\[0\]: 1, expected 0"),
    (
        {"cu_seqlens_q": int32(0, 7, 6)},
        ValueError,
        r"cu_seqlens_q\[2\]: 6, expected at least cu_seqlens_q\[1\] = 7",
    ),
    ({"cu_seqlens_q": int32(0, 2, 5)}, ValueError, r"cu_seqlens_q\[2\]: 5, expected .* = 6"),
    ({"cu_seqlens_q": int32(0, 6)}, ValueError, r"cache_seqlens: shape \[2\], expected \[B\]"),
    ({"cu_seqlens_q": meta(3)}, RuntimeError, r"cu_seqlens_q: on device meta"),
    (
        {"q": torch.zeros(6, H, L), "q_pe": torch.zeros(5, H, R)},
        ValueError,
        r"q_pe: shape .*, expected \[T, H, R\] with",
    ),
    (
        {"attn_mask": torch.zeros(5, 24)},
        ValueError,
        r"attn_mask: .*broadcastable to \[H, T, S\] with 1 sequences, 4 heads and 6 query tokens",
    ),
    ({"indices": int32([[[0]]])}, ValueError, r"indices: .*, expected \[T, topk\] = \[6, 1\]"),
]

ALL_ERRORS = [
    (name, *case)
    for names, cases in (
        (("mla_attention",), QUERY_ERRORS),
        (("mla_attention", "mla_attention_kv_b"), KEY_ERRORS),
        (("mla_attention_kv_b",), KV_B_ERRORS),
        (("ragged",), RAGGED_ERRORS),
        (("concat_and_cache_mla",), APPEND_ERRORS),
        (("gather_cache",), GATHER_ERRORS),
        (("merge_attn_states",), MERGE_ERRORS),
        (("copy_blocks",), COPY_ERRORS),
    )
    for case in cases
    for name in names
]


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_the_unchanged_arguments_are_fine(name: str) -> None:
    operator(name)(**ARGUMENTS[name]())


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    ALL_ERRORS,
    ids=[f"{name}-{'+'.join(changes)}-{i}" for i, (name, changes, *_) in enumerate(ALL_ERRORS)],
)
def test_error(name: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = ARGUMENTS[name]() | changes
    cache = arguments.get("kv_cache")
    readable = cache is not None and cache.device.type == "cpu" and cache.layout == torch.strided
    readable = readable and cache.untyped_storage().nbytes() > 0
    before = cache.clone() if readable else None
    with pytest.raises(error, match=message):
        operator(name)(**arguments)
    if readable:
        assert torch.equal(cache, before), "the cache was written before the error"


def test_valid_edges(isa: str) -> None:
    """Arguments at the border of what is allowed give results, not errors."""
    base = attention_arguments()

    def shapes(**changes: Any) -> tuple[torch.Size, torch.Size]:
        out, lse = ops.mla_attention(**(base | changes))
        assert out.isfinite().all()
        return out.shape, lse.shape

    full = (B, SQ, H, L), (B, H, SQ)
    assert shapes(cache_seqlens=int32(0, 1)) == full
    assert shapes(cache_leftpad=base["cache_seqlens"]) == full
    assert shapes(window=1 << 50) == full
    assert shapes(softmax_scale=0.0) == full
    assert shapes(softmax_scale=-1.0) == full
    assert shapes(kv_cache=base["kv_cache"].unsqueeze(2)) == full
    assert shapes(kv_cache=base["kv_cache"].transpose(0, 1).contiguous().transpose(0, 1)) == full
    assert shapes(block_table=base["block_table"].T.contiguous().T) == full
    assert shapes(cache_seqlens=int32(13, 0, 16, 0)[::2]) == full
    assert shapes(q=base["q"][:, :1].expand(B, SQ, H, L + R)) == full
    assert shapes(q=base["q"].transpose(1, 2).contiguous().transpose(1, 2)) == full
    assert shapes(q=torch.zeros(B, 0, H, L + R)) == ((B, 0, H, L), (B, H, 0))
    assert shapes(q=torch.zeros(B, SQ, 0, L + R)) == ((B, SQ, 0, L), (B, 0, SQ))
    empty = {"block_table": int32().view(0, 3), "cache_seqlens": int32()}
    assert shapes(q=torch.zeros(0, SQ, H, L + R), **empty) == ((0, SQ, H, L), (0, H, SQ))
    assert shapes(q=torch.zeros(B, SQ, H, L + R), head_dim_v=L + R) == ((B, SQ, H, L + R), full[1])
    nothing = {"kv_cache": torch.zeros(0, BLOCK_SIZE, L + R), "cache_seqlens": int32(0, 0)}
    out, lse = ops.mla_attention(**(base | nothing))
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = ops.mla_attention_kv_b(**(kv_b_arguments() | nothing))
    assert (out == 0).all() and (lse == -torch.inf).all()
    # numpy gives arrays without elements strides of 0.
    no_tokens = torch.zeros(B, 0, H, L + R).as_strided((B, 0, H, L + R), (0, 0, 0, 0))
    assert shapes(q=no_tokens) == ((B, 0, H, L), (B, H, 0))
    part = (no_tokens, torch.zeros(B, H, 0))
    assert ops.merge_attn_states(*part, *part)[0].shape == no_tokens.shape


def test_masks_of_every_layout_mean_the_same(isa: str) -> None:
    base = attention_arguments()
    mask = torch.rand(B, 1, SQ, 20) > 0.4
    expected = ops.mla_attention(**base, attn_mask=mask)
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    infinite = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for same in (
        mask.expand(B, H, SQ, 20),
        mask.transpose(-1, -2).contiguous().transpose(-1, -2),
        mask.transpose(-1, -2).contiguous().transpose(-1, -2).expand(B, H, SQ, 20),
        torch.nn.functional.pad(mask, (0, 7), value=True),
        lowest,
        infinite,
        infinite.half(),
        infinite.bfloat16(),
    ):
        torch.testing.assert_close(ops.mla_attention(**base, attn_mask=same), expected)
    one = torch.tensor([True]).expand(20)  # a stride of 0 in the last dimension
    torch.testing.assert_close(ops.mla_attention(**base, attn_mask=one), ops.mla_attention(**base))


def test_append_layouts(isa: str) -> None:
    """All shapes in which models hold the new tokens write the same rows."""
    arguments = append_arguments()
    ops.concat_and_cache_mla(**arguments)
    expected = arguments["kv_cache"].clone()
    kv_c, k_pe = arguments["kv_c"], arguments["k_pe"]
    slots = arguments["slot_mapping"]
    for changes in (
        {"kv_c": kv_c.view(2, 2, L), "k_pe": k_pe.view(2, 2, R), "slot_mapping": slots.view(2, 2)},
        {"k_pe": k_pe.view(4, 1, R)},
        {"k_pe": k_pe.view(2, 1, 2, R)},
        {"kv_c": torch.cat([kv_c, k_pe], dim=1)[:, :L], "k_pe": k_pe.T.contiguous().T},
        {"slot_mapping": torch.stack([slots, slots], dim=1)[:, 0]},
    ):
        cache = torch.zeros_like(expected)
        cache.copy_(expected)
        cache[0, 0] = cache[5, 7] = cache[1, 1] = 0
        ops.concat_and_cache_mla(**(arguments | {"kv_cache": cache} | changes))
        assert torch.equal(cache, expected)
    none = {"kv_c": kv_c[:0], "k_pe": k_pe[:0], "slot_mapping": slots[:0]}
    ops.concat_and_cache_mla(**(arguments | none))


def test_copy_blocks() -> None:
    cache = torch.randn(6, 8, 1, 96)
    expected = cache.clone()
    expected[[1, 4]] = cache[[0, 2]]
    ops.copy_blocks(cache, torch.tensor([[0, 1], [2, 4]]))
    assert torch.equal(cache, expected)
    packed = torch.arange(6 * 8 * 3, dtype=torch.uint8).view(6, 8, 3)
    ops.copy_blocks(packed, torch.tensor([[5, 0]]))
    assert torch.equal(packed[0], packed[5])
    ops.copy_blocks(packed, torch.zeros(0, 2, dtype=torch.int64))


# Random arguments: the operators may refuse them, but only with an exception of their own.

INTEGERS = st.sampled_from([-(2**31), -7, -1, 0, 1, 2, 7, 8, 9, 16, 24, 1000, 2**31 - 1])
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.float64]
)
SIZES = st.sampled_from([0, 1, 2, 3, 8])


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    """Mostly the right shape, sometimes with a dimension changed, added, strided or expanded."""
    sizes = list(shape)
    if draw(st.integers(0, 4)) == 0 and sizes:
        sizes[draw(st.integers(0, len(sizes) - 1))] = draw(SIZES)
    if draw(st.integers(0, 9)) == 0:
        sizes.insert(draw(st.integers(0, len(sizes))), draw(SIZES))
    dtype = draw(DTYPES) if draw(st.integers(0, 3)) == 0 else torch.float32
    kind = draw(st.integers(0, 5))
    if kind == 0 and sizes:
        return torch.ones(1, dtype=dtype).expand(sizes)
    if kind == 1 and sizes:
        return torch.ones([2 * s for s in sizes], dtype=dtype)[
            tuple(slice(0, 2 * s, 2) for s in sizes)
        ]
    if kind == 2 and len(sizes) > 1:
        order = draw(st.permutations(range(len(sizes))))
        inverse = sorted(range(len(sizes)), key=lambda d: order[d])
        return torch.ones([sizes[d] for d in order], dtype=dtype).permute(inverse)
    return torch.ones(sizes, dtype=dtype)


@st.composite
def integers(draw: st.DrawFn, *shape: int, dtype: torch.dtype, high: int) -> Tensor:
    """Mostly valid numbers, sometimes anything."""
    t = draw(tensors(*shape))
    wild = draw(st.integers(0, 3)) == 0
    values = INTEGERS if wild else st.integers(0, high)
    flat = [draw(values) for _ in range(min(t.numel(), 12))]
    filled = torch.zeros(t.shape, dtype=dtype)
    filled.view(-1)[: len(flat)] = torch.tensor(flat, dtype=dtype)
    return filled.to(torch.int64) if draw(st.integers(0, 9)) == 0 else filled


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), strategy)


@st.composite
def any_attention_arguments(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(
        st.sampled_from(["auto", "auto", "auto", *PACKED_FORMATS, "float32", "float16", "x"])
    )
    cache = draw(tensors(BLOCKS, BLOCK_SIZE, L + R))
    if name in PACKED_FORMATS and draw(st.booleans()):
        cache = torch.ones(BLOCKS, BLOCK_SIZE, row_bytes(name, L, R), dtype=torch.uint8)
    two = draw(st.integers(0, 3)) == 0
    arguments = {
        "q": draw(tensors(B, SQ, H, L + R)),
        "kv_cache": cache[..., :L] if two else cache,
        "k_pe_cache": draw(tensors(BLOCKS, BLOCK_SIZE, R)) if two else None,
        "block_table": draw(maybe(integers(B, MAX_BLOCKS, dtype=torch.int32, high=BLOCKS - 1))),
        "cache_seqlens": draw(integers(B, dtype=torch.int32, high=BLOCK_SIZE * 2)),
        "head_dim_v": draw(st.sampled_from([L, L, L, L, L + R, 1, 0, 97])),
        "softmax_scale": draw(st.sampled_from([0.1, 0.0, -3.0, 1e38, float("nan")])),
        "causal": draw(st.booleans()),
        "attn_mask": draw(maybe(tensors(B, 1, SQ, 24))),
        "cache_leftpad": draw(maybe(integers(B, dtype=torch.int32, high=2))),
        "indices": draw(maybe(integers(B, SQ, 5, dtype=torch.int32, high=20))),
        "topk_length": draw(maybe(integers(B, dtype=torch.int32, high=5))),
        "attn_sink": draw(maybe(tensors(H))),
        "q_pe": draw(maybe(tensors(B, SQ, H, R))) if draw(st.integers(0, 3)) == 0 else None,
        "window": draw(st.sampled_from([0, 0, 1, 5, -1, 1 << 40])),
        "kv_cache_dtype": name,
    }
    if draw(st.integers(0, 3)) == 0:  # ragged
        first = draw(st.integers(0, B * SQ))
        right = int32(0, first, B * SQ)
        wild = integers(B + 1, dtype=torch.int32, high=B * SQ)
        arguments["cu_seqlens_q"] = draw(st.one_of(st.just(right), st.just(right), wild))
        if draw(st.integers(0, 3)) > 0:
            for key in ("q", "q_pe", "indices"):
                t = arguments[key]
                arguments[key] = t.flatten(0, 1) if t is not None and t.dim() > 1 else t
            arguments["attn_mask"] = draw(maybe(tensors(1, B * SQ, 24)))
    return arguments


FUZZ = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=400
)


@FUZZ
@given(any_attention_arguments())
def test_fuzz_attention(arguments: dict[str, Any]) -> None:
    try:
        out, lse = ops.mla_attention(**arguments)
    except ERRORS as error:
        assert ":" in str(error)
        return
    q = arguments["q"]
    assert out.shape == (*q.shape[:-1], arguments["head_dim_v"]) and out.dtype == q.dtype
    assert lse.shape == q[..., 0].mT.shape


@FUZZ
@given(any_attention_arguments(), st.data())
def test_fuzz_attention_kv_b(arguments: dict[str, Any], data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        ragged = arguments.get("cu_seqlens_q") is not None
        arguments["q"] = torch.ones(*((B * SQ,) if ragged else (B, SQ)), H, P + R)
    arguments["head_dim_v"] = data.draw(st.sampled_from([V, V, V, 0, P + V]))
    arguments["w_kv_b"] = data.draw(tensors(H, P + V, L))
    arguments["form"] = data.draw(st.sampled_from(["auto", "absorbed", "expanded", ""]))
    try:
        out, _ = ops.mla_attention_kv_b(**arguments)
    except ERRORS as error:
        assert ":" in str(error)
        return
    assert out.shape == (*arguments["q"].shape[:-1], arguments["head_dim_v"])


@FUZZ
@given(any_attention_arguments(), st.data())
def test_fuzz_cache(arguments: dict[str, Any], data: st.DataObject) -> None:
    name = arguments["kv_cache_dtype"]
    cache = arguments["kv_cache"]
    if cache.numel() < 1 << 16:
        cache = cache.clone(memory_format=torch.preserve_format)
    tokens = data.draw(tensors(3, L)), data.draw(tensors(3, R))
    slots = data.draw(integers(3, dtype=torch.int64, high=BLOCKS * BLOCK_SIZE - 1))
    calls = (
        lambda: ops.concat_and_cache_mla(*tokens, cache, slots, name, arguments["k_pe_cache"]),
        lambda: ops.gather_cache(
            cache,
            arguments["block_table"],
            arguments["cache_seqlens"],
            L,
            L + R,
            data.draw(DTYPES),
            name,
            data.draw(maybe(st.sampled_from([0, 1, 9, 30, -1]))),
        ),
        lambda: ops.copy_blocks(
            cache, data.draw(integers(2, 2, dtype=torch.int64, high=BLOCKS - 1))
        ),
    )
    for call in calls:
        try:
            call()
        except ERRORS as error:
            assert ":" in str(error)


# The instruction set


def test_force_isa() -> None:
    before = torch_flash_mla.cpu_isa()
    for name in torch_flash_mla.available_isas():
        with torch_flash_mla.force_isa(name):
            assert torch_flash_mla.cpu_isa() == name
    assert torch_flash_mla.cpu_isa() == before
    refused = pytest.raises(ValueError, match=r'"sse9" is no instruction set .* expected scalar')
    with refused, torch_flash_mla.force_isa("sse9"):
        pass
    assert torch_flash_mla.cpu_isa() == before


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment},
    )


def test_environment_chooses_the_isa() -> None:
    result = run_python("import torch_flash_mla as m; print(m.cpu_isa())", FLASHMLA_ISA="scalar")
    assert result.stdout.strip() == "scalar", result.stderr


def test_environment_naming_an_unknown_isa_is_an_error() -> None:
    code = """
import torch, torch_flash_mla
one = torch.zeros(1, 1, 1, 1)
torch_flash_mla.merge_attn_states(one, one[..., 0], one, one[..., 0])
"""
    result = run_python(code, FLASHMLA_ISA="sse9")
    assert result.returncode != 0
    assert "ValueError" in result.stderr and "FLASHMLA_ISA" in result.stderr
    assert "sse9" in result.stderr
