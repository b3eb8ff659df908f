"""The attention backend: a batch of vLLM -> calls of ``concat_and_cache_mla`` and attention.

A batch is prompts, pieces of prompts with cached history, single tokens and speculated ones, in any
mixture, each sequence with a row of the block table. vLLM separates decoding (absorbed by itself)
from prompts (expanded by itself); here a batch is one call of ``mla_attention_kv_b`` with
``cu_seqlens_q``, which takes the cheaper of the two forms for each sequence. So the metadata call
everything a prompt, and vLLM hands all tokens to :meth:`FlashMLAImpl.forward_mha`. They are in the
cache by then: ``do_kv_cache_update`` runs first.

The cache of a layer is [blocks, block_size, D] of a float dtype or [blocks, block_size, bytes] of
uint8, blocks possibly strided. For the size of a page vLLM asks the backend's class, and tells it
nothing of the user's settings, so each size of a packed row has a class of its own
(:func:`__getattr__`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend, MLACommonImpl
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from torch_flash_mla import __version__, ops
from torch_flash_mla.formats import FLOAT_DTYPES, row_bytes
from torch_flash_mla.integrations.vllm import LOGGER_NAME
from torch_flash_mla.integrations.vllm.settings import settings_of

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

logger = init_logger(LOGGER_NAME)


@dataclass
class FlashMLAMetadata(AttentionMetadata):
    """A batch of B sequences and T new tokens.

    Attributes:
        block_table: int32 [B, max_blocks].
        seq_lens: int32 [B], keys of each sequence with the new tokens.
        query_start_loc: int32 [B + 1], from 0 to T.
        slot_mapping: int64 [T], where the new tokens go.
        num_actual_tokens: T; what vLLM pads tensors with lies behind.
        num_decodes, num_decode_tokens: 0, so that vLLM hands over the batch as it is.
        num_prefills: B.
        prefill, decode: None; vLLM's own metadata of the two parts.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int
    num_prefills: int
    num_decodes: int = 0
    num_decode_tokens: int = 0
    prefill: None = None
    decode: None = None


class FlashMLAMetadataBuilder(AttentionMetadataBuilder[FlashMLAMetadata]):
    """Picks what the operators need out of vLLM's description of a batch."""

    reorder_batch_threshold = None  # any order will do

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashMLAMetadata:
        """The metadata of one step, for all layers that share a block table."""
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("torch_flash_mla: attention that is not causal")
        return FlashMLAMetadata(
            block_table=batch.block_table_tensor,
            seq_lens=batch.seq_lens,
            query_start_loc=batch.query_start_loc,
            slot_mapping=batch.slot_mapping,
            num_actual_tokens=batch.num_actual_tokens,
            num_prefills=batch.num_reqs,
        )


class FlashMLAImpl(MLACommonImpl[FlashMLAMetadata]):
    """Attention of one layer.

    Attributes:
        w_kv_b: [H, P + V, L], there once the weights are loaded.
    """

    w_kv_b: Tensor
    can_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        for name, value in (("alibi_slopes", alibi_slopes), ("logits_soft_cap", logits_soft_cap)):
            if value:
                raise NotImplementedError(f"torch_flash_mla: MLA with {name}")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"torch_flash_mla: MLA in attention of type {attn_type}")
        self.supports_quant_query_input = False
        self.window = sliding_window or 0
        self.cache_format = settings_of(get_current_vllm_config()).kv_cache_dtype
        self._announce()

    def _announce(self) -> None:
        """One line per process: what computes attention over what."""
        vllm_config = get_current_vllm_config()
        if self.cache_format == "auto":
            dtype = kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, vllm_config.model_config)
            name = str(dtype).removeprefix("torch.")
            row = self.head_size * dtype.itemsize
        else:
            name = self.cache_format
            row = row_bytes(name, self.kv_lora_rank, self.qk_rope_head_dim)
        logger.info_once(
            "torch_flash_mla %s: MLA on level %s, KV cache %s, %d bytes per token and layer",
            __version__,
            ops.cpu_isa(),
            name,
            row,
            scope="process",
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Takes ``kv_b_proj``'s weight as [H, P + V, L], dequantised where it was quantised."""
        weight = get_and_maybe_dequant_weights(self.kv_b_proj, act_dtype)
        self.w_kv_b = weight.view(
            self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank
        )

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Writes the new tokens to their slots."""
        if kv_cache.numel() == 0:
            return
        tokens = slot_mapping.numel()
        ops.concat_and_cache_mla(
            kv_c_normed[:tokens], k_pe[:tokens], kv_cache, slot_mapping, self.cache_format
        )

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: FlashMLAMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Attention of the whole batch: q [T, H, P + R] -> output [T, H * V]."""
        out, _ = ops.mla_attention_kv_b(
            q,
            kv_c_and_k_pe_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            self.w_kv_b,
            self.v_head_dim,
            self.scale,
            causal=True,
            window=self.window,
            kv_cache_dtype=self.cache_format,
            cu_seqlens_q=attn_metadata.query_start_loc,
        )
        output.copy_(out.flatten(1))

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: FlashMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        """Never called: the metadata have no decode tokens."""
        raise NotImplementedError("torch_flash_mla: decoding goes through forward_mha")


class FlashMLAPrefill(MLAPrefillBackend):
    """Stands where vLLM wants a backend for prompts. Nobody calls it: ``forward_mha`` does them."""

    @staticmethod
    def get_name() -> str:
        return "TORCH_FLASH_MLA"

    def run_prefill_new_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never called."""
        raise NotImplementedError("torch_flash_mla: prompts go through forward_mha")

    def run_prefill_context_chunk(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called."""
        raise NotImplementedError("torch_flash_mla: prompts go through forward_mha")


class FlashMLABackend(MLACommonBackend):
    """Describes the backend to vLLM, for float caches; subclasses are for packed formats.

    Attributes:
        row: bytes of a token in a packed format, else None.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = list(FLOAT_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    row: ClassVar[int | None] = None

    @staticmethod
    def get_name() -> str:
        return "TORCH_FLASH_MLA"

    @staticmethod
    def get_impl_cls() -> type[FlashMLAImpl]:
        return FlashMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLAMetadataBuilder]:
        return FlashMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The cache of a layer: the float dtype that vLLM chose, or rows of ``row`` bytes."""
        if cls.row is None:
            return spec
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.row)


@cache
def _packed_backend(row: int) -> type[FlashMLABackend]:
    return type(f"FlashMLABackend_{row}", (FlashMLABackend,), {"row": row, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``FlashMLABackend_584`` is the backend whose caches have rows of 584 bytes.

    vLLM names backends by their path and asks the class for the size of a page.
    """
    base, _, row = name.rpartition("_")
    if base == "FlashMLABackend" and row.isdecimal():
        return _packed_backend(int(row))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
