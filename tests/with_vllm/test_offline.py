"""vLLM's offline engine over this package's operators, beside transformers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from engines import (
    LAYERS,
    Calls,
    Greedy,
    compare_greedy,
    counted,
    engine,
    generate,
    held_out_prompts,
    held_out_tokens,
    metric,
    reference_logprobs,
    tokens_of,
    transformers_model,
)
from programs import run
from vllm import LLM, RequestOutput, SamplingParams

from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

# 1 to 1500 tokens, around the edges of blocks and of vLLM's steps.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 511, 512, 513, 1000, 1024, 1500]
LENGTHS += [3 + 97 * i for i in range(32 - len(LENGTHS))]

# Largest change of perplexity against bfloat16 rows: examples/tiny_model/quality.py, whose table
# docs/choosing_a_format.md shows.
PERPLEXITY_LIMITS = {"q8_kv": 0.0005, "q8_0": 0.0005, "q6_0": 0.003, "q4_kv": 0.003}

NEEDS_AMX = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="vLLM has AMX_MLA on CPUs with AMX alone"
)


def test_greedy_tokens_equal_transformers(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]
) -> None:
    prompts = held_out_prompts(LENGTHS)
    with engine(max_num_batched_tokens=512) as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, prompts)
    found = compare_greedy(transformers_model(torch.float32), outputs)
    measured(
        f"float32: {found.differ} of {found.tokens} greedy tokens of {len(prompts)} prompts differ "
        f"from transformers, whose second choice is {found.margin:.1e} behind or more; "
        f"{calls.attention} calls for {calls.layers} layers and steps, {calls.mixed} of them mixed"
    )
    assert found.tokens == 64 * len(prompts)
    assert found.differ == 0
    assert_all_here(calls, outputs)
    assert calls.mixed > 0, "no call held prompts and single tokens together"
    assert calls.formats == {"auto"}


def assert_all_here(calls: Calls, outputs: Sequence[RequestOutput]) -> None:
    """Every layer and every step ran here, once for each token: the last one is never computed."""
    tokens = sum(
        len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in outputs
    )
    assert calls.attention == calls.layers > 0
    assert calls.queries == calls.appended == LAYERS * tokens


@pytest.mark.parametrize(
    ("backend", "step", "kernel"),
    [
        ("CPU_MLA", 0, "_ragged_sdpa"),
        ("CPU_MLA", 1, "mla_decode_kvcache_cpu"),
        pytest.param("AMX_MLA", 0, "forward_mha", marks=NEEDS_AMX),
        pytest.param("AMX_MLA", 1, "forward_mqa", marks=NEEDS_AMX),
    ],
)
def test_kernels_of_vllm_are_seen(
    monkeypatch: pytest.MonkeyPatch, backend: str, step: int, kernel: str
) -> None:
    """What :func:`counted` proves elsewhere: it fails in the first step that vLLM computes."""
    with engine(attention_backend=backend, dtype="bfloat16") as llm:
        prompt = {"prompt_token_ids": held_out_prompts([20])[0]}
        llm.llm_engine.add_request("0", prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        for _ in range(step):
            llm.llm_engine.step()
        with (
            counted(monkeypatch) as calls,
            pytest.raises(AssertionError, match=f"{kernel} of vLLM was called"),
        ):
            llm.llm_engine.step()
        assert calls.attention == 0


def test_bfloat16_is_as_exact_as_transformers(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]
) -> None:
    prompts = held_out_prompts(LENGTHS)
    with engine(dtype="bfloat16") as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, prompts, logprobs=0)
    assert_all_here(calls, outputs)
    ours, theirs, greedy = [], [], Greedy()
    for output in outputs:
        answer = list(output.outputs[0].token_ids)
        index = torch.tensor(answer)[:, None]
        exact, stock = (
            reference_logprobs(transformers_model(dtype), output.prompt_token_ids, answer)
            for dtype in (torch.float32, torch.bfloat16)
        )
        found = output.outputs[0].logprobs
        here = torch.tensor([at[token].logprob for at, token in zip(found, answer, strict=True)])
        ours.append(here - exact.gather(1, index)[:, 0])
        theirs.append((stock - exact).gather(1, index)[:, 0])
        greedy.add(stock, answer)
    error, noise = (torch.cat(parts).square().mean().sqrt().item() for parts in (ours, theirs))
    measured(
        f"bfloat16: {greedy.differ} of {greedy.tokens} greedy tokens of {len(prompts)} prompts "
        f"differ from transformers; RMS error of log-probabilities {error:.4f}, of transformers in "
        f"bfloat16 {noise:.4f}"
    )
    assert error <= 1.25 * noise
    assert greedy.differ <= greedy.tokens // 50


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    """Mean loss over held-out tokens by cache format, by vLLM's own ``prompt_logprobs``."""
    tokens, window, found = held_out_tokens(), 1024, {}
    windows = [tokens[start : start + window] for start in range(0, 24 * window, window)]
    for name in ("auto", *PACKED_FORMATS):
        # Steps of 256 tokens: most keys were written in an earlier step.
        with (
            pytest.MonkeyPatch.context() as patches,
            engine(name, dtype="bfloat16", max_num_batched_tokens=256) as llm,
            counted(patches) as calls,
        ):
            outputs = generate(llm, windows, max_tokens=1, prompt_logprobs=0)
        assert_all_here(calls, outputs)
        assert calls.formats == {name}
        total = 0.0
        for output in outputs:
            pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            total -= sum(at[token].logprob for token, at in pairs)
        found[name] = total / (len(windows) * (window - 1))
    return found


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_perplexity_of_packed_caches(
    losses: dict[str, float], measured: Callable[[str], None], name: str
) -> None:
    change = torch.tensor(losses[name] - losses["auto"]).exp().item() - 1
    measured(f"{name}: perplexity {100 * change:+.3f} % against bfloat16 rows")
    assert abs(change) <= PERPLEXITY_LIMITS[name]


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_packed_pages(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """vLLM's own page size is that of the format, so a GiB holds more tokens."""
    row = row_bytes(name, 512, 64)
    with engine(name, dtype="bfloat16") as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, held_out_prompts([300, 1]), max_tokens=4)
        assert_all_here(calls, outputs)
        assert calls.formats == {name}
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks == 2**30 // (LAYERS * 128 * row)


def test_prefix_caching(monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    shared, first, second = held_out_prompts([1000, 30, 40])
    with engine(block_size=16, enable_prefix_caching=False) as llm:
        expected = tokens_of(generate(llm, [shared + first, shared + second]))
    with engine(block_size=16) as llm:
        cold = generate(llm, [shared + first])
        with counted(monkeypatch) as calls:
            warm = generate(llm, [shared + second])
        hits = metric(llm, "vllm:prefix_cache_hits")
        measured(
            f"prefix caching: vLLM counts {hits:.0f} hits of {len(shared + second)} tokens; "
            f"{calls.appended // LAYERS - 63} of the prompt were computed"
        )
        assert hits == 1000 // 16 * 16
        assert calls.queries == calls.appended == LAYERS * (1000 % 16 + 40 + 63)
        assert metric(llm, "vllm:prompt_tokens") == 2000 + 30 + 40
    assert cold[0].num_cached_tokens == 0
    assert warm[0].num_cached_tokens == 1000 // 16 * 16
    assert tokens_of(cold) + tokens_of(warm) == expected


def test_chunked_prefill(monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    prompts = held_out_prompts([1500, 1, 700, 129])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts))
    chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(**chunks) as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, prompts)
    measured(
        f"prompts in pieces of 64: {calls.layers // LAYERS} steps, the longest of {calls.longest}"
    )
    assert tokens_of(outputs) == expected
    assert_all_here(calls, outputs)
    assert calls.longest <= 64


def test_preemption(monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    """A cache that holds fewer sequences than run: some are thrown out and computed again."""
    prompts = held_out_prompts([200, 210, 220, 230, 240, 250])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts, max_tokens=200))
    small = {"block_size": 16, "num_gpu_blocks_override": 70, "enable_prefix_caching": False}
    with engine(max_model_len=1024, **small) as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, prompts, max_tokens=200)
        preemptions = metric(llm, "vllm:num_preemptions")
    least = sum(map(len, prompts)) + 199 * len(prompts)
    measured(
        f"preemption: {preemptions:.0f} times, {calls.appended // LAYERS - least} tokens computed "
        "again"
    )
    assert tokens_of(outputs) == expected
    assert preemptions > 0
    assert calls.attention == calls.layers
    assert calls.queries == calls.appended > LAYERS * least


def _samples(llm: LLM) -> list[list[list[int]]]:
    return tokens_of(generate(llm, held_out_prompts([333, 50]), n=8, seed=7, temperature=0.8))


def test_many_samples_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples share the prompt's pages, and are the same however the work is cut."""
    with engine() as llm:
        expected = _samples(llm)
    assert len({tuple(sample) for sample in expected[0]}) > 4
    cut = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with engine(**cut) as llm, counted(monkeypatch) as calls:
        assert _samples(llm) == expected
        assert calls.attention == calls.layers > 0


def test_speculation(monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    """Tokens guessed from the prompt: several queries per sequence, of different number."""
    prompts = held_out_prompts([600, 90, 17])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts, max_tokens=128))
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    guess["prompt_lookup_min"] = 1
    with engine(speculative_config=guess) as llm, counted(monkeypatch) as calls:
        assert tokens_of(generate(llm, prompts, max_tokens=128)) == expected
        drafted, accepted = (
            metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")
        )
        measured(f"speculation: {accepted:.0f} of {drafted:.0f} guessed tokens were right")
        assert accepted > 0
        assert calls.mixed > 0
        assert calls.attention == calls.layers


def test_example(measured: Callable[[str], None]) -> None:
    """``examples/vllm_offline.py`` answers, from a beginning that is computed once."""
    output = run(sys.executable, "-W", "ignore", "examples/vllm_offline.py")
    prompts = re.findall(r"--- (\d+) tokens, (\d+) of them from the cache", output)
    assert len(prompts) == 4
    for length, cached in prompts:
        assert 0 < int(cached) < int(length)
        assert int(cached) % 128 == 0
    last = re.search(r"--- \d+ tokens for 4 prompts in [0-9.]+ s", output)
    assert last is not None
    measured(f"examples/vllm_offline.py: {prompts[0][1]} of {prompts[0][0]} cached; {last[0]}")
