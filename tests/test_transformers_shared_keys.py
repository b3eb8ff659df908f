"""Layers whose one key head is their value (DeepSeek-V4): masks, caches, training, refusals.

That logits and text are those of stock is compared in test_transformers.py, with all other
families.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers_cases import shared_key_families, small_model
from transformers_compare import OpCalls, assert_same_logits, logits, prompt, watch

from torch_flash_mla import ops, reference
from torch_flash_mla.integrations.transformers import (
    DecoderStep,
    MLACache,
    patch,
    patched,
    shared_keys,
    unpatch,
)
from torch_flash_mla.integrations.transformers.attention import mla_attention_forward
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

FAMILY = "deepseek_v4"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        FAMILY not in shared_key_families(), reason="no such family in this transformers"
    ),
]


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    """An unpatched model that tests do not change."""
    return small_model(FAMILY)


@pytest.fixture
def model(stock: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A patched copy of ``stock``."""
    copied = copy.deepcopy(stock)
    patch(copied)
    return copied


def text(model: PreTrainedModel, lengths: tuple[int, ...] = (19,), **arguments: Any) -> Tensor:
    """Tokens of ``generate``, greedy unless told otherwise."""
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    return model.generate(**prompt(lengths), **arguments)


@pytest.fixture
def ids() -> Tensor:
    return prompt((24, 24))["input_ids"]


class TestMasks:
    """``as_indices``: lists where they spare keys, and never anything else than the mask says."""

    @staticmethod
    def attention(query: Tensor, key: Tensor, mask: Tensor | None, **lists: Any) -> Tensor:
        out, _ = reference.mla_attention(
            query.transpose(1, 2),
            key[:, 0],
            None,
            torch.full((len(key),), key.shape[2], dtype=torch.int32),
            key.shape[3],
            0.2,
            attn_mask=mask,
            attn_sink=torch.zeros(query.shape[1]),
            **lists,
        )
        return out

    @pytest.mark.parametrize("values", [False, True], ids=["hides", "adds"])
    @pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
    @pytest.mark.parametrize("batch_of_mask", [1, 3])
    @pytest.mark.parametrize("most_bytes", [1, 1 << 26], ids=["parts", "whole"])
    def test_holes(
        self,
        batch_of_mask: int,
        lowest: float,
        values: bool,
        most_bytes: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(shared_keys, "_MOST_BYTES", most_bytes)
        torch.manual_seed(0)
        query, key = torch.randn(3, 32, 5, 16), torch.randn(3, 1, 40, 16)
        mask = torch.zeros(batch_of_mask, 1, 5, 40)
        mask[torch.rand_like(mask) < 0.7] = lowest
        mask[:, :, 2] = lowest  # a query that sees nothing
        if values:
            mask[:, :, 3, ::3] = 1.5
        left, indices = shared_keys.as_indices(mask, 3, 5, 40, 32)
        assert indices is not None
        assert (left is None) is not values
        assert indices.dtype == torch.int32
        kept = (mask.expand(3, 1, 5, 40) > torch.finfo(torch.float32).min)[:, 0]
        for row, chosen in zip(kept.reshape(-1, 40), indices.reshape(15, -1), strict=True):
            assert chosen[chosen >= 0].tolist() == row.nonzero()[:, 0].tolist()
        torch.testing.assert_close(
            self.attention(query, key, left, indices=indices), self.attention(query, key, mask)
        )
        actual = shared_keys.shared_attention(query, key, mask, 0.2, torch.zeros(32))
        torch.testing.assert_close(
            actual.double(), self.attention(query, key, mask), rtol=1e-4, atol=1e-5
        )

    def test_intervals_are_left_to_the_operator(self) -> None:
        window = torch.ones(1, 1, 30, 30).tril().triu(-4)
        mask = torch.zeros_like(window).masked_fill(window == 0, float("-inf"))
        assert shared_keys.as_indices(mask, 2, 30, 30, 64) == (mask, None)

    def test_queries_of_few_heads_share_keys(self) -> None:
        """A list of each query would cost more than the mask, but for a single query."""
        mask = torch.zeros(1, 1, 3, 30)
        mask[..., ::5] = float("-inf")
        assert shared_keys.as_indices(mask, 2, 3, 30, 4) == (mask, None)
        left, indices = shared_keys.as_indices(mask[:, :, :1], 2, 1, 30, 4)
        assert left is None
        assert indices is not None
        assert indices.shape == (2, 1, 24)

    def test_a_mask_per_head_stays(self) -> None:
        mask = torch.zeros(1, 2, 1, 30)
        mask[..., ::2] = float("-inf")
        mask[..., 5:20] = float("-inf")
        assert shared_keys.as_indices(mask, 2, 1, 30, 2) == (mask, None)

    def test_a_bool_mask_is_refused(self) -> None:
        """Its ones would be added to logits, and the layer's own entries would be inverted."""
        query = torch.randn(1, 2, 3, 16)
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"attention_mask: got torch.bool.*float mask"):
            shared_keys.shared_attention(query, query[:, :1], mask, None, None)

    def test_a_mask_of_other_keys_is_refused(self) -> None:
        query = torch.randn(1, 2, 3, 16)
        with pytest.raises(ValueError, match="got 4 columns for 3 keys"):
            shared_keys.shared_attention(query, query[:, :1], torch.zeros(1, 1, 3, 4), None, None)

    def test_a_selection_becomes_lists(
        self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In each decoding step of the layer that selects, with all keys of the window."""
        seen: list[tuple[int, int | None]] = []
        attend = ops.mla_attention

        def spy(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
            indices = kwargs["indices"]
            seen.append((kv.shape[1], None if indices is None else indices.shape[2]))
            return attend(q, kv, *args, **kwargs)

        monkeypatch.setattr(ops, "mla_attention", spy)
        text(model, max_new_tokens=20)
        config = model.config
        window, chosen = config.sliding_window, config.index_topk
        sliding, selecting, heavy = seen[-3:]
        assert sliding == (window, None)
        assert selecting == (window + 38 // 2, window + chosen)
        assert heavy == (window + 38 // 5, None)


class TestReport:
    def test_report(self, stock: PreTrainedModel) -> None:
        with patched(stock) as report:
            assert len(report.patched) == 3
            assert not report.expanded
            assert "already patched" in str(patch(stock))
        row = str(report).splitlines()[2].split(maxsplit=3)
        assert row == [
            "model.layers.0.self_attn",
            "patched",
            "-",
            "one key head, which is its value",
        ]

    def test_unpatch_restores_everything(self, stock: PreTrainedModel) -> None:
        before = [dict(module.__dict__) for module in stock.modules()]
        patch(stock)
        unpatch(stock)
        assert [dict(module.__dict__) for module in stock.modules()] == before

    def test_packed_formats_are_refused(self, stock: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match="a cache of transformers, which knows no q8_kv"):
            patch(stock, "q8_kv")
        assert not patch(stock, "q8_kv", strict=False).patched
        with pytest.raises(ValueError, match="kv_cache_dtype: got 'q8_kv', but no layer"):
            MLACache(stock.config, "q8_kv")

    def test_float64_is_refused(self, stock: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match="float64 is not supported"):
            patch(copy.deepcopy(stock).double())

    def test_decoder_step_is_refused(self, model: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match="expected plain MLA in every layer"):
            DecoderStep(model)

    def test_other_attention_is_no_such_layer(self) -> None:
        """One projection for keys and values, but of two heads' width."""
        assert not shared_keys.shares_keys(small_model("deepseek_v3").model.layers[0].self_attn)
        layer = small_model(FAMILY).model.layers[0].self_attn
        assert shared_keys.shares_keys(layer)
        layer.kv_proj = torch.nn.Linear(64, 2 * layer.head_dim)
        assert not shared_keys.shares_keys(layer)


class TestGenerate:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20},
            {"num_beams": 3, "num_return_sequences": 2},
            {"prefill_chunk_size": 7},
            {"use_cache": False},
        ],
        ids=["sampling", "beams", "chunked prefill", "no cache"],
    )
    @pytest.mark.parametrize("lengths", [(19,), (19, 8)], ids=["one", "padded"])
    def test_same_text(
        self,
        stock: PreTrainedModel,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        lengths: tuple[int, ...],
    ) -> None:
        torch.manual_seed(3)
        expected = text(stock, lengths, **arguments)
        torch.manual_seed(3)
        with watch(model):
            assert torch.equal(text(model, lengths, **arguments), expected)

    def test_selected_by_name(self, stock: PreTrainedModel, ids: Tensor) -> None:
        named = copy.deepcopy(stock)
        named.set_attn_implementation("mla_cpu")
        with watch(named):
            assert_same_logits(logits(named, ids), logits(stock, ids))
        with watch(named):
            assert torch.equal(text(named, (19, 8)), text(stock, (19, 8)))

    def test_selected_by_name_while_disabled(
        self, stock: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_FLASH_MLA_DISABLE", "1")
        named = copy.deepcopy(stock)
        named.set_attn_implementation("mla_cpu")
        assert not patch(named).patched
        with OpCalls() as calls:
            actual = logits(named, ids)
        assert calls.count == 0
        assert torch.equal(actual, logits(stock, ids))

    @pytest.mark.parametrize("patch_it", [False, True])
    def test_no_cache_of_fixed_size(self, stock: PreTrainedModel, patch_it: bool) -> None:
        """transformers has none for compressed entries."""
        model = copy.deepcopy(stock)
        if patch_it:
            patch(model)
        with pytest.raises(KeyError, match="compressed"):
            text(model, cache_implementation="static")

    def test_sliding_layers_alone_in_a_cache_of_fixed_size(self) -> None:
        stock = small_model(FAMILY, layer_types=3 * ["sliding_attention"])
        model = copy.deepcopy(stock)
        patch(model)
        for lengths in ((19,), (19, 8), (3,)):
            caches = (StaticCache(model.config, 64), DynamicCache(config=model.config))
            for cache in caches:
                expected = text(stock, lengths, **{CACHE_ARGUMENT: copy.deepcopy(cache)})
                with watch(model):
                    actual = text(model, lengths, **{CACHE_ARGUMENT: cache})
                assert torch.equal(actual, expected)

    def test_steps_of_several_tokens(
        self, stock: PreTrainedModel, model: PreTrainedModel, ids: Tensor
    ) -> None:
        caches = [DynamicCache(config=stock.config) for _ in range(2)]
        for tokens in ids.split((9, 1, 1, 6, 1, 6), dim=1):
            expected = logits(stock, tokens, **{CACHE_ARGUMENT: caches[0]})
            with watch(model):
                actual = logits(model, tokens, **{CACHE_ARGUMENT: caches[1]})
            assert_same_logits(actual, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, stock: PreTrainedModel, dtype: torch.dtype) -> None:
        """A layer's attention is no further from float64 than the stock one in that dtype. (Text
        would not tell: experts and entries are chosen by scores that nearly tie.)"""
        layer = stock.model.layers[1].self_attn
        torch.manual_seed(0)
        query, key = (3 * torch.randn(2, heads, 20, 64, dtype=dtype) for heads in (4, 1))
        mask = torch.zeros(2, 1, 20, 20, dtype=dtype)
        mask[torch.rand_like(mask) < 0.6] = float("-inf")
        arguments = {"scaling": 0.125, "dropout": 0.0, "s_aux": layer.sinks.detach()}
        eager = sys.modules[type(layer).__module__].eager_attention_forward
        exact, _ = eager(layer, query.double(), key.double(), key.double(), mask, **arguments)
        theirs, _ = eager(layer, query, key, key, mask, **arguments)
        ours, _ = mla_attention_forward(layer, query, key, key, mask, **arguments)
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()

    def test_custom_masks(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        ids = prompt((16,))["input_ids"]
        keep = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril().triu(-5)
        keep[..., 9:, 7] = False
        mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        mask[..., 3, 2] = 0.7
        expected = logits(stock, ids, attention_mask=mask)
        assert_same_logits(logits(model, ids, attention_mask=mask), expected)


class TestStockPaths:
    def test_attention_weights(
        self, stock: PreTrainedModel, model: PreTrainedModel, ids: Tensor
    ) -> None:
        for one in (stock, model):
            one.config.output_attentions = False
        with torch.no_grad():
            expected = stock(ids, output_attentions=True)
            actual = model(ids, output_attentions=True)
        assert len(actual.attentions) == 3
        for a, e in zip(actual.attentions, expected.attentions, strict=True):
            assert a is not None
            torch.testing.assert_close(a, e)
        assert_same_logits(actual.logits, expected.logits)

    def test_dropout(self, stock: PreTrainedModel, ids: Tensor) -> None:
        dropping = copy.deepcopy(stock).train()
        for layer in dropping.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(5)
        expected = dropping(ids, use_cache=False).logits
        report = patch(dropping)
        assert "training with attention_dropout=0.5" in str(report)
        torch.manual_seed(5)
        with OpCalls() as calls:
            actual = dropping(ids, use_cache=False).logits
        assert calls.count == 0
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(stock: PreTrainedModel, ids: Tensor, checkpointing: bool) -> None:
    """Of every parameter, sinks and compressors included, as in the stock model."""
    gradients = []
    for patch_it in (False, True):
        model = copy.deepcopy(stock).train()
        if patch_it:
            patch(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with OpCalls() as calls:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert calls.count == (3 * (1 + checkpointing) if patch_it else 0)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert actual.keys() == expected.keys()
    assert any("sinks" in name for name in expected)
    assert any("compressor.kv_proj" in name for name in expected)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name
