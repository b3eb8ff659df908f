"""What examples/cpp/operators.cpp must print, computed by the operators of this process."""

from __future__ import annotations

import re

import torch
from cpp_examples import numbers
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import ops


def values(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()])


def check_operators(output: str) -> None:
    """``output``: of the program, linked with any series of torch."""
    printed = dict(re.findall(r"^([\w ]+): (.*)$", output, re.MULTILINE))
    assert printed["instruction set"] == torch_flash_mla.cpu_isa()

    heads, latent, nope, value = 4, 64, 16, 24
    kv_cache = torch.empty(6, 16, torch.ops.flashmla._row_bytes("q8_kv", 64, 32), dtype=torch.uint8)
    table = torch.tensor([[0, 3, 5], [4, 1, 2]], dtype=torch.int32)
    lengths = torch.tensor([20, 20], dtype=torch.int32)
    positions = torch.arange(20)
    slots = table.long()[:, positions // 16] * 16 + positions % 16
    tokens = numbers(0, 2, 20, latent), numbers(7, 2, 20, 32)
    ops.concat_and_cache_mla(*tokens, kv_cache, slots, "q8_kv")
    weight = numbers(3, heads, nope + value, latent)
    q_nope, q_pe = numbers(11, 2, 1, heads, nope), numbers(13, 2, 1, heads, 32)
    query = torch.cat([torch.einsum("bshp,hpl->bshl", q_nope, weight[:, :nope]), q_pe], dim=-1)
    tail = (kv_cache, table, lengths)
    scale = (nope + 32) ** -0.5
    latent_out, lse = ops.mla_attention(query, *tail, latent, scale, kv_cache_dtype="q8_kv")
    out, _ = ops.mla_attention_kv_b(
        q_nope, *tail, weight, value, scale, q_pe=q_pe, kv_cache_dtype="q8_kv"
    )
    for name, expected in (("latent out", latent_out), ("lse", lse), ("out", out)):
        torch.testing.assert_close(
            values(printed[name]), expected.flatten()[:6], rtol=1e-4, atol=1e-4
        )
    for name in ("by hand", "merged", "merged lse"):
        assert re.search(rf"^{name}: relative difference \d\.\de-", output, re.MULTILINE)
    ops.copy_blocks(kv_cache, table[:, 0].long().unsqueeze(0))
    for name in torch_flash_mla.available_isas():
        with torch_flash_mla.force_isa(name):
            expected, _ = ops.mla_attention(
                query, *tail, latent, scale, causal=True, kv_cache_dtype="q8_kv"
            )
        torch.testing.assert_close(
            values(printed[name]), expected.flatten()[:6], rtol=1e-4, atol=1e-4
        )
    assert printed["as expected"].startswith("kv_cache: rows of 104, expected 72")
