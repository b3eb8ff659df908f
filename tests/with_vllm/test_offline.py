"""vLLM's offline engine over this package's operators, beside transformers."""

from __future__ import annotations

import pytest
import torch
from engines import (
    LAYERS,
    counted,
    engine,
    generate,
    held_out_prompts,
    held_out_tokens,
    metric,
    not_greedy,
    reference_logprobs,
    tokens_of,
    transformers_model,
)
from vllm import LLM

from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

# 1 to 1500 tokens, around the edges of blocks and of vLLM's steps.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 511, 512, 513, 1000, 1024, 1500]
LENGTHS += [3 + 97 * i for i in range(32 - len(LENGTHS))]

# Largest change of perplexity against bfloat16 rows: examples/tiny_model/quality.py, whose table
# docs/choosing_a_format.md shows.
PERPLEXITY_LIMITS = {"q8_kv": 0.0005, "q8_0": 0.0005, "q6_0": 0.003, "q4_kv": 0.003}


def test_greedy_tokens_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = held_out_prompts(LENGTHS)
    with engine(max_num_batched_tokens=512) as llm, counted(monkeypatch) as calls:
        outputs = generate(llm, prompts)
    assert not_greedy(transformers_model(torch.float32), outputs, tie=1e-4) == 0

    # Every layer and every step ran here, once for each token: the last one is never computed.
    assert calls.attention == calls.layers > 0
    assert calls.queries == calls.appended == LAYERS * (sum(LENGTHS) + 63 * len(prompts))
    assert calls.mixed > 0, "no call held prompts and single tokens together"
    assert calls.formats == {"auto"}


def test_bfloat16_is_as_exact_as_transformers() -> None:
    prompts = held_out_prompts(LENGTHS[::2])
    with engine(dtype="bfloat16") as llm:
        outputs = generate(llm, prompts, logprobs=0)
    ours, theirs, differ = [], [], 0
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
        differ += int((stock.argmax(1) != index[:, 0]).sum())
    error, noise = (torch.cat(parts).square().mean().sqrt().item() for parts in (ours, theirs))
    tokens = 64 * len(prompts)
    print(
        f"bfloat16: {differ} of {tokens} greedy tokens differ from transformers; RMS error of "
        f"log-probabilities {error:.4f}, of transformers in bfloat16 {noise:.4f}"
    )
    assert error <= 1.25 * noise
    assert differ <= tokens // 50


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    """Mean loss over held-out tokens by cache format, by vLLM's own ``prompt_logprobs``."""
    tokens, window, found = held_out_tokens(), 1024, {}
    windows = [tokens[start : start + window] for start in range(0, 24 * window, window)]
    for name in ("auto", *PACKED_FORMATS):
        # Steps of 256 tokens: most keys were written in an earlier step.
        with engine(name, dtype="bfloat16", max_num_batched_tokens=256) as llm:
            outputs = generate(llm, windows, max_tokens=1, prompt_logprobs=0)
        total = 0.0
        for output in outputs:
            pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            total -= sum(at[token].logprob for token, at in pairs)
        found[name] = total / (len(windows) * (window - 1))
    return found


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_perplexity_of_packed_caches(losses: dict[str, float], name: str) -> None:
    change = torch.tensor(losses[name] - losses["auto"]).exp().item() - 1
    print(f"{name}: perplexity {100 * change:+.3f} % against bfloat16 rows")
    assert abs(change) <= PERPLEXITY_LIMITS[name]


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_packed_pages(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """vLLM's own page size is that of the format, so a GiB holds more tokens."""
    row = row_bytes(name, 512, 64)
    with engine(name, dtype="bfloat16") as llm, counted(monkeypatch) as calls:
        generate(llm, held_out_prompts([300, 1]), max_tokens=4)
        assert calls.formats == {name}
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks == 2**30 // (LAYERS * 128 * row)


def test_prefix_caching() -> None:
    shared, first, second = held_out_prompts([1000, 30, 40])
    with engine(block_size=16, enable_prefix_caching=False) as llm:
        expected = tokens_of(generate(llm, [shared + first, shared + second]))
    with engine(block_size=16) as llm:
        cold = generate(llm, [shared + first])
        warm = generate(llm, [shared + second])
        assert metric(llm, "vllm:prefix_cache_hits") == 1000 // 16 * 16
        assert metric(llm, "vllm:prompt_tokens") == 2000 + 30 + 40
    assert cold[0].num_cached_tokens == 0
    assert warm[0].num_cached_tokens == 1000 // 16 * 16
    assert tokens_of(cold) + tokens_of(warm) == expected


def test_chunked_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = held_out_prompts([1500, 1, 700, 129])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts))
    chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(**chunks) as llm, counted(monkeypatch) as calls:
        assert tokens_of(generate(llm, prompts)) == expected
        assert calls.layers >= LAYERS * sum(map(len, prompts)) // 64


def test_preemption() -> None:
    """A cache that holds fewer sequences than run: some are thrown out and computed again."""
    prompts = held_out_prompts([200, 210, 220, 230, 240, 250])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts, max_tokens=200))
    small = {"block_size": 16, "num_gpu_blocks_override": 70, "enable_prefix_caching": False}
    with engine(max_model_len=1024, **small) as llm:
        assert tokens_of(generate(llm, prompts, max_tokens=200)) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


def _samples(llm: LLM) -> list[list[list[int]]]:
    return tokens_of(generate(llm, held_out_prompts([333, 50]), n=8, seed=7, temperature=0.8))


def test_many_samples_of_a_prompt() -> None:
    """Eight samples share the prompt's pages, and are the same however the work is cut."""
    with engine() as llm:
        expected = _samples(llm)
    assert len({tuple(sample) for sample in expected[0]}) > 4
    cut = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with engine(**cut) as llm:
        assert _samples(llm) == expected


def test_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens guessed from the prompt: several queries per sequence, of different number."""
    prompts = held_out_prompts([600, 90, 17])
    with engine() as llm:
        expected = tokens_of(generate(llm, prompts, max_tokens=128))
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    guess["prompt_lookup_min"] = 1
    with engine(speculative_config=guess) as llm, counted(monkeypatch) as calls:
        assert tokens_of(generate(llm, prompts, max_tokens=128)) == expected
        assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
        assert calls.mixed > 0
