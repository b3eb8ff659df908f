"""Models as people have them: wrapped, quantised, offloaded, trained and distributed.

Every case runs stock and patched, with a cache of the model's dtype and with one of 8 bits. The
result has to be that of stock, whichever way kv_b_proj is read; the report says which way, and the
operator is called exactly where that is not "expanded". For packed caches the right value is the
stock model over rows that were stored and read back.

Some cases need packages of an environment of its own, which ``make test-matrix`` makes. Not here is
what a CPU cannot run: bitsandbytes' int8 (its product fails in the stock model), torchao's fp8
activations (they ask for a GPU), FP8 weights that stay FP8 (their kernels are Triton's).
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT, run
from torch import Tensor
from transformers_cases import mla_layers
from transformers_compare import CACHES, TOLERANCE, OpCalls, prompt, rounding_cache
from wrapped_models import (
    CHANGES,
    EXPANDED,
    WRAPPED,
    gradients,
    lora_being_trained,
    plain_model,
    wrapped_model,
)

import torch_flash_mla
from torch_flash_mla.integrations.transformers import patch, patched, unpatch
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

FORMATS = ("auto", "q8_kv")
STEPS = (8, 1, 1, 3)  # tokens of each forward pass


def logits(model: Any, cache: Any = None, **arguments: Any) -> Tensor:
    """Of a prompt and the steps after it, [3, tokens, vocabulary]; the model makes the cache
    unless there is one."""
    ids = prompt((sum(STEPS),) * 3, 128)["input_ids"]
    steps = []
    with torch.no_grad():
        for tokens in ids.split(STEPS, dim=1):
            out = model(input_ids=tokens, use_cache=True, **{CACHE_ARGUMENT: cache}, **arguments)
            cache = getattr(out, CACHE_ARGUMENT)
            steps.append(out.logits)
    return torch.cat(steps, dim=1)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def stock_logits(model: Any, kv_cache_dtype: str, **arguments: Any) -> tuple[Tensor, float]:
    """Right values for a cache of that format, and how far others may be from them: once in a while
    a latent that differs in its last bit is rounded to the neighbouring code."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    exact = logits(model, CACHES["DynamicCache"](inner), **arguments)
    if kv_cache_dtype == "auto":
        return exact, TOLERANCE
    rounded = logits(model, rounding_cache(inner, "DynamicCache", kv_cache_dtype), **arguments)
    return rounded, distance(rounded, exact) / 3


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped(name: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    model = wrapped_model(name, tmp_path)
    case = WRAPPED[name]
    expected, bound = stock_logits(model, kv_cache_dtype, **case.arguments)
    assert 0 < bound < 0.2
    with patched(model, kv_cache_dtype) as report, torch_flash_mla.force_isa("scalar"):
        assert {layer.kv_b_proj.split(":")[0] for layer in report.layers} == {case.way}, report
        with OpCalls() as calls:
            actual = logits(model, **case.arguments)
    layers = len(mla_layers(model))
    assert calls.count == (0 if case.way_of_call == EXPANDED else layers * len(STEPS))
    assert distance(actual, expected) <= bound
    assert torch.equal(stock_logits(model, kv_cache_dtype, **case.arguments)[0], expected)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_after_a_call(name: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    of, change = CHANGES[name]
    model = wrapped_model(of, tmp_path)
    before, bound = stock_logits(model, kv_cache_dtype)
    patch(model, kv_cache_dtype)
    with torch_flash_mla.force_isa("scalar"):
        for _ in range(2):  # what is remembered is remembered now
            assert distance(logits(model), before) <= bound
        change(model, tmp_path / "other")
        actual = logits(model)
        again = logits(model)
    unpatch(model)
    expected, bound = stock_logits(model, kv_cache_dtype)
    assert distance(expected, before) > 10 * TOLERANCE  # the change changes something
    assert distance(actual, expected) <= bound
    assert distance(again, expected) <= bound


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(actual[name], gradient) <= 1e-3, name


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_gradient_checkpointing(
    kind: str, use_reentrant: bool, kv_cache_dtype: str, tmp_path: Path
) -> None:
    model: Any = plain_model()
    if kind == "lora":
        pytest.importorskip("peft")
        model = lora_being_trained(model, tmp_path)
    model.train()
    expected = gradients(model)
    assert any("kv_b_proj" in name for name in expected)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with patched(model, kv_cache_dtype):
        assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("optimizer", ["fused", "foreach"])
def test_evaluation_between_steps_of_training(
    optimizer: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    """The losses after each step are those of a stock model."""
    pytest.importorskip("peft")
    losses: dict[bool, list[float]] = {}
    start = lora_being_trained(plain_model(), tmp_path)
    ids = prompt((16, 16), 128)["input_ids"]
    for is_patched in (False, True):
        model: Any = copy.deepcopy(start)
        if is_patched:
            patch(model, kv_cache_dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=2e-2, **{optimizer: True})
        losses[is_patched] = []
        for _ in range(4):
            model.train()
            model(ids, labels=ids, use_cache=False).loss.backward()
            adam.step()
            adam.zero_grad()
            model.eval()
            with torch.no_grad():
                losses[is_patched].append(float(model(ids, labels=ids, use_cache=False).loss))
    assert max(losses[False]) > min(losses[False]) + 0.1
    assert losses[True] == pytest.approx(losses[False], abs=2e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor_parallel"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """tests/distributed_models.py compares in each process."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    program = [str(ROOT / "tests" / "distributed_models.py"), kind, str(tmp_path), *FORMATS]
    output = run(
        *launch,
        "--nproc-per-node=2",
        *program,
        OMP_NUM_THREADS="1",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
    )
    for kv_cache_dtype in FORMATS:
        assert output.count(f"{kv_cache_dtype}: same as stock") == 2, output
