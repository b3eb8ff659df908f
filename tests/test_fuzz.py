"""The fuzzer itself: what its oracle says is what the reference says, faults are found, deaths and
hangs get a name. And runs of it, short here and longer in continuous integration."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from programs import ROOT, run_python

import torch_flash_mla
from tests.fuzz import oracle, rules, run, shrink, specs
from tests.fuzz.build import Call, build
from torch_flash_mla import ops, reference
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

ISAS = torch_flash_mla.available_isas()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """``run.run`` takes one thread for good, as workers shall."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fuzz(*arguments: str, timeout: float) -> str:
    """The last line of a run."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        timeout=timeout,
    )
    last = result.stdout.strip().split("\n")[-1]
    passed, failed = map(int, re.findall(r"^(\d+) passed, (\d+) failed$", last)[0])
    assert failed == 0, result.stdout[-6000:]
    assert result.returncode == 0
    return f"{passed} passed"


def calls(count: int, seed: int, **changes: Any) -> list[Call]:
    """Valid calls of attention with nothing poisoned but what no query sees."""
    found = []
    for index in range(10**6):
        spec = specs.draw(seed, index, ISAS)
        if spec["kind"] not in ("attention", "kv_b") or spec["heads"] == 0:
            continue
        spec |= {"mutations": [], "poison_seen": False, "poison_query": None, **changes}
        found.append(build(spec | {"poison_weight": False}))
        if len(found) == count:
            break
    return found


def rows_of(call: Call, t: torch.Tensor, heads_first: bool) -> list[np.ndarray]:
    """The part of each sequence, [Sq, H, ..]."""
    ragged = call.arguments.get("cu_seqlens_q") is not None
    x = t.double().numpy()
    parts = []
    for b, tokens in enumerate(oracle.query_tokens(call.arguments)):
        if heads_first:
            parts.append((x[:, tokens] if ragged else x[b]).T)
        else:
            parts.append(x[tokens] if ragged else x[b])
    return parts


def test_the_oracle_is_the_reference() -> None:
    for call in calls(150, seed=1):
        expected = oracle.attention(call.arguments, call.spec["isa"])
        # The operators take it as a float32, and so does the oracle.
        scale = float(np.float32(call.arguments["softmax_scale"]))
        arguments = {**call.arguments, "softmax_scale": scale}
        out, lse = getattr(reference, call.operator)(**arguments)
        pairs = zip(expected, rows_of(call, out, False), rows_of(call, lse, True), strict=True)
        for e, of_sequence, lse_of_sequence in pairs:
            finite = e.status == oracle.FINITE
            assert (lse_of_sequence[e.status == oracle.EMPTY] == -np.inf).all()
            assert (of_sequence[e.status == oracle.EMPTY] == 0).all()
            error = np.abs(of_sequence - e.out).max(axis=2, initial=0)
            # Float64 itself moves logits of this size.
            usual = call.spec["logits"]["kind"] in ("normal", "peaky", "sink")
            bound = 1e-9 * (1 + np.abs(e.out).max(axis=2, initial=0)) if usual else e.out_bound
            assert (error <= bound)[finite].all()
            assert (np.abs(lse_of_sequence - e.lse) <= 1e-9 * (1 + np.abs(e.lse)))[finite].all()


@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
def test_its_rows_are_those_of_the_reference(cache_format: str) -> None:
    latent, rope = 96, 32
    # No encoder of q8_kv writes the code of byte 0.
    rows = torch.randint(1, 256, (200, row_bytes(cache_format, latent, rope))).to(torch.uint8)
    values, peak = oracle.decode(rows.numpy(), cache_format, latent, rope)
    expected = reference.decode_rows(rows, cache_format, latent, rope).numpy()
    np.testing.assert_array_equal(values, expected)
    finite = np.isfinite(expected).all(axis=1)
    for seg, part in enumerate((values[:, :latent], values[:, latent:])):
        written = finite & ~np.isnan(peak[:, seg])  # by an encoder
        assert written.sum() > 5
        most = np.abs(part[written]).max(axis=1)
        assert (most <= peak[written, seg] * (1 + 1e-6)).all()


def test_its_gradients_are_those_of_the_reference() -> None:
    checked = 0
    for call in calls(150, seed=2, logits={"kind": "normal", "size": 1.0}, q_dtype="float32"):
        a = dict(call.arguments)
        seen = [e.status for e in oracle.attention(a, call.spec["isa"])]
        if a["q"].numel() == 0 or any((s == oracle.EMPTY).any() for s in seen):
            continue  # autograd of the reference divides 0 by 0
        kv_cache = a["kv_cache"]
        if kv_cache.is_floating_point():
            a["kv_cache"] = kv_cache.nan_to_num(0, 0, 0)
        gradients = []
        for function in (getattr(reference, call.operator), oracle.differentiable):
            leaves = {"q": a["q"].double().requires_grad_()}
            if kv_cache.is_floating_point():
                leaves["kv_cache"] = a["kv_cache"].double().requires_grad_()
            out, lse = (
                function(**{**a, **leaves})
                if function is not oracle.differentiable
                else (function({**a, **leaves}))
            )
            loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.sum()
            gradients.append(torch.autograd.grad(loss, list(leaves.values())))
        if any(x.isnan().any() for x in gradients[0]):
            continue  # so it does where a large sink leaves nothing to the keys
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("isa", ISAS)
def test_a_key_too_few_is_found(isa: str) -> None:
    """The bounds let rounding pass and little else: an answer without one of a few keys does not.

    Among many keys one is less than what rounding of 4-bit codes may do.
    """
    plain = {"mask": None, "indices": None, "leftpad": None, "window": 0, "scale": 1.0}
    tried = {"attention": 0, "kv_b": 0}
    for call in calls(250, seed=3, isa=isa, logits={"kind": "normal", "size": 1.0}, **plain):
        a = call.arguments
        sizes = a["cache_seqlens"]
        if not len(sizes) or a["q"].numel() == 0 or not 2 <= sizes.min() <= sizes.max() <= 16:
            continue
        out, lse = getattr(reference, call.operator)(**{**a, "cache_seqlens": sizes - 1})
        answer = out.to(a["q"].dtype), lse.float()
        assert oracle.check_attention(a, *answer, oracle.attention(a, isa)) is not None
        tried[call.spec["kind"]] += 1
    assert tried["attention"] >= 10
    assert tried["kv_b"] >= 2


def test_a_row_of_noise_is_found() -> None:
    """Rows off by a hundredth of what they are, in float32."""
    for call in calls(60, seed=4, q_dtype="float32", format="fp32", latent=64, rope=16):
        a, isa = call.arguments, call.spec["isa"]
        if call.operator != "mla_attention" or call.spec["logits"]["kind"] != "normal":
            continue
        expected = oracle.attention(a, isa)
        out, lse = reference.mla_attention(**a)
        if not any((np.abs(e.out[e.status == oracle.FINITE]) > 1e-6).any() for e in expected):
            continue
        assert oracle.check_attention(a, out.float(), lse.float(), expected) is None
        noisy = out.float() * (1 + 0.01 * torch.randn(out.shape))
        assert oracle.check_attention(a, noisy, lse.float(), expected) is not None


@pytest.mark.parametrize("kind", ["noise", "equal", "near", "little", "listed"])
def test_its_bound_of_a_sum_holds(kind: str) -> None:
    """Weights added up one by one in float32, the largest first: all others round most."""
    draw = np.random.default_rng(0)
    closest = 0.0
    for _ in range(300):
        n = int(draw.integers(2, 300))
        x = np.exp(draw.standard_normal(n)) if kind == "noise" else np.ones(n)
        if kind != "noise":
            x *= 2.0 ** draw.uniform(-25 if kind == "little" else -22, -12)
        if kind == "near":
            x *= 1 + 1e-4 * draw.standard_normal(n)
        elif kind == "little":
            x *= draw.random(n)
        x[0] = x.max() if kind == "noise" else 1
        x = x.astype(np.float32)
        count = None
        if kind == "listed":
            x, count = x[:2], np.array([[[1, n - 1]]])
        p = x.astype(np.float64) * (1 if count is None else count[0, 0])
        total = p.sum()
        each = x if count is None else np.repeat(x, count[0, 0])
        actual = np.add.accumulate(each, dtype=np.float32)[-1]
        square, everything = oracle._added(p[None, None] / total, count)
        bound = min(3 * math.sqrt(square[0, 0]), everything[0, 0])
        error = abs(float(actual) - total) / total
        assert error <= bound
        closest = max(closest, error / bound)
    assert closest > (0.1 if kind == "noise" else 0.6)  # no more room than is needed


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_what_float32_cannot_hold_is_unknown(form: str, part: str) -> None:
    """Projections overflow where float64 does not, and nothing is said of results before that."""
    rows_of, unknown = {1e20: 0, 3e38: 0}, {1e20: 0, 3e38: 0}
    plain: dict[str, Any] = {"mask": None, "indices": None, "leftpad": None, "window": 0}
    logits = {"kind": "factor", "size": 1e-30 if part == "keys" else 1.0}
    plain |= {"kind": "kv_b", "form": form, "nope": 16, "value": 16, "w_layout": "plain"}
    for call in calls(40, seed=6, q_dtype="float32", logits=logits, **plain):
        a = call.arguments
        if a["q"].numel() == 0:
            continue
        rows = a["w_kv_b"][:, :16] if part == "keys" else a["w_kv_b"][:, 16:]
        drawn = rows.clone()
        for size in rows_of:
            rows.copy_((drawn * size).clamp(-size, size))
            expected = oracle.attention(a, call.spec["isa"])
            status = np.concatenate([e.status.ravel() for e in expected] or [np.zeros(0)])
            rows_of[size] += (status != oracle.EMPTY).sum()
            unknown[size] += (status == oracle.ANY).sum()
            answer = run.call_operator(call, "none")
            assert oracle.check_attention(a, *answer, expected) is None
    assert min(rows_of.values()) > 100
    assert unknown[1e20] == 0
    if (form, part) == ("absorbed", "keys"):  # small queries take them back into the range
        assert unknown[3e38] == 0
    else:
        assert unknown[3e38] > 0.9 * rows_of[3e38]


def test_a_bias_of_thousands_leaves_few_digits() -> None:
    """Not enough for the bounds of plain logits, in rows that see nothing else."""
    mask = {"dtype": "float32", "of_batch": True, "of_heads": True, "of_tokens": True, "dims": 4}
    mask |= {"pattern": "full", "hidden": "-inf", "low": -1e4, "extra": 0, "layout": "plain"}
    sizes = {"lengths": [3], "queries": [9], "heads": 16, "leftpad": None, "indices": None}
    sizes |= {"latent": 64, "rope": 64, "format": "fp32", "q_dtype": "float32", "layout": "paged"}
    for index in range(4):
        spec = specs.draw(7, index, ISAS) | {"kind": "attention", "mutations": []}
        plain = specs._attention(random.Random(index)) | sizes
        plain |= {"logits": {"kind": "normal", "size": 1.0}, "scale": 1.0, "sink": None}
        plain |= {"poison_seen": False, "poison_query": None, "gradients": True, "window": 0}
        run.run(spec | plain | {"mask": mask})


def test_infinities_in_merges() -> None:
    """One whose weight is 0 in float32 may be NaN; another stays what it is."""
    spec = specs.draw(8, 0, ISAS)
    for sink, unknown in ((600.0, True), (6.0, False)):
        out = torch.tensor([[[[1.0, math.inf]]]])
        lse = torch.zeros(1, 1, 1)
        arguments = {"out_a": out, "lse_a": lse, "out_b": torch.ones_like(out), "lse_b": lse}
        call = Call(spec, "merge_attn_states", {**arguments, "attn_sink": torch.tensor([sink])})
        answer = torch_flash_mla.merge_attn_states(**call.arguments)
        run._check_merge(call, answer)
        for value in (math.nan, 0.0):
            wrong = answer[0].clone()
            wrong[..., 1] = value
            if unknown:
                run._check_merge(call, (wrong, answer[1]))
                continue
            with pytest.raises(run.Wrong, match="wrong merge"):
                run._check_merge(call, (wrong, answer[1]))


def test_copied_blocks_are_bytes() -> None:
    """Whatever dtype they are seen as: of a bool, too, that is neither 0 nor 1."""
    mapping = torch.tensor([[0, 2]])
    for dtype in (torch.bool, torch.float32, torch.complex128):
        cache = torch.arange(3 * 4 * 16, dtype=torch.uint8).view(3, 4, 16).view(dtype)
        call = Call(specs.draw(9, 0, ISAS), "copy_blocks", {})
        call.arguments = {"kv_cache": cache, "block_mapping": mapping}
        before = run.Snapshot(call.arguments)
        torch_flash_mla.copy_blocks(**call.arguments)
        run._check_copy(call, before)
        cache.view(torch.uint8)[2, 0, 0] ^= 2
        with pytest.raises(run.Wrong, match="not the blocks"):
            run._check_copy(call, before)


def test_rules_agree_with_the_operators() -> None:
    """On calls with nothing damaged: all are valid."""
    for index in range(400):
        spec = specs.draw(5, index, ISAS) | {"mutations": []}
        if spec["kind"] == "huge":
            continue
        call = build(spec)
        expected = rules.EITHER if spec["kind"] == "flash_mla" else rules.VALID
        assert rules.judge(call.operator, call.arguments)[0] == expected


def test_specs_depend_on_seed_and_index_alone() -> None:
    assert specs.draw(1, 7, ISAS) == specs.draw(1, 7, ISAS)
    assert specs.draw(1, 7, ISAS) != specs.draw(1, 8, ISAS) != specs.draw(2, 8, ISAS)
    calls_ = [build(specs.draw(1, 2, ISAS)) for _ in "ab"]
    for x, y in zip(*(c.arguments.values() for c in calls_), strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.reshape(-1).nan_to_num(), y.reshape(-1).nan_to_num())


def test_shrinking() -> None:
    """What has nothing to do with the fault goes."""
    spec = next(
        s
        for s in (specs.draw(6, i, ISAS) for i in range(10**5))
        if s["kind"] == "attention" and s["mask"] and s["sink"] and len(s["lengths"]) == 3
    )
    least = shrink.shrink(spec, lambda s: s["mask"] is not None and max(s["lengths"]) >= 2, 400)
    assert least["mask"] is not None
    assert least["sink"] is None
    assert len(least["lengths"]) == 1
    assert least["lengths"][0] <= 3
    assert least["heads"] <= 1


DEATHS = """
import ctypes, os, pathlib, signal, sys, time
import torch
from tests.fuzz import guard, workers

def case(index, tell):
    tell({"case": index})
    if index == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == 5:
        raise ValueError("five")
    if index == 7:
        time.sleep(100)
    if index in (9, 11):  # one byte behind a tensor at the end, or before one at the beginning
        t = guard.Arenas().place([torch.zeros(5)], end=index == 9)[0]
        ctypes.string_at(t.data_ptr() + (20 if index == 9 else -1), 1)

found = list(workers.run(pathlib.Path(sys.argv[1]), case, 0, 20, 2, time_limit=1, progress=False))
print([(f.index, f.kind) for f in found if isinstance(f, workers.Failure)], found[-1])
print(workers.attempt(lambda: os.abort()).kind, workers.attempt(lambda: None))
"""


def test_deaths_and_hangs_have_names(tmp_path: Any) -> None:
    output = run_python(DEATHS, tmp_path).splitlines()
    failures = eval(output[0].split("] ")[0] + "]")
    assert sorted(failures) == [
        (3, "died: SIGSEGV"),
        (5, "fuzzer: ValueError"),
        (7, "hang"),
        (9, "died: SIGSEGV"),
        (11, "died: SIGSEGV"),
    ]
    assert output[0].endswith("(15, 5)")
    assert output[1] == "died: SIGABRT None"


@pytest.mark.skipif("avx2" not in ISAS, reason="the codes are those of a level")
def test_query_codes_may_all_be_off_to_one_side() -> None:
    """bfloat16 numbers beside a step that is nearly a multiple of theirs."""
    run.run(
        specs.draw(0, 0, ISAS)
        | {"kind": "attention", "isa": "avx2", "threads": 1, "deterministic": True, "mode": "none"}
        | {"guard": "end", "data": 2625261210, "format": "q8_kv", "latent": 512, "rope": 0}
        | {"page": 32, "layout": "rank4", "slices": "", "shared": False, "heads": 5}
        | {"lengths": [16], "queries": [3], "ragged": False, "q_dtype": "bfloat16", "split": True}
        | {"q_layout": "plain", "strided": False, "least_rows": 1, "causal": False, "window": 0}
        | {"leftpad": [15], "mask": None, "indices": None, "sink": None, "scale": -1.0}
        | {"logits": {"kind": "centre", "size": -400.0}, "poison": "inf", "poison_seen": False}
        | {"poison_query": None, "gradients": False, "twice": True, "mutations": []}
    )


@pytest.mark.parametrize("isa", ISAS)
def test_codes_without_a_scale(isa: str) -> None:
    """No encoder writes them; kernels take the scale for 1e-30."""
    shape = {"format": "q8_kv", "latent": 160, "rope": 64, "indices": None, "twice": False}
    changes = {"isa": isa, "gradients": False, **shape}
    for call in calls(8, seed=4, **changes):
        a = call.arguments
        a["kv_cache"].zero_()
        if a["q"].numel():
            answer = run.call_operator(call, "none")
            assert oracle.check_attention(a, *answer, oracle.attention(a, isa)) is None


def test_calls() -> None:
    assert fuzz("1", "2000", "--workers", "2", timeout=300) == "2000 passed"


def test_threads() -> None:
    assert fuzz("1", "100", "--kind", "threads", timeout=300) == "100 passed"


def test_a_level_is_forced() -> None:
    assert fuzz("2", "50", "--isa", "scalar", timeout=300) == "50 passed"


@pytest.mark.slow
def test_many_calls() -> None:
    workers = str(os.cpu_count() or 1)
    assert fuzz("3", "20000", "--workers", workers, timeout=1500) == "20000 passed"


@pytest.mark.exhaustive  # compiles every level with sanitizers
def test_sanitized_calls() -> None:
    workers = str(os.cpu_count() or 1)
    arguments = ("4", "3000", "--workers", workers, "--sanitize")
    assert fuzz(*arguments, timeout=1800) == "3000 passed"


@pytest.mark.exhaustive
def test_threads_without_races() -> None:
    assert fuzz("6", "100", "--kind", "threads", "--tsan", timeout=1800) == "100 passed"


@pytest.mark.slow
def test_damaged_files() -> None:
    assert fuzz("5", "1000", "--kind", "files", timeout=600) == "1000 passed"


def test_the_scale_of_the_machine_is_left_alone() -> None:
    """Cases change levels and threads for a call, not for whoever runs them."""
    before = ops.cpu_isa(), torch.get_num_threads()
    for call in calls(len(ISAS) * 4, seed=5):
        run.call_operator(call, "none")
        assert (ops.cpu_isa(), torch.get_num_threads()) == before
    assert not torch.are_deterministic_algorithms_enabled()
