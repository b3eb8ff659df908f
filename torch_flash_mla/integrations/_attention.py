"""The attention function that transformers calls for a patched layer: its arguments -> one op call.

A patched layer hands over its *compressed* keys: ``expand_kv`` is replaced by :func:`passthrough`, so ``key``
is the latent ``[B, 1, S, L]`` and ``value`` the rotary key ``[B, 1, S, R]``. They come from

* an :class:`MLACache`: NaN carriers that point to the pages of the layer (see ``_mla_cache.py``);
* any cache of transformers, or none: the tensors themselves, read in place in the two-tensor form.

Nothing here branches on lengths or on values of masks: a graph compiled for decoding stays one graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_flash_mla import ops
from torch_flash_mla.integrations._mla_cache import cache_layer_of
from torch_flash_mla.integrations._weights import has_active_dropout, kv_b_weight

ATTENTION_NAME = "mla_cpu"  # transformers treats any name with "flash" in it as one of its own


@dataclass
class PatchState:
    """What a patched module was before: kept on the module, so it follows deepcopy and pickling."""

    config: PreTrainedConfig  # the model's own config object, not a copy: later changes stay visible


def passthrough(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for ``expand_kv``: the compressed ``[B, 1, S, L]``, ``[B, 1, S, R]`` reach the attention function."""
    return kv_nope, k_rot


def patch_state(module: nn.Module) -> PatchState | None:
    return module.__dict__.get("_torch_flash_mla")


def mla_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, Sq, P + R]
    key: Tensor,  # [B, 1, S, L] latent; [B, H, S, P + R] where the module still expands
    value: Tensor,  # [B, 1, S, R] rotary key; [B, H, S, V] where the module still expands
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    indices: Tensor | None = None,  # int32 [B, Sq, topk], cache positions, -1 skips
    s_aux: Tensor | None = None,  # [H] attention sinks
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the calling convention of transformers' attention interface.

    Returns ``(out [B, Sq, H, V], weights)``; weights is None except where the stock path computed them.
    Raises NotImplementedError for continuous batching (``cache=``) and for position biases, ValueError for
    softcap: none of them has a meaning here that could be ignored safely.
    """
    _refuse_unsupported(kwargs)
    state = patch_state(module)
    live_config = module.config if state is None else state.config
    wants_weights = kwargs.get("output_attentions", getattr(live_config, "output_attentions", False))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    if module.__dict__.get("expand_kv") is not passthrough:
        # Selected by name, without patch(): this call got expanded keys, the next one will not.
        if is_mla(module):
            module.expand_kv = passthrough
        mask = _fold_indices(attention_mask, indices, key.shape[2], query, is_causal)
        name = "eager" if wants_weights or s_aux is not None else "sdpa"
        extra = {**kwargs, "is_causal": is_causal, "s_aux": s_aux, "dropout": dropout, "scaling": scaling}
        return _stock_attention(module, name, query, key, value, mask, extra)

    mask = _fold_indices(attention_mask, indices, key.shape[2], query, is_causal)
    if dropout > 0.0 or wants_weights or has_active_dropout(module.kv_b_proj):
        cached = cache_layer_of(key)
        if cached is not None:
            key, value = cached.gather(key.shape[2], query.dtype)
        key, value = type(module).expand_kv(module, key, value)
        name = getattr(live_config, "_attn_implementation", None) or "sdpa"
        if name == ATTENTION_NAME:
            name = "eager" if wants_weights or s_aux is not None else "sdpa"
        extra = {**kwargs, "is_causal": is_causal, "s_aux": s_aux, "dropout": dropout, "scaling": scaling}
        return _stock_attention(module, name, query, key, value, mask, extra)

    if isinstance(mask, BlockMask):
        mask = _dense_block_mask(mask, query, key)
    return _absorbed_attention(module, query, key, value, mask, scaling, is_causal, s_aux), None


def is_mla(module: nn.Module) -> bool:
    """Whether a module is an MLA attention layer that caches the latent: it has the two parts we rely on."""
    return callable(getattr(type(module), "expand_kv", None)) and isinstance(
        getattr(module, "kv_b_proj", None), nn.Module
    )


def _absorbed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    is_causal: bool,
    s_aux: Tensor | None,
) -> Tensor:
    """One call of ``mla_attention_kv_b`` over pages or over plain tensors: out ``[B, Sq, H, V]``."""
    heads, head_dim = query.shape[1], query.shape[3]
    weight = kv_b_weight(module.kv_b_proj, heads, key.shape[3], query.dtype)  # [H, P + V, L]
    cached = cache_layer_of(key)
    if cached is not None:
        kv_cache, k_pe_cache = cached.kv_cache(), None
        block_table, cache_seqlens = cached.block_table(), cached.cache_seqlens()
        kv_cache_dtype = cached.kv_cache_dtype
    else:
        if mask is None and query.shape[2] > 1:
            # Without a mask the queries are the first tokens, whatever buffer a static cache returns.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        kv_cache, block_table, kv_cache_dtype = key[:, 0], None, "auto"
        k_pe_cache = value[:, 0].to(key.dtype) if value.shape[3] else None
        cache_seqlens = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32)
    out, _ = ops.mla_attention_kv_b(
        query.transpose(1, 2),
        kv_cache,
        block_table,
        cache_seqlens,
        weight,
        weight.shape[1] - (head_dim - value.shape[3]),  # V = (P + V) - P
        head_dim**-0.5 if scaling is None else scaling,
        causal=mask is None and is_causal,  # a mask of transformers already holds causality
        attn_mask=mask,
        attn_sink=None if s_aux is None else s_aux.float(),
        k_pe_cache=k_pe_cache,
        kv_cache_dtype=kv_cache_dtype,
    )
    return out


def _stock_attention(
    module: nn.Module,
    name: str,
    query: Tensor,  # [B, H, Sq, P + R]
    key: Tensor,  # [B, H, S, P + R]
    value: Tensor,  # [B, H, S, V]
    mask: Tensor | BlockMask | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The implementation ``name`` of transformers over expanded keys, exactly as the unpatched layer calls it."""
    eager: Callable | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name == "eager":
        if mask is None and kwargs["is_causal"] and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, lowest)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return attention(module, query, key, value, mask, **kwargs)


def _fold_indices(
    mask: Tensor | BlockMask | None, indices: Tensor | None, kv_length: int, query: Tensor, is_causal: bool
) -> Tensor | BlockMask | None:
    """``mask`` AND "is one of the selected positions": bool or additive ``[B, 1, Sq, S]``."""
    if indices is None:
        return mask
    batch, q_length = query.shape[0], query.shape[2]
    slots = torch.where(indices < 0, kv_length, indices).long()  # skipped entries go to an extra column
    keep = torch.zeros(batch, q_length, kv_length + 1, dtype=torch.bool)
    keep = keep.scatter(-1, slots, True)[:, None, :, :kv_length]
    if isinstance(mask, BlockMask):
        raise NotImplementedError("sparse MLA layers do not combine with flex_attention's BlockMask")
    if mask is None:
        return keep & torch.ones_like(keep).tril() if is_causal and q_length > 1 else keep
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def _dense_block_mask(mask: BlockMask, query: Tensor, key: Tensor) -> Tensor:
    """The bool ``[B, H or 1, Sq, S]`` mask that a flex_attention BlockMask stands for."""
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device="cpu")


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "continuous batching (generate_batch, PagedAttentionCache) is not supported by torch_flash_mla: "
            "its paged cache holds expanded keys and values. Call unpatch(model) first, or use generate()."
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position_bias is not supported by torch_flash_mla")
    if kwargs.get("softcap") is not None:
        raise ValueError("softcap is not supported by torch_flash_mla")
