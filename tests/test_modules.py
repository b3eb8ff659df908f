"""MLAAttention: equal to the transformers layer, scriptable, compilable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from torch_flash_mla.cache import PagedLatentCache
from torch_flash_mla.modules import MLAAttention

DIMS = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 48, "v_head_dim": 40}
HIDDEN, HEADS = 96, 4


def layer(**changes) -> MLAAttention:
    torch.manual_seed(1)
    return MLAAttention(HIDDEN, HEADS, **DIMS | changes).eval().requires_grad_(False)


def angles(positions: Tensor, rope: int = 32) -> tuple[Tensor, Tensor]:
    frequency = 10000 ** (-torch.arange(0, rope, 2) / rope)
    phase = positions.unsqueeze(-1) * frequency
    return torch.cat([phase.cos()] * 2, dim=-1), torch.cat([phase.sin()] * 2, dim=-1)


def run(module, hidden: Tensor, steps: list[int], kv_cache_dtype: str = "auto", **cache) -> Tensor:
    """Feeds ``hidden`` [B, S, hidden] in pieces, through one cache."""
    latents = PagedLatentCache(
        1, 64, 32, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype, block_size=16, **cache
    )
    out, start = [], 0
    for new in steps:
        slots = latents.reserve(len(hidden), new)
        cos, sin = angles(torch.arange(start, start + new)[None].float())
        piece = hidden[:, start : start + new]
        tables = latents.block_table[: len(hidden)], latents.cache_seqlens[: len(hidden)]
        out.append(module(piece, cos, sin, latents.kv_cache(0), *tables, slots))
        start += new
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_equals_transformers(q_lora_rank, interleave):
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        rope_interleave=interleave,
        attn_implementation="eager",
        **DIMS,
    )
    stock = DeepseekV3Attention(config, layer_idx=0).eval()
    ours = layer(q_lora_rank=q_lora_rank, rope_interleave=interleave)
    ours.load_state_dict(stock.state_dict())
    hidden = torch.randn(2, 21, HIDDEN)
    mask = torch.full((21, 21), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = stock(hidden, angles(torch.arange(21)[None].float()), mask)
        out = run(ours, hidden, [16, 1, 3, 1])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_without_rope():
    module = layer(qk_rope_head_dim=0)
    latents = PagedLatentCache(1, 64, 0, dtype=torch.float32)
    slots = latents.reserve(1, 3)
    tables = latents.block_table, latents.cache_seqlens
    out = module(torch.randn(1, 3, HIDDEN), None, None, latents.kv_cache(0), *tables, slots)
    assert out.isfinite().all()


def test_missing_angles_and_odd_rope():
    with pytest.raises(ValueError, match="even"):
        layer(qk_rope_head_dim=7)
    latents = PagedLatentCache(1, 64, 32, dtype=torch.float32)
    arguments = latents.kv_cache(0), latents.block_table, latents.cache_seqlens
    with pytest.raises(ValueError, match="cos, sin"):
        layer()(torch.zeros(1, 1, HIDDEN), None, None, *arguments, torch.zeros(1, 1).long())


def test_compiled_steps_are_one_graph():
    """Decode steps with a cache of fixed size: one graph, no recompile, the same numbers."""
    module = layer()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    hidden = torch.randn(2, 40, HIDDEN)
    out = run(compiled, hidden, [1] * 40, max_batch=2, max_cache_len=40)
    assert graphs.frame_count == 1
    torch.testing.assert_close(out, run(module, hidden, [1] * 40))


def test_gradients_reach_what_they_can():
    module = layer().requires_grad_(True)
    run(module, torch.randn(1, 4, HIDDEN), [4]).sum().backward()
    for name in ("q_proj", "kv_b_proj", "o_proj"):
        assert getattr(module, name).weight.grad.abs().sum() > 0
