"""The packed cache formats: the bytes that operators write and read are those of the documentation.

`reference.encode_rows` and `decode_rows` are docs/cache_formats.md in Python.
"""

import mla_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_flash_mla import available_isas, force_isa, ops
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes
from torch_flash_mla.reference import decode_rows, encode_rows

DIMS = [(512, 64), (512, 0), (256, 32), (32, 32), (96, 64)]
# Largest error of a value, as a part of the largest magnitude that shares its scale: half a step.
# The widest step of q4_kv's codebook is 31 of 127.
HALF_STEP = {"q8_kv": 0.5 / 127, "q8_0": 0.5 / 127, "q6_0": 0.5 / 31, "q4_kv": 15.5 / 127}

# Magnitudes of everything float32 can hold: denormals, where fp16 scales underflow or saturate, the
# largest values.
EXPONENTS = st.integers(-149, 127)
SPECIAL = st.sampled_from(
    [0.0, -0.0, 1e-45, 1e-30, 1.0000001e-30, 65504.0, 65504.0 * 127, 65520.0 * 127, 1e30, 3.4e38]
)


def append(latent: torch.Tensor, rope: torch.Tensor, cache_format: str) -> torch.Tensor:
    """The rows as the operator stores them: uint8 [tokens, row bytes]."""
    size = row_bytes(cache_format, latent.shape[-1], rope.shape[-1])
    cache = torch.full((1, len(latent), size), 0xAA, dtype=torch.uint8)
    ops.concat_and_cache_mla(latent, rope, cache, torch.arange(len(latent)), cache_format)
    return cache[0]


def gather(rows: torch.Tensor, latent: int, rope: int, cache_format: str) -> torch.Tensor:
    lengths = torch.tensor([len(rows)], dtype=torch.int32)
    return ops.gather_cache(
        rows[None], None, lengths, latent, latent + rope, torch.float32, cache_format
    )[0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def usual_rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of all sizes, among them zeros and values of very different size in one row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x *= 10 ** (6 * torch.rand(tokens, 1, generator=generator) - 3)
    x *= 10 ** (2 * torch.rand(tokens, width, generator=generator) - 1)
    x[3] = 0
    return x


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
def test_operators_write_and_read_the_documented_bytes(cache_format, dims, isa):
    latent, rope = dims
    x = usual_rows(37, latent + rope)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = x.to(dtype)
        expected = encode_rows(values[:, :latent], values[:, latent:], cache_format)
        with force_isa(isa):
            rows = append(values[:, :latent], values[:, latent:], cache_format)
            back = gather(rows, latent, rope, cache_format)
        assert torch.equal(rows, expected)
        assert torch.equal(back, decode_rows(expected, cache_format, latent, rope))


@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_extreme_values(cache_format, data):
    """Every magnitude that float32 has, non-finite values too: the bytes still agree."""
    latent, rope = data.draw(st.sampled_from(DIMS))
    seed, low, high = data.draw(st.integers(0, 2**32)), data.draw(EXPONENTS), data.draw(EXPONENTS)
    generator = torch.Generator().manual_seed(seed)
    low, high = min(low, high), max(low, high)
    exponents = torch.randint(low, high + 1, (3, latent + rope), generator=generator)
    mantissa = 2 * torch.rand(3, latent + rope, generator=generator) - 1
    x = torch.ldexp(mantissa, exponents)
    for value in data.draw(st.lists(SPECIAL | st.floats(width=32), max_size=4)):
        x[data.draw(st.integers(0, 2)), data.draw(st.integers(0, latent + rope - 1))] = value

    expected = encode_rows(x[:, :latent], x[:, latent:], cache_format)
    rows = append(x[:, :latent], x[:, latent:], cache_format)
    back = gather(rows, latent, rope, cache_format)
    decoded = decode_rows(expected, cache_format, latent, rope)
    assert same(back, decoded)
    finite = decoded.isfinite()
    codes = codes_of(rows, cache_format, latent, rope)
    assert torch.equal(codes, codes_of(expected, cache_format, latent, rope))
    for first, end in segments(cache_format, latent, rope):
        # A value that is not finite makes its own scale NaN, and nothing else.
        assert torch.equal(x[:, first:end].isfinite().all(1), finite[:, first:end].all(1))


def segments(cache_format: str, latent: int, rope: int) -> list[tuple[int, int]]:
    """The ranges of values that share a scale."""
    blocks = [(i, i + 32) for i in range(0, latent + rope, 32)]
    if cache_format == "q8_kv":
        blocks = [(0, latent), (latent, latent + rope)]
    if cache_format == "q4_kv":
        blocks = [*blocks[: latent // 32], (latent, latent + rope)]
    return [(first, end) for first, end in blocks if first < end]


def codes_of(rows: torch.Tensor, cache_format: str, latent: int, rope: int) -> torch.Tensor:
    """The bytes that are not scales: NaN has many encodings."""
    if cache_format == "q4_kv":
        codes = latent // 2 + latent // 32 * 2
        return torch.cat([rows[:, : latent // 2], rows[:, codes : codes + rope]], dim=-1)
    return rows[:, : (latent + rope) * 3 // 4 if cache_format == "q6_0" else latent + rope]


@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), dims=st.sampled_from(DIMS))
def test_error_is_half_a_step(cache_format, seed, dims):
    latent, rope = dims
    x = usual_rows(8, latent + rope, seed)
    back = decode_rows(
        encode_rows(x[:, :latent], x[:, latent:], cache_format), cache_format, latent, rope
    )
    for first, end in segments(cache_format, latent, rope):
        absmax = x[:, first:end].abs().amax(1, keepdim=True)
        error = (back - x)[:, first:end].abs()
        if cache_format == "q4_kv" and end <= latent:
            # Some values may be clipped for the good of the block: half a step on average.
            error = error.square().mean(1, keepdim=True).sqrt()
        half_step = HALF_STEP["q8_kv" if cache_format == "q4_kv" and end > latent else cache_format]
        # An fp16 scale is off by 2^-11 of itself, or by half its smallest denormal.
        bound = absmax * (half_step + 2.0**-11) + 127 * 2.0**-25
        assert (error <= bound * 1.0001).all()


@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
def test_zero_rows_stay_zero(cache_format):
    zero = torch.zeros(2, 64)
    rows = append(zero, zero, cache_format)
    assert (gather(rows, 64, 64, cache_format) == 0).all()


@pytest.mark.parametrize("cache_format", PACKED_FORMATS)
@pytest.mark.parametrize("dims", [(96, 16), (100, 32)], ids=str)
def test_widths_that_a_format_cannot_hold(cache_format, dims):
    latent, rope = dims
    with pytest.raises(ValueError, match="32"):
        row_bytes(cache_format, latent, rope)
    cache = torch.zeros(1, 4, 2 * (latent + rope), dtype=torch.uint8)
    with pytest.raises(ValueError, match="32"):
        ops.concat_and_cache_mla(
            torch.zeros(1, latent), torch.zeros(1, rope), cache, torch.zeros(1).long(), cache_format
        )
    q = torch.zeros(1, 1, 2, latent + rope)
    with pytest.raises(ValueError, match="32"):
        ops.mla_attention(
            q, cache, None, torch.ones(1).int(), latent, 1.0, kv_cache_dtype=cache_format
        )


@pytest.mark.parametrize("dtype", mla_cases.FLOAT_FORMATS.values(), ids=str)
def test_float_caches_round_once(dtype):
    x = usual_rows(21, 48 + 16)
    for source in (torch.float32, torch.bfloat16, torch.float16):
        values = x.to(source)
        cache = torch.zeros(3, 7, 64, dtype=dtype)
        ops.concat_and_cache_mla(values[:, :48], values[:, 48:], cache, torch.arange(21))
        assert torch.equal(cache.view(21, 64), values.to(dtype))
        table = torch.arange(3, dtype=torch.int32)[None]
        back = ops.gather_cache(cache, table, torch.tensor([21]).int(), 48, 64, torch.float32)
        assert torch.equal(back[0], values.to(dtype).float())


@pytest.mark.parametrize("isa", available_isas())
def test_values_of_every_magnitude_round_once(isa):
    """Subnormals too, exact values and those between two of bfloat16."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = torch.stack([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001)]).view(-1, 64)
    x = bits.to(torch.int32).view(torch.float32)
    length = torch.tensor([len(x)], dtype=torch.int32)
    for source in mla_cases.FLOAT_FORMATS.values():
        values = x.to(source)
        for dtype in mla_cases.FLOAT_FORMATS.values():
            cache = torch.zeros(1, *x.shape, dtype=dtype)
            with force_isa(isa):
                ops.concat_and_cache_mla(
                    values[:, :48], values[:, 48:], cache, torch.arange(len(x))
                )
                back = ops.gather_cache(values[None], None, length, 48, 64, dtype)
            assert same(cache[0], values.to(dtype))
            assert same(back[0], values.to(dtype))


@pytest.mark.parametrize("cache_format", ["auto", *PACKED_FORMATS])
def test_scattered_slots_and_skipped_tokens(cache_format):
    """Only the named slots change; -1 writes nothing."""
    x = usual_rows(6, 96)
    if cache_format == "auto":
        before = torch.randn(4, 5, 96)
        stored = x
    else:
        before = torch.randint(0, 256, (4, 5, row_bytes(cache_format, 64, 32))).to(torch.uint8)
        stored = encode_rows(x[:, :64], x[:, 64:], cache_format)
    slots = torch.tensor([19, -1, 0, 7, -1, 12])
    expected = before.clone()
    expected.flatten(0, 1)[slots[slots >= 0]] = stored[slots >= 0]
    cache = before.clone()
    ops.concat_and_cache_mla(x[:, :64], x[:, 64:], cache, slots, cache_format)
    assert torch.equal(cache, expected)


def test_gather_is_zero_beyond_each_length():
    x = torch.randn(2, 8, 64)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    back = ops.gather_cache(x, table, torch.tensor([3, 0]).int(), 48, 64, torch.float32)
    expected = torch.zeros(2, 8, 64)
    expected[0, :3] = x[1, :3]
    assert torch.equal(back, expected)
    longer = ops.gather_cache(
        x, table, torch.tensor([3, 0]).int(), 48, 64, torch.bfloat16, max_seqlen=5
    )
    assert torch.equal(longer, expected[:, :5].bfloat16())
