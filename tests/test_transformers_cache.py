"""A layer and its cache know of each other: whose keys are read, in which format, and who says so
when they are not. The right value is that of the stock model.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load_program
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers_cases import TINY_MODEL, mla_layers, small_model, tiny_model
from transformers_compare import CACHE_ARGUMENT, assert_near, prompt, watch

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.integrations.transformers import (
    DecoderStep,
    MLACache,
    patch,
    patched,
    unpatch,
)
from torch_flash_mla.integrations.transformers.cache import cache_layer_of
from torch_flash_mla.integrations.transformers.fingerprint import difference, fingerprint

FAMILY = "deepseek_v3"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    """A model that tests do not change."""
    return small_model(FAMILY)


@pytest.fixture
def ids() -> Tensor:
    return prompt((10, 10))["input_ids"]


def call(model: Any, ids: Tensor, cache: Any = None, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(ids, **{CACHE_ARGUMENT: cache}, **arguments)


def cache_of(out: Any) -> Any:
    return getattr(out, CACHE_ARGUMENT)


def steps(model: Any, ids: Tensor, cache: Any = None, first: int = 6) -> Tensor:
    """Logits of a prompt and of the tokens after it, over one cache."""
    out = call(model, ids[:, :first], cache, use_cache=True)
    logits, cache = [out.logits], cache_of(out)
    for i in range(first, ids.shape[1]):
        logits.append(call(model, ids[:, i : i + 1], cache).logits)
    return torch.cat(logits, dim=1)


def text(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    mask = torch.ones_like(ids)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **arguments}
    return model.generate(ids, **arguments)


def _out_of_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("injected")


class TestCarriers:
    """What an MLACache hands out is NaN: somebody must read its pages instead."""

    def test_an_unpatched_model_is_told(self, stock: PreTrainedModel, ids: Tensor) -> None:
        with pytest.raises(RuntimeError, match=r"call torch_flash_mla.patch\(model\) first"):
            call(stock, ids, MLACache(stock.config))
        with pytest.raises(RuntimeError, match="needs a cache of transformers"):
            text(stock, ids, **{CACHE_ARGUMENT: MLACache(stock.config, "q8_kv")})

    def test_a_single_layer_is_told_by_the_next_step(self, ids: Tensor) -> None:
        model = small_model(FAMILY, num_hidden_layers=1)
        with pytest.raises(RuntimeError, match=r"call torch_flash_mla.patch\(model\) first"):
            text(model, ids, **{CACHE_ARGUMENT: MLACache(model.config)})

    def test_a_layer_that_was_unpatched(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        patch(model)
        unpatch(mla_layers(model)[0])
        with pytest.raises(RuntimeError, match="cannot read its pages"):
            call(model, ids, MLACache(model.config))

    def test_a_cache_is_fine_after_reset(self, stock: PreTrainedModel, ids: Tensor) -> None:
        cache = MLACache(stock.config)
        with pytest.raises(RuntimeError, match="reset"):
            call(stock, ids, cache)
        cache.reset()
        with patched(stock):
            actual = steps(stock, ids, cache)
        assert_near(actual, steps(stock, ids))

    def test_layers_that_share_keys(self, ids: Tensor) -> None:
        """One update, several readers."""
        model = small_model("mistral_large4")
        expected = steps(model, ids)
        patch(model)
        assert_near(steps(model, ids, MLACache(model.config)), expected)


class TestContents:
    """``keys`` and ``values`` of a layer are those that a cache of transformers would hold."""

    @pytest.mark.parametrize("fixed", [None, 64])
    def test_are_those_of_a_stock_model(
        self, stock: PreTrainedModel, ids: Tensor, fixed: int | None
    ) -> None:
        model = copy.deepcopy(stock)
        patch(model)
        expected, cache = DynamicCache(), MLACache(model.config, max_cache_len=fixed)
        assert all(layer.keys is None and layer.values is None for layer in cache.layers)
        for _ in range(2):
            steps(stock, ids, expected)
            steps(model, ids, cache)
            for ours, theirs in zip(cache.layers, expected.layers, strict=True):
                for actual, right in (ours.keys, theirs.keys), (ours.values, theirs.values):
                    assert_near(actual[:, :, :10], right)
                    assert actual.shape[2] == fixed or actual.shape == right.shape
                    assert not actual[:, :, 10:].any()
            expected, _ = DynamicCache(), cache.reset()
            assert all(layer.keys is None for layer in cache.layers)

    def test_of_a_packed_cache(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """The first layer's rows come from no attention: they differ by half a step of 8 bits."""
        model = copy.deepcopy(stock)
        patch(model)
        expected, cache = DynamicCache(), MLACache(model.config, "q8_kv")
        steps(stock, ids, expected)
        steps(model, ids, cache)
        ours, theirs = cache.layers[0], expected.layers[0]
        assert ours.keys.dtype == theirs.keys.dtype
        assert_near(ours.keys, theirs.keys, 0.5 / 127 * 1.001)
        assert_near(ours.values, theirs.values, 0.5 / 127 * 1.001)

    def test_of_a_cache_that_generate_made(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        patch(model)
        kwargs = {"return_dict_in_generate": True}
        expected, out = text(stock, ids, **kwargs), text(model, ids, **kwargs)
        assert isinstance(cache_of(out), MLACache)
        assert torch.equal(out.sequences, expected.sequences)
        pairs = zip(cache_of(out).layers, cache_of(expected).layers, strict=True)
        for ours, theirs in pairs:
            assert_near(ours.keys, theirs.keys)
            assert_near(ours.values, theirs.values)

    def test_a_cache_that_grows_is_a_dynamic_one(self, stock: PreTrainedModel) -> None:
        growing, fixed = MLACache(stock.config), MLACache(stock.config, max_cache_len=64)
        for cache, is_dynamic in (growing, True), (fixed, False):
            for copied in cache, copy.deepcopy(cache):
                assert isinstance(copied, MLACache)
                assert isinstance(copied, DynamicCache) == is_dynamic

    def test_follow_what_is_done_to_the_cache(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        patch(model)
        expected, cache = DynamicCache(), MLACache(model.config)
        for m, c in (stock, expected), (model, cache):
            steps(m, ids, c)
            c.reorder_cache(torch.tensor([1, 0]))
            c.crop(-3)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert_near(ours.keys, theirs.keys)
            assert_near(ours.values, theirs.values)

    def test_are_copies(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        patch(model)
        cache = MLACache(model.config)
        call(model, ids, cache)
        layer = cache.layers[0]
        before = layer.keys.clone()
        layer.keys.zero_()
        assert torch.equal(layer.keys, before)
        for name in ("keys", "values"):
            with pytest.raises(AttributeError, match=f"{name} of a layer of an MLACache is a copy"):
                setattr(layer, name, before)


class TestLeader:
    """The layer that comes first reserves room for a step."""

    @pytest.mark.parametrize("fixed", [None, 64])
    def test_a_model_without_its_first_layers(self, ids: Tensor, fixed: int | None) -> None:
        model = small_model(FAMILY, num_hidden_layers=4)
        model.model.layers = model.model.layers[2:]  # as a stage of a pipeline, or pruned
        expected = call(model, ids, use_cache=False).logits
        patch(model)
        cache = MLACache(model.config, max_cache_len=fixed)
        assert_near(steps(model, ids, cache), expected)
        cache.crop(-4)
        actual = call(model, ids[:, 6:], cache).logits
        assert_near(actual, expected[:, 6:])
        cache.reset()
        assert_near(steps(model, ids, cache), expected)
        assert_near(steps(model, ids), expected)  # the cache that a call makes

    def test_two_stages(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """The second one continues the step of the first, and cannot begin one."""
        model = copy.deepcopy(stock)
        patch(model)
        cache = MLACache(model.config)
        expected = steps(stock, ids)
        assert_near(steps(model, ids, cache), expected)
        latent, rope = torch.zeros(2, 1, 1, 64), torch.zeros(2, 1, 1, 32)
        with pytest.raises(RuntimeError, match=r"pool 1 .* got rows twice since pool 0"):
            cache.update(latent, rope, 1)

    def test_a_layer_that_failed_is_repeated(
        self, stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the layer that came first."""
        cache = MLACache(stock.config)
        latent, rope = torch.zeros(2, 1, 1, 64), torch.zeros(2, 1, 1, 32)

        def update(layer: int) -> None:
            carrier, _ = cache.update(latent, rope, layer)
            cache_layer_of(carrier).take()

        for _ in range(2):  # a first use, and a later one
            update(0)
            with monkeypatch.context() as context:
                context.setattr(ops, "concat_and_cache_mla", _out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    update(1)
            update(1)
        assert cache.get_seq_length() == 2

    def test_a_leader_that_is_compiled(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """And others that are not."""
        model = copy.deepcopy(stock)
        patch(model)
        expected = steps(stock, ids)
        torch.compiler.reset()
        model.model.layers[0].compile(backend="eager")
        assert_near(steps(model, ids, MLACache(model.config)), expected)

    def test_a_loaded_cache(self, ids: Tensor, tmp_path: Path) -> None:
        model = small_model(FAMILY, num_hidden_layers=3)
        model.model.layers = model.model.layers[1:]
        expected = call(model, ids, use_cache=False).logits
        patch(model)
        cache = MLACache(model.config)
        call(model, ids[:, :6], cache)
        cache.save(tmp_path / "cache", model)
        loaded = MLACache.load(tmp_path / "cache", model)
        assert_near(call(model, ids[:, 6:], loaded).logits, expected[:, 6:])


class TestDisabled:
    """TORCH_FLASH_MLA_DISABLE: stock models, and programs that make caches run on them."""

    @pytest.fixture(autouse=True)
    def _disable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_FLASH_MLA_DISABLE", "1")
        monkeypatch.setattr(
            torch_flash_mla.ops, "mla_attention_kv_b", lambda *_, **__: pytest.fail("was called")
        )

    @pytest.mark.parametrize("fixed", [None, 64])
    def test_a_cache_is_stock(self, stock: PreTrainedModel, ids: Tensor, fixed: int | None) -> None:
        model = copy.deepcopy(stock)
        assert not patch(model, "q8_kv").patched
        cache = MLACache(model.config, "q8_kv", max_cache_len=fixed)
        assert_near(steps(model, ids, cache), steps(stock, ids))
        assert cache.batch_size == 2
        assert cache.nbytes == cache.bytes_per_token == 0

    def test_many_answers_to_one_prompt(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """A cache that holds the whole prompt, forked, as in the README."""
        model = copy.deepcopy(stock)
        patch(model, "q8_kv")
        cache = MLACache(model.config, "q8_kv")
        call(model, ids[:1], cache)
        cache.fork(3)
        rows = ids[:1].repeat(3, 1)
        actual = text(model, rows, **{CACHE_ARGUMENT: cache})
        assert torch.equal(actual, text(stock, rows))

    def test_other_kinds_of_layers(self, ids: Tensor) -> None:
        model = small_model("kimi_linear")
        expected = text(model, ids)
        patch(model)
        cache = MLACache(model.config, "q8_kv")
        assert torch.equal(text(model, ids, **{CACHE_ARGUMENT: cache}), expected)

    def test_files_are_refused(
        self,
        stock: PreTrainedModel,
        ids: Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        cache = MLACache(stock.config)
        call(stock, ids, cache)
        with pytest.raises(ValueError, match="save of an MLACache: its layers are stock"):
            cache.save(tmp_path / "cache", stock)
        with pytest.raises(ValueError, match="TORCH_FLASH_MLA_DISABLE is set"):
            MLACache.load(tmp_path / "cache", stock)

    def test_selection_by_name_is_stock(self, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        stock = small_model("youtu")
        layer = next(type(m) for m in stock.modules() if hasattr(m, "expand_kv"))
        untaught = getattr(layer.expand_kv, "_stock", layer.expand_kv)  # as in a new process
        monkeypatch.setattr(layer, "expand_kv", untaught)
        named = copy.deepcopy(stock)
        named.set_attn_implementation("mla_cpu")
        assert torch.equal(steps(named, ids), steps(stock, ids))


class TestSelectionByName:
    @pytest.fixture
    def named(self, stock: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
        stock.save_pretrained(tmp_path)
        return AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mla_cpu")

    @pytest.fixture
    def op_calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How often attention ran on the operator: grows by one each time."""
        calls: list[int] = []
        op = torch_flash_mla.ops.mla_attention_kv_b

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return op(*args, **kwargs)

        monkeypatch.setattr(torch_flash_mla.ops, "mla_attention_kv_b", counted)
        return calls

    @pytest.mark.parametrize("family", [FAMILY, "hy_v4", "dots3_note", "kimi_linear"])
    def test_from_the_first_call_on(self, family: str, ids: Tensor, op_calls: list[int]) -> None:
        stock = small_model(family)
        named = copy.deepcopy(stock)
        named.set_attn_implementation("mla_cpu")
        for cache in (None, DynamicCache(config=named.config), MLACache(named.config)):
            before = len(op_calls)
            actual = call(named, ids, cache).logits
            assert len(op_calls) - before == len(mla_layers(named))
            assert_near(actual, call(stock, ids).logits)
        inputs = prompt((9, 4))
        arguments = {"max_new_tokens": 6, "do_sample": False}
        expected = stock.generate(**inputs, **arguments)
        assert torch.equal(named.generate(**inputs, **arguments), expected)

    def test_an_mla_cache_at_the_first_call(
        self, named: PreTrainedModel, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        keep = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()  # nobody makes a mask then
        out = call(named, ids[:, :6], MLACache(named.config), attention_mask=keep)
        assert_near(out.logits, call(stock, ids[:, :6]).logits)

    def test_a_class_that_nobody_has_seen(self, ids: Tensor, op_calls: list[int]) -> None:
        """Made by a program that has imported all it needs, with an ``expand_kv`` of its own."""
        stock = small_model(FAMILY)
        call(stock, ids, attention_mask=torch.ones_like(ids))
        cls = type(mla_layers(stock)[0])
        stock_expand_kv = getattr(cls.expand_kv, "_stock", cls.expand_kv)

        def expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> Any:
            key, value = stock_expand_kv(self, kv_nope, k_rot)
            return key, 2 * value

        own = type("OwnAttention", (cls,), {"expand_kv": expand_kv})
        for layer in mla_layers(stock):
            layer.__class__ = own
        named = copy.deepcopy(stock)
        named.set_attn_implementation("mla_cpu")
        for layer in mla_layers(named):  # as its expand_kv does it
            layer.kv_b_proj.weight.data.view(4, 80, 64)[:, 32:] *= 2
        assert_near(steps(named, ids, MLACache(named.config)), steps(stock, ids))
        assert op_calls

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(
        self, named: PreTrainedModel, stock: PreTrainedModel, ids: Tensor, reentrant: bool
    ) -> None:
        expected = gradients(copy.deepcopy(stock).train(), ids)
        named.train()
        named.gradient_checkpointing_enable({"use_reentrant": reentrant})
        actual = gradients(named, ids)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)

    def test_threads(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """First calls at the same time."""
        expected = call(stock, ids).logits
        for _ in range(5):
            named = copy.deepcopy(stock)
            named.set_attn_implementation("mla_cpu")
            results: list[Any] = [None] * 4
            start = threading.Barrier(4)

            def work(
                place: int, named: Any = named, results: Any = results, start: Any = start
            ) -> None:
                start.wait()
                results[place] = call(named, ids).logits

            threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for result in results:
                assert_near(result, expected)

    def test_it_goes_back(
        self, named: PreTrainedModel, stock: PreTrainedModel, ids: Tensor, op_calls: list[int]
    ) -> None:
        expected = call(stock, ids).logits
        for name in ("mla_cpu", "sdpa", "mla_cpu", "eager", "mla_cpu"):
            named.set_attn_implementation(name)
            before = len(op_calls)
            assert_near(call(named, ids).logits, expected)
            assert (len(op_calls) > before) is (name == "mla_cpu")
        named.config._attn_implementation = "sdpa"
        with pytest.raises(RuntimeError, match="cannot read its pages"):
            call(named, ids, MLACache(named.config))

    def test_patch_and_unpatch_of_a_named_model(
        self, named: PreTrainedModel, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        expected = steps(stock, ids)
        patch(named)
        assert_near(steps(named, ids), expected)
        unpatch(named)
        assert_near(steps(named, ids), expected)

    def test_compiled_before_anything_else(
        self, named: PreTrainedModel, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(named, backend=backend, fullgraph=True)
        assert_near(call(compiled, ids, use_cache=False).logits, call(stock, ids).logits)
        assert "mla_attention_kv_b" in graphs[0].code
        torch._dynamo.reset()


def gradients(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestFormat:
    """patch(model, format): every call that makes a cache of its own makes one of that format."""

    @pytest.fixture
    def model(self, stock: PreTrainedModel) -> PreTrainedModel:
        model = copy.deepcopy(stock)
        patch(model, "q8_kv")
        return model

    @pytest.mark.parametrize("family", [FAMILY, "dots3_note", "kimi_linear", "minicpm3"])
    def test_a_loop_by_hand(self, family: str, ids: Tensor) -> None:
        model = small_model(family)
        patch(model, "q4_kv" if family == FAMILY else "auto")
        kv_cache_dtype = "q4_kv" if family == FAMILY else "auto"
        expected = steps(model, ids, MLACache(model.config, kv_cache_dtype))
        with watch(model):
            actual = steps(model, ids)
        assert torch.equal(actual, expected)
        out = call(model, ids)
        assert isinstance(cache_of(out), MLACache)
        assert cache_of(out).pages.kv_cache_dtype == kv_cache_dtype
        assert cache_of(out).get_seq_length() == 10

    def test_who_asks_for_none_gets_none(
        self, model: PreTrainedModel, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        assert cache_of(call(model, ids, use_cache=False)) is None
        assert_near(call(model, ids, use_cache=False).logits, call(stock, ids).logits)
        own = DynamicCache(config=model.config)
        assert cache_of(call(model, ids, own)) is own
        model.config.use_cache = False
        assert cache_of(call(model, ids)) is None
        assert isinstance(cache_of(call(model, ids, use_cache=True)), MLACache)

    def test_arguments_by_position(self, model: PreTrainedModel, ids: Tensor) -> None:
        inner = model.model
        mask = torch.ones_like(ids)
        own = DynamicCache(config=model.config)
        with torch.no_grad():
            assert cache_of(inner(ids, mask, None, own)) is own
            assert isinstance(cache_of(inner(ids, mask, None, None)), MLACache)

    def test_a_multimodal_model(self, ids: Tensor) -> None:
        model = small_model("hy_v4_vl")
        expected = steps(model, ids)
        patch(model)
        assert_near(steps(model, ids), expected)
        assert isinstance(cache_of(call(model, ids)), MLACache)

    @pytest.mark.skipif(
        not (TINY_MODEL / "model.safetensors").exists(), reason="examples/tiny_model has no weights"
    )
    def test_perplexity_shows_what_a_format_costs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of whole windows through ``model(x)``, as evaluation harnesses do it: what quality.py
        measures with caches of its own, in chunks."""
        monkeypatch.syspath_prepend(str(TINY_MODEL))
        quality = load_program("examples/tiny_model/quality.py")
        model = tiny_model()
        windows = quality.held_out_windows(2)

        def by_quality(new_cache: Callable[[], Any]) -> Any:
            losses, _ = quality.window_losses(model, windows, new_cache, chunk=128, batch=2)
            return losses / (quality.CONTEXT - 1)

        def by_call(**arguments: Any) -> Any:
            with torch.no_grad():
                calls = [model(x[None], labels=x[None], **arguments) for x in windows]
            return torch.tensor([float(out.loss) for out in calls], dtype=torch.float64).numpy()

        stock = by_quality(lambda: DynamicCache(config=model.config))
        patch(model, "q4_kv")
        expected = by_quality(lambda: MLACache(model.config, "q4_kv"))
        cost = abs(expected - stock).min()
        assert cost > 1e-4
        assert abs(by_call() - expected).max() < cost / 10
        assert abs(by_call(use_cache=False) - stock).max() < cost / 10

    def test_training_gets_gradients(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """use_cache is on by default: a cache of pages would end the gradient."""
        model = copy.deepcopy(stock).train()
        expected = gradients(model, ids)
        patch(model, "q8_kv")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = gradients(model, ids)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)

    def test_gradients_of_embeddings(self, stock: PreTrainedModel, ids: Tensor) -> None:
        """Of a frozen model, as in prompt tuning."""
        model = copy.deepcopy(stock).requires_grad_(False)

        def gradient() -> Tensor:
            embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
            model(inputs_embeds=embeddings, labels=ids).loss.backward()
            assert embeddings.grad is not None
            return embeddings.grad

        expected = gradient()
        patch(model)
        assert_near(gradient(), expected, 1e-3)

    def test_a_forgotten_no_grad_is_told_once(self, model: PreTrainedModel, ids: Tensor) -> None:
        with pytest.warns(UserWarning, match=r"keeps no 'q8_kv' pages .* torch.no_grad\(\)"):
            out = model(ids)
        assert isinstance(cache_of(out), DynamicCache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids)

    def test_another_cache_in_the_generation_config_is_told_once(
        self, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        model = copy.deepcopy(stock)
        model.generation_config.cache_implementation = "static"
        report = patch(model, "q8_kv")
        assert "generate() keeps a 'static' cache" in str(report)
        with pytest.warns(UserWarning, match="'static' cache .* not the 'q8_kv' pages"):
            text(model, ids)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*pages.*")
            text(model, ids)
            patch(model, "auto")  # nothing is lost then
            text(model, ids)

    def test_patched_and_unpatch(self, model: PreTrainedModel, ids: Tensor) -> None:
        def kind() -> str:
            made = text(model, ids, return_dict_in_generate=True)
            formats = {
                cache.pages.kv_cache_dtype if isinstance(cache, MLACache) else "stock"
                for cache in (cache_of(made), cache_of(call(model, ids)))
            }
            (found,) = formats
            return found

        assert kind() == "q8_kv"
        with patched(model, "q4_kv"):
            assert kind() == "q4_kv"
        assert kind() == "q8_kv"
        patch(model)
        assert kind() == "auto"
        unpatch(model)
        assert kind() == "stock"
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
    def test_copies_keep_it(self, model: PreTrainedModel, ids: Tensor, kind: str) -> None:
        if kind == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        unpatch(model)
        assert cache_of(call(twin, ids)).pages.kv_cache_dtype == "q8_kv"
        assert isinstance(cache_of(call(model, ids)), DynamicCache)

    def test_in_a_graph_a_call_makes_its_own(
        self, model: PreTrainedModel, stock: PreTrainedModel, ids: Tensor
    ) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_near(call(compiled, ids).logits, call(stock, ids).logits)
        torch._dynamo.reset()


class TestReport:
    def test_which_calls_run_stock(self) -> None:
        report = patch(small_model(FAMILY, attention_dropout=0.3))
        assert "calls that return attention weights" in report.stock_calls
        assert "training with attention_dropout=0.3" in report.stock_calls
        assert str(report).splitlines()[-1].startswith("stock all the same: ")
        assert not any("dropout" in x for x in patch(small_model(FAMILY)).stock_calls)

    def test_guessing_layers(self) -> None:
        model = small_model(FAMILY)
        for layers in (1, 0):
            model.config.num_mtp_layers = layers
            assert any("use_mtp" in x for x in patch(model).stock_calls) is bool(layers)

    def test_refusals_say_what_to_do(self, stock: PreTrainedModel) -> None:
        class RemoteAttention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.kv_b_proj = nn.Linear(4, 4)

        with pytest.raises(ValueError, match="load the model without trust_remote_code"):
            patch(RemoteAttention())
        with pytest.raises(ValueError, match=r"load with dtype=torch\.float32"):
            patch(copy.deepcopy(stock).double())


class TestDefaultDevice:
    """The model is on the CPU, new tensors of the program are not."""

    @pytest.mark.parametrize("fixed", [None, 64])
    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
    def test_caches(
        self, stock: PreTrainedModel, ids: Tensor, fixed: int | None, kv_cache_dtype: str
    ) -> None:
        model = copy.deepcopy(stock)
        patch(model, kv_cache_dtype)

        def run() -> Tensor:
            cache = MLACache(
                model.config, kv_cache_dtype, max_cache_len=fixed, max_batch=4, block_size=4
            )
            logits = steps(model, ids, cache)
            cache.crop(-3)
            cache.fork(2)
            more = call(model, ids[:, 7:].repeat_interleave(2, 0), cache).logits
            return torch.cat([logits, more[::2], more[1::2]], dim=1)

        expected = run()
        with torch.device("meta"):
            actual = run()
        assert torch.equal(actual, expected)

    def test_ways_to_read_kv_b(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        for layer in mla_layers(model):
            layer.kv_b_proj.register_forward_hook(lambda module, args, out: out + 0.25)
        expected = steps(model, ids)
        with torch.device("meta"):
            patch(model)
            assert_near(steps(model, ids, MLACache(model.config)), expected)

    def test_training(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock).train()
        expected = gradients(model, ids, use_cache=False)
        patch(model)
        with torch.device("meta"):
            actual = gradients(model, ids, use_cache=False)
        for name, gradient in expected.items():
            assert_near(actual[name], gradient, 1e-3)

    def test_decoder_step(self, stock: PreTrainedModel, ids: Tensor) -> None:
        model = copy.deepcopy(stock)
        expected = call(model, ids).logits[:, -1:]
        patch(model)
        with torch.device("meta"), torch.no_grad():
            step = DecoderStep(model)
            _, *pages = step.example_inputs(batch=2, new_tokens=ids.shape[1])
            assert_near(step(ids, *pages), expected)


class TestFingerprint:
    def test_buffers_count(self, stock: PreTrainedModel) -> None:
        """Weights of GPTQ and the biases of routers are buffers."""
        model = copy.deepcopy(stock)
        before = fingerprint(model)
        name, buffer = next(
            (name, buffer)
            for name, buffer in model.named_buffers()
            if name.endswith("e_score_correction_bias")
        )
        buffer[0] += 1
        assert "other weights" in (difference(before, fingerprint(model)) or "")
        buffer[0] -= 1
        assert difference(before, fingerprint(model)) is None
        assert name in model.state_dict()

    def test_what_follows_from_the_config_does_not(self, stock: PreTrainedModel) -> None:
        """Rotary frequencies change while a model runs."""
        model = copy.deepcopy(stock)
        before = fingerprint(model)
        model.model.rotary_emb.inv_freq.mul_(2)
        assert difference(before, fingerprint(model)) is None
