"""How exact attention is, for every level, format, size, layout and kind of visibility.

The cases, their tensors and the bounds are in mla_cases.py. By default: a pairwise cover, random
sizes, and the error of INT8 over many draws. ``-m exhaustive`` runs the full product of sizes.
"""

import dataclasses
import functools
import itertools

import mla_cases
import pytest
import torch
from mla_cases import FACTORS, FORMATS, Case, check, make_problem, pairwise, possible, random_case

import torch_flash_mla
from torch_flash_mla import ops, reference

ISAS = torch_flash_mla.available_isas()
COVER = [Case(**c) for c in pairwise({"isa": ISAS, **FACTORS}, possible)]
RANDOM = [(isa, seed) for isa in ISAS for seed in range(ISAS.index(isa), 60, len(ISAS))]


def run(case: Case, problem: mla_cases.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    with torch_flash_mla.force_isa(case.isa):
        return ops.mla_attention(**problem.arguments)


@pytest.mark.parametrize("case", COVER, ids=str)
def test_pairwise_cover(case):
    problem = make_problem(case)
    check(problem, *run(case, problem))


@pytest.mark.parametrize(("isa", "seed"), RANDOM)
def test_random_sizes(isa, seed):
    case = random_case(isa, seed)
    problem = make_problem(case)
    check(problem, *run(case, problem))


@functools.cache
def draws(cache_format: str, kind: str) -> mla_cases.Problem:
    """50 sequences, each a draw."""
    case = Case("scalar", cache_format, heads=16)
    factors = {"peaky": {"q_factor": 3.0}, "sink": {"key_factor": 4.0}}.get(kind, {})
    return make_problem(case, list(range(250, 300)), **factors)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["normal", "peaky", "sink"])
@pytest.mark.parametrize("cache_format", mla_cases.PACKED_FORMATS)
def test_pooled_error_of_packed_formats(cache_format, kind, isa):
    """The error of the result is that of the storage, times what the arithmetic adds to it."""
    problem = draws(cache_format, kind)
    case = dataclasses.replace(problem.case, isa=isa)
    out, lse = run(case, problem)
    original, _ = problem.expected_of_original()
    stored, stored_lse = problem.expected()
    error = (out - original).square().sum(dim=(1, 2, 3))
    storage = (stored - original).square().sum(dim=(1, 2, 3))
    pooled = (error.sum() / storage.sum()).sqrt()
    worst = (error / storage).sqrt().max()
    assert pooled <= mla_cases.POOLED_RATIO[case.arithmetic][kind]
    assert worst <= mla_cases.PACKED_RATIO[case.arithmetic]
    assert (lse - stored_lse).abs().max() <= mla_cases.PACKED_LSE_ERROR[case.arithmetic][kind]


@pytest.mark.parametrize("keys", ["all", "causal", "leftpad", "bool_mask", "each"])
@pytest.mark.parametrize("heads", [1, 16, 20, 64, 128])
@pytest.mark.parametrize(
    "isa", [i for i in ISAS if mla_cases.arithmetic(i, "q8_kv", torch.float32) == "INT8"]
)
def test_large_logits_are_refined(isa, heads, keys):
    """Rounded queries alone would leave logits this large off by up to 0.3."""
    case = Case(isa, "q8_kv", heads, length=700, q_len=3, keys=keys)
    problem = make_problem(case, q_factor=5)
    out, lse = run(case, problem)
    check(problem, out, lse)
    expected = problem.expected()[1]
    error = (lse.double() - expected).masked_fill(expected == -torch.inf, 0).abs().max()
    assert error <= 5e-3


@pytest.mark.parametrize("isa", ISAS)
def test_code_that_no_encoder_writes(isa):
    """-128 in q8_0: integer sums hold it too."""
    cache = torch.full((1, 128, 612), 0x80, dtype=torch.uint8)
    cache[..., 576:] = torch.ones(18, dtype=torch.float16).view(torch.uint8)
    q = torch.zeros(1, 1, 1, 576)
    for first, value in ((0, 1e-4), (0, 1e-2), (512, 1e-2)):
        q[..., first : first + 64] = value
        arguments = {
            "q": q,
            "kv_cache": cache,
            "block_table": torch.zeros(1, 1, dtype=torch.int32),
            "cache_seqlens": torch.tensor([128], dtype=torch.int32),
            "head_dim_v": 512,
            "softmax_scale": 0.1,
            "kv_cache_dtype": "q8_0",
        }
        with torch_flash_mla.force_isa(isa):
            out, lse = ops.mla_attention(**arguments)
        expected, expected_lse = reference.mla_attention(**arguments)
        assert torch.allclose(out.double(), expected, rtol=1e-3)
        assert torch.allclose(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)


def test_cover_has_every_pair():
    factors = {"isa": ISAS, **FACTORS}
    seen = {
        pair
        for case in COVER
        for pair in itertools.combinations([(name, getattr(case, name)) for name in factors], 2)
    }
    for a, b in itertools.combinations(factors, 2):
        for x, y in itertools.product(factors[a], factors[b]):
            assert ((a, x), (b, y)) in seen or not possible({a: x, b: y})


@pytest.mark.exhaustive
@pytest.mark.parametrize("heads", FACTORS["heads"])
@pytest.mark.parametrize("dims", FACTORS["dims"], ids=str)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_full_product(cache_format, dims, heads):
    """Level x page x query length x dtype of the queries; all lengths are one batch."""
    if not possible({"cache_format": cache_format, "dims": dims}):
        pytest.skip("the format does not hold these dims")
    for q_len, q_dtype in itertools.product(FACTORS["q_len"], FACTORS["q_dtype"]):
        keys = "causal" if q_len > 1 else "all"
        expected = {}  # the same for all pages
        for page in FACTORS["page"]:
            case = Case(
                "", cache_format, heads, dims, page, q_len=q_len, q_dtype=q_dtype, keys=keys
            )
            problem = make_problem(case, FACTORS["length"])
            problem.share_expected(expected)
            for isa in ISAS:
                problem.case = dataclasses.replace(case, isa=isa)
                check(problem, *run(problem.case, problem))
