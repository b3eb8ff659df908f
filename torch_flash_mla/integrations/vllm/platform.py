"""vLLM's CPU platform, with this package's backend for MLA: which backend, and which features.

``CpuPlatform`` takes its own MLA backends for granted: where there is no AMX it forces blocks of 16
tokens and switches chunked prefill and prefix caching off. Neither is needed here, so
:meth:`FlashMLACpuPlatform.check_and_update_config` puts back what the user (or vLLM) had chosen.
Whoever asks for vLLM's own backends gets them: ``--attention-backend CPU_MLA`` or ``AMX_MLA``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from torch_flash_mla.formats import row_bytes
from torch_flash_mla.integrations.vllm import LOGGER_NAME
from torch_flash_mla.integrations.vllm.settings import settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig
else:
    # CpuPlatform, or its subclass for AMD Zen where zentorch is installed.
    CpuPlatform = resolve_obj_by_qualname(cpu_platform_plugin())

logger = init_logger(LOGGER_NAME)

_BACKENDS = "torch_flash_mla.integrations.vllm.backend"
_WORKER = "torch_flash_mla.integrations.vllm.worker.FlashMLAWorker"
_STOCK_BACKENDS = (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA)

# Tokens of a page where the user has named no size: what CpuPlatform takes for other attention.
_BLOCK_SIZE = 128


class FlashMLACpuPlatform(CpuPlatform):
    """``CpuPlatform`` for models with MLA; for others nothing changes."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """The path of the backend class of a layer; the row of its cache is part of it."""
        if (
            not attn_selector_config.use_mla
            or attn_selector_config.use_sparse
            or selected_backend in _STOCK_BACKENDS
        ):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if selected_backend is not None:
            logger.info("%s is no backend for MLA on CPUs.", selected_backend.name)

        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        kv_cache_dtype = settings_of(vllm_config).kv_cache_dtype
        if kv_cache_dtype == "auto":
            return f"{_BACKENDS}.FlashMLABackend"
        rope_dim = vllm_config.model_config.hf_text_config.qk_rope_head_dim
        row = row_bytes(kv_cache_dtype, attn_selector_config.head_size - rope_dim, rope_dim)
        return f"{_BACKENDS}.FlashMLABackend_{row}"

    @classmethod
    def get_mla_prefill_backend_cls(
        cls, mla_selector_config: MLAPrefillSelectorConfig
    ) -> type[MLAPrefillBackend]:
        """The class that stands for the backend of prompts, which has nothing left to do."""
        from vllm.config import get_current_vllm_config

        if not _takes_over(get_current_vllm_config()):
            return super().get_mla_prefill_backend_cls(mla_selector_config)
        from torch_flash_mla.integrations.vllm.backend import FlashMLAPrefill

        return FlashMLAPrefill

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Lets ``CpuPlatform`` adjust the configuration, except for its limits on MLA."""
        _forget_selected_backends()
        if not _takes_over(vllm_config):
            super().check_and_update_config(vllm_config)
            return
        settings_of(vllm_config)  # raises here, in the process of the user, not in a worker
        _refuse_context_parallel(vllm_config)
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        block_size = cache.block_size if cache.user_specified_block_size else _BLOCK_SIZE
        prefix_caching = cache.enable_prefix_caching
        chunked_prefill = scheduler.enable_chunked_prefill
        max_num_batched_tokens = scheduler.max_num_batched_tokens
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = _WORKER
        super().check_and_update_config(vllm_config)
        cache.block_size = block_size
        cache.enable_prefix_caching = prefix_caching
        scheduler.enable_chunked_prefill = chunked_prefill
        scheduler.max_num_batched_tokens = max_num_batched_tokens

        # vLLM's CPU kernel for rotary embeddings takes a query [T, H, R], as MLA models hand it
        # over, for [T, R], and turns T of its T * H rows.
        custom_ops = vllm_config.compilation_config.custom_ops
        if not {"+rotary_embedding", "-rotary_embedding"} & set(custom_ops):
            custom_ops.append("-rotary_embedding")


def _takes_over(vllm_config: VllmConfig) -> bool:
    """Whether the MLA layers of a model get this package's backend."""
    model_config = vllm_config.model_config
    return (
        model_config is not None
        and model_config.use_mla
        and not str(model_config.hf_config.model_type).startswith("deepseek_v4")
        and not hasattr(model_config.hf_text_config, "index_topk")
        and vllm_config.attention_config.backend not in _STOCK_BACKENDS
    )


def _refuse_context_parallel(vllm_config: VllmConfig) -> None:
    """Says at the start what vLLM's CPU worker would only assert at the first step."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            raise NotImplementedError(
                f"{name}: got {size}, but vLLM's CPU worker has no context parallelism: its "
                "_compute_slot_mapping_kernel_impl (vllm/utils/cpu_triton_utils.py) asserts one "
                "rank, and CorrectAttnCPOutKernel (vllm/v1/attention/ops/dcp.py) needs Triton. Use "
                "--tensor-parallel-size or --data-parallel-size"
            )


def _forget_selected_backends() -> None:
    """Empties vLLM's caches of selected backends.

    Their keys lack what the choice here depends on (``additional_config``, and for prompts the
    backend asked for), and one process may run several engines.
    """
    from vllm.v1.attention.backends.mla.prefill.selector import _auto_select_mla_prefill_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _auto_select_mla_prefill_backend.cache_clear()
    _cached_get_attn_backend.cache_clear()
