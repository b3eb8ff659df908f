"""The attention function that transformers calls for a patched layer: its arguments -> one op call.

A patched layer, or one whose config selects this attention by its name, hands over its *compressed*
keys (``selection.py``): ``key`` is the latent ``[B, 1, S, L]`` and ``value`` the rotary key
``[B, 1, S, R]``; a layer whose key is its value gives that twice (``shared_keys.py``). They are

* carriers of an MLACache, NaN tensors that point to the pages of the layer (``cache.py``);
* or the tensors themselves, from any cache of transformers or from none: read in place, in the
  two-tensor form.

Where kv_b_proj is no matrix (``weights.py``), with dropout and for requested attention weights the
latents are expanded after all, by the layer's own code, and one of transformers' implementations
attends.

Nothing here branches on lengths or on the values of masks, so a graph compiled for decoding stays
one graph. (A query of one token and one of many differ in shape, which specialises it anyway.)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_flash_mla import ops
from torch_flash_mla.integrations.transformers.cache import Pages, cache_layer_of
from torch_flash_mla.integrations.transformers.selection import (
    ATTENTION_NAME,
    AttentionModule,
    expand,
    is_disabled,
    passes_latents,
)
from torch_flash_mla.integrations.transformers.shared_keys import (
    is_shared,
    shared_attention,
    shares_keys,
)
from torch_flash_mla.integrations.transformers.weights import kv_b_weight, reading

Mask: TypeAlias = Tensor | BlockMask | None


@dataclass
class PatchState:
    """What a patched module was before. Kept on the module, so deepcopy and pickling take it along.

    Attributes:
        config: the model's own config object, not a copy: later changes of it stay visible.
    """

    config: PreTrainedConfig


def patch_state(module: AttentionModule) -> PatchState | None:
    """The state that ``patch`` left on a module, None for an unpatched one."""
    return module.__dict__.get("_torch_flash_mla")


def is_mla(module: AttentionModule) -> bool:
    """Whether a module is an MLA layer that caches the latent: it has the two parts we rely on."""
    return callable(getattr(type(module), "expand_kv", None)) and hasattr(module, "kv_b_proj")


def mla_attention_forward(
    module: AttentionModule,
    query: Tensor,  # [B, H, Sq, P + R]
    key: Tensor,  # [B, 1, S, L] latent; [B, H, S, P + R] where the module still expands
    value: Tensor,  # [B, 1, S, R] rotary key; [B, H, S, V] where the module still expands
    attention_mask: Mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    indices: Tensor | None = None,  # int32 [B, Sq, topk], distinct cache positions, -1 skips
    s_aux: Tensor | None = None,  # [H] attention sinks
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the calling convention of transformers' attention interface.

    Dropout, requested attention weights and a kv_b_proj that is no matrix take the stock path, over
    keys expanded for that call.

    Returns:
        out: [B, Sq, H, V], dtype of ``query``.
        weights: those of the stock path if it computes them, else None.

    Raises:
        NotImplementedError: continuous batching (``cache=``) or a position bias.
        ValueError: softcap. None of these could be ignored without wrong results.
    """
    state = patch_state(module)
    config = module.config if state is None else state.config
    wants_weights = bool(
        kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    )
    stock_kwargs = {**kwargs, "scaling": scaling, "dropout": dropout}
    stock_kwargs |= {} if is_causal is None else {"is_causal": is_causal}
    stock_kwargs |= {} if s_aux is None else {"s_aux": s_aux}
    name = config._attn_implementation
    if name in (None, ATTENTION_NAME):
        name = "eager" if wants_weights or s_aux is not None else "sdpa"
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    shared = shares_keys(module) and is_shared(key, value)
    if is_mla(module) or shared:
        _refuse_unsupported(kwargs)
    if shared:
        ours = state is not None or not is_disabled()
        if ours and dropout == 0.0 and not wants_weights and query.dtype != torch.float64:
            return shared_attention(query, key, attention_mask, scaling, s_aux), None
        is_causal = False  # without a mask these layers see every key
    # Latents have one head; a class may learn the name while another thread is between the two.
    if not passes_latents(module) or key.shape[1] == query.shape[1] > 1:
        return _stock_attention(
            module, name, query, key, value, attention_mask, indices, is_causal, stock_kwargs
        )
    mask = attention_mask
    cached = cache_layer_of(key)
    if cached is not None:
        cached.take()
    weight = None  # [H, P + V, L]
    if dropout == 0.0 and not wants_weights:
        heads, latent_dim = query.shape[1], key.shape[3]
        weight = kv_b_weight(module.kv_b_proj, heads, latent_dim, query.dtype)
    if weight is None:
        if cached is not None and cached.causal_by_length:
            if dropout > 0.0 or wants_weights:
                raise NotImplementedError(
                    "a DecoderStep has neither dropout nor attention weights: call eval() on it, "
                    "and leave output_attentions of the model's config off"
                )
            mask = _causal_by_length(cached, query.shape[2], key.shape[2])
        if cached is not None:
            if cached.context is not None:
                raise NotImplementedError(
                    "an MLACache with a process_group has neither dropout nor attention weights, "
                    "and kv_b_proj must be a matrix (this one: "
                    f"{reading(module.kv_b_proj, key.shape[3], query.dtype)}; with tp_plan it is "
                    "none): no process holds all keys"
                )
            key, value = cached.gather(key.shape[2], query.dtype)
        key, value = expand(module, key, value)
        return _stock_attention(
            module, name, query, key, value, mask, indices, is_causal, stock_kwargs
        )
    if isinstance(mask, BlockMask):
        mask = _dense_block_mask(mask, query, key)
    out = _mla_attention(
        query, key, value, cached, weight, mask, scaling, is_causal, indices, s_aux
    )
    return out, None


def _mla_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached: Pages | None,
    weight: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    is_causal: bool,
    indices: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    """One call of ``mla_attention_kv_b`` over pages or plain tensors: out [B, Sq, H, V]."""
    q_length, head_dim = query.shape[2:]
    rope_dim = value.shape[3]
    head_dim_v = weight.shape[1] - (head_dim - rope_dim)  # V = (P + V) - P
    scale = head_dim**-0.5 if scaling is None else scaling
    sink = None if s_aux is None else s_aux.float()
    if cached is not None and cached.context is not None:
        return cached.context.attend(
            cached,
            query.transpose(1, 2),
            weight,
            head_dim_v,
            scale,
            key.shape[2],
            mask,
            is_causal,
            indices,
            sink,
        )
    if cached is not None:
        kv_cache, k_pe_cache, kv_cache_dtype = cached.kv_cache(), None, cached.kv_cache_dtype
        block_table, cache_seqlens = cached.block_table(), cached.cache_seqlens()
        mask = None if cached.causal_by_length else mask
    else:
        if mask is None and q_length > 1:
            # No mask: the queries are the first tokens, even if a static cache returns more keys.
            key, value = key[:, :, :q_length], value[:, :, :q_length]
        kv_cache, kv_cache_dtype = key[:, 0], "auto"
        k_pe_cache = value[:, 0].to(key.dtype) if rope_dim else None
        block_table = None
        batch, length = key.shape[0], key.shape[2]
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=key.device)
    out, _ = ops.mla_attention_kv_b(
        query.transpose(1, 2),
        kv_cache,
        block_table,
        cache_seqlens,
        weight,
        head_dim_v,
        scale,
        causal=mask is None and is_causal,  # the masks of transformers contain causality
        attn_mask=mask,
        indices=indices,
        attn_sink=sink,
        k_pe_cache=k_pe_cache,
        kv_cache_dtype=kv_cache_dtype,
    )
    return out


def _stock_attention(
    module: AttentionModule,
    name: str,
    query: Tensor,  # [B, H, Sq, P + R]
    key: Tensor,  # [B, H, S, P + R]
    value: Tensor,  # [B, H, S, V]
    mask: Mask,
    indices: Tensor | None,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The implementation ``name`` of transformers, called as the unpatched layer calls it.

    A sparse layer folds its selection into the mask for these implementations; it did not here.
    """
    mask = _fold_indices(mask, indices, query, key, is_causal)
    if name == "eager":  # adds its mask to the logits and needs one for causality
        if mask is None and is_causal and query.shape[2] > 1:
            mask = _causal(query, key.shape[2])
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = query.new_zeros(mask.shape).masked_fill(~mask, lowest)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return attention(module, query, key, value, mask, **kwargs)


def _fold_indices(
    mask: Mask, indices: Tensor | None, query: Tensor, key: Tensor, is_causal: bool
) -> Mask:
    """``mask`` AND "is one of the selected positions": bool or additive [B, 1, Sq, S]."""
    if indices is None:
        return mask
    if isinstance(mask, BlockMask):
        raise NotImplementedError("sparse MLA layers do not combine with a flex_attention mask")
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    column = torch.where(indices < 0, kv_length, indices).long()  # skipped ones: an extra column
    keep = indices.new_zeros(batch, q_length, kv_length + 1, dtype=torch.bool)
    keep = keep.scatter(-1, column, True)[:, None, :, :kv_length]
    if mask is None:
        return keep & _causal(query, kv_length) if is_causal and q_length > 1 else keep
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def _causal(query: Tensor, kv_length: int) -> Tensor:
    """What no mask means for several queries: bool [1, 1, Sq, S], causal from the first key on."""
    return query.new_ones(1, 1, query.shape[2], kv_length, dtype=torch.bool).tril()


def _causal_by_length(cached: Pages, q_length: int, kv_length: int) -> Tensor:
    """The bool mask [B, 1, Sq, S] of queries that are the last tokens of their sequences."""
    lengths = cached.cache_seqlens()
    query = torch.arange(q_length, device=lengths.device) - q_length
    last = (lengths[:, None] + query).clamp(min=0)  # places that hold no token: any key will do
    return (torch.arange(kv_length, device=lengths.device) <= last[..., None])[:, None]


def _dense_block_mask(mask: BlockMask, query: Tensor, key: Tensor) -> Tensor:
    """The bool mask [B, 1 or H, Sq, S] that a mask of flex_attention stands for."""
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device="cpu")


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "continuous batching (generate_batch, PagedAttentionCache) keeps expanded keys and is "
            "not supported by torch_flash_mla: use generate(), or vLLM with torch_flash_mla for "
            "many requests at once (docs/serving_vllm.md)"
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position_bias is not supported by torch_flash_mla")
    if kwargs.get("softcap") is not None:
        raise ValueError("softcap is not supported by torch_flash_mla")
