"""What patching promises beyond equal text: caches, training, copies, wrappers, refusals."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers_cases import mla_layers, small_model
from transformers_compare import assert_near, logits, prompt, watch

from torch_flash_mla.integrations import transformers as integration
from torch_flash_mla.integrations.transformers import MLACache, patch, patched, unpatch
from torch_flash_mla.integrations.transformers.attention import mla_attention_forward

FAMILY = "deepseek_v3"


pytestmark = pytest.mark.usefixtures("one_thread")


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


def text(model: PreTrainedModel, lengths: tuple[int, ...] = (9,), **arguments: Any) -> Tensor:
    """Tokens of ``generate``, greedy unless told otherwise."""
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    return model.generate(**prompt(lengths), **arguments)


@pytest.fixture
def ids() -> Tensor:
    return prompt((10, 10))["input_ids"]


class TestPatch:
    def test_report(self, stock: PreTrainedModel) -> None:
        with patched(stock) as report:
            assert report.patched == ("model.layers.0.self_attn", "model.layers.1.self_attn")
            assert not report.failed
            assert "already patched" in str(patch(stock))
        lines = str(report).splitlines()
        assert lines[0].split() == ["layer", "status", "kv_b_proj", "reason"]
        assert lines[2].split() == ["model.layers.0.self_attn", "patched", "in", "place", "MLA"]
        assert lines[4] == "2 of 2 attention layers patched"

    def test_hybrid_layers_stay_stock(self) -> None:
        report = patch(small_model("kimi_linear"))
        assert [layer.status for layer in report.layers] == ["stock", "patched"]

    def test_unpatch_restores_everything(self, stock: PreTrainedModel) -> None:
        before = [dict(module.__dict__) for module in stock.modules()]
        patch(stock)
        patch(stock, "q8_kv")
        unpatch(stock)
        assert [dict(module.__dict__) for module in stock.modules()] == before

    def test_patched_keeps_an_outer_patch(self, model: PreTrainedModel) -> None:
        with patched(model, "q8_kv"):
            pass
        with watch(model):
            cache = model.generate(
                **prompt((5,)), max_new_tokens=2, return_dict_in_generate=True
            ).past_key_values
        assert cache.pages.kv_cache_dtype == "auto"

    def test_nothing_to_patch(self) -> None:
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        llama = LlamaForCausalLM(config)
        with pytest.raises(ValueError, match="no latent keys"):
            patch(llama)
        assert not patch(llama, strict=False).patched
        assert text(llama).shape[1] == 21

    def test_a_format_that_does_not_fit(self) -> None:
        model = small_model(FAMILY, qk_rope_head_dim=16)
        with pytest.raises(ValueError, match="multiples of 32"):
            patch(model, "q8_kv")
        with pytest.raises(ValueError, match="kv_cache_dtype: got 'q9'"):
            patch(model, "q9")

    def test_disabled_by_the_environment(
        self, stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_FLASH_MLA_DISABLE", "1")
        report = patch(stock)
        assert not report.patched
        assert "TORCH_FLASH_MLA_DISABLE" in str(report)
        assert "expand_kv" not in mla_layers(stock)[0].__dict__

    def test_later_choice_of_attention(self, model: PreTrainedModel, ids: Tensor) -> None:
        expected = logits(model, ids)
        for name in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(name)
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            with watch(model):
                assert_near(logits(model, ids), expected)
                logits(model, ids, attention_mask=mask)


class TestGenerate:
    """Ways to generate that the comparison over all families does not go through."""

    @pytest.mark.parametrize(
        "arguments",
        [
            {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20},
            {"num_beams": 3, "num_return_sequences": 2},
            {"prompt_lookup_num_tokens": 3, "max_new_tokens": 40},
            {"prefill_chunk_size": 4},
            {"prefill_chunk_size": 4, "cache_implementation": "static"},
        ],
        ids=["sampling", "beams", "prompt lookup", "chunked prefill", "chunked prefill, static"],
    )
    def test_same_text(
        self, stock: PreTrainedModel, model: PreTrainedModel, arguments: dict[str, Any]
    ) -> None:
        torch.manual_seed(3)
        expected = text(stock, **arguments)
        torch.manual_seed(3)
        with watch(model):
            assert torch.equal(text(model, **arguments), expected)

    def test_early_exit(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        """The model assists itself with its first layer."""
        assert torch.equal(text(model, assistant_early_exit=1), text(stock))

    def test_flex_attention_masks(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        model.set_attn_implementation("flex_attention")
        with watch(model):
            actual = text(model, (9, 4))
        assert torch.equal(actual, text(stock, (9, 4)))

    @pytest.mark.parametrize("fixed", [False, True])
    def test_continued(self, stock: PreTrainedModel, model: PreTrainedModel, fixed: bool) -> None:
        """A second round appends to the cache of the first, prompt tokens included."""
        cache = MLACache(model.config, max_cache_len=64 if fixed else None)
        arguments = {"max_new_tokens": 6, "do_sample": False}
        inputs = prompt((7, 4))
        for _ in range(2):
            expected = stock.generate(**inputs, **arguments)
            actual = model.generate(**inputs, **arguments, past_key_values=cache)
            assert torch.equal(actual, expected)
            more = prompt((3, 3))["input_ids"]
            tokens = torch.cat([actual, more], dim=1)
            mask = torch.ones_like(tokens)
            mask[:, :7] = inputs["attention_mask"][:, :7]
            inputs = {"input_ids": tokens, "attention_mask": mask}

    def test_an_explicit_cache_wins(self, model: PreTrainedModel) -> None:
        def kind(**arguments: Any) -> type:
            arguments = {"max_new_tokens": 2, "return_dict_in_generate": True, **arguments}
            return type(model.generate(**prompt((5,)), **arguments).past_key_values)

        assert issubclass(kind(), MLACache)
        assert kind(past_key_values=DynamicCache(config=model.config)) is DynamicCache
        assert kind(cache_implementation="static") is StaticCache
        assert kind(use_cache=False) is type(None)

    @pytest.mark.parametrize(("kv_cache_dtype", "tolerance"), [("q8_kv", 0.2), ("q8_0", 0.1)])
    def test_packed_cache(
        self, stock: PreTrainedModel, kv_cache_dtype: str, tolerance: float, ids: Tensor
    ) -> None:
        """The named format is used, and its logits are those of rounded keys: near, not equal."""
        expected = logits(stock, ids)
        with patched(stock, kv_cache_dtype):
            out = stock.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
            assert out.past_key_values.layers[0].kv_cache().dtype == torch.uint8
            packed = logits(stock, ids, past_key_values=MLACache(stock.config, kv_cache_dtype))
        assert_near(packed, expected, tolerance)
        assert (packed - expected).norm() <= tolerance / 2 * expected.norm()
        assert not torch.equal(packed, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, stock: PreTrainedModel, ids: Tensor, dtype: torch.dtype) -> None:
        half = copy.deepcopy(stock).to(dtype)
        expected = logits(half, ids).float()
        patch(half)
        assert_near(logits(half, ids, past_key_values=MLACache(half.config)).float(), expected, 0.1)

    def test_inference_mode_and_autocast(self, model: PreTrainedModel, ids: Tensor) -> None:
        expected = logits(model, ids)
        cache = MLACache(model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        logits(model, ids, past_key_values=cache)  # the same tensors, outside of inference mode
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(logits(model, ids).float(), expected, 0.1)

    def test_custom_masks(self, stock: PreTrainedModel, model: PreTrainedModel) -> None:
        ids = prompt((6,))["input_ids"]
        keep = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
        keep[..., 3:, 1] = False
        additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        for mask in (keep, additive):
            expected = logits(stock, ids, attention_mask=mask)
            assert_near(logits(model, ids, attention_mask=mask), expected)


class TestMLACache:
    def test_a_model_without_mla_is_refused(self, ids: Tensor) -> None:
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        with pytest.raises(ValueError, match="not MLA"):
            logits(LlamaForCausalLM(config), ids, past_key_values=MLACache(config))

    @pytest.mark.parametrize("fixed", [False, True])
    def test_operations_on_sequences(
        self, model: PreTrainedModel, ids: Tensor, fixed: bool
    ) -> None:
        """crop, reorder, select, repeat, reset and deepcopy, against the rows themselves."""

        def rows(cache: MLACache) -> Tensor:
            layer = cache.layers[1]
            return torch.cat(layer.gather(int(layer.get_seq_length()), torch.float32), dim=-1)

        cache = MLACache(model.config, max_cache_len=64 if fixed else None, block_size=4)
        assert cache.is_compileable is fixed
        assert cache.nbytes == 0
        logits(model, ids, past_key_values=cache)
        first = rows(cache)
        assert cache.get_seq_length() == 10
        assert cache.bytes_per_token == 2 * (64 + 32) * 4
        assert cache.nbytes >= 20 * cache.bytes_per_token

        cache.crop(0)
        cache.crop(-3)
        assert torch.equal(rows(cache), first[:, :, :7])
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(rows(cache), first[[1, 1], :, :7])
        more = prompt((3, 2))["input_ids"]
        logits(model, more, past_key_values=cache)
        assert torch.equal(rows(cache)[:, :, :7], first[[1, 1], :, :7])
        assert not torch.equal(rows(cache)[0, :, 7:], rows(cache)[1, :, 7:])

        assert torch.equal(rows(twin), first[:, :, :7])
        twin.batch_select_indices(torch.tensor([1]))
        assert torch.equal(rows(twin), first[1:, :, :7])
        twin.batch_repeat_interleave(2)
        assert torch.equal(rows(twin), first[[1, 1], :, :7])
        with pytest.raises(ValueError, match="negative"):
            twin.crop(2)

        cache.reset()
        assert cache.get_seq_length() == 0
        logits(model, ids.repeat(2, 1), past_key_values=cache)  # another batch size
        assert torch.equal(rows(cache), first.repeat(2, 1, 1, 1))

    def test_pickled(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = MLACache(model.config)
        logits(model, ids, past_key_values=cache)
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        more = ids[:, :2]
        expected = logits(model, more, past_key_values=cache)
        assert torch.equal(logits(model, more, past_key_values=loaded), expected)

    def test_a_fixed_cache_that_is_full(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = MLACache(model.config, max_cache_len=16, block_size=16)
        logits(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="max_cache_len=16"):
            logits(model, ids, past_key_values=cache)


class TestTraining:
    def gradients(self, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("family", [FAMILY, "hy_v4"])
    def test_gradients(self, ids: Tensor, family: str) -> None:
        model = small_model(family).train()
        expected = self.gradients(model, ids)
        patch(model)
        with watch(model):
            actual = self.gradients(model, ids)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)

    def test_dropout_takes_the_stock_path(self, ids: Tensor) -> None:
        model = small_model(FAMILY, attention_dropout=0.3).train()
        torch.manual_seed(4)
        expected = model(ids).logits
        with patched(model):
            torch.manual_seed(4)
            assert_near(model(ids).logits, expected)

    def test_attention_weights(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """Requested weights come from the eager path, over whichever cache."""
        model = copy.deepcopy(stock)
        model.set_attn_implementation("eager")
        expected = model(ids, output_attentions=True)
        patch(model)
        for cache in (None, DynamicCache(config=model.config), MLACache(model.config, "auto")):
            actual = model(ids, output_attentions=True, past_key_values=cache)
            for a, e in zip(actual.attentions, expected.attentions, strict=True):
                assert_near(a, e)


class TestLifetime:
    def test_memory_is_returned_at_once(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """Neither a cache nor a patched model waits for the garbage collector."""
        model = copy.deepcopy(stock)
        patch(model)
        cache = MLACache(model.config)
        gc.collect()
        gc.disable()
        try:
            logits(model, ids, past_key_values=cache)
            pages = weakref.ref(cache.pages.paged)
            del cache
            assert pages() is None
            layer = weakref.ref(mla_layers(model)[0])
            del model
            assert layer() is None
        finally:
            gc.enable()


class TestCopies:
    def test_deepcopy(self, model: PreTrainedModel, stock: PreTrainedModel) -> None:
        twin = copy.deepcopy(model)
        expected = text(stock)
        unpatch(model)
        with watch(twin):
            assert torch.equal(text(twin), expected)
        assert torch.equal(text(model), expected)
        assert twin._prepare_cache_for_generation.model is twin

    def test_torch_save(self, model: PreTrainedModel, stock: PreTrainedModel) -> None:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        with watch(loaded):
            actual = text(loaded)
        assert torch.equal(actual, text(stock))

    def test_save_pretrained(
        self, model: PreTrainedModel, stock: PreTrainedModel, tmp_path: Path
    ) -> None:
        assert model.state_dict().keys() == stock.state_dict().keys()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == "sdpa"
        assert torch.equal(text(loaded), text(stock))


class TestWrappedProjection:
    """Adapters of PEFT on kv_b_proj. More kinds are in test_transformers_weights.py."""

    def with_lora(self, stock: PreTrainedModel, dropout: float = 0.0) -> Any:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], lora_dropout=dropout)
        model = peft.get_peft_model(copy.deepcopy(stock), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first
                nn.init.normal_(parameter, std=0.1)
        return model

    def test_lora(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = self.with_lora(stock).requires_grad_(False)
        expected, expected_text = logits(model, ids), text(model)
        report = patch(model)
        assert {layer.kv_b_proj for layer in report.layers} == {
            "dense copy: peft Linear over Linear"
        }
        with watch(model):
            assert_near(logits(model, ids), expected)
            assert torch.equal(text(model), expected_text)

    @pytest.mark.parametrize("trained", [False, True])
    def test_adapters_change(self, stock: PreTrainedModel, ids: Tensor, trained: bool) -> None:
        """New values, disabled and merged adapters: never a stale weight."""
        model = self.with_lora(stock).requires_grad_(trained)
        patch(model)

        def check() -> None:
            actual = logits(model, ids)
            unpatch(model)
            expected = logits(model, ids)
            patch(model)
            assert_near(actual, expected)

        check()
        for name, parameter in model.named_parameters():
            if "kv_b_proj.lora_B" in name:
                parameter.data.mul_(-2)
        check()
        with model.disable_adapter():
            check()
        check()
        model.merge_adapter()
        check()
        with model.disable_adapter():  # takes the merged ones out first
            check()

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_lora_training(self, stock: PreTrainedModel, ids: Tensor, dropout: float) -> None:
        model = self.with_lora(stock, dropout).train()
        gradients = TestTraining().gradients
        torch.manual_seed(5)
        expected = gradients(model, ids)
        patch(model)
        torch.manual_seed(5)
        actual = gradients(model, ids)
        assert any("kv_b_proj.lora_A" in name for name in expected)
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)


class TestRefusals:
    def test_continuous_batching(self, model: PreTrainedModel) -> None:
        layer = mla_layers(model)[0]
        query, key = torch.zeros(1, 4, 2, 64), torch.zeros(1, 1, 2, 64)
        for argument, error in (
            ("cache", NotImplementedError),
            ("position_bias", NotImplementedError),
            ("softcap", ValueError),
        ):
            with pytest.raises(error, match="not supported by torch_flash_mla"):
                mla_attention_forward(layer, query, key, key[..., :32], None, **{argument: 1.0})


class TestVersions:
    def test_an_old_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.__version__", "5.14.1")
        spec = importlib.util.spec_from_file_location("again", integration.__file__)
        assert spec is not None
        assert spec.loader is not None
        with pytest.raises(ImportError, match=r"needs transformers >= 5\.15, found 5\.14\.1"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))

    def test_sparse_layers_need_a_newer_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("torch_flash_mla.integrations.transformers.patch")
        monkeypatch.setattr(module, "SPARSE_LAYERS_CACHE_LATENTS", False)
        with pytest.raises(ValueError, match=r"sparse MLA needs transformers >= 5\.18, found 5"):
            patch(small_model("deepseek_v32"))
