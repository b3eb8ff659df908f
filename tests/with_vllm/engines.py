"""Engines of vLLM over the tiny model, prompts for them, and transformers to judge the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers_compare import rounding_cache
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.v1.attention.backends.mla import amx_mla, cpu_mla
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from torch_flash_mla import ops
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

TINY_MODEL = ROOT / "examples" / "tiny_model"
LAYERS = 4


@contextmanager
def engine(
    kv_cache_dtype: str = "auto", *, model: Path | str = TINY_MODEL, **options: Any
) -> Iterator[LLM]:
    """An engine in this process, float32 unless ``dtype`` says otherwise; nothing of it remains."""
    additional = {"torch_flash_mla": {"kv_cache_dtype": kv_cache_dtype}}
    defaults = {
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "seed": 0,
        "additional_config": {} if kv_cache_dtype == "auto" else additional,
        "disable_log_stats": False,  # which takes the metrics away too
    }
    llm = None
    try:
        llm = LLM(str(model), **(defaults | options))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def generate(llm: LLM, prompts: Sequence[list[int]], **options: Any) -> list[RequestOutput]:
    """The answers to prompts of token ids; 64 tokens, greedy, unless ``options`` say otherwise."""
    defaults = {"temperature": 0.0, "max_tokens": 64, "ignore_eos": True}
    parameters = SamplingParams(**(defaults | options))
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, parameters, use_tqdm=False)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    """Token ids by request and sample."""
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def metric(llm: LLM, name: str) -> float:
    """The value of one of vLLM's own counters."""
    found = [m.value for m in llm.get_metrics() if m.name == name]
    assert found, f"{name} is none of {sorted({m.name for m in llm.get_metrics()})}"
    return sum(found)


@cache
def held_out_tokens() -> list[int]:
    """The text that the tiny model was not trained on, as token ids."""
    text = (TINY_MODEL / "heldout.txt").read_text()[:100_000]
    return AutoTokenizer.from_pretrained(TINY_MODEL)(text)["input_ids"]


def held_out_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Different pieces of the held-out text."""
    tokens, generator = held_out_tokens(), torch.Generator().manual_seed(0)
    starts = [
        int(torch.randint(len(tokens) - length, (), generator=generator)) for length in lengths
    ]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@cache
def transformers_model(dtype: torch.dtype, path: Path = TINY_MODEL) -> PreTrainedModel:
    """The stock model of transformers, which is the reference."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel,
    prompt: Sequence[int],
    answer: Sequence[int],
    kv_cache_dtype: str = "auto",
) -> Tensor:
    """What transformers says at each token of an answer: float32 [answer, vocabulary].

    With a packed format, over rows that were stored in it and read back.
    """
    tokens = torch.tensor([[*prompt, *answer]])
    cache = None
    if kv_cache_dtype != "auto":
        cache = rounding_cache(model, "DynamicCache", kv_cache_dtype)
    arguments = {CACHE_ARGUMENT: cache, "logits_to_keep": len(answer)}
    logits = model(tokens[:, :-1], **arguments).logits[0]
    return logits.float().log_softmax(-1)


@dataclass
class Greedy:
    """How greedy answers compare with what transformers would have taken at each of their tokens.

    Attributes:
        tokens: how many there are.
        differ: how many are not the most likely one.
        worse: largest distance of a token's log-probability from the best.
        margin: smallest distance of the second best from the best.
    """

    tokens: int = 0
    differ: int = 0
    worse: float = 0.0
    margin: float = float("inf")

    def add(self, logprobs: Tensor, answer: Sequence[int]) -> None:
        """Takes one answer; ``logprobs`` are those of :func:`reference_logprobs`."""
        taken = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        best, second = logprobs.topk(2).values.unbind(1)
        self.tokens += len(answer)
        self.differ += int((taken != best).sum())
        self.worse = max(self.worse, float((best - taken).max()))
        self.margin = min(self.margin, float((best - second).min()))


def compare_greedy(
    model: PreTrainedModel, outputs: Sequence[RequestOutput], kv_cache_dtype: str = "auto"
) -> Greedy:
    """Greedy answers beside transformers, both over rows that are kept in ``kv_cache_dtype``.

    Given the tokens before it, so where none differs transformers generates the same answers.
    """
    found = Greedy()
    for output in outputs:
        answer = list(output.outputs[0].token_ids)
        found.add(
            reference_logprobs(model, output.prompt_token_ids, answer, kv_cache_dtype), answer
        )
    return found


@dataclass
class Calls:
    """What was computed by whom while :func:`counted` was active.

    Attributes:
        layers: steps of layers that vLLM asked attention of.
        attention: calls of ``mla_attention_kv_b``.
        queries: query tokens in those.
        appended: tokens written to the cache.
        longest: largest number of query tokens in a call.
        mixed: calls that held single tokens and longer pieces.
        formats: cache formats of those calls.
    """

    layers: int = 0
    attention: int = 0
    queries: int = 0
    appended: int = 0
    longest: int = 0
    mixed: int = 0
    formats: set[str] = field(default_factory=set)


# What computes attention in vLLM's own backends for MLA on CPUs: prompts and decoding of each.
VLLM_KERNELS: tuple[tuple[Any, str], ...] = (
    (CPUSDPAMLAPrefillBackend, "_ragged_sdpa"),
    (cpu_mla.ops, "mla_decode_kvcache_cpu"),
    (amx_mla.AMXMLAImpl, "forward_mha"),
    (amx_mla.AMXMLAImpl, "forward_mqa"),
)


def _never(name: str) -> Callable[..., None]:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{name} of vLLM was called")

    return called


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Counts the calls of this package's operators, and fails if vLLM's own attention runs."""
    calls = Calls()
    attention, append, forward = (
        ops.mla_attention_kv_b,
        ops.concat_and_cache_mla,
        MLAAttention.forward_impl,
    )

    def count_attention(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.attention += 1
        calls.queries += q.shape[0]
        calls.longest = max(calls.longest, q.shape[0])
        calls.formats.add(kwargs["kv_cache_dtype"])
        lengths = kwargs["cu_seqlens_q"].diff()
        calls.mixed += int(lengths.min() == 1 and lengths.max() > 1)
        return attention(q, *args, **kwargs)

    def count_append(*args: Any, **kwargs: Any) -> None:
        calls.appended += int((args[3] >= 0).sum())
        append(*args, **kwargs)

    def count_layer(self: MLAAttention, *args: Any, **kwargs: Any) -> Tensor:
        calls.layers += 1
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(ops, "mla_attention_kv_b", count_attention)
        patches.setattr(ops, "concat_and_cache_mla", count_append)
        patches.setattr(MLAAttention, "forward_impl", count_layer)
        for owner, name in VLLM_KERNELS:
            patches.setattr(owner, name, _never(name))
        yield calls
