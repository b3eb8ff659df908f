"""DecoderStep: a patched model as a function of tensors, for torch.export and programs without
Python.

A transformers model keeps its history in a Cache, an object that a graph cannot have as an input.
Here the pages are arguments: the caller owns pools, block table and lengths, and decides where
tokens go. Inside, each call wraps them in a Cache of its own, whose layers hand them to the
attention function (``attention.py``) by carriers, as the layers of an MLACache do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from torch_flash_mla import ops
from torch_flash_mla.formats import row_bytes
from torch_flash_mla.integrations.transformers.attention import patch_state
from torch_flash_mla.integrations.transformers.cache import Pages
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT


class DecoderStep(nn.Module):
    """One forward pass of a patched model, with the pages of its cache as arguments.

    Sequences may differ in length: each sees its own tokens and nothing else, positions follow from
    the lengths, and no mask is made. A sequence with fewer new tokens than the others takes the
    last places of its row and has -1 as the slot of those before. ::

        patch(model)
        step = DecoderStep(model, "q8_kv")
        program = torch.export.export(
            step, step.example_inputs(), dynamic_shapes=step.dynamic_shapes(), strict=False
        )
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

    Args:
        model: a causal language model, every attention layer of it patched
            (:func:`torch_flash_mla.patch`) MLA with full attention.
        kv_cache_dtype: format of the pages: "auto" for their own float dtype, or "q8_kv", ...
        logits_to_keep: how many of the last tokens get logits; 0: all.

    Raises:
        ValueError: a layer that is not patched, or needs more than pages of latents (sparse, linear
            or sliding attention, shared keys).
        NotImplementedError: in ``forward``: dropout, or attention weights requested by the config.
    """

    model: Any  # transformers' own classes say too little about themselves

    def __init__(self, model: Any, kv_cache_dtype: str = "auto", logits_to_keep: int = 1) -> None:
        super().__init__()
        self.model = model
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_to_keep = logits_to_keep
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        modules = {m.layer_idx: m for m in model.modules() if patch_state(m) is not None}
        dims = []
        for index, layer in enumerate(layers):
            if type(layer) is not DynamicLayer or index not in modules:
                raise ValueError(
                    f"model: the cache of layer {index} is a {type(layer).__name__} of "
                    f"{'a patched' if index in modules else 'an unpatched'} module, expected plain "
                    "MLA in every layer, after patch(model)"
                )
            module = modules[index]
            dims.append((module.kv_lora_rank, module.qk_rope_head_dim))
        self.dims: list[tuple[int, int]] = dims  # L and R of each layer

    def new_caches(
        self, num_blocks: int, block_size: int = 64, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Uninitialised pages for each layer: [num_blocks, block_size, L + R] of ``dtype``
        (default: that of the model), or uint8 rows of the packed format.
        """
        if self.kv_cache_dtype == "auto":
            element = self.model.dtype if dtype is None else dtype
            widths = [latent + rope for latent, rope in self.dims]
        else:
            element = torch.uint8
            widths = [row_bytes(self.kv_cache_dtype, *dims) for dims in self.dims]
        return [
            torch.empty(num_blocks, block_size, width, dtype=element, device="cpu")
            for width in widths
        ]

    def forward(
        self,
        input_ids: Tensor,
        kv_caches: list[Tensor],
        block_table: Tensor,
        cache_seqlens: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Writes the new tokens to the pages, attends, and returns logits.

        Args:
            input_ids: int64 [B, Sq], the new tokens.
            kv_caches: the pages of each layer, see :meth:`new_caches`; mutated.
            block_table: int32 [B, max_blocks], the same for all layers.
            cache_seqlens: int32 [B], the new tokens included.
            slot_mapping: int64 [B, Sq], where each new token goes: block * block_size + offset; -1
                for a place that holds none.

        Returns:
            [B, logits_to_keep, vocabulary] (or [B, Sq, vocabulary]).
        """
        if len(kv_caches) != len(self.dims):
            raise ValueError(
                f"kv_caches: got {len(kv_caches)} tensors, expected {len(self.dims)}, one per layer"
            )
        q_length = input_ids.shape[1]
        first = cache_seqlens.long().unsqueeze(1) - q_length
        positions = (first + torch.arange(q_length, device="cpu")).clamp(min=0)
        tables = block_table, cache_seqlens, slot_mapping
        layers: list[Any] = [
            StepLayer(self.kv_cache_dtype, dims, pool, *tables)
            for dims, pool in zip(self.dims, kv_caches, strict=True)
        ]
        out = self.model(
            input_ids,
            # Any mask of four dimensions goes to the layers as it is; ours do not look at it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cpu"),
            position_ids=positions,
            **{CACHE_ARGUMENT: Cache(layers=layers)},
            use_cache=True,
            logits_to_keep=self.logits_to_keep,
        )
        return out.logits

    def example_inputs(
        self, batch: int = 2, new_tokens: int = 3, block_size: int = 64
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        """Arguments of :meth:`forward` to trace with: the first tokens of ``batch`` sequences, two
        blocks for each and one to spare."""
        table = torch.arange(2 * batch, dtype=torch.int32, device="cpu").view(batch, 2)
        return (
            torch.zeros(batch, new_tokens, dtype=torch.int64, device="cpu"),
            self.new_caches(2 * batch + 1, block_size),
            table,
            torch.full((batch,), new_tokens, dtype=torch.int32, device="cpu"),
            table[:, :1] * block_size + torch.arange(new_tokens, device="cpu"),
        )

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """What may vary in an exported program: sequences, new tokens, and the blocks of the pools
        and of a sequence. The block size may not."""
        batch, new_tokens = Dim("batch", min=1), Dim("new_tokens", min=1)
        num_blocks, max_blocks = Dim("num_blocks", min=1), Dim("max_blocks", min=1)
        return (
            {0: batch, 1: new_tokens},
            [{0: num_blocks} for _ in self.dims],
            {0: batch, 1: max_blocks},
            {0: batch},
            {0: batch, 1: new_tokens},
        )


class StepLayer(Pages, CacheLayerMixin):
    """The pages of one layer for the time of one forward pass."""

    causal_by_length = True

    def __init__(
        self,
        kv_cache_dtype: str,
        dims: tuple[int, int],
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        super().__init__()
        self._format, self._dims = kv_cache_dtype, dims
        self._tensors = kv_cache, block_table, cache_seqlens
        self._slot_mapping = slot_mapping

    @property
    def kv_cache_dtype(self) -> str:
        return self._format

    def dims(self) -> tuple[int, int]:
        return self._dims

    def kv_cache(self) -> Tensor:
        return self._tensors[0]

    def block_table(self) -> Tensor:
        return self._tensors[1]

    def cache_seqlens(self) -> Tensor:
        return self._tensors[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores [B, 1, Sq, L] and [B, 1, Sq, R]; returns carriers of the shape of all tokens."""
        self.lazy_initialization(key_states, value_states)
        kv_c, k_pe = key_states[:, 0].detach(), value_states[:, 0].detach()
        ops.concat_and_cache_mla(kv_c, k_pe, self.kv_cache(), self._slot_mapping, self._format)
        nan = torch.full((), float("nan"), dtype=key_states.dtype, device="cpu")
        return self.carriers(nan, key_states.shape[0], self.get_max_length())

    def get_seq_length(self) -> Any:
        """int32 [], of the first sequence, as that of a FixedLatentLayer."""
        return self.cache_seqlens()[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_max_length(self) -> int:
        return self.block_table().shape[1] * self.kv_cache().shape[1]
