"""torch.compile: one graph for every step, the numbers of eager mode, also when training.

Adds about 2 minutes to `make test SLOW=1` on two cores, and half a minute to the fast tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_step import append_and_attend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import Cache, PreTrainedModel, StaticCache
from transformers_cases import TINY_MODEL, families, shared_key_families, small_model, tiny_model
from transformers_compare import prompt

from torch_flash_mla import ops
from torch_flash_mla.formats import row_bytes
from torch_flash_mla.integrations.transformers import MLACache, patch
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

FAMILY = "deepseek_v3"
# The others are marked slow.
FAST_FAMILIES = (FAMILY, "hy_v4", "minicpm3")
# What stock models do: routing to experts that reads its data; a sliding window that fills up.
STOCK_BREAKS = {"longcat_flash": "data-dependent expression"}
STOCK_GRAPHS = {"dots3_note": 2}
CACHES: dict[str, Callable[[PreTrainedModel, int], Cache]] = {
    "MLACache": lambda model, width: MLACache(model.config, max_cache_len=width),
    "MLACache q8_kv": lambda model, width: MLACache(model.config, "q8_kv", max_cache_len=width),
    "StaticCache": lambda model, width: StaticCache(model.config, width),
}


@pytest.fixture(autouse=True)
def _fresh(_reproducible: None) -> None:
    """Nothing compiled before; one thread, as models this small would only wait for others."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def model_of(family: str) -> PreTrainedModel:
    model = small_model(family)
    patch(model)
    return model


# The operators: append and attention in one graph, any sizes


LATENT, ROPE, NOPE, VALUE, HEADS, BLOCK_SIZE = 64, 32, 16, 24, 3, 8


def sized_arguments(
    batch: int, new_tokens: int, blocks: int, kv_cache_dtype: str
) -> tuple[Any, ...]:
    """Arguments of ``append_and_attend``: sequences that fill ``blocks`` blocks but for a token."""
    length = blocks * BLOCK_SIZE - 1
    if kv_cache_dtype == "auto":
        kv_cache = torch.randn(batch * blocks + 1, BLOCK_SIZE, LATENT + ROPE)
    else:
        width = row_bytes(kv_cache_dtype, LATENT, ROPE)
        kv_cache = torch.empty(batch * blocks + 1, BLOCK_SIZE, width, dtype=torch.uint8)
    table = torch.randperm(batch * blocks).view(batch, blocks)
    positions = torch.arange(length)
    slots = table[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    history = (torch.randn(batch, length, LATENT), torch.randn(batch, length, ROPE))
    ops.concat_and_cache_mla(*history, kv_cache, slots, kv_cache_dtype)
    return (
        torch.randn(batch, new_tokens, LATENT),
        torch.randn(batch, new_tokens, ROPE),
        slots[:, -new_tokens:].contiguous(),
        torch.randn(batch, new_tokens, HEADS, NOPE + ROPE),
        torch.randn(HEADS, NOPE + VALUE, LATENT) / 8,
        kv_cache,
        table.int(),
        torch.full((batch,), length, dtype=torch.int32),
        kv_cache_dtype,
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
def test_sizes_are_dynamic(kv_cache_dtype: str, backend: str) -> None:
    """Batch, new tokens and length of the cache vary within one graph; one token is another."""
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(append_and_attend, fullgraph=True, dynamic=True, backend=graphs)
    # The first sizes differ from each other and from all dims: torch takes equal ones for the same.
    sizes = [(2, 11, 4), (3, 2, 3), (5, 7, 2), (4, 5, 6), (2, 11, 2)]
    for count, variants in ((1, sizes), (2, [(b, 1, n) for b, _, n in sizes])):
        for size in variants:
            arguments = sized_arguments(*size, kv_cache_dtype)
            before = arguments[5].clone()
            expected = append_and_attend(*arguments)
            written = arguments[5].clone()
            assert not torch.equal(before, written)
            arguments[5].copy_(before)
            torch.testing.assert_close(compiled(*arguments), expected)
            assert torch.equal(arguments[5], written)
        assert graphs.frame_count == count


def test_two_writes_and_a_view_between() -> None:
    """Functionalisation keeps the order of writes through views of one pool."""

    def function(pools: Tensor, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        kv_c, k_pe = rows.split([LATENT, ROPE], dim=-1)
        ops.concat_and_cache_mla(kv_c, k_pe, pools[0], slots)
        between = pools[0, 1] * 2  # the first write, and not the second
        ops.concat_and_cache_mla(-kv_c, k_pe, pools[0], slots)
        ops.copy_blocks(pools[0], torch.tensor([[1, 2]]))
        pools[1].copy_(pools[0])
        return between, pools.sum(dim=-1)

    rows, slots = torch.randn(5, LATENT + ROPE), torch.tensor([8, 9, -1, 3, 11])
    eager = torch.randn(2, 4, BLOCK_SIZE, LATENT + ROPE)
    traced = eager.clone()
    expected = function(eager, rows, slots)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(traced, rows, slots)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(traced, eager)
    assert torch.equal(expected[0][0], 2 * rows[0])


# Models: decoding


def decode(
    model: PreTrainedModel, step: Callable[..., Any], cache: Cache, tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy decoding by hand, the prompt through ``model``, each token through ``step``: the
    tokens, and their logits."""
    with torch.no_grad():
        ids = prompt((9,), model.config.get_text_config().vocab_size)["input_ids"]
        past = {CACHE_ARGUMENT: cache}
        out = [model(ids, **past).logits[:, -1:]]
        for _ in range(tokens):
            ids = out[-1].argmax(-1)
            out.append(step(input_ids=ids, **past).logits[:, -1:])
    logits = torch.cat(out, dim=1)
    return logits.argmax(-1), logits


def check_decoding(
    model: PreTrainedModel, backend: Any, cache: str = "MLACache", steps: int = 80, graphs: int = 1
) -> None:
    """Compiled steps give the tokens of eager ones; the first step compiles, no other does."""
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    width = 64 * (steps // 64 + 2)
    new_cache = CACHES[cache]
    expected, expected_logits = decode(model, model, new_cache(model, width), steps)
    actual, logits = decode(model, compiled, new_cache(model, width), steps)
    assert torch.equal(actual, expected)
    tolerance = 5e-4 if cache != "MLACache q8_kv" else 5e-2  # a code may round the other way
    assert (logits - expected_logits).abs().max() <= tolerance * expected_logits.abs().max()
    assert backend.frame_count == graphs
    # A second cache of the same shape uses the same graphs.
    decode(model, compiled, new_cache(model, width), 3)
    assert backend.frame_count == graphs


@pytest.mark.parametrize("cache", list(CACHES))
def test_one_graph(cache: str) -> None:
    check_decoding(model_of(FAMILY), CompileCounter(), cache)


@pytest.mark.parametrize("cache", ["MLACache", "StaticCache"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in FAST_FAMILIES else pytest.mark.slow)
        for family in families()
        if family not in (FAMILY, *shared_key_families())  # no cache of fixed size holds theirs
    ],
)
def test_one_graph_of_other_families(family: str, cache: str) -> None:
    model = small_model(family)
    if family in STOCK_BREAKS:
        with pytest.raises(torch._dynamo.exc.UserError, match=STOCK_BREAKS[family]):
            check_decoding(model, CompileCounter(), "StaticCache", 2)
        pytest.skip("the stock model is not one graph")
    patch(model)
    check_decoding(model, CompileCounter(), cache, 20, STOCK_GRAPHS.get(family, 1))


@pytest.mark.slow
@pytest.mark.skipif(
    not (TINY_MODEL / "model.safetensors").exists(), reason="examples/tiny_model has no weights"
)
@pytest.mark.parametrize("cache", ["MLACache", "StaticCache"])
def test_the_trained_model_with_inductor(cache: str) -> None:
    """200 steps; benchmarks/decode_step.py times the same."""
    model = tiny_model()
    patch(model)
    check_decoding(model, CompileCounterWithBackend("inductor"), cache, 200)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
def test_pages_after_compiled_steps(kv_cache_dtype: str) -> None:
    """What compiled steps leave in the pages is what eager ones leave."""
    model = model_of(FAMILY)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    caches = [MLACache(model.config, kv_cache_dtype, max_cache_len=64) for _ in range(2)]
    for step, cache in zip((model, compiled), caches, strict=True):
        decode(model, step, cache, 4)
    eager, traced = (cache.pages.paged for cache in caches)
    assert traced.cache_seqlens.tolist() == eager.cache_seqlens.tolist() == [13]
    for layer in range(2):
        torch.testing.assert_close(
            traced.kv_cache(layer)[0, :13], eager.kv_cache(layer)[0, :13], rtol=1e-4, atol=1e-4
        )


# Models: training


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_lora_training_step(backend: str) -> None:
    """Adapters on the query and the latent's up-projection: losses and weights over three steps."""
    peft = pytest.importorskip("peft")
    targets = ["q_a_proj", "q_b_proj", "kv_b_proj"]
    eager = peft.get_peft_model(
        small_model("minicpm3"), peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)
    ).train()
    for name, parameter in eager.named_parameters():
        if "lora_B" in name:  # zero at first
            nn.init.normal_(parameter, std=0.1)
    patch(eager)
    traced = copy.deepcopy(eager)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(traced, backend=graphs, fullgraph=True)
    adapters = [name for name, p in eager.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapters} == set(targets)

    ids = prompt((12, 12))["input_ids"]
    losses = []
    for model, call in ((eager, eager), (traced, compiled)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        start = {name: model.get_parameter(name).detach().clone() for name in adapters}
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert all(not torch.equal(start[name], model.get_parameter(name)) for name in adapters)
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name in adapters:
        actual, expected = traced.get_parameter(name), eager.get_parameter(name)
        assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max(), name
    assert graphs.frame_count == 1
