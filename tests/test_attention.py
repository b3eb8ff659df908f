"""What attention promises besides accuracy: empty rows, splits, determinism, memory, odd inputs."""

import math

import mla_cases
import pytest
import torch
from mla_cases import FORMATS, Case, check, make_problem

import torch_flash_mla
from torch_flash_mla import ops, reference

ISAS = torch_flash_mla.available_isas()
# One case for each arithmetic that a level has over each format.
NATIVE = [
    Case(isa, cache_format, heads=6, dims=(128, 32), q_dtype=q_dtype)
    for isa in ISAS
    for cache_format in FORMATS
    for q_dtype in ((torch.bfloat16, torch.float32) if cache_format == "bf16" else (torch.float32,))
]


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(problem: mla_cases.Problem, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    with torch_flash_mla.force_isa(problem.case.isa):
        return ops.mla_attention(**problem.arguments | changes)


def vary(case: Case, **changes) -> Case:
    return Case(**{**vars(case), **changes})


@pytest.mark.parametrize("case", NATIVE, ids=str)
class TestEachArithmetic:
    def test_rows_without_keys(self, case):
        """No key by length, by causality, by padding, by mask: exactly 0 and minus infinity."""
        problem = make_problem(vary(case, q_len=4, keys="causal"), [0, 2, 40, 300])
        check(problem, *run(problem))
        assert (problem.expected()[1] == -torch.inf).sum() == (4 + 2) * case.heads

        hidden = torch.zeros(4, 1, 4, 300, dtype=torch.bool)
        hidden[1:3, :, 1] = True  # in sequences 1 and 2 the second query may look
        problem.arguments["attn_mask"] = hidden
        problem = mla_cases.Problem(problem.case, problem.arguments, problem.rows)
        check(problem, *run(problem))

        leftpad = torch.tensor([0, 2, 40, 300], dtype=torch.int32)
        out, lse = run(problem, attn_mask=None, cache_leftpad=leftpad)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()

    @pytest.mark.parametrize("hidden", [-torch.inf, "lowest", -1e30])
    def test_masks_with_holes(self, case, hidden):
        """Whole tiles hidden at the start, in the middle and at the end; a sink in addition."""
        problem = make_problem(vary(case, q_len=2, sink=True), [700])
        dtype = torch.bfloat16 if hidden == "lowest" else torch.float32
        value = torch.finfo(dtype).min if hidden == "lowest" else hidden
        mask = torch.zeros(1, 1, 2, 700, dtype=dtype)
        mask[..., :130], mask[..., 200:460], mask[..., 1, 600:] = value, value, value
        problem.arguments["attn_mask"] = mask
        check(problem, *run(problem))

    def test_splits(self, case, threads):
        """One long sequence on several threads is cut into parts and merged."""
        problem = make_problem(vary(case, heads=3, keys="causal", q_len=2, sink=True), [3000])
        for count in (1, 2, 5):
            threads(count)
            check(problem, *run(problem))

    def test_deterministic(self, case, threads, deterministic):
        """Bits depend on the sequence alone: not on threads, not on the rest of the batch."""
        problem = make_problem(vary(case, heads=3, q_len=2, keys="causal"), [2100, 17, 0])
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run(problem))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(lse, results[0][1])
        arguments = problem.arguments
        for b in range(3):
            alone = {
                name: arguments[name][b : b + 1] for name in ("q", "cache_seqlens", "block_table")
            }
            out, lse = run(problem, **alone)
            assert torch.equal(out, results[0][0][b : b + 1])
            assert torch.equal(lse, results[0][1][b : b + 1])

    def test_huge_logits(self, case):
        """Logits that fit float32 never give NaN, whatever their size and sign."""
        for factor in (1e4, -1e4, 1e15):
            problem = make_problem(vary(case, q_dtype=torch.float32), [300, 1])
            out, lse = run(problem, q=problem.arguments["q"] * factor)
            assert out.isfinite().all()
            assert lse.isfinite().all()
            # One key has all the weight, so the result is one of the rows (nearly: two may tie).
            stored = problem.arguments | {"q": problem.arguments["q"] * factor}
            expected = reference.mla_attention(**stored)[0]
            assert out.norm() <= 1.05 * expected.norm()

    def test_negative_scale(self, case):
        problem = make_problem(case, [200, 31])
        problem.arguments["softmax_scale"] *= -1
        check(problem, *run(problem))

    def test_zero_scale(self, case):
        problem = make_problem(case, [200, 31])
        problem.arguments["softmax_scale"] = 0.0
        check(problem, *run(problem))

    def test_zero_scale_with_skipped_entries(self, case):
        """Tiles of a list whose entries are all skipped add nothing, whatever the scale."""
        problem = make_problem(case, [300, 31])
        indices = torch.full((2, 1, 300), -1, dtype=torch.int32)
        indices[:, :, 260:270] = torch.arange(10, dtype=torch.int32)
        problem.arguments |= {"softmax_scale": 0.0, "indices": indices}
        check(problem, *run(problem))

    def test_non_finite_input_stays_in_its_row(self, case):
        """A NaN in one query changes that query only; one in a visible key, that sequence only."""
        problem = make_problem(case, [200, 31])
        clean, _ = run(problem)
        q = problem.arguments["q"].clone()
        q[0, 0, 2, 5] = torch.nan
        out, lse = run(problem, q=q)
        others = [h for h in range(case.heads) if h != 2]
        assert torch.equal(out[1], clean[1])
        assert torch.equal(out[0][:, others], clean[0][:, others])
        assert out[0, 0, 2].isnan().all()
        assert lse[0, 2, 0].isnan()

        kv_cache, table = problem.arguments["kv_cache"].clone(), problem.arguments["block_table"]
        poison = 255 if case.packed else torch.nan
        kv_cache[int(table[0, 1]), 3] = poison
        out, lse = run(problem, kv_cache=kv_cache)
        assert torch.equal(out[1], clean[1])
        assert out[0].isnan().all()
        assert lse[0].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [1, 2, 5, 31, 33, 100, 127, 129, 255, 256])
def test_any_number_of_heads(heads, isa):
    case = Case(isa, "fp32", heads=heads, dims=(32, 8), q_len=3, keys="causal", sink=True)
    problem = make_problem(case, [150, 3])
    check(problem, *run(problem))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dims", [(1, 0), (1, 1), (2, 3), (31, 33), (513, 7), (1024, 64)], ids=str)
@pytest.mark.parametrize("cache_format", mla_cases.FLOAT_FORMATS)
def test_any_dims_of_float_caches(cache_format, dims, isa):
    for q_dtype in (torch.bfloat16, torch.float32):
        case = Case(isa, cache_format, heads=5, dims=dims, q_len=2, q_dtype=q_dtype, keys="causal")
        problem = make_problem(case, [140, 33])
        # Few values cannot average rounding errors: the bound is the worst rounding of one value.
        out, lse = run(problem)
        expected, expected_lse = problem.expected()
        bound = 1.2 * mla_cases.UNIT_ROUNDOFF[q_dtype] + mla_cases.FLOAT_ERROR[q_dtype]
        assert (out - expected).norm() <= bound * expected.norm()
        assert (lse - expected_lse).abs().max() <= mla_cases.FLOAT_LSE_ERROR


@pytest.mark.parametrize("shape", [(0, 1), (2, 0), (0, 0)], ids=str)
def test_nothing_to_do(shape):
    batch, q_len = shape
    out, lse = ops.mla_attention(
        torch.zeros(batch, q_len, 4, 40),
        torch.zeros(3, 16, 40),
        torch.zeros(batch, 2, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
        32,
        1.0,
    )
    assert out.shape == (batch, q_len, 4, 32)
    assert lse.shape == (batch, 4, q_len)


@pytest.mark.parametrize("isa", ISAS)
def test_window_without_causal(isa):
    """The window is the end of the keys for every query alike."""
    problem = make_problem(Case(isa, "fp32", heads=2, q_len=3, keys="window"), [400, 5])
    for window in (1, 5, 6, 399, 400, 2**31 - 1):
        problem.arguments["window"] = window
        fresh = mla_cases.Problem(problem.case, problem.arguments, problem.rows)
        fresh.arguments["kv_cache"] = fresh.arguments["kv_cache"].nan_to_num()
        check(fresh, *run(fresh))


@pytest.mark.parametrize("isa", ISAS)
def test_the_sink_counts_once(isa, threads):
    """With and without splits; a sink of minus infinity is none."""
    case = Case(isa, "fp32", heads=2, sink=True)
    problem = make_problem(case, [4000])
    none, lse_none = run(problem, attn_sink=None)
    for count in (1, 4):
        threads(count)
        out, lse = run(problem)
        check(problem, out, lse)
        torch.testing.assert_close(lse, lse_none, rtol=0, atol=1e-5)
        weight = 1 / (1 + (problem.arguments["attn_sink"] - lse_none[0, :, 0]).exp())
        torch.testing.assert_close(out, none * weight[:, None], rtol=1e-4, atol=1e-6)
        infinite, _ = run(problem, attn_sink=torch.full((2,), -torch.inf))
        torch.testing.assert_close(infinite, none, rtol=1e-5, atol=1e-6)


def test_levels_agree():
    """The same call on every level, which differ by rounding only."""
    problem = make_problem(Case("scalar", "bf16", q_len=2, keys="causal"), [333, 20])
    for isa in ISAS:
        problem.case = vary(problem.case, isa=isa)
        check(problem, *run(problem))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["bf16", "q8_kv"])
def test_scratch_does_not_grow_with_the_context(cache_format, isa):
    """A decode call holds the same memory at 1k and at 128k keys."""
    held = []
    for length in (1024, 128 * 1024):
        case = Case(isa, cache_format, heads=1, dims=(32, 32), length=length)
        dtype = torch.bfloat16 if cache_format == "bf16" else torch.uint8
        width = 64 if cache_format == "bf16" else 72
        blocks = length // 64
        arguments = {
            "q": torch.ones(1, 1, 1, 64, dtype=torch.bfloat16),
            "kv_cache": torch.zeros(blocks, 64, width, dtype=dtype),
            "block_table": torch.arange(blocks, dtype=torch.int32)[None],
            "cache_seqlens": torch.tensor([length], dtype=torch.int32),
            "head_dim_v": 32,
            "softmax_scale": 1.0,
            "kv_cache_dtype": "auto" if cache_format == "bf16" else cache_format,
        }
        for _ in range(3):  # any thread may have run the work
            with torch_flash_mla.force_isa(case.isa):
                ops.mla_attention(**arguments)
        held.append(ops.scratch_bytes())
    assert held[0] == held[1]


# Merging partial results


def states(dtype=torch.float32, batch=2, q_len=3, heads=4, width=40):
    generator = torch.Generator().manual_seed(0)
    out = [torch.randn(batch, q_len, heads, width, generator=generator).to(dtype) for _ in "ab"]
    lse = [3 * torch.randn(batch, heads, q_len, generator=generator) for _ in "ab"]
    lse[0][0, 1, 2] = -torch.inf
    lse[1][0, 1, 2] = -torch.inf
    lse[0][1, 0] = -torch.inf
    lse[1][1, 2] = -torch.inf
    out[0][1, :, 0] = torch.nan  # never looked at: its part has no key
    return out[0], lse[0], out[1], lse[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_sink", [False, True])
def test_merge_attn_states(dtype, with_sink):
    parts = states(dtype)
    sink = torch.randn(4) if with_sink else None
    out, lse = ops.merge_attn_states(*parts, sink)
    expected, expected_lse = reference.merge_attn_states(*parts, sink)
    assert out.dtype == dtype
    assert (out[0, 2, 1] == 0).all()
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= mla_cases.FLOAT_ERROR[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_sink", [False, True])
def test_merging_halves_is_attending_to_all(with_sink):
    problem = make_problem(Case(ISAS[-1], "fp32", heads=5, q_len=2, sink=with_sink), [300, 9])
    sink = problem.arguments.pop("attn_sink", None)
    column = torch.arange(300)
    parts = []
    for keep in (column < 123, column >= 123):  # the second sequence has no key in one half
        parts += run(problem, attn_mask=keep[None, None, None])
    out, lse = ops.merge_attn_states(*parts, sink)
    whole, whole_lse = run(problem, attn_sink=sink)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)


# Through the weight of kv_b_proj


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_kv_b_form(cache_format, q_dtype, split):
    """Queries and values of the model; projections round like the dtype, and not much worse."""
    case = Case(
        ISAS[-1], cache_format, heads=4, dims=(96, 32), q_len=2, q_dtype=q_dtype, keys="causal"
    )
    problem = make_problem(case, [130, 7, 0])
    generator = case.generator()
    nope, value = 40, 24
    w = (torch.randn(4, nope + value, 96, generator=generator) / 10).to(q_dtype)
    q = torch.randn(3, 2, 4, nope + 32, generator=generator).to(q_dtype)
    arguments = {name: v for name, v in problem.arguments.items() if name != "head_dim_v"}
    arguments |= {"q": q, "w_kv_b": w, "head_dim_v": value}
    if split:
        arguments |= {"q": q[..., :nope], "q_pe": q[..., nope:]}
    expected, expected_lse = reference.mla_attention_kv_b(**arguments)
    out, lse = ops.mla_attention_kv_b(**arguments)
    assert out.dtype == q_dtype
    assert out.shape == (3, 2, 4, value)
    assert (out[2] == 0).all()
    error = (out.double() - expected).norm() / expected.norm()
    # Two roundings of projections besides that of the attention; INT8 as a part of the output.
    bound = 4 * mla_cases.FLOAT_ERROR[q_dtype] + (2e-2 if case.packed else 0)
    assert error <= bound
    seen = expected_lse.isfinite()
    assert (lse[seen] - expected_lse[seen]).abs().max() <= 0.1


def test_kv_b_form_in_the_reference_is_the_expanded_attention():
    """The reference itself, against keys and values made from the latent (float64)."""
    problem = make_problem(Case("scalar", "fp32", heads=3, dims=(16, 8), q_len=3), [20, 20])
    rows = problem.rows.double()
    w, q = torch.randn(3, 6 + 5, 16).double(), torch.randn(2, 3, 3, 6 + 8).double()
    lengths = torch.tensor([20, 20])
    out, lse = reference.mla_attention_kv_b(q, rows, None, lengths, w, 5, 0.3, causal=True)
    latent, rope = rows[..., :16], rows[..., 16:]
    keys = torch.einsum("btl,hpl->bhtp", latent, w[:, :6])
    keys = torch.cat([keys, rope[:, None].expand(-1, 3, -1, -1)], dim=-1)
    values = torch.einsum("btl,hvl->bhtv", latent, w[:, 6:])
    logits = 0.3 * torch.einsum("bshd,bhtd->bhst", q, keys)
    logits.masked_fill_(~torch.ones(3, 20, dtype=torch.bool).tril(17), -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    expected = torch.einsum("bhst,bhtv->bshv", logits.softmax(-1), values)
    torch.testing.assert_close(out, expected)


# The rest of the reference


def test_reference_of_sparse_indices():
    """Chosen positions are a mask; -1, positions beyond the length and the tail are skipped, and a
    key that is listed twice counts twice."""
    problem = make_problem(Case("scalar", "fp32", heads=2, dims=(16, 8), q_len=2), [30, 12])
    indices = torch.tensor([[[3, -1, 29, 4], [0, 1, 2, 2]], [[11, 12, 5, -1], [40, 0, -1, 7]]])
    topk_length = torch.tensor([4, 3])
    mask = torch.full((2, 1, 2, 30), -torch.inf)
    for b, s, positions in [(0, 0, [3, 29, 4]), (0, 1, [0, 1, 2]), (1, 0, [11, 5]), (1, 1, [0])]:
        mask[b, 0, s, positions] = 0.0
    mask[0, 0, 1, 2] = math.log(2.0)
    sparse = {"indices": indices, "topk_length": topk_length}
    out, lse = reference.mla_attention(**problem.arguments, **sparse)
    expected, expected_lse = reference.mla_attention(**problem.arguments, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_reference_of_ragged_queries():
    problem = make_problem(Case("scalar", "fp32", heads=2, dims=(16, 8), q_len=3), [30, 12])
    arguments = problem.arguments | {"causal": True}
    out, lse = reference.mla_attention(**arguments)
    ragged = arguments | {"q": torch.cat([arguments["q"][0], arguments["q"][1, 1:]])}
    ragged["cu_seqlens_q"] = torch.tensor([0, 3, 5])
    packed, packed_lse = reference.mla_attention(**ragged)
    torch.testing.assert_close(packed, torch.cat([out[0], out[1, 1:]]))
    torch.testing.assert_close(packed_lse, torch.cat([lse[0], lse[1, :, 1:]], dim=-1))
