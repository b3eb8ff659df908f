"""The comparison behind test_transformers.py: a patched model against the stock one, step by step.

``watch`` makes sure that the operator did the work, and ``FAULTS`` are deliberate mistakes that the
comparison has to notice.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, StaticCache, cache_utils
from transformers_cases import mla_layers

import torch_flash_mla
from torch_flash_mla import PagedLatentCache, ops
from torch_flash_mla.integrations.transformers import MLACache, attention, patch, patched
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

TOLERANCE = 5e-4  # of the largest logit of a step
WIDTH = 128  # tokens of a fixed cache: whole pages, so that all kinds are equally wide

CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "default": lambda model: None,
    "MLACache": lambda model: MLACache(model.config),
    "MLACache fixed": lambda model: MLACache(model.config, max_cache_len=WIDTH),
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "StaticCache": lambda model: StaticCache(model.config, WIDTH),
}
STOCK_OF = {  # sparse layers break ties of scores by the width of the cache: like with like
    "default": "DynamicCache",
    "MLACache": "DynamicCache",
    "MLACache fixed": "StaticCache",
    "DynamicCache": "DynamicCache",
    "StaticCache": "StaticCache",
}


@dataclass(frozen=True)
class Mode:
    """One way to generate: lengths of the prompts (left-padded), arguments of ``generate``."""

    lengths: tuple[int, ...]
    arguments: dict[str, Any]
    caches: tuple[str, ...]
    assisted: bool = False


MODES = {
    "greedy": Mode(
        (11,), {"max_new_tokens": 64}, ("default", "MLACache fixed", "DynamicCache", "StaticCache")
    ),
    "padded": Mode(
        (12, 5),
        {"max_new_tokens": 24},
        ("default", "MLACache fixed", "DynamicCache", "StaticCache"),
    ),
    "beam": Mode(
        (9, 9),
        {"max_new_tokens": 16, "num_beams": 2},
        ("default", "MLACache fixed", "DynamicCache"),
    ),
    "assisted": Mode((11,), {"max_new_tokens": 24}, ("default", "DynamicCache"), assisted=True),
}


@dataclass(frozen=True)
class Trace:
    """What a run of ``generate`` made."""

    tokens: Tensor  # [B, length]
    logits: tuple[Tensor, ...]  # one [B, vocabulary] per step


def prompt(lengths: tuple[int, ...], vocabulary: int = 96) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(3, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(
    model: PreTrainedModel, mode: Mode, cache: Any, assistant: PreTrainedModel | None = None
) -> Trace:
    """A run of ``generate`` with a cache of :data:`CACHES`, or with one made elsewhere."""
    arguments = dict(mode.arguments)
    if cache != "default":
        arguments[CACHE_ARGUMENT] = CACHES[cache](model) if isinstance(cache, str) else cache
    if mode.assisted:
        arguments["assistant_model"] = assistant
    inputs = prompt(mode.lengths, model.config.get_text_config().vocab_size)
    out = model.generate(
        **inputs,
        **arguments,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return Trace(out.sequences, out.logits)


def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model with some noise: its guesses are accepted now and then."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
    return assistant


def assert_same_logits(actual: Tensor, expected: Tensor, step: int = 0) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"step {step}: logits differ by {error:.1e} of the largest"


def assert_same(actual: Trace, expected: Trace) -> None:
    for step, (a, e) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_same_logits(a, e, step)
    assert torch.equal(actual.tokens, expected.tokens)


class OpCalls(TorchDispatchMode):
    """Counts calls of the attention operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.flashmla.mla_attention_kv_b.default,
            torch.ops.flashmla.mla_attention.default,
        )
        return func(*args, **(kwargs or {}))


def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 5e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@contextmanager
def watch(*models: PreTrainedModel) -> Iterator[None]:
    """Checks: each forward pass calls the op once per MLA layer, and never ``expand_kv``."""

    def refuse(*args: Any) -> None:
        raise AssertionError("expand_kv was called")

    expected = 0

    def count(model: PreTrainedModel, *args: Any) -> None:
        nonlocal expected
        expected += len(mla_layers(model))

    inner = [next(m for m in x.modules() if isinstance(m, PreTrainedModel)) for x in models]
    hooks = [model.register_forward_pre_hook(count) for model in inner]
    layers = [layer for model in models for layer in mla_layers(model)]
    classes = {type(layer) for layer in layers if hasattr(type(layer), "expand_kv")}
    originals = {cls: cls.expand_kv for cls in classes}
    for cls in classes:
        cls.expand_kv = refuse
    try:
        with OpCalls() as calls:
            yield
    finally:
        for cls, original in originals.items():
            cls.expand_kv = original
        for hook in hooks:
            hook.remove()
    assert calls.count == expected > 0


def compare(
    model: PreTrainedModel, mode: Mode, stock: dict[str, Trace], assistant: PreTrainedModel | None
) -> None:
    """The comparison: the patched ``model`` on every cache of the mode against the stock traces."""
    for cache in mode.caches:
        watched = (model,) if assistant is None else (model, assistant)
        with watch(*watched):
            actual = generate(model, mode, cache, assistant)
        assert_same(actual, stock[STOCK_OF[cache]])


def holds(model: PreTrainedModel, cache: str) -> bool:
    """Whether transformers has a cache of that kind for the model's layers. Compressed entries have
    none of fixed size."""
    kinds = cache_utils.STATIC_LAYER_TYPE_MAPPING
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return STOCK_OF[cache] != "StaticCache" or not {x for x in types if "compressed" in x} - {
        *kinds
    }


def check_mode(model: PreTrainedModel, mode: Mode) -> None:
    mode = dataclasses.replace(mode, caches=tuple(x for x in mode.caches if holds(model, x)))
    assistant = assistant_of(model) if mode.assisted else None
    stock = {}
    for cache in {STOCK_OF[cache] for cache in mode.caches}:
        try:
            stock[cache] = generate(model, mode, cache, assistant)
        except (ValueError, RuntimeError) as error:
            # Recurrent states cannot go back; up to 5.17 an assistant's cache may outgrow the text.
            if mode.assisted and re.search("stateful|tensor of 0 elements", str(error)):
                pytest.skip(f"transformers: {error}")
            raise
    with patched(model):
        if assistant is not None:
            patch(assistant)
        compare(model, mode, stock, assistant)


def check_logits(model: PreTrainedModel) -> None:
    """One forward pass without a cache, of a whole prompt and of padded ones."""
    vocabulary = model.config.get_text_config().vocab_size
    for lengths in ((40,), (24, 9)):
        inputs = prompt(lengths, vocabulary)
        seen = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
            with patched(model), watch(model):
                actual = model(**inputs, use_cache=False).logits
        assert_same_logits(actual[seen], expected[seen])


# Cache formats: the right value is the stock model over rows that were stored and read back


def rounded(rows: tuple[Tensor, Tensor], kv_cache_dtype: str) -> tuple[Tensor, Tensor]:
    """Latents [B, 1, T, L] and rotary keys [B, 1, T, R] as a packed cache gives them back."""
    (batch, _, tokens, latent), rope = rows[0].shape, rows[1].shape[3]
    cache = PagedLatentCache(1, latent, rope, kv_cache_dtype=kv_cache_dtype, max_batch=batch)
    cache.reserve(batch, tokens)
    cache.append(0, rows[0][:, 0], rows[1][:, 0])
    read = ops.gather_cache(
        cache.kv_cache(0),
        cache.block_table[:batch],
        cache.cache_seqlens[:batch],
        latent,
        latent + rope,
        rows[0].dtype,
        kv_cache_dtype,
        tokens,
    )
    kv_c, k_pe = read.unsqueeze(1).split([latent, rope], dim=-1)
    return kv_c, k_pe


def rounding_cache(model: PreTrainedModel, kind: str, kv_cache_dtype: str) -> Any:
    """A cache of transformers that rounds what an MLACache of that format would keep packed."""
    cache = CACHES[kind](model)
    for layer, ours in zip(cache.layers, MLACache(model.config).layers, strict=True):
        if hasattr(ours, "kv_cache_dtype"):

            def update(
                key: Tensor, value: Tensor, *args: Any, stock: Any = layer.update, **kwargs: Any
            ) -> Any:
                return stock(*rounded((key, value), kv_cache_dtype), *args, **kwargs)

            layer.update = update
    return cache


def check_format(model: PreTrainedModel, kv_cache_dtype: str) -> None:
    """``generate`` of a model patched with that format, in float arithmetic.

    Latents of the second layer differ in their last bit, so once in a while one is rounded to the
    neighbouring code: the bound is a third of what rounding all of them changes.
    """
    tokens = prompt((8, 8), model.config.get_text_config().vocab_size)["input_ids"]
    forced = {"prefix_allowed_tokens_fn": lambda row, ids: [tokens[row, len(ids) - 12]]}
    mode = Mode((12, 5), {"max_new_tokens": tokens.shape[1], **forced}, ())

    def logits(cache: Any) -> Tensor:
        return torch.stack(generate(model, mode, cache).logits)

    fixed = MLACache(model.config, kv_cache_dtype, max_cache_len=WIDTH)
    for cache, kind in (("default", "DynamicCache"), (fixed, "StaticCache")):
        expected = logits(rounding_cache(model, kind, kv_cache_dtype))
        bound = (expected - logits(kind)).abs().max() / 3
        assert bound > 0
        with patched(model, kv_cache_dtype), torch_flash_mla.force_isa("scalar"), watch(model):
            assert (logits(cache) - expected).abs().max() <= bound


# Deliberate faults: a comparison that does not notice them proves nothing


def _zero_attention(call: Callable, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, lse = call(q, *args, **kwargs)
    return out * 0, lse


def _zero_rope(call: Callable, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    weight, head_dim_v = args[3], args[4]
    q = q.clone()
    q[..., weight.shape[1] - head_dim_v :] = 0
    return call(q, *args, **kwargs)


def _ignore_padding(call: Callable, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    lengths = MODES["padded"].lengths
    padding = max(lengths) - min(lengths)
    row = lengths.index(min(lengths))
    mask = kwargs["attn_mask"].clone()
    mask[row, :, :, :padding] = True if mask.dtype == torch.bool else 0
    return call(q, *args, **{**kwargs, "attn_mask": mask})


def _ignore_selection(
    call: Callable, q: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    return call(q, *args, **{**kwargs, "indices": None})


# The same for layers of shared keys, whose masks are those of tokens (the lowest number) and behind
# them, those of compressed entries (minus infinity)


def _zero_shared(call: Callable, *args: Any) -> Tensor:
    return call(*args) * 0


def _ignore_sinks(call: Callable, query: Tensor, *args: Any) -> Tensor:
    return call(query, *args[:-1], None)


def _see_padding(call: Callable, query: Tensor, key: Tensor, mask: Tensor, *args: Any) -> Tensor:
    lengths = MODES["padded"].lengths
    row, padding = lengths.index(min(lengths)), max(lengths) - min(lengths)
    if query.shape[2] > 1:
        mask = mask.clone()
        mask[row, :, :, :padding] = 0
    return call(query, key, mask, *args)


def _see_all_entries(
    call: Callable, query: Tensor, key: Tensor, mask: Tensor, *args: Any
) -> Tensor:
    return call(query, key, mask.masked_fill(mask.isneginf(), 0), *args)


SHARED_KEY_FAULTS = {
    "attention zeroed": (_zero_shared, "greedy"),
    "sinks ignored": (_ignore_sinks, "greedy"),
    "padding mask ignored": (_see_padding, "padded"),
    "selection ignored": (_see_all_entries, "greedy"),
}


def check_shared_key_fault(
    model: PreTrainedModel, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, mode_name = SHARED_KEY_FAULTS[fault]
    mode = Mode(MODES[mode_name].lengths, {"max_new_tokens": 8}, ("default",))
    stock = {"DynamicCache": generate(model, mode, "DynamicCache")}
    with patched(model):
        compare(model, mode, stock, None)
        right = attention.shared_attention
        monkeypatch.setattr(attention, "shared_attention", lambda *args: wrong(right, *args))
        with pytest.raises(AssertionError, match="logits differ"):
            compare(model, mode, stock, None)


def _passes_indices(layer: torch.nn.Module) -> bool:
    """Whether the layer hands its selection to the attention function, instead of in the mask."""
    return re.search(r"\bindices=", inspect.getsource(type(layer).forward)) is not None


FAULTS = {
    "attention zeroed": (_zero_attention, "greedy"),
    "rope zeroed": (_zero_rope, "greedy"),
    "padding mask ignored": (_ignore_padding, "padded"),
    "selection ignored": (_ignore_selection, "greedy"),
}


def check_fault(model: PreTrainedModel, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, mode_name = FAULTS[fault]
    rotary = [layer for layer in mla_layers(model) if layer.qk_rope_head_dim]
    if fault == "rope zeroed" and not rotary:
        pytest.skip("no rotary dimensions")
    if fault == "selection ignored" and not any(map(_passes_indices, mla_layers(model))):
        pytest.skip("passes no selection")
    mode = MODES[mode_name]
    mode = Mode(mode.lengths, {"max_new_tokens": 8}, ("default",))
    stock = {"DynamicCache": generate(model, mode, "DynamicCache")}
    with patched(model):
        compare(model, mode, stock, None)
        right = torch_flash_mla.ops.mla_attention_kv_b
        monkeypatch.setattr(
            attention.ops,
            "mla_attention_kv_b",
            lambda *args, **kwargs: wrong(right, *args, **kwargs),
        )
        with pytest.raises(AssertionError, match="logits differ"):
            compare(model, mode, stock, None)
