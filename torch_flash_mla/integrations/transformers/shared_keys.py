"""Attention whose one key head is its value (DeepSeek-V4): found by structure, one call of the op.

Such a layer projects each token to one head that all query heads take for key and value alike: a
latent that needs no ``kv_b_proj``. Its attention function gets the same tensor twice, of any cache
of transformers or of none, and reads it in place. Compressed entries stand behind the tokens of the
window in that tensor, and the mask, a float one, says which of both a query sees.

A mask that keeps one interval of keys per query is left to the operator, which reduces it to
ranges. One with holes (a window, and entries that are selected or compressed from earlier tokens)
becomes index lists: keys that nobody sees are not even read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from torch_flash_mla import ops
from torch_flash_mla.integrations.transformers.selection import AttentionModule

# Masks are looked at in parts of so many bytes.
_MOST_BYTES = 1 << 26

# With an index list each query token reads keys of its own, at the price of so many heads; with a
# mask tokens of few heads share them.
_LEAST_HEADS = 32


def shares_keys(module: AttentionModule) -> bool:
    """Whether a layer has one projection that makes one head, for keys and values."""
    parts = module._modules
    return (
        "kv_proj" in parts
        and not parts.keys() & {"k_proj", "v_proj", "kv_b_proj", "qkv_proj"}
        and hasattr(module, "head_dim")
        and getattr(module.kv_proj, "out_features", None) == module.head_dim
    )


def is_shared(key: Tensor, value: Tensor) -> bool:
    """Whether the keys of a call are one head that is the values too."""
    return key is value and key.shape[1] == 1


def shared_attention(
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, 1, S, D], and the values
    mask: Tensor | BlockMask | None,  # added, as [B, H, Sq, S]; None: a query sees every key
    scaling: float | None,
    s_aux: Tensor | None,  # [H]
) -> Tensor:
    """Attention of one layer: [B, Sq, H, D].

    Raises:
        ValueError: no float mask (such layers append masks of their own to the one they get), or
            one of other keys.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.is_floating_point()):
        raise ValueError(
            f"attention_mask: got {getattr(mask, 'dtype', type(mask).__name__)}, but layers whose "
            "key is their value add their masks to logits: pass a float mask, 0 where a query sees "
            "a key and -inf where not"
        )
    batch, length, head_dim = key.shape[0], key.shape[2], key.shape[3]
    if mask is not None and mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask: got {mask.shape[-1]} columns for {length} keys, expected as many"
        )
    indices = None
    if mask is not None and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        mask, indices = as_indices(mask, batch, query.shape[2], length, query.shape[1])
    out, _ = ops.mla_attention(
        query.transpose(1, 2),
        key[:, 0],
        None,
        torch.full((batch,), length, dtype=torch.int32, device="cpu"),
        head_dim,
        head_dim**-0.5 if scaling is None else scaling,
        attn_mask=mask,
        indices=indices,
        attn_sink=None if s_aux is None else s_aux.float(),
    )
    return out


def as_indices(
    mask: Tensor, batch: int, q_length: int, length: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """``(mask, indices)`` that say together what the float ``mask`` says: index lists int32
    [B, Sq, most keys of a query] where a query sees more than one interval of keys."""
    if mask.dim() != 4 or mask.shape[1] != 1 or q_length == 0:
        return mask, None  # it differs by head
    rows = mask[:, 0].expand(batch, q_length, length)
    lowest = torch.finfo(mask.dtype).min
    # A bool takes a byte, and each kept key 16 while its place is looked for.
    step = max(1, _MOST_BYTES // max(1, batch * length))
    parts, adds, holes = [], False, False
    for part in rows.split(step, dim=1):
        kept = part > lowest
        most = int(kept.sum(-1).max())
        if q_length > 1 and most * max(heads, _LEAST_HEADS) > length * heads:
            return mask, None
        adds = adds or not torch.equal(kept, part == 0)
        holes = holes or _has_holes(kept)
        parts.append(kept)
    if not holes:
        return mask, None
    lists = [_lists(kept) for kept in parts]
    most = max(part.shape[-1] for part in lists)
    indices = torch.cat(
        [functional.pad(part, (0, most - part.shape[-1]), value=-1) for part in lists], dim=1
    )
    return mask if adds else None, indices


def _has_holes(kept: Tensor) -> bool:
    """Whether any row [.., S] keeps more than one interval."""
    begins = (kept[..., 1:] > kept[..., :-1]).sum(-1) + kept[..., 0]
    return bool((begins > 1).any())


def _lists(kept: Tensor) -> Tensor:
    """The kept columns of each row [B, Sq, S] in order: int32 [B, Sq, most of a row], -1 behind."""
    batch, q_length, length = kept.shape
    rows = kept.reshape(-1, length)
    counts = rows.sum(-1)
    row, column = rows.nonzero(as_tuple=True)
    place = torch.arange(len(row), device="cpu") - (counts.cumsum(0) - counts)[row]
    lists = torch.full((len(rows), int(counts.max())), -1, dtype=torch.int32, device="cpu")
    lists[row, place] = column.int()
    return lists.view(batch, q_length, -1)
