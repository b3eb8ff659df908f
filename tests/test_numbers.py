"""Numbers that are not finite, or barely: what reaches a result, and what must not.

A query row is computed beside others, over tiles of keys that some of them do not see. Whatever
stands in a key that a row does not see, its result is that of the float64 reference over the keys
it sees; a row without keys is exactly 0. Logits may be as large as float32 goes.
"""

from __future__ import annotations

from typing import Any

import mla_cases
import pytest
import torch
from mla_cases import FLOAT_FORMATS, FORMATS
from torch import Tensor

import torch_flash_mla
from torch_flash_mla import ops, reference
from torch_flash_mla.formats import PACKED_FORMATS

ISAS = torch_flash_mla.available_isas()
L, R = 128, 32
SCALE = 0.07
NOT_FINITE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}

# Relative, of results in bf16, against the reference over the stored values: what the arithmetic
# adds (INT8 rounds queries and staged rows to 8 bits).
ERROR = {"F32": 5e-3, "BF16": 5e-3, "INT16": 5e-3, "INT8": 5e-2}

pytestmark = pytest.mark.parametrize("cache_format", FORMATS)


def stored(rows: Tensor, cache_format: str) -> Tensor:
    """Rows [B, N, L + R] as a cache of one page per sequence."""
    if cache_format in PACKED_FORMATS:
        return reference.encode_rows(rows[..., :L], rows[..., L:], cache_format)
    return rows.to(FLOAT_FORMATS[cache_format])


def poison(cache: Tensor, keys: Any, value: float) -> Tensor:
    """The cache with the rows ``keys`` of every sequence not finite: values, or scales."""
    cache = cache.clone()
    cache[:, keys] = 255 if cache.dtype == torch.uint8 else value
    return cache


def arguments(cache: Tensor, q: Tensor, cache_format: str, **more: Any) -> dict[str, Any]:
    """Those of a call over all rows of a cache."""
    return {
        "q": q,
        "kv_cache": cache,
        "block_table": None,
        "cache_seqlens": torch.full((len(cache),), cache.shape[1], dtype=torch.int32),
        "head_dim_v": L,
        "softmax_scale": SCALE,
        "kv_cache_dtype": cache_format if cache_format in PACKED_FORMATS else "auto",
        **more,
    }


def check(case: mla_cases.Case, given: dict[str, Any], expected: tuple[Tensor, Tensor]) -> None:
    """Results are the expected ones, row by row; those that are expected not to be finite are."""
    out, lse = ops.mla_attention(**given)
    want, want_lse = expected
    none = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, none)
    assert (out.transpose(1, 2)[none] == 0).all()
    wrong = ~want.isfinite().all(-1)
    assert torch.equal(~out.isfinite().all(-1), wrong)
    error = (out.double() - want).masked_fill(wrong[..., None], 0).norm()
    assert error <= ERROR[case.arithmetic] * want.masked_fill(wrong[..., None], 0).norm()


@pytest.fixture(params=ISAS)
def case(request, cache_format):
    """The level and what it computes in; queries are bf16."""
    with torch_flash_mla.force_isa(request.param):
        yield mla_cases.Case(request.param, cache_format, q_dtype=torch.bfloat16)


@pytest.mark.parametrize("heads", [3, 80])
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("keys", ["holes", "holes_per_head", "causal", "window"])
def test_keys_that_a_row_does_not_see(case, cache_format, keys, value, heads):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 144, L + R, generator=generator)
    q = torch.randn(2, 3, heads, L + R, generator=generator).bfloat16()
    if keys == "causal":
        hidden: Any = [143]  # the last key, which only the last query sees
        more: dict[str, Any] = {"causal": True}
    elif keys == "window":
        hidden, more = [100], {"causal": True, "window": 43}  # it starts at 99, 100, 101
    else:
        hidden = [0, 5, *range(20, 37), 130]
        mask = torch.ones(2, heads if keys == "holes_per_head" else 1, 3, 144, dtype=torch.bool)
        mask[..., hidden] = False
        if keys == "holes_per_head":
            mask[:, 0, 1, hidden] = True  # one row sees them
        more = {"attn_mask": mask}
    given = arguments(poison(stored(rows, cache_format), hidden, value), q, cache_format, **more)
    clean = given | {"kv_cache": stored(rows, cache_format)}
    out, lse = reference.mla_attention(**clean)
    seen = {
        "causal": [2],
        "window": [0, 1],
        "holes": [],
        "holes_per_head": [1],
    }[keys]
    for s in seen:
        head = slice(1) if keys == "holes_per_head" else slice(None)
        out[:, s, head] = torch.nan
        lse[:, head, s] = torch.nan
    check(case, given, (out, lse))


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("n", [17, 64, 128])
def test_rows_without_keys(case, cache_format, n, value):
    """Left padding, and mask rows of False; tiles with and without padding."""
    generator = torch.Generator().manual_seed(0)
    cache = stored(torch.randn(1, n, L + R, generator=generator), cache_format)
    q = torch.randn(1, n, 4, L + R, generator=generator).bfloat16()
    pad = {"causal": True, "cache_leftpad": torch.tensor([3], dtype=torch.int32)}
    blind = q.clone()
    blind[:, :3] = value  # their own queries are not finite
    expected = reference.mla_attention(**arguments(cache, q, cache_format, **pad))
    for queries in (q, blind):
        given = arguments(poison(cache, slice(3), value), queries, cache_format, **pad)
        check(case, given, expected)
    for shape in ((1, 1, n, n), (1, 4, n, n)):
        mask = torch.ones(shape, dtype=torch.bool)
        mask[:, :, :3] = False
        given = arguments(cache, q, cache_format, attn_mask=mask)
        expected = reference.mla_attention(**given)
        check(case, given | {"q": blind}, expected)


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("n", [9, 70])
def test_weight_that_is_not_finite(case, cache_format, n, form, value, part):
    """Its head's rows without keys are 0 nevertheless, and other heads are what they are."""
    generator = torch.Generator().manual_seed(0)
    nope, width, heads, pad = 24, 40, 4, 3
    cache = stored(torch.randn(1, n, L + R, generator=generator), cache_format)
    q = torch.randn(1, n, heads, nope + R, generator=generator).bfloat16()
    w = (torch.randn(heads, nope + width, L, generator=generator) / L**0.5).bfloat16()
    given = arguments(cache, q, cache_format, causal=True) | {
        "w_kv_b": w,
        "head_dim_v": width,
        "cache_leftpad": torch.tensor([pad], dtype=torch.int32),
    }
    expected, expected_lse = reference.mla_attention_kv_b(**given)
    spoilt = w.clone()
    spoilt[1, 5 if part == "keys" else nope + 7, 11] = value
    out, lse = ops.mla_attention_kv_b(**given | {"w_kv_b": spoilt}, form=form)
    assert (out[:, :pad] == 0).all()
    assert (lse[:, :, :pad] == -torch.inf).all()
    finite = out.isfinite().all(-1) & lse.isfinite().transpose(1, 2)
    assert not finite[:, pad:, 1].any()
    others = [0, 2, 3]
    error = (out[:, :, others].double() - expected[:, :, others]).norm()
    assert error <= 2 * ERROR[case.arithmetic] * expected[:, :, others].norm()
    assert (lse - expected_lse)[:, others, pad:].abs().max() <= 0.1


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_query_that_is_not_finite(case, cache_format, value):
    """It spoils its own result, and no other."""
    generator = torch.Generator().manual_seed(0)
    cache = stored(torch.randn(1, 200, L + R, generator=generator), cache_format)
    q = torch.randn(1, 2, 20, L + R, generator=generator).bfloat16()
    expected = reference.mla_attention(**arguments(cache, q, cache_format))
    q[0, 1, 7, 3] = value
    for result in (expected[0][0, 1, 7], expected[1][0, 7, 1]):
        result.fill_(torch.nan)
    check(case, arguments(cache, q, cache_format), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("logit", [-60.0, -90.0, -150.0, -1e4, -1e30])
def test_large_negative_logits(case, cache_format, logit, threads):
    """Of a row beside one that sees one tile more."""
    generator = torch.Generator().manual_seed(0)
    n = 129
    key = torch.randn(L + R, generator=generator)
    cache = stored(key + 0.1 * torch.randn(1, n, L + R, generator=generator), cache_format)
    q = (logit / key.square().sum() / SCALE * key).expand(1, 2, 16, L + R).bfloat16()
    given = arguments(cache, q.contiguous(), cache_format, causal=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, _ = ops.mla_attention(**given)
    finally:
        torch.set_num_threads(before)
    assert out.isfinite().all()
    # Weights depend on differences of logits that no format holds; the values are alike.
    expected, _ = reference.mla_attention(**given)
    assert (out.double() - expected).norm() <= 0.2 * expected.norm()


# Products of queries and keys, and the scale that makes logits of them: any logit of float32, also
# where the product alone is beyond it.
RANGES = [(1e3, 1.0), (1e10, 1.0), (2e38, 1.0), (3.2e38, 1.0), (3e38, 0.07), (1e3, 1e29)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("logit", "scale"), RANGES)
def test_logits_over_the_range_of_float32(case, cache_format, logit, scale, sign):
    """One key has the largest logit, near the others by the half: it takes all."""
    generator = torch.Generator().manual_seed(1)
    n, heads = 150, 16
    key = torch.randn(L + R, generator=generator)
    key *= (L + R) ** 0.5 / key.norm()
    rows = (0.05 * torch.randn(2, n, L + R, generator=generator) + 0.4 * key) * sign
    rows[:, 77] = key if sign > 0 else -0.1 * key
    cache = stored(rows, cache_format)
    q = (logit / scale / key.double().square().sum() * key.double()).expand(2, 1, heads, L + R)
    given = arguments(cache, q.float().bfloat16(), cache_format, softmax_scale=scale)
    assert given["q"].isfinite().all()
    out, lse = ops.mla_attention(**given)
    expected, expected_lse = reference.mla_attention(**given)
    assert out.isfinite().all()
    assert (out.double() - expected).norm() <= ERROR[case.arithmetic] * expected.norm()
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-2)
