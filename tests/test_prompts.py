"""Prompts: the expanded form, ragged queries, chunks, and the choice between the forms.

The truth is the float64 reference. A prompt in one piece, in chunks, token by token, and inside a
ragged batch is the same attention, so each is held to the same bounds. Adds 10 seconds to the fast
tests, and about a minute to `make test SLOW=1` (peak memory).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import mla_cases
import pytest
import torch
from mla_cases import FLOAT_ERROR, FORMATS, Case, Problem, make_problem
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import ops, reference

ISAS = torch_flash_mla.available_isas()
# What queries, keys and values round to besides the attention itself: projected queries or keys,
# and projected outputs or values.
PROJECTIONS = 2


def with_weight(problem: Problem, nope: int, value: int) -> dict[str, Any]:
    """Arguments of mla_attention_kv_b over the cache of a problem."""
    case = problem.case
    latent, rope = case.dims
    generator = case.generator("isa", "page", "layout")
    batch = problem.arguments["cache_seqlens"].shape[0]
    w = torch.randn(case.heads, nope + value, latent, generator=generator) * latent**-0.5
    q = torch.randn(batch, case.q_len, case.heads, nope + rope, generator=generator)
    arguments = {k: v for k, v in problem.arguments.items() if k != "q_pe"}
    return arguments | {
        "q": q.to(case.q_dtype),
        "w_kv_b": w.to(case.q_dtype),
        "head_dim_v": value,
        "softmax_scale": (nope + rope) ** -0.5,
    }


def check(case: Case, out: Tensor, lse: Tensor, expected: Tensor, expected_lse: Tensor) -> None:
    """Against the reference over the rows as stored."""
    empty = expected_lse == -torch.inf
    assert out.shape == expected.shape
    assert torch.equal(lse == -torch.inf, empty)
    assert (out.transpose(-3, -2)[empty] == 0).all()
    assert out.isfinite().all()
    bound = (1 + PROJECTIONS) * FLOAT_ERROR[case.q_dtype]
    lse_bound = 1e-2 if case.q_dtype == torch.bfloat16 else 1e-3
    if case.packed:  # absorbed: integer products, as a part of the output
        bound, lse_bound = bound + 2e-2, 0.1
    error = (out.double() - expected).norm()
    assert error <= bound * expected.norm(), f"relative error {error / expected.norm():.2e}"
    assert (lse.double() - expected_lse).masked_fill(empty, 0).abs().max() <= lse_bound


def run(case: Case, arguments: dict[str, Any], form: str = "auto") -> tuple[Tensor, Tensor]:
    with torch_flash_mla.force_isa(case.isa):
        return ops.mla_attention_kv_b(**arguments, form=form)


LENGTHS = [180, 40, 0, 67]  # keys; 40 are fewer than queries
KEYS = mla_cases.FACTORS["keys"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_forms_agree_with_the_reference(q_dtype, keys, isa):
    """Every way to limit keys, sinks too; formats, layouts and dims take turns."""
    turn = 3 * KEYS.index(keys) + [torch.bfloat16, torch.float16, torch.float32].index(q_dtype)
    cache_format = FORMATS[(turn + ISAS.index(isa)) % len(FORMATS)]
    dims, nope, value = [((512, 64), 128, 128), ((96, 32), 40, 24), ((128, 0), 64, 96)][turn % 3]
    layouts = ["plain", "paged", "rank4", "two_tensor"]
    choice = {"cache_format": cache_format, "dims": dims}
    layouts = [v for v in layouts if mla_cases.possible({**choice, "layout": v})]
    case = Case(
        isa,
        cache_format,
        heads=2,
        dims=dims,
        q_len=66,
        q_dtype=q_dtype,
        keys=keys,
        layout=layouts[turn % len(layouts)],
        sink=turn % 2 == 0,
    )
    problem = make_problem(case, LENGTHS)
    arguments = with_weight(problem, nope, value)
    expected = reference.mla_attention_kv_b(**arguments)
    for form in ("absorbed", "expanded", "auto"):
        check(case, *run(case, arguments, form), *expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_len", [1, 2, 64, 65, 257])
def test_any_number_of_queries_expanded(q_len, isa):
    heads = {1: 20, 2: 5}.get(q_len, 3)
    case = Case(isa, "fp32", heads=heads, dims=(64, 16), q_len=q_len, keys="causal")
    problem = make_problem(case, [q_len + 70, 3])
    arguments = with_weight(problem, 17, 33)
    check(case, *run(case, arguments, "expanded"), *reference.mla_attention_kv_b(**arguments))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_prompt_in_pieces(cache_format):
    """In one piece, in chunks, token by token, and inside a ragged batch: the same answer."""
    q_dtype = torch.bfloat16 if cache_format in ("bf16", "q8_kv") else torch.float32
    case = Case(ISAS[-1], cache_format, heads=4, q_len=230, q_dtype=q_dtype, keys="causal")
    problem = make_problem(case, [230])
    whole = with_weight(problem, 128, 128)
    expected, expected_lse = reference.mla_attention_kv_b(**whole)
    check(case, *run(case, whole), expected, expected_lse)

    for step in (100, 1):
        outs, lses = [], []
        for begin in range(0, 230, step):
            end = min(begin + step, 230)
            piece = whole | {
                "q": whole["q"][:, begin:end],
                "cache_seqlens": torch.tensor([end], dtype=torch.int32),
            }
            out, lse = run(case, piece)
            outs.append(out)
            lses.append(lse)
        check(case, torch.cat(outs, 1), torch.cat(lses, 2), expected, expected_lse)

    # The prompt between two sequences that decode one token each, over the same pages.
    table = whole["block_table"].expand(3, -1)
    q = whole["q"][0]
    out, lse = run(
        case,
        whole
        | {
            "q": torch.cat([q[9:10], q, q[100:101]]),
            "block_table": table,
            "cache_seqlens": torch.tensor([10, 230, 101], dtype=torch.int32),
            "cu_seqlens_q": torch.tensor([0, 1, 231, 232], dtype=torch.int32),
        },
    )
    order = [9, *range(230), 100]
    check(case, out, lse, expected[0, order], expected_lse[0][:, order])


RAGGED = [1, 70, 0, 1, 7, 130, 2]  # query tokens of each sequence
RAGGED_KEYS = [77, 70, 30, 1, 4, 150, 0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["absorbed", "expanded", "auto"])
@pytest.mark.parametrize("limit", ["causal", "window", "mask", "interval mask", "head mask"])
def test_ragged(limit, form, isa):
    case = Case(isa, "fp32", heads=3, dims=(64, 32), sink=True)
    generator = case.generator()
    problem = make_problem(case, RAGGED_KEYS)
    tokens = sum(RAGGED)
    arguments = with_weight(problem, 24, 40) | {
        "q": torch.randn(tokens, 3, 24 + 32, generator=generator),
        "cu_seqlens_q": torch.tensor([0, *RAGGED]).cumsum(0).int(),
        "causal": limit != "interval mask",
        "window": 50 if limit == "window" else 0,
    }
    if limit in ("mask", "head mask"):
        heads = 3 if limit == "head mask" else 1
        arguments["attn_mask"] = torch.randn(heads, tokens, 150, generator=generator)
    elif limit == "interval mask":
        first = torch.randint(0, 90, (tokens, 1), generator=generator)
        position = torch.arange(150)
        arguments["attn_mask"] = (position >= first) & (position < first + 50)
    kv_cache = arguments["kv_cache"]
    if limit not in ("causal", "mask", "head mask"):  # those see every cell
        arguments["kv_cache"] = kv_cache.nan_to_num()
    expected = reference.mla_attention_kv_b(**arguments)
    check(case, *run(case, arguments, form), *expected)
    if form == "absorbed":  # ready queries
        direct = {k: v for k, v in arguments.items() if k not in ("w_kv_b", "q")}
        direct |= {"q": torch.randn(tokens, 3, 96, generator=generator), "head_dim_v": 64}
        with torch_flash_mla.force_isa(isa):
            check(case, *ops.mla_attention(**direct), *reference.mla_attention(**direct))


def test_ragged_index_lists():
    case = Case(ISAS[-1], "q8_kv", heads=2, dims=(64, 32))
    problem = make_problem(case, RAGGED_KEYS)
    generator = case.generator()
    tokens = sum(RAGGED)
    order = torch.rand(tokens, 160, generator=generator).argsort(dim=1)[:, :40]
    arguments = problem.arguments | {
        "q": torch.randn(tokens, 2, 96, generator=generator),
        "cu_seqlens_q": torch.tensor([0, *RAGGED]).cumsum(0).int(),
        "indices": order.int(),
        "topk_length": torch.tensor([40, 3, 40, 40, 0, 17, 40], dtype=torch.int32),
        "causal": True,
    }
    expected, expected_lse = reference.mla_attention(**arguments)
    check(case, *ops.mla_attention(**arguments), expected, expected_lse)


def test_ragged_is_the_padded_call():
    """Equal lengths: bit for bit what the padded call gives, one thread or many."""
    case = Case(ISAS[-1], "q8_kv", heads=6, q_len=3, q_dtype=torch.bfloat16, keys="causal")
    problem = make_problem(case, [200, 5, 64])
    out, lse = ops.mla_attention(**problem.arguments)
    ragged, ragged_lse = ops.mla_attention(
        **problem.arguments
        | {
            "q": problem.arguments["q"].flatten(0, 1),
            "cu_seqlens_q": torch.tensor([0, 3, 6, 9], dtype=torch.int32),
        }
    )
    assert torch.equal(ragged, out.flatten(0, 1))
    assert torch.equal(ragged_lse, lse.transpose(0, 1).flatten(1))


def test_merge_of_ragged_results():
    """Two halves of the keys of a ragged call, merged, are the call over all keys."""
    case = Case(ISAS[-1], "fp32", heads=3, dims=(64, 32))
    problem = make_problem(case, [90, 40])
    arguments = problem.arguments | {
        "q": torch.randn(7, 3, 96, generator=case.generator()),
        "cu_seqlens_q": torch.tensor([0, 5, 7], dtype=torch.int32),
    }
    position = torch.arange(90)
    halves = [
        ops.mla_attention(**arguments, attn_mask=keep) for keep in (position < 30, position >= 30)
    ]
    sink = torch.tensor([0.5, -1.0, 2.0])
    out, lse = ops.merge_attn_states(*halves[0], *halves[1], sink)
    check(case, out, lse, *reference.mla_attention(**arguments, attn_sink=sink))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_take_the_modes_of_the_caller(mode):
    """Products run on other threads than the caller's, who may be in inference mode."""
    case = Case(ISAS[-1], "bf16", heads=4, q_len=100, q_dtype=torch.bfloat16, keys="causal")
    arguments = with_weight(make_problem(case, [150]), 32, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with mode(), torch.autocast("cpu"):
            out, lse = run(case, arguments, "expanded")
    finally:
        torch.set_num_threads(before)
    check(case, out, lse, *reference.mla_attention_kv_b(**arguments))


def test_keys_beyond_the_buffer_come_in_parts():
    """One head's keys exceed the buffer of expanded keys; sink, padding and a long history."""
    case = Case(ISAS[-1], "bf16", heads=2, dims=(32, 0), q_len=40, q_dtype=torch.float32)
    length, nope, value = 20_000, 256, 300  # 2.3 kB per key and head: 11k fit
    problem = make_problem(case, [length])
    arguments = with_weight(problem, nope, value) | {
        "causal": True,
        "cache_leftpad": torch.tensor([333], dtype=torch.int32),
        "attn_sink": torch.tensor([1.5, -2.0]),
    }
    expected = reference.mla_attention_kv_b(**arguments)
    check(case, *run(case, arguments, "expanded"), *expected)


def test_prompt_of_a_mask_with_intervals_takes_causal_speed():
    """A mask that says what causal says gives the same bits: it is reduced to the same ranges."""
    case = Case(ISAS[-1], "bf16", heads=2, q_len=200, q_dtype=torch.bfloat16, keys="causal")
    problem = make_problem(case, [200, 200])
    arguments = with_weight(problem, 128, 128)
    out, lse = run(case, arguments)
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    for same in (mask, torch.zeros(200, 200).masked_fill(~mask, -torch.inf)):
        masked, masked_lse = run(case, arguments | {"causal": False, "attn_mask": same})
        assert torch.equal(masked, out)
        assert torch.equal(masked_lse, lse)


PEAK = """
import sys, torch
from torch_flash_mla import ops
new, history, kv_cache_dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
heads, nope, value, latent, rope = 16, 128, 128, 512, 64
def call(n, length):
    blocks = -(-length // 64)
    width = latent + rope if kv_cache_dtype == "auto" else 584
    dtype = torch.bfloat16 if kv_cache_dtype == "auto" else torch.uint8
    arguments = (
        torch.ones(1, n, heads, nope + rope, dtype=torch.bfloat16),
        torch.ones(blocks, 64, width, dtype=dtype),
        torch.arange(blocks, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.ones(heads, nope + value, latent, dtype=torch.bfloat16),
        value,
        0.07,
        True,
    )
    return lambda: ops.mla_attention_kv_b(*arguments, kv_cache_dtype=kv_cache_dtype)
def kib(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1])
run = call(new, new + history)
call(256, 256)()  # what libraries keep
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
out, lse = run()
print((kib("VmHWM") - before) / 1024 - (out.nbytes + lse.nbytes) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
@pytest.mark.parametrize(("new", "history"), [(16384, 0), (4096, 61440)])
def test_peak_memory_of_a_long_prompt(new, history, kv_cache_dtype):
    """A buffer of bounded size beyond inputs, outputs and cache (MiB). About 10 seconds each."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process reset its peak memory")
    command = [sys.executable, "-c", PEAK, str(new), str(history), kv_cache_dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 64


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("latent", [33, 34, 100, 96])
def test_a_key_between_that_is_not_finite(isa: str, latent: int, form: str) -> None:
    """Products of many rows must not mix what lies behind a row into it."""
    n, heads, nope, rope, value = 41, 2, 36, 20, 16
    rows = torch.randn(1, n, latent + rope).bfloat16()
    rows[:, 8] = torch.nan
    mask = torch.ones(1, 1, n, n, dtype=torch.bool)
    mask[..., 8] = False
    q = torch.randn(1, n, heads, nope + rope).bfloat16()
    q[:, 8] = torch.nan
    out, lse = ops.mla_attention_kv_b(
        q,
        rows,
        None,
        torch.tensor([n], dtype=torch.int32),
        torch.randn(heads, nope + value, latent).bfloat16() / latent**0.5,
        value,
        0.1,
        attn_mask=mask,
        form=form,
    )
    finite = torch.arange(n) != 8
    assert torch.equal(out.isfinite().all(-1).all(-1), finite[None])
    assert torch.equal(lse.isfinite().all(1), finite[None])
