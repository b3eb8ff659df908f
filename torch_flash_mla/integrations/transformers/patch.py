"""``patch``, ``unpatch``, ``patched``: which layers of a model change, and what the report says."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from torch_flash_mla.formats import PACKED_FORMATS, row_bytes
from torch_flash_mla.integrations.transformers.attention import (
    PatchState,
    is_mla,
    mla_attention_forward,
    patch_state,
)
from torch_flash_mla.integrations.transformers.cache import CACHE_ARGUMENT, MLACache
from torch_flash_mla.integrations.transformers.selection import (
    ATTENTION_NAME,
    AttentionModule,
    is_disabled,
    mla_mask,
    passthrough,
)

_OLDEST_SPARSE = Version("5.18")  # the first release whose layers with an indexer cache the latent
_VERSION = Version(Version(transformers.__version__).base_version)

# from_pretrained(..., attn_implementation="mla_cpu") works from here on.
AttentionInterface.register(ATTENTION_NAME, mla_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, mla_mask)

PATCHED, STOCK, FAILED = "patched", "stock", "not patched"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one attention layer."""

    name: str  # its path in the model
    status: str  # "patched", "stock" (rightly left alone) or "not patched" (MLA, but not possible)
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did. ``str(report)`` is a table."""

    layers: tuple[LayerReport, ...]
    kv_cache_dtype: str

    @property
    def patched(self) -> tuple[str, ...]:
        """Names of the patched layers."""
        return tuple(layer.name for layer in self.layers if layer.status == PATCHED)

    @property
    def failed(self) -> tuple[LayerReport, ...]:
        """MLA layers that could not be patched."""
        return tuple(layer for layer in self.layers if layer.status == FAILED)

    def __str__(self) -> str:
        rows = [("layer", "status", "reason")] + [(x.name, x.status, x.reason) for x in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{len(self.patched)} of {len(self.layers)} attention layers patched")
        return "\n".join(line.rstrip() for line in lines)


class _CacheForGeneration:
    """Stands in for ``model._prepare_cache_for_generation``: an MLACache where nothing was asked.

    An object and not a closure, so that the model can still be pickled and deep-copied. It refers
    to its model weakly: dropping the model frees the weights at once.
    """

    def __init__(self, model: Any, kv_cache_dtype: str) -> None:
        self._model = weakref.ref(model)
        self.kv_cache_dtype = kv_cache_dtype

    @property
    def model(self) -> Any:
        return self._model()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "kv_cache_dtype": self.kv_cache_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        model = self.model
        stock = type(model)._prepare_cache_for_generation
        cache = model_kwargs.get(CACHE_ARGUMENT)
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        mask = _whole_mask(generation_config, model_kwargs, batch_size * copies)
        if isinstance(cache, MLACache) and mask is not None:
            _continue(cache, mask, 1 if model.training else copies)
        explicit = (
            cache is not None
            or generation_config.cache_implementation is not None
            or generation_config.use_cache is False
        )
        if explicit:
            return stock(
                model, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
            )
        layers = {m.layer_idx for m in model.modules() if patch_state(m) is not None}
        cache = MLACache(model.config, self.kv_cache_dtype, layers=layers)
        if mask is not None and not model.training:  # dropout may make the copies differ
            cache.share_prompt(copies, mask.shape[1])
        model_kwargs[CACHE_ARGUMENT] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None


def _whole_mask(generation_config: Any, model_kwargs: dict[str, Any], batch: int) -> Tensor | None:
    """The mask [B, S] of cached and new tokens. transformers drops one that is all ones, and keeps
    its width."""
    mask = model_kwargs.get("attention_mask")
    width = getattr(generation_config, "_mask_length", None)
    if mask is None and width is not None:
        return torch.ones(batch, width, dtype=torch.long)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _continue(cache: MLACache, mask: Tensor, copies: int) -> None:
    """Prepares a cache of the user's for a call with ``mask`` [B, S]: ``copies`` rows per input.

    A cache with one sequence per input forks. One that holds the whole prompt forgets its last
    token, since the next one takes that token's logits.
    """
    if cache.batch_size < 0:
        cache.share_prompt(copies, mask.shape[1])
        return
    forks = copies > 1 and cache.batch_size * copies == len(mask)
    cache.check_continuation(mask[::copies] if forks else mask)
    if int(cache.get_seq_length()) == mask.shape[1]:
        if not cache.has_only_pages:
            raise ValueError(
                f"the cache holds the whole prompt of {mask.shape[1]} tokens, and layers that "
                "stayed stock cannot forget the last one, whose logits the next token needs: cache "
                "the prompt without it"
            )
        cache.crop(-1)
    if forks:
        cache.fork(copies)


def patch(model: nn.Module, kv_cache_dtype: str = "auto", strict: bool = True) -> PatchReport:
    """Lets the MLA layers of ``model`` run on this package's attention, in place.

    Afterwards ``generate()`` without ``past_key_values`` keeps the history in an :class:`MLACache`;
    an explicit cache or ``cache_implementation`` wins, and caches of transformers are read in
    place. Patching again only changes the format. Layers are recognised by structure, so every MLA
    family of transformers is covered, wrapped models (PEFT) included.

    Args:
        model: a transformers model, or a module that contains one.
        kv_cache_dtype: format of that MLACache: "auto" (dtype of the model) or a packed format
            ("q8_kv", ...).
        strict: raise when an MLA layer cannot be patched or there is none. Otherwise only the
            report tells.

    Returns:
        PatchReport: one row per attention layer.

    Raises:
        ValueError: ``kv_cache_dtype`` is unknown; or, if strict, something could not be patched or
            there was nothing to patch. The model is unchanged then.
    """
    if kv_cache_dtype != "auto" and kv_cache_dtype not in PACKED_FORMATS:
        raise ValueError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, expected auto, {', '.join(PACKED_FORMATS)}"
        )
    if is_disabled():
        reason = "TORCH_FLASH_MLA_DISABLE is set"
        disabled = (LayerReport(name, STOCK, reason) for name, _ in _attention_layers(model))
        return PatchReport(tuple(disabled), kv_cache_dtype)

    rows: list[LayerReport] = []
    accepted: list[AttentionModule] = []
    for name, module in _attention_layers(model):
        status, reason = _verdict(module, kv_cache_dtype)
        rows.append(LayerReport(name, status, reason))
        if status == PATCHED:
            accepted.append(module)
    report = PatchReport(tuple(rows), kv_cache_dtype)
    if strict and (report.failed or not accepted):
        raise ValueError(f"torch_flash_mla could not patch {type(model).__name__}:\n{report}")

    configs: dict[int, Any] = {}  # layers that shared a config still do
    for module in accepted:
        if patch_state(module) is None:
            original = module.config
            if id(original) not in configs:
                configs[id(original)] = copy.copy(original)
                configs[id(original)]._attn_implementation_internal = ATTENTION_NAME
            module._torch_flash_mla = PatchState(original)
            module.config = configs[id(original)]
            module.expand_kv = passthrough
    if accepted:
        for generator in _generators(model):
            generator._prepare_cache_for_generation = _CacheForGeneration(generator, kv_cache_dtype)
    return report


def unpatch(model: nn.Module) -> None:
    """Takes :func:`patch` back; a model that is not patched stays as it is."""
    module: AttentionModule
    for module in model.modules():
        state = patch_state(module)
        if state is not None:
            module.config = state.config
            del module._torch_flash_mla
        if module.__dict__.get("expand_kv") is passthrough:
            del module.expand_kv
        module.__dict__.pop("_prepare_cache_for_generation", None)


@contextmanager
def patched(
    model: nn.Module, kv_cache_dtype: str = "auto", strict: bool = True
) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches inside of the block only.

    A model that was patched before stays so. Arguments and errors are those of :func:`patch`.
    """
    before = [g.__dict__.get("_prepare_cache_for_generation") for g in _generators(model)]
    was_patched = any(patch_state(module) is not None for module in model.modules())
    try:
        yield patch(model, kv_cache_dtype, strict)
    finally:
        if not was_patched:
            unpatch(model)
        for generator, prepare in zip(_generators(model), before, strict=True):
            if prepare is not None:
                generator._prepare_cache_for_generation = prepare


def _attention_layers(model: nn.Module) -> list[tuple[str, AttentionModule]]:
    """MLA layers, and whatever else looks like the attention of a decoder layer."""
    return [
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if hasattr(module, "kv_b_proj")
        or ("Attention" in type(module).__name__ and hasattr(module, "layer_idx"))
    ]


def _generators(model: nn.Module) -> list[Any]:
    """The models in ``model`` (usually one) whose ``generate`` makes caches for MLA layers."""
    return [
        m
        for m in model.modules()
        if hasattr(type(m), "_prepare_cache_for_generation") and any(map(is_mla, m.modules()))
    ]


def _verdict(module: AttentionModule, kv_cache_dtype: str) -> tuple[str, str]:
    """(status, reason) of one attention layer."""
    if not hasattr(module, "kv_b_proj"):
        return STOCK, "no latent keys"
    if not is_mla(module):
        name = type(module).__name__
        return FAILED, f"{name} has no expand_kv: it caches expanded keys (remote code?)"
    if hasattr(module, "indexer") and _VERSION < _OLDEST_SPARSE:
        return FAILED, f"sparse MLA needs transformers >= {_OLDEST_SPARSE}, found {_VERSION}"
    tensors = [*module.kv_b_proj.parameters(), *module.kv_b_proj.buffers()]
    device = next((t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None)
    if device is not None:
        return FAILED, f"its weights are on {device}; the attention runs on the CPU"
    if any(t.dtype == torch.float64 for t in tensors):
        return FAILED, "float64 is not supported; use float32, bfloat16 or float16"
    if kv_cache_dtype != "auto":
        try:
            row_bytes(kv_cache_dtype, module.kv_lora_rank, module.qk_rope_head_dim)
        except ValueError as error:
            return FAILED, str(error)
    return PATCHED, "already patched" if patch_state(module) is not None else "MLA"
