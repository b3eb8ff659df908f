"""``patch``, ``unpatch``, ``patched``: which layers of a model change, and what the report says."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)

from torch_flash_mla.formats import FLOAT_DTYPES, PACKED_FORMATS, row_bytes
from torch_flash_mla.integrations.transformers.attention import (
    PatchState,
    is_mla,
    mla_attention_forward,
    patch_state,
)
from torch_flash_mla.integrations.transformers.cache import MLACache
from torch_flash_mla.integrations.transformers.compat import (
    CACHE_ARGUMENT,
    SPARSE_LAYERS_CACHE_LATENTS,
)
from torch_flash_mla.integrations.transformers.selection import (
    ATTENTION_NAME,
    AttentionModule,
    is_disabled,
    mla_mask,
    passthrough,
)
from torch_flash_mla.integrations.transformers.shared_keys import shares_keys
from torch_flash_mla.integrations.transformers.weights import Way, reading

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
    kv_b_proj: str = ""  # of a patched layer: "in place", "dense copy: ..." or "expanded: ..."


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did. ``str(report)`` is a table.

    ``kv_b_proj`` says how a layer reads its projection at the moment: *in place*, the weight of a
    plain linear layer; *dense copy*, one of a quantised weight or an adapter, valid as long as the
    bytes it was made of; *expanded*, the projection itself runs over all cached latents, which
    costs what the stock layer costs. It is decided anew whenever the projection changes.
    """

    layers: tuple[LayerReport, ...]
    kv_cache_dtype: str
    stock_calls: tuple[str, ...] = ()  # which calls of patched layers run stock all the same

    @property
    def patched(self) -> tuple[str, ...]:
        """Names of the patched layers."""
        return tuple(layer.name for layer in self.layers if layer.status == PATCHED)

    @property
    def failed(self) -> tuple[LayerReport, ...]:
        """MLA layers that could not be patched."""
        return tuple(layer for layer in self.layers if layer.status == FAILED)

    @property
    def expanded(self) -> tuple[LayerReport, ...]:
        """Patched layers that run kv_b_proj over all latents, at the cost of stock ones."""
        return tuple(x for x in self.layers if x.kv_b_proj.startswith(Way.EXPANDED.value))

    def __str__(self) -> str:
        rows = [("layer", "status", "kv_b_proj", "reason")]
        rows += [(x.name, x.status, x.kv_b_proj or "-", x.reason) for x in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{len(self.patched)} of {len(self.layers)} attention layers patched")
        if self.stock_calls:
            lines.append(f"stock all the same: {'; '.join(self.stock_calls)}")
        return "\n".join(line.rstrip() for line in lines)


class _CacheForGeneration:
    """Stands in for ``model._prepare_cache_for_generation``: an MLACache where nothing was asked.

    An object and not a closure, so that the model can still be pickled and deep-copied. It refers
    to its model weakly: dropping the model frees the weights at once.
    """

    def __init__(self, model: Any, kv_cache_dtype: str) -> None:
        self._model = weakref.ref(model)
        self.kv_cache_dtype = kv_cache_dtype
        self.has_warned = False

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
            if generation_config.is_assistant:
                _forget_guesses(cache, mask.shape[1])
            _continue(cache, mask, 1 if model.training else copies)
        kind = generation_config.cache_implementation
        if cache is None and kind is not None and self.kv_cache_dtype != "auto":
            self._warn(kind)
        explicit = cache is not None or kind is not None or generation_config.use_cache is False
        if explicit or is_disabled():
            return stock(
                model, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
            )
        cache = MLACache(model.config, self.kv_cache_dtype, layers=_layers_of_pages(model))
        if mask is not None and not model.training:  # dropout may make the copies differ
            cache.share_prompt(copies, mask.shape[1])
        model_kwargs[CACHE_ARGUMENT] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None

    def _warn(self, kind: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"generate() uses a {kind!r} cache (cache_implementation of its arguments or of "
                f"model.generation_config), not the {self.kv_cache_dtype!r} pages that patch() was "
                "asked for: set cache_implementation to None to have them",
                stacklevel=4,
            )


class _CacheForForward:
    """A forward pre-hook: an MLACache where a call would make a cache of its own.

    Calls that record gradients keep making their own, which hands gradients on, and so do calls in
    a graph, which cannot make pages.
    """

    def __init__(self, model: Any, kv_cache_dtype: str) -> None:
        self.kv_cache_dtype = kv_cache_dtype
        self.layers: set[int] = set()
        self.has_warned = False
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.places = {name: place for place, name in enumerate(names)}

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._makes_a_cache(model, args, kwargs):
            return None
        if torch.is_grad_enabled() and _records_gradients(model, args, kwargs):
            if self.kv_cache_dtype != "auto" and not model.training:
                self._warn()
            return None
        cache = MLACache(model.config, self.kv_cache_dtype, layers=self.layers)
        place = self.places[CACHE_ARGUMENT]
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, CACHE_ARGUMENT: cache}

    def _makes_a_cache(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        def argument(name: str) -> Any:
            place = self.places.get(name, len(args))
            return args[place] if place < len(args) else kwargs.get(name)

        if argument("cache") is not None or argument("past_key_values") is not None:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        use_cache = argument("use_cache")
        return bool(getattr(model.config, "use_cache", False) if use_cache is None else use_cache)

    def _warn(self) -> None:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"this call records gradients, so it keeps no {self.kv_cache_dtype!r} pages and "
                "says nothing about their quality: call the model under torch.no_grad()",
                stacklevel=4,
            )


def _records_gradients(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return any(x.requires_grad for x in inputs) or any(p.requires_grad for p in model.parameters())


def _layers_of_pages(model: Any) -> set[int]:
    """Which layers of a cache hold pages: all but those whose attention is not patched.

    A layer that the model lacks (a stage of a pipeline) counts as one of ours, since any layer may
    be asked for the length of the text.
    """
    ours: set[int] = set()
    stock: set[int] = set()
    for _, module in _attention_layers(model):
        (stock if patch_state(module) is None else ours).add(getattr(module, "layer_idx", -1))
    places = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
    return set(range(places)) - (stock - ours)


def _whole_mask(generation_config: Any, model_kwargs: dict[str, Any], batch: int) -> Tensor | None:
    """The mask [B, S] of cached and new tokens. transformers drops one that is all ones, and keeps
    its width."""
    mask = model_kwargs.get("attention_mask")
    width = getattr(generation_config, "_mask_length", None)
    if mask is None and width is not None:
        return torch.ones(batch, width, dtype=torch.long, device="cpu")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _forget_guesses(cache: MLACache, width: int) -> None:
    """Crops the cache of an assistant to the ``width`` tokens there are. Up to transformers 5.17 it
    is left with guesses that were refused."""
    surplus = int(cache.get_seq_length()) - width
    if cache.batch_size > 0 and surplus > 0:
        cache.crop(-surplus)


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
        if not cache.can_forget:
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

    Afterwards ``generate()`` and calls of the model that make a cache (``use_cache``) make an
    :class:`MLACache`; an explicit cache or ``cache_implementation`` wins, and caches of
    transformers are read in place. Calls that record gradients keep the model's own tensors.
    Patching again only changes the format. Layers are recognised by structure, so every MLA family
    of transformers is covered, wrapped models (PEFT) included.

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
        _hold_format(model, kv_cache_dtype)  # for caches that come to generate() all the same
        reason = "TORCH_FLASH_MLA_DISABLE is set"
        disabled = (LayerReport(name, STOCK, reason) for name, _ in _attention_layers(model))
        return PatchReport(tuple(disabled), kv_cache_dtype)

    rows: list[LayerReport] = []
    accepted: list[AttentionModule] = []
    for name, module in _attention_layers(model):
        status, reason = _verdict(module, kv_cache_dtype)
        way = _way(module) if status == PATCHED else ""
        rows.append(LayerReport(name, status, reason, way))
        if status == PATCHED:
            accepted.append(module)
    report = PatchReport(tuple(rows), kv_cache_dtype, _stock_calls(model, accepted, kv_cache_dtype))
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
            if is_mla(module):
                module.expand_kv = passthrough
    if accepted:
        _hold_format(model, kv_cache_dtype)
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
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _CacheForForward):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


@contextmanager
def patched(
    model: nn.Module, kv_cache_dtype: str = "auto", strict: bool = True
) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches inside of the block only.

    A model that was patched before stays so. Arguments and errors are those of :func:`patch`.
    """
    before = [(maker, maker.kv_cache_dtype) for maker in _cache_makers(model)]
    was_patched = any(patch_state(module) is not None for module in model.modules())
    try:
        yield patch(model, kv_cache_dtype, strict)
    finally:
        if not was_patched:
            unpatch(model)
        for maker, format_before in before:
            maker.kv_cache_dtype = format_before


def _hold_format(model: nn.Module, kv_cache_dtype: str) -> None:
    """Lets whatever makes a cache in ``model`` make one of this format."""
    for maker in _cache_makers(model):
        maker.kv_cache_dtype = kv_cache_dtype
    for module in _models_of_mla(model):
        if hasattr(type(module), "_prepare_cache_for_generation"):
            module.__dict__.setdefault(
                "_prepare_cache_for_generation", _CacheForGeneration(module, kv_cache_dtype)
            )
        is_innermost = len(_models_of_mla(module)) == 1
        takes_a_cache = CACHE_ARGUMENT in inspect.signature(type(module).forward).parameters
        if is_innermost and takes_a_cache and not is_disabled():
            hooks = [x for x in module._forward_pre_hooks.values() if type(x) is _CacheForForward]
            if not hooks:
                hooks = [_CacheForForward(module, kv_cache_dtype)]
                module.register_forward_pre_hook(hooks[0], with_kwargs=True)
            hooks[0].layers = _layers_of_pages(module)


def _cache_makers(model: nn.Module) -> list[_CacheForGeneration | _CacheForForward]:
    makers = []
    for module in model.modules():
        attributes = module.__dict__.get("_prepare_cache_for_generation")
        makers += [x for x in (attributes, *module._forward_pre_hooks.values())]
    return [x for x in makers if isinstance(x, (_CacheForGeneration, _CacheForForward))]


def _attention_layers(model: nn.Module) -> list[tuple[str, AttentionModule]]:
    """MLA layers, and whatever else looks like the attention of a decoder layer."""
    return [
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if hasattr(module, "kv_b_proj")
        or ("Attention" in type(module).__name__ and hasattr(module, "layer_idx"))
    ]


def _models_of_mla(model: nn.Module) -> list[Any]:
    """The models in ``model`` that have MLA layers, from the outermost to the innermost."""
    return [
        m
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and any(map(is_mla, m.modules()))
    ]


def _way(module: AttentionModule) -> str:
    """How an MLA layer reads its kv_b_proj now; empty where it has none."""
    if not is_mla(module):
        return ""
    floats = (p.dtype for p in module.parameters() if p.dtype in FLOAT_DTYPES)
    return str(
        reading(module.kv_b_proj, module.kv_lora_rank, next(floats, torch.get_default_dtype()))
    )


def _stock_calls(
    model: nn.Module, accepted: list[AttentionModule], kv_cache_dtype: str
) -> tuple[str, ...]:
    """Which calls do not run on this package's attention, or not in the format, all the same."""
    calls = ["calls that return attention weights"] if accepted else []
    rates = {getattr(module, "attention_dropout", 0.0) for module in accepted} - {0.0, None}
    if rates:
        calls.append(f"training with attention_dropout={max(rates)}")
    for module in _models_of_mla(model):
        if getattr(module.config.get_text_config(), "num_mtp_layers", None):
            calls.append("the layers that generate(use_mtp=True) adds for its guesses")
            break
    for maker in _models_of_mla(model):
        kind = getattr(getattr(maker, "generation_config", None), "cache_implementation", None)
        if kind is not None and kv_cache_dtype != "auto":
            calls.append(f"generate() keeps a {kind!r} cache (generation_config), not this format")
    return tuple(calls)


def _verdict(module: AttentionModule, kv_cache_dtype: str) -> tuple[str, str]:
    """(status, reason) of one attention layer."""
    shared = shares_keys(module)
    if not hasattr(module, "kv_b_proj") and not shared:
        return STOCK, "no latent keys"
    if not is_mla(module) and not shared:
        name = type(module).__name__
        return FAILED, (
            f"{name} has no expand_kv, so it caches expanded keys: load the model without "
            "trust_remote_code"
        )
    if hasattr(module, "indexer") and not SPARSE_LAYERS_CACHE_LATENTS:
        found = transformers.__version__
        return FAILED, f"sparse MLA needs transformers >= 5.18, found {found}"
    projection = module.kv_proj if shared else module.kv_b_proj
    tensors = [*projection.parameters(), *projection.buffers()]
    device = next((t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None)
    if device is not None:
        return FAILED, f"its weights are on {device}: call model.to('cpu') first"
    if any(t.dtype == torch.float64 for t in tensors):
        return FAILED, "float64 is not supported: load with dtype=torch.float32 or torch.bfloat16"
    if kv_cache_dtype != "auto" and shared:
        return FAILED, (
            f"its keys lie in a cache of transformers, which knows no {kv_cache_dtype}: use auto"
        )
    if kv_cache_dtype != "auto":
        try:
            row_bytes(kv_cache_dtype, module.kv_lora_rank, module.qk_rope_head_dim)
        except ValueError as error:
            return FAILED, str(error)
    if patch_state(module) is not None:
        return PATCHED, "already patched"
    return PATCHED, "one key head, which is its value" if shared else "MLA"
