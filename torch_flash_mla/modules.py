"""An MLA attention layer as a module: projections, rotary embedding, cache, attention operator."""

# No `from __future__ import annotations`: torch.jit.script would not know `Final` in a string.
from typing import Final

import torch
from torch import Tensor, nn

from torch_flash_mla.ops import concat_and_cache_mla, mla_attention_kv_b


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of the last dimension.

    Args:
        x: [B, Sq, heads, R].
        cos, sin: [B or 1, Sq, R / 2 or more], of each pair's angle; columns beyond R / 2 are not
            read (transformers repeats the angles there).
        interleaved: pairs are neighbours (2i, 2i + 1), as in DeepSeek's weights; else they are
            (i, i + R / 2). The result has the first of all pairs, then the second of all pairs.

    Returns:
        [B, Sq, heads, R].
    """
    half = x.size(-1) // 2
    cos, sin = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MLAAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) for inference.

    Parameters are named like those of DeepSeek layers in transformers, so that a state dict of one
    loads into the other. The cache comes as arguments (see ``PagedLatentCache``), so the module
    holds no state of a sequence and works under ``torch.jit.script``, ``torch.compile`` and
    ``torch.export``.

    Gradients reach the queries, ``kv_b_proj`` and ``o_proj``, but do not pass the cache to
    ``kv_a_proj_with_mqa``.

    Args:
        hidden_size: width of the layer's input and output.
        num_heads: H.
        kv_lora_rank: L.
        qk_rope_head_dim: R, even; 0 for layers without position.
        qk_nope_head_dim: P.
        v_head_dim: V.
        q_lora_rank: width of the low-rank query projection; None: a plain one.
        softmax_scale: default (P + R) ** -0.5. Models with YaRN have another one.
        rope_interleave: which dims form a rotary pair (see ``rotate``).
        kv_cache_dtype: format of the cache, "auto" for its own float dtype.
        attention_bias: whether the input and output projections have a bias.
        rms_norm_eps: of the norms.
    """

    low_rank_queries: Final[bool]
    has_rope: Final[bool]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        qk_rope_head_dim: int = 64,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        q_lora_rank: int | None = None,
        softmax_scale: float | None = None,
        rope_interleave: bool = True,
        kv_cache_dtype: str = "auto",
        attention_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: got {qk_rope_head_dim}, expected an even number")
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.qk_nope_head_dim = qk_nope_head_dim
        self.v_head_dim = v_head_dim
        self.rope_interleave = rope_interleave
        self.kv_cache_dtype = kv_cache_dtype
        self.low_rank_queries = q_lora_rank is not None
        self.has_rope = qk_rope_head_dim > 0
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = qk_head_dim**-0.5 if softmax_scale is None else softmax_scale

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm(width: int) -> nn.RMSNorm:
            return nn.RMSNorm(width, eps=rms_norm_eps, device=device, dtype=dtype)

        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, num_heads * qk_head_dim)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, attention_bias)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = linear(q_lora_rank, num_heads * qk_head_dim)
        self.kv_a_proj_with_mqa = linear(
            hidden_size, kv_lora_rank + qk_rope_head_dim, attention_bias
        )
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        kv_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Tensor,
        slot_mapping: Tensor,
        causal: bool = True,
        attn_mask: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Writes the new tokens to the cache, then attends to all tokens in it.

        Args:
            hidden_states: [B, Sq, hidden_size].
            cos, sin: [B or 1, Sq, at least R / 2], of the new tokens; None when R = 0.
            kv_cache: [num_blocks, block_size, L + R] or packed rows; mutated.
            block_table: int32 [B, max_blocks], or None: block i is sequence i.
            cache_seqlens: int32 [B], the new tokens included.
            slot_mapping: int64 [B, Sq], where the new tokens go; -1 for nowhere.
            causal, attn_mask, cache_leftpad, window: as in ``ops.mla_attention``.

        Returns:
            [B, Sq, hidden_size].

        Raises:
            ValueError: no ``cos`` and ``sin`` though R > 0, or what the operators refuse.
        """
        batch, q_len, _ = hidden_states.shape
        if self.low_rank_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            q = self.q_proj(hidden_states)
        q = q.view(batch, q_len, self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim)
        q_nope, q_pe = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        latent = self.kv_a_proj_with_mqa(hidden_states)
        kv_c, k_pe = torch.split(latent, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_c = self.kv_a_layernorm(kv_c)
        if self.has_rope:
            if cos is None or sin is None:
                raise ValueError("cos, sin: got None, but the layer has rotary dims")
            q_pe = rotate(q_pe, cos, sin, self.rope_interleave)
            k_pe = rotate(k_pe.unsqueeze(2), cos, sin, self.rope_interleave).squeeze(2)
        # Under autocast, or with angles of another dtype, the parts differ.
        q_pe = q_pe.to(q_nope.dtype)
        k_pe = k_pe.to(kv_c.dtype)

        concat_and_cache_mla(
            kv_c.detach(), k_pe.detach(), kv_cache, slot_mapping, self.kv_cache_dtype
        )
        heads_width = self.qk_nope_head_dim + self.v_head_dim
        w_kv_b = self.kv_b_proj.weight.to(q_nope.dtype)
        out, _ = mla_attention_kv_b(
            q_nope,
            kv_cache,
            block_table,
            cache_seqlens,
            w_kv_b.view(self.num_heads, heads_width, self.kv_lora_rank),
            self.v_head_dim,
            self.softmax_scale,
            causal=causal,
            attn_mask=attn_mask,
            cache_leftpad=cache_leftpad,
            q_pe=q_pe,
            window=window,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return self.o_proj(out.flatten(2))
