"""Decoding with mla_attention_kv_b: the projections that stream the weight.

The truth is the float64 reference. A step is right for every dtype, width and stride of the weight,
its results depend on their own token, head and sequence alone, and it is one parallel region.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from mla_cases import FLOAT_FORMATS, FORMATS, Case, make_problem
from test_prompts import check, run, with_weight
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torch_flash_mla
from torch_flash_mla import ops, reference
from torch_flash_mla.formats import PACKED_FORMATS

ISAS = torch_flash_mla.available_isas()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def decode(
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 4,
    lengths: tuple[int, ...] = (150, 31),
    q_len: int = 1,
    widths: tuple[int, int, int, int] = (128, 128, 512, 64),
    cache_format: str = "auto",
) -> dict[str, Any]:
    """Arguments of a decoding step; ``widths`` are P, V, L and R."""
    nope, value, latent, rope = widths
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = draw(len(lengths), max(*lengths, 1), latent + rope)
    if cache_format not in PACKED_FORMATS:
        kv_cache = rows.to(FLOAT_FORMATS.get(cache_format, dtype))
        cache_format = "auto"
    else:
        kv_cache = reference.encode_rows(rows[..., :latent], rows[..., latent:], cache_format)
    return {
        "q": draw(len(lengths), q_len, heads, nope + rope).to(dtype),
        "kv_cache": kv_cache,
        "block_table": None,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "w_kv_b": (draw(heads, nope + value, latent) * latent**-0.5).to(dtype),
        "head_dim_v": value,
        "softmax_scale": (nope + rope) ** -0.5,
        "causal": True,
        "kv_cache_dtype": cache_format,
    }


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# heads, P, V, L, R
WIDTHS = [
    (16, 128, 128, 512, 64),
    (128, 128, 128, 512, 64),
    (3, 13, 17, 45, 7),
    (1, 1, 1, 1, 0),
    (2, 9, 40, 129, 3),
    (5, 64, 96, 256, 32),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_step_agrees_with_the_reference(widths, dtype, isa):
    """Any widths, odd ones too, and a few tokens of a few sequences, one of them without keys."""
    heads, nope, value, latent, rope = widths
    turn = WIDTHS.index(widths) + DTYPES.index(dtype) + ISAS.index(isa)
    lengths = [(200,), (70, 5), (33, 0, 64), (1, 90, 17, 40, 130, 2, 3, 64)][turn % 4]
    q_len = (4, 2, 3, 1)[turn % 4]
    packed = latent % 32 == 0 and rope % 32 == 0 and turn % 2 == 0
    cache_format = ("q8_kv", "q6_0", "q8_0", "q4_kv")[turn % 4] if packed else "auto"
    arguments = decode(dtype, heads, lengths, q_len, (nope, value, latent, rope), cache_format)
    name = cache_format if packed else {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    case = Case(isa, name or "fp32", heads, (latent, rope), q_len=q_len, q_dtype=dtype)
    expected = reference.mla_attention_kv_b(**arguments)
    check(case, *run(case, arguments, "absorbed"), *expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_steps(dtype, isa):
    """Runs of sequences with one or more tokens each, masks and sinks among them."""
    case = Case(isa, "fp32", heads=3, dims=(64, 32), q_dtype=dtype, sink=True)
    problem = make_problem(case, [77, 30, 4, 150])
    arguments = with_weight(problem, 24, 40) | {
        "q": torch.randn(7, 3, 24 + 32).to(dtype),
        "cu_seqlens_q": torch.tensor([0, 1, 1, 4, 7], dtype=torch.int32),
        "causal": True,
        "window": 50,
    }
    arguments["kv_cache"] = arguments["kv_cache"].nan_to_num()
    check(case, *run(case, arguments), *reference.mla_attention_kv_b(**arguments))


def spaced(w: Tensor, dim: int) -> Tensor:
    """The same values, every second one of a tensor along a dimension; NaN between them."""
    shape = list(w.shape)
    shape[dim] *= 2
    wide = torch.full(shape, torch.nan, dtype=w.dtype)
    index: list[slice] = [slice(None)] * w.dim()
    index[dim] = slice(0, None, 2)
    wide[tuple(index)] = w
    return wide[tuple(index)]


def misaligned(w: Tensor) -> Tensor:
    memory = torch.full((w.numel() + 3,), torch.nan, dtype=w.dtype)
    memory[3:] = w.flatten()
    return memory[3:].view(w.shape)


LAYOUTS = {
    "transposed": lambda w: w.mT.contiguous().mT,
    "heads innermost": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "rows apart": lambda w: spaced(w, 1),
    "values apart": lambda w: spaced(w, 2),
    "heads apart": lambda w: spaced(w, 0),
    "off any alignment": misaligned,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_weight_change_no_bit(layout, dtype, isa):
    arguments = decode(dtype, heads=3, widths=(20, 35, 100, 12), q_len=2)
    other = arguments | {"w_kv_b": LAYOUTS[layout](arguments["w_kv_b"])}
    assert torch.equal(other["w_kv_b"], arguments["w_kv_b"])
    with torch_flash_mla.force_isa(isa):
        out, lse = ops.mla_attention_kv_b(**arguments)
        out_other, lse_other = ops.mla_attention_kv_b(**other)
    assert torch.equal(out, out_other)
    assert torch.equal(lse, lse_other)


def test_heads_that_share_one_weight():
    arguments = decode(heads=4)
    shared = arguments["w_kv_b"][:1].expand(4, -1, -1)
    out, lse = ops.mla_attention_kv_b(**arguments | {"w_kv_b": shared})
    expected, expected_lse = ops.mla_attention_kv_b(**arguments | {"w_kv_b": shared.contiguous()})
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_head_and_token(bad, dtype, isa):
    """Also behind rows whose width is no whole vector."""
    arguments = decode(dtype, heads=5, widths=(19, 21, 61, 9), lengths=(90, 40, 33))
    with torch_flash_mla.force_isa(isa):
        out, lse = ops.mla_attention_kv_b(**arguments)
        w = arguments["w_kv_b"].clone()
        w[1, :19], w[3, 19:] = bad, bad
        q = arguments["q"].clone()
        q[2, 0, 4, 0] = bad
        out_bad, lse_bad = ops.mla_attention_kv_b(**arguments | {"w_kv_b": w, "q": q})
    for token, head in itertools.product(range(3), range(5)):
        if head == 1 or (token, head) == (2, 4):
            assert not out_bad[token, 0, head].isfinite().any()
        elif head == 3:
            assert not out_bad[token, 0, head].isfinite().any()
            assert torch.equal(lse_bad[token, head], lse[token, head])
        else:
            assert torch.equal(out_bad[token, 0, head], out[token, 0, head]), (token, head)
            assert torch.equal(lse_bad[token, head], lse[token, head])


@pytest.mark.parametrize("heads", [1, 2, 16, 128])
@pytest.mark.parametrize("lengths", [(1500,), (300,) * 8], ids=["merged", "whole"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_is_one_parallel_region(threads, lengths, heads):
    """None on one thread; and no operator of ATen has a part in it."""
    torch.set_num_threads(threads)
    arguments = decode(heads=heads, lengths=lengths, widths=(32, 32, 128, 32))
    ops.mla_attention_kv_b(**arguments)
    before = ops.parallel_regions()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        ops.mla_attention_kv_b(**arguments)
    assert ops.parallel_regions() - before == (threads > 1)
    names = {event.name for event in recorded.events() if event.name.startswith("aten::")}
    assert names <= {"aten::empty", "aten::contiguous"}


def test_all_threads_have_work():
    """Heads are cut where there are fewer of them than threads: every number gives the same."""
    arguments = decode(torch.float32, heads=2, lengths=(600,))
    results = []
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        results.append(ops.mla_attention_kv_b(**arguments))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_rounded_between_the_steps(isa):
    """bf16: nearer to float64 than products whose latent results are rounded to bf16."""
    errors = {"step": 0.0, "products": 0.0}
    for seed, heads, cache_format in ((0, 16, "auto"), (1, 4, "auto"), (2, 16, "q8_kv")):
        torch.manual_seed(seed)
        arguments = decode(heads=heads, lengths=(300, 120), cache_format=cache_format)
        expected, _ = reference.mla_attention_kv_b(**arguments)
        latent = {k: v for k, v in arguments.items() if k not in ("q", "w_kv_b", "head_dim_v")}
        w_uk, w_uv = arguments["w_kv_b"].split([128, 128], dim=1)
        q = arguments["q"]
        q_latent = torch.einsum("bshp,hpl->bshl", q[..., :128], w_uk)
        with torch_flash_mla.force_isa(isa):
            out, _ = ops.mla_attention_kv_b(**arguments, form="absorbed")
            ready = torch.cat([q_latent, q[..., 128:]], -1)
            out_latent, _ = ops.mla_attention(ready, head_dim_v=512, **latent)
        by_products = torch.einsum("bshl,hvl->bshv", out_latent, w_uv)
        for name, result in (("step", out), ("products", by_products)):
            error = ((result.double() - expected).norm() / expected.norm()).item()
            errors[name] += error
            print(f"{isa}, {heads} heads, {cache_format}: {name} {error:.2e}")
    assert errors["step"] < errors["products"]


@pytest.mark.parametrize("in_order", [False, True], ids=["products", "streaming"])
@pytest.mark.parametrize("listed", [False, True], ids=["causal", "listed"])
def test_many_tokens_come_in_parts(listed, in_order):
    """More latent rows than are held at once: 96 MiB of them for products, 24 for streaming."""
    heads, latent, rope, q_len = 2000, 64, 8, 130
    arguments = decode(torch.float32, heads, (150, 3, 0), q_len, (5, 3, latent, rope))
    # Ragged: 130 tokens, 1 and none.
    arguments["q"] = torch.cat([arguments["q"][0], arguments["q"][1, :1]])
    arguments["cu_seqlens_q"] = torch.tensor([0, q_len, q_len + 1, q_len + 1], dtype=torch.int32)
    if listed:
        order = torch.rand(q_len + 1, 150).argsort(dim=1)[:, :20]
        arguments["indices"] = order.int()
    torch.use_deterministic_algorithms(in_order)
    try:
        out, lse = ops.mla_attention_kv_b(**arguments, form="absorbed")
    finally:
        torch.use_deterministic_algorithms(False)
    few = [0, 1, 777, heads - 1]  # the reference holds keys and values of every head
    expected, expected_lse = reference.mla_attention_kv_b(
        **arguments | {"q": arguments["q"][:, few], "w_kv_b": arguments["w_kv_b"][few]}
    )
    case = Case(torch_flash_mla.cpu_isa(), "fp32", q_dtype=torch.float32)
    check(case, out[:, few], lse[few], expected, expected_lse)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("widths", [(17, 24, 64, 32), (16, 24, 33, 0), (17, 24, 129, 1)])
def test_products_of_odd_depth(widths, form, isa):
    """A query or a hidden key that is NaN spoils no row beside it."""
    q_len, n = 45, 60
    arguments = decode(torch.bfloat16, 3, (n,), q_len, widths)
    mask = torch.ones(n, dtype=torch.bool)
    mask[5:21] = False
    arguments["attn_mask"] = mask
    expected, expected_lse = reference.mla_attention_kv_b(**arguments)
    arguments["q"][:, 9] = torch.nan
    arguments["kv_cache"][:, 5:21] = torch.nan
    out, lse = ops.mla_attention_kv_b(**arguments, form=form)
    assert out[:, 9].isnan().all()
    others = [t for t in range(q_len) if t != 9]
    case = Case(torch_flash_mla.cpu_isa(), "bf16", q_dtype=torch.bfloat16)
    check(case, out[:, others], lse[..., others], expected[:, others], expected_lse[..., others])


STEPS = """
import torch
from torch_flash_mla import ops
torch.set_num_threads(1)
heads, batch = {heads}, {batch}
q = torch.randn(batch, {q_len}, heads, 192).bfloat16()
w = torch.randn(heads, 256, 512).bfloat16()
torch.use_deterministic_algorithms({in_order})
held = []
for keys in {lengths}:
    cache = torch.ones(1, keys, 576, dtype=torch.bfloat16).expand(batch, -1, -1)
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    for _ in range(2):
        ops.mla_attention_kv_b(q, cache, None, lengths, w, 128, 0.07, True, form="absorbed")
    held.append(ops.scratch_bytes())
print(*held)
"""


# In deterministic mode a sequence is cut into pieces of its own, at most so many: more keys than
# 16384 make longer ones.
@pytest.mark.parametrize(
    ("heads", "batch", "q_len", "in_order", "lengths"),
    [
        (16, 1, 1, False, (1024, 16384)),
        (16, 8, 1, False, (1024, 16384)),
        (4, 1, 900, True, (16384, 32768)),
    ],
)
def test_scratch_of_a_step_does_not_depend_on_its_length(heads, batch, q_len, in_order, lengths):
    code = STEPS.format(heads=heads, batch=batch, q_len=q_len, in_order=in_order, lengths=lengths)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    short, long = map(int, result.stdout.split())
    assert short == long
    assert 0 < short < (32 if in_order else 8) << 20


# Of mla_attention_kv_b; "latent" is mla_attention.
FORMS = ["absorbed", "expanded", "auto", "latent"]
QUERIES = [1, 3, 40]  # of a sequence


def check_bits(
    dtype: torch.dtype, form: str, cache_format: str, q_len: int, threads: tuple[int, ...]
) -> None:
    """The same bits on any number of threads, and with any sequences around each."""
    lengths = (2100, 130, 0)
    heads, latent, rope = 3, 128, 32
    arguments = decode(dtype, heads, lengths, q_len, (64, 48, latent, rope), cache_format)
    if form == "latent":
        del arguments["w_kv_b"]
        generator = torch.Generator().manual_seed(8)
        q = torch.randn(len(lengths), q_len, heads, latent + rope, generator=generator)
        arguments |= {"q": q.to(dtype), "head_dim_v": latent}
    per_sequence = ("q", "kv_cache", "cache_seqlens")

    def attend(*sequences: int) -> tuple[Tensor, Tensor]:
        chosen = {name: arguments[name][list(sequences)] for name in per_sequence}
        if form == "latent":
            return ops.mla_attention(**arguments | chosen)
        return ops.mla_attention_kv_b(**arguments | chosen, form=form)

    torch.set_num_threads(1)
    expected, expected_lse = attend(0, 1, 2)
    for count in threads:
        torch.set_num_threads(count)
        for sequences in ((0, 1, 2), (0,), (1,), (2, 1, 0, 0, 1)):
            out, lse = attend(*sequences)
            for i, b in enumerate(sequences):
                assert torch.equal(out[i], expected[b]), (count, sequences, b)
                assert torch.equal(lse[i], expected_lse[b]), (count, sequences, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_sequence_alone(dtype, form, isa, deterministic):
    """Formats and numbers of queries take turns."""
    turn = DTYPES.index(dtype) + FORMS.index(form) + ISAS.index(isa)
    check_bits(dtype, form, FORMATS[turn % 7], QUERIES[turn % 3], (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("q_len", QUERIES)
@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_bits(dtype, form, cache_format, q_len, deterministic):
    check_bits(dtype, form, cache_format, q_len, (1, 2, 3, 5))


def test_expanded_products_in_order_are_right(isa, deterministic):
    """Those of the deterministic mode: odd widths, and a latent of no whole words."""
    for widths in ((13, 17, 45, 7), (140, 20, 64, 16)):
        for dtype in DTYPES:
            arguments = decode(dtype, 2, (300, 7), 20, widths)
            case = Case(torch_flash_mla.cpu_isa(), "fp32", q_dtype=dtype)
            result = ops.mla_attention_kv_b(**arguments, form="expanded")
            check(case, *result, *reference.mla_attention_kv_b(**arguments))
