"""Patched models of transformers against stock ones: same tokens, same logits, at every step.

Three kinds of evidence keep these comparisons honest: the op is called once per MLA layer and
forward pass and ``expand_kv`` never (``watch``); random weights are large enough for attention to
matter; and three deliberate faults (``FAULTS``) must each make the same comparison fail.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_cases import TINY_MODEL, families, mla_layers, small_model, tiny_model

import torch_flash_mla
from torch_flash_mla.integrations import _attention
from torch_flash_mla.integrations.transformers import MLACache, patch, patched, unpatch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

TOLERANCE = 5e-4  # of the largest logit of a step
WIDTH = 128  # tokens of a fixed cache; whole pages, so that ours and transformers' are equally wide

# Plain; odd head count; sparse with sinks; sparse with shared and rope-free layers; dims differ,
# sliding window.
FAST_FAMILIES = ("deepseek_v3", "minicpm3", "hy_v4", "mistral_large4", "dots3_note")

CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "default": lambda model: None,
    "MLACache": lambda model: MLACache(model.config),
    "MLACache fixed": lambda model: MLACache(model.config, max_cache_len=WIDTH),
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "StaticCache": lambda model: StaticCache(model.config, WIDTH),
}
STOCK_OF = {  # sparse layers break ties among scores by the width of the cache: compare like with like
    "default": "DynamicCache",
    "MLACache": "DynamicCache",
    "MLACache fixed": "StaticCache",
    "DynamicCache": "DynamicCache",
    "StaticCache": "StaticCache",
}


@dataclass(frozen=True)
class Mode:
    """One way to generate: prompt lengths of the batch (left-padded) and arguments of ``generate``."""

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
    model: PreTrainedModel, mode: Mode, cache: str, assistant: PreTrainedModel | None = None
) -> Trace:
    arguments = dict(mode.arguments)
    if cache != "default":
        arguments["past_key_values"] = CACHES[cache](model)
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


def assert_same(actual: Trace, expected: Trace) -> None:
    for step, (a, e) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        error = (a - e).abs().max() / e.abs().max()
        assert error <= TOLERANCE, f"step {step}: logits differ by {error:.1e} of the largest"
    assert torch.equal(actual.tokens, expected.tokens)


class _OpCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.flashmla.mla_attention_kv_b.default
        return func(*args, **(kwargs or {}))


@contextmanager
def watch(*models: PreTrainedModel) -> Iterator[None]:
    """Checks: each forward pass calls the op once per MLA layer, and never ``expand_kv``."""

    def refuse(*args: Any) -> None:
        raise AssertionError("expand_kv was called")

    expected = 0

    def count(model: PreTrainedModel, *args: Any) -> None:
        nonlocal expected
        expected += len(mla_layers(model))

    hooks = [model.register_forward_pre_hook(count) for model in models]
    classes = {type(layer) for model in models for layer in mla_layers(model)}
    originals = {cls: cls.expand_kv for cls in classes}
    for cls in classes:
        cls.expand_kv = refuse
    try:
        with _OpCalls() as calls:
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


def check_mode(model: PreTrainedModel, mode: Mode) -> None:
    assistant = assistant_of(model) if mode.assisted else None
    stock = {}
    for cache in {STOCK_OF[cache] for cache in mode.caches}:
        try:
            stock[cache] = generate(model, mode, cache, assistant)
        except ValueError as error:
            if mode.assisted and "stateful" in str(error):
                pytest.skip(f"transformers: {error}")
            raise
    with patched(model):
        if assistant is not None:
            patch(assistant)
        compare(model, mode, stock, assistant)


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


FAULTS = {
    "attention zeroed": (_zero_attention, "greedy"),
    "rope zeroed": (_zero_rope, "greedy"),
    "padding mask ignored": (_ignore_padding, "padded"),
}


def check_fault(model: PreTrainedModel, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, mode_name = FAULTS[fault]
    rotary = [layer for layer in mla_layers(model) if layer.qk_rope_head_dim]
    if fault == "rope zeroed" and not rotary:
        pytest.skip("no rotary dimensions")
    mode = MODES[mode_name]
    mode = Mode(mode.lengths, {"max_new_tokens": 8}, ("default",))
    stock = {"DynamicCache": generate(model, mode, "DynamicCache")}
    with patched(model):
        compare(model, mode, stock, None)
        right = torch_flash_mla.ops.mla_attention_kv_b
        monkeypatch.setattr(
            _attention.ops,
            "mla_attention_kv_b",
            lambda *args, **kwargs: wrong(right, *args, **kwargs),
        )
        with pytest.raises(AssertionError, match="logits differ"):
            compare(model, mode, stock, None)


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """Models as small as these spend their time on waking threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], PreTrainedModel]:
    """Stock small models, built once per family. Tests leave them unpatched."""
    models: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in models:
            models[family] = tiny_model() if family == "tiny_model" else small_model(family)
        return models[family]

    return get


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], PreTrainedModel]) -> Iterator[PreTrainedModel]:
    return model_of("deepseek_v3")


def _family_params() -> list[Any]:
    names = [
        pytest.param(f, marks=() if f in FAST_FAMILIES else pytest.mark.slow) for f in families()
    ]
    missing = not (TINY_MODEL / "model.safetensors").exists()
    skip = pytest.mark.skipif(missing, reason="examples/tiny_model has no weights yet")
    return [*names, pytest.param("tiny_model", marks=(pytest.mark.slow, skip))]


class TestFamilies:
    """Every MLA family of the installed transformers, and the trained model of the repository."""

    def test_the_families_are_found(self) -> None:
        assert set(FAST_FAMILIES) <= set(families())
        assert len(families()) >= 10

    @pytest.mark.parametrize("family", _family_params())
    @pytest.mark.parametrize("mode", ["padded", pytest.param("greedy", marks=pytest.mark.slow)])
    def test_greedy(self, model_of, family: str, mode: str) -> None:
        check_mode(model_of(family), MODES[mode])

    @pytest.mark.slow
    @pytest.mark.parametrize("family", [*families(), _family_params()[-1]])
    @pytest.mark.parametrize("mode", ["beam", "assisted"])
    def test_other_modes(self, model_of, family: str, mode: str) -> None:
        check_mode(model_of(family), MODES[mode])

    @pytest.mark.parametrize("mode", MODES)
    def test_all_modes_of_one_family(self, model, mode: str) -> None:
        check_mode(model, MODES[mode])

    @pytest.mark.parametrize("family", _family_params())
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_is_noticed(self, model_of, family: str, fault: str, monkeypatch) -> None:
        check_fault(model_of(family), fault, monkeypatch)
