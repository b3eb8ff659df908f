"""``torch.func.vmap`` of the operators: the mapped dimension joins the sequences of one call.

N samples of B sequences each become one call of N * B sequences. Pools that are not mapped are
shared, not copied; mapped ones lie behind each other, and the block tables are shifted. What has no
dimension of sequences (sinks, weights, queries of ragged length) is walked sample by sample.
Operators that write into a cache refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from torch_flash_mla import ops

Arguments = dict[str, Any]


class _Mapped:
    """Arguments of one call under vmap, each mapped tensor with its mapped dimension in front."""

    def __init__(
        self,
        op: Callable[..., Any],
        samples: int,
        in_dims: tuple[Any, ...],
        args: tuple[Any, ...],
    ) -> None:
        self.op = op
        self.samples = samples
        bound = inspect.signature(op).bind(*args)
        mapped_dims = dict(zip(bound.arguments, in_dims, strict=True))
        self.mapped = {name for name, dim in mapped_dims.items() if dim is not None}
        bound.apply_defaults()
        self.values: Arguments = dict(bound.arguments)
        for name in self.mapped:
            self.values[name] = self.values[name].movedim(mapped_dims[name], 0)

    def each(self) -> tuple[Any, Any]:
        """Sample by sample."""
        results = []
        for i in range(self.samples):
            values = {n: v[i] if n in self.mapped else v for n, v in self.values.items()}
            results.append(self.op(**values))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0, 0)

    def folded(self, name: str) -> Tensor | None:
        """The argument with its sequences in front, those of sample 0, then of sample 1, ..."""
        value = self.values[name]
        if value is None:
            return None
        if name not in self.mapped:
            value = value.expand(self.samples, *value.shape)
        return value.flatten(0, 1)

    def call(self, **changes: Any) -> tuple[Any, Any]:
        result = self.op(**self.values | changes)
        if isinstance(result, Tensor):
            return self._unfolded(result), 0
        return tuple(map(self._unfolded, result)), (0, 0)

    def _unfolded(self, x: Tensor) -> Tensor:
        return x.reshape(self.samples, x.shape[0] // self.samples, *x.shape[1:])

    def fold_cache(self) -> Arguments:
        """Pools and block table of all samples."""
        result: Arguments = {}
        pools = [n for n in ("kv_cache", "k_pe_cache") if self.values.get(n) is not None]
        table = self.values["block_table"]
        lengths = self.folded("cache_seqlens")
        assert lengths is not None
        if table is None:  # block i is sequence i
            batch = lengths.shape[0] // self.samples
            table = torch.arange(batch, dtype=torch.int32, device="cpu").unsqueeze(1)
        if "block_table" not in self.mapped:
            table = table.expand(self.samples, *table.shape)
        if self.mapped.intersection(pools):
            for name in pools:
                result[name] = self.folded(name)
            blocks = result["kv_cache"].shape[0] // self.samples
            first = torch.arange(self.samples, dtype=torch.int32, device="cpu") * blocks
            table = table + first.view(-1, 1, 1)
        return {**result, "block_table": table.flatten(0, 1), "cache_seqlens": lengths}

    def fold_mask(self) -> Tensor | None:
        """The mask as [N * B or 1, H or 1, Sq or 1, S]."""
        mask, batch = self.values["attn_mask"], self.values["q"].shape[int("q" in self.mapped)]
        if mask is None:
            return None
        is_mapped = "attn_mask" in self.mapped
        rank = mask.dim() - is_mapped
        if not 1 <= rank <= 4:
            return mask  # for the operator to refuse
        mask = mask[(slice(None),) * is_mapped + (None,) * (4 - rank)]
        if not is_mapped:
            if mask.shape[0] == 1:
                return mask
            mask = mask.expand(self.samples, *mask.shape)
        elif mask.shape[1] == 1:
            mask = mask.expand(-1, batch, -1, -1, -1)
        return mask.flatten(0, 1)


def _attention(mapped: _Mapped) -> tuple[Any, Any]:
    one_for_all = {"attn_sink", "w_kv_b", "cu_seqlens_q"}
    if mapped.mapped & one_for_all or mapped.values["cu_seqlens_q"] is not None:
        return mapped.each()
    changes = mapped.fold_cache()
    for name in ("q", "q_pe", "cache_leftpad", "indices", "topk_length"):
        changes[name] = mapped.folded(name)
    for name in ("q", "q_pe"):  # a mapped last dimension leaves the next one strided
        if changes[name] is not None and changes[name].stride(-1) != 1:
            changes[name] = changes[name].contiguous()
    return mapped.call(attn_mask=mapped.fold_mask(), **changes)


def _gather_cache(mapped: _Mapped) -> tuple[Any, Any]:
    return mapped.call(**mapped.fold_cache())


def _merge_attn_states(mapped: _Mapped) -> tuple[Any, Any]:
    if "attn_sink" in mapped.mapped:
        return mapped.each()
    names = ("out_a", "lse_a", "out_b", "lse_b")
    return mapped.call(**{name: mapped.folded(name) for name in names})


def _refuse(mapped: _Mapped) -> NoReturn:
    raise NotImplementedError(
        f"{mapped.op.__name__}: writes into kv_cache, which torch.func.vmap does not map; make one "
        "call for all samples, outside of vmap"
    )


def _register(op: Callable[..., Any], rule: Callable[[_Mapped], tuple[Any, Any]]) -> None:
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return rule(_Mapped(op, info.batch_size, in_dims, args))

    torch.library.register_vmap(f"flashmla::{op.__name__}", vmap)


_register(ops.mla_attention, _attention)
_register(ops.mla_attention_kv_b, _attention)
_register(ops.gather_cache, _gather_cache)
_register(ops.merge_attn_states, _merge_attn_states)
_register(ops.concat_and_cache_mla, _refuse)
_register(ops.copy_blocks, _refuse)
