"""The level onednn: products of whole tiles by the oneDNN inside torch.

How exact it is, test_accuracy.py and the others ask, as of every level. Here: that it computes the
integers of avx512_bf16, when it runs and when not, what it compiles, and what threads keep.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from mla_cases import Case, make_problem

import torch_flash_mla
from torch_flash_mla import ops
from torch_flash_mla.formats import row_bytes

pytestmark = pytest.mark.skipif(
    "onednn" not in torch_flash_mla.available_isas(),
    reason="needs AVX-512 BF16 and a oneDNN that may use it",
)

L, R = 512, 64


@pytest.fixture
def least_rows():
    """Sets the rows from which on the level makes products, and puts them back."""
    before = ops.set_onednn_least_rows(1)
    yield ops.set_onednn_least_rows
    ops.set_onednn_least_rows(before)


def attention(isa: str, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch_flash_mla.force_isa(isa):
        return ops.mla_attention(**arguments)


def products(call) -> int:
    before = ops.onednn_stats()[0]
    call()
    return ops.onednn_stats()[0] - before


def shapes(call) -> int:
    before = ops.onednn_stats()[1]
    call()
    return ops.onednn_stats()[1] - before


def decode(format_name: str, heads: int, lengths: list[int], page: int = 64) -> dict:
    """Arguments of mla_attention: random queries, pages in random order."""
    batch, pages = len(lengths), -(-max(lengths) // page)
    rows = torch.randn(batch * pages * page, L + R)
    if format_name == "bf16":
        cache = rows.bfloat16().view(-1, page, L + R)
    else:
        cache = torch.empty(batch * pages, page, row_bytes(format_name, L, R), dtype=torch.uint8)
        slots = torch.arange(len(rows))
        ops.concat_and_cache_mla(rows[:, :L], rows[:, L:], cache, slots, format_name)
    return {
        "q": torch.randn(batch, 1, heads, L + R).bfloat16(),
        "kv_cache": cache,
        "block_table": torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "head_dim_v": L,
        "softmax_scale": 192**-0.5,
        "kv_cache_dtype": "auto" if format_name == "bf16" else format_name,
    }


@pytest.mark.parametrize("dims", [(512, 64), (512, 0), (320, 32), (32, 32)], ids=str)
@pytest.mark.parametrize("cache_format", ["q8_kv", "q6_0", "q4_kv"])
def test_integers_are_those_of_avx512(cache_format, dims):
    """Integer products are exact and everything else is the same steps: so are all bits."""
    for heads, q_len, page, keys in (
        (1, 1, 64, "all"),
        (20, 3, 16, "causal"),
        (16, 7, 128, "leftpad"),
        (64, 2, 61, "float_mask"),
    ):
        case = Case("onednn", cache_format, heads, dims, page, 290, q_len, keys=keys)
        arguments = make_problem(case, key_factor=4).arguments  # some scores are refined
        before = ops.onednn_stats()[0]
        results = attention("onednn", arguments)
        assert ops.onednn_stats()[0] > before
        for ours, theirs in zip(attention("avx512_bf16", arguments), results, strict=True):
            assert torch.equal(ours, theirs)


def test_bf16_differs_by_rounding_alone():
    arguments = decode("bf16", 128, [1000, 300])
    ours, lse = attention("avx512_bf16", arguments)
    theirs, their_lse = attention("onednn", arguments)
    assert (ours.float() - theirs.float()).norm() <= 2e-3 * ours.float().norm()
    assert (lse - their_lse).abs().max() < 1e-4


@pytest.mark.parametrize("cache_format", ["bf16", "q8_kv"])
def test_lists_with_tiles_of_skipped_entries(cache_format):
    arguments = decode(cache_format, 32, [300])
    indices = torch.full((1, 1, 400), -1, dtype=torch.int32)
    indices[..., 128:256:3] = torch.randperm(300, dtype=torch.int32)[:43]
    arguments["indices"] = indices
    ours, theirs = attention("avx512_bf16", arguments)[0], attention("onednn", arguments)[0]
    assert (ours.float() - theirs.float()).norm() <= 2e-3 * ours.float().norm()


def test_formats_and_small_blocks_that_are_left_to_avx512(least_rows):
    q8_kv, bf16 = decode("q8_kv", 40, [300]), decode("bf16", 40, [300])
    q8_0 = decode("q8_0", 40, [300])
    wide = {**bf16, "q": bf16["q"].float()}  # computed in f32
    for arguments, expected in ((q8_kv, True), (bf16, True), (q8_0, False), (wide, False)):
        assert (products(lambda: attention("onednn", arguments)) > 0) == expected  # noqa: B023
    for rows, expected in ((40, True), (41, False)):
        least_rows(rows)
        assert (products(lambda: attention("onednn", q8_kv)) > 0) == expected
    for ours, theirs in zip(attention("avx512_bf16", bf16), attention("onednn", bf16), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="rows: 0, expected at least 1"):
        least_rows(0)


def test_other_levels_make_no_products():
    arguments = decode("q8_kv", 64, [300])
    for isa in torch_flash_mla.available_isas():
        made = products(lambda: attention(isa, arguments))  # noqa: B023
        assert (made > 0) == (isa == "onednn"), isa


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "FLASHMLA_ISA": "", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


ONE_CALL = """
import torch, torch_flash_mla
from torch_flash_mla import ops
q, cache = torch.randn(2, 1, 128, 576).bfloat16(), torch.randn(2, 200, 576).bfloat16()
lengths = torch.tensor([200, 70], dtype=torch.int32)
ops.mla_attention(q, cache, None, lengths, 512, 0.1)
print(torch_flash_mla.cpu_isa(), ops.onednn_stats()[0] > 0)
"""


def amx() -> bool:
    with open("/proc/cpuinfo") as file:
        return "amx_int8" in file.read()


def test_never_chosen_without_amx():
    """Nothing of it runs, not even a probe, unless the level is asked for."""
    if amx():
        assert run_python(ONE_CALL) == "onednn True"
        # The instruction set that oneDNN may use counts, not the CPU's.
        assert run_python(ONE_CALL, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16") == "avx512_bf16 False"
    else:
        assert run_python(ONE_CALL) == "avx512_bf16 False"
    assert run_python(ONE_CALL, FLASHMLA_ISA="onednn") == "onednn True"


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_VNNI"])
def test_a_limited_onednn_does_not_offer_it(limit):
    code = "import torch_flash_mla; print(torch_flash_mla.available_isas())"
    assert "onednn" not in run_python(code, ONEDNN_MAX_CPU_ISA=limit)


def test_switching_onednn_off():
    """torch.backends.mkldnn.enabled = False: the level is not offered, and computes without."""
    arguments = decode("bf16", 64, [200])
    expected, _ = attention("avx512_bf16", arguments)
    with torch_flash_mla.force_isa("onednn"), torch.backends.mkldnn.flags(enabled=False):
        assert "onednn" not in torch_flash_mla.available_isas()
        before = ops.onednn_stats()[0]
        assert torch.equal(ops.mla_attention(**arguments)[0], expected)
        assert ops.onednn_stats()[0] == before


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cache_format", ["bf16", "q8_kv", "q6_0"])
def test_nothing_is_compiled_after_warmup(cache_format, threads):
    """On any thread of the pool; any batch, lengths, heads and query tokens."""
    before = torch.get_num_threads()
    failures = []

    def calls() -> None:  # a thread without compiled products, whose pool is new as well
        torch.set_num_threads(threads)
        arguments = decode(cache_format, 1, [300])
        cache = arguments["kv_cache"]
        options = {"kv_cache_dtype": arguments["kv_cache_dtype"]}
        weight = torch.randn(8, 128 + 128, L).bfloat16() * L**-0.5
        options |= {"w_kv_b": weight, "v_head_dim": 128}
        with torch_flash_mla.force_isa("avx512_bf16"):
            idle = shapes(lambda: torch_flash_mla.warmup(cache, L, L + R, **options))
        with torch_flash_mla.force_isa("onednn"):
            first = shapes(lambda: torch_flash_mla.warmup(cache, L, L + R, **options))
            again = shapes(lambda: torch_flash_mla.warmup(cache, L, L + R, **options))
            later = 0
            for heads, lengths in ((128, [1, 900, 64]), (16, [130] * 7), (3, [2000]), (80, [192])):
                call = decode(cache_format, heads, lengths)
                later += shapes(lambda: ops.mla_attention(**call))  # noqa: B023
            call = decode(cache_format, 8, [400])
            call["q"] = torch.randn(1, 333, 8, 192).bfloat16()
            call |= {"w_kv_b": weight, "head_dim_v": 128, "causal": True, "form": "expanded"}
            later += shapes(lambda: ops.mla_attention_kv_b(**call))
        failures.append((idle, again, later))
        print(f"{cache_format}, {threads} threads: {first} shapes, {first / threads:.0f} each")
        assert first % threads == 0
        assert first > 0

    try:
        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert failures == [(0, 0, 0)]


def test_warmup_refuses_what_is_no_cache():
    with torch_flash_mla.force_isa("onednn"):
        with pytest.raises(ValueError, match=r"kv_cache: got shape \[5, 576\], expected"):
            torch_flash_mla.warmup(torch.zeros(5, 576), L, L + R)
        with pytest.raises(ValueError, match="kv_cache"):
            torch_flash_mla.warmup(torch.zeros(5, 16, 100), L, L + R)


def test_threads_of_the_caller_and_other_products_in_between():
    """Several Python threads at once, each with products of torch's own between the calls."""
    problems = [decode(f, heads, [500, 90]) for f in ("bf16", "q8_kv") for heads in (16, 48, 128)]
    with torch_flash_mla.force_isa("onednn"):
        expected = [ops.mla_attention(**p)[0] for p in problems]
        weight = torch.randn(256, 256).bfloat16()
        product = torch.mm(weight, weight)
        wrong = []

        def work(seed: int) -> None:
            for i in range(12):
                k = (seed * 5 + i) % len(problems)
                if not torch.equal(ops.mla_attention(**problems[k])[0], expected[k]):
                    wrong.append(("attention", seed, i))
                if not torch.equal(torch.mm(weight, weight), product):
                    wrong.append(("mm", seed, i))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("q_len", [1, 100])
def test_deterministic_on_any_number_of_threads(q_len):
    arguments = decode("bf16", 16, [1500, 200])
    arguments |= {"q": torch.randn(2, q_len, 16, L + R).bfloat16(), "causal": True}
    torch.use_deterministic_algorithms(True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention("onednn", arguments))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(lse, results[0][1])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
