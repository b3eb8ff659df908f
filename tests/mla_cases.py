"""Attention test cases: which combinations to try, their tensors, how exact a result must be.

A `Case` is a point in the space of everything that selects code: level, format, sizes, layout,
which keys are visible. `make_problem` draws its tensors, with every cell that nobody may read
poisoned. `check` compares a result with the float64 reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import reference
from torch_flash_mla.formats import PACKED_FORMATS

FLOAT_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = (*FLOAT_FORMATS, *PACKED_FORMATS)

# Which arithmetic computes what, F32 where nothing is listed.
ARITHMETIC = {
    **{("avx2", name): "INT16" for name in PACKED_FORMATS},
    **{("avx2_vnni", name): "INT8" for name in PACKED_FORMATS},
    **{("avx2_vnni_evex", name): "INT8" for name in PACKED_FORMATS},
    **{("avx512_vnni", name): "INT8" for name in PACKED_FORMATS},
    **{("avx512_bf16", name): "INT8" for name in PACKED_FORMATS},
    **{("onednn", name): "INT8" for name in PACKED_FORMATS},
    ("avx2_vnni", "q8_0"): "INT16",
    ("avx2_vnni_evex", "q8_0"): "INT16",
    ("avx512_vnni", "q8_0"): "INT16",
    ("avx512_bf16", "q8_0"): "INT16",
    ("onednn", "q8_0"): "INT16",
}
# With bf16 queries alone:
WITH_BF16_QUERIES = {(isa, "bf16"): "BF16" for isa in ("avx512_bf16", "onednn")}

# The bounds. Errors are relative RMS: ||out - expected|| / ||expected||, for each sequence.
#
# Float caches, by the dtype of queries and output, against the reference over the same cache:
FLOAT_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float32: 1e-5}
FLOAT_LSE_ERROR = 1e-3  # absolute, in the natural logarithm
# Packed formats, by arithmetic: ||out - original|| / ||dequantised - original||, where `original`
# is the reference over the values before they were stored, `dequantised` over the stored ones. One
# sequence at most, and pooled over many by kind of input: normal noise, "peaky" (queries times 3),
# "sink" (one key times 4). A single sequence shows rounding more than a pool does: INT8 rounds
# queries to 255 steps, which shifts the logit of a dominant key.
PACKED_RATIO = {"F32": 1.10, "INT16": 1.10, "INT8": 2.5}
POOLED_RATIO = {
    "F32": {"normal": 1.01, "peaky": 1.01, "sink": 1.01},
    "INT16": {"normal": 1.02, "peaky": 1.02, "sink": 1.02},
    "INT8": {"normal": 1.6, "peaky": 1.10, "sink": 1.10},
}
# Against the reference over the stored values, absolute: what rounding queries and keys does to a
# logit. The last two kinds have logits several times larger than those of any other test.
PACKED_LSE_ERROR = {
    "F32": {"normal": 1e-3, "peaky": 1e-3, "sink": 1e-3},
    "INT16": {"normal": 1e-3, "peaky": 5e-3, "sink": 5e-3},
    "INT8": {"normal": 0.1, "peaky": 0.2, "sink": 0.2},
}
# Rounding a result to the output's dtype changes each value by at most this part of it. Added to
# the bound of packed formats, whose storage error says nothing about the output.
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def arithmetic(isa: str, cache_format: str, q_dtype: torch.dtype) -> str:
    known = ARITHMETIC | (WITH_BF16_QUERIES if q_dtype == torch.bfloat16 else {})
    return known.get((isa, cache_format), "F32")


@dataclass(frozen=True)
class Case:
    isa: str
    cache_format: str = "bf16"
    heads: int = 16
    dims: tuple[int, int] = (512, 64)  # L, R
    page: int = 64
    length: int = 129
    q_len: int = 1
    q_dtype: torch.dtype = torch.float32
    layout: str = "paged"  # paged, rank4, two_tensor, plain (no block table)
    keys: str = "all"
    sink: bool = False
    queries: str = "joined"  # joined, split (q_pe), transposed ([B, H, Sq, D] in memory)

    @property
    def packed(self) -> bool:
        return self.cache_format in PACKED_FORMATS

    @property
    def arithmetic(self) -> str:
        return arithmetic(self.isa, self.cache_format, self.q_dtype)

    def __str__(self) -> str:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return "-".join(str(v).replace("torch.", "").replace(" ", "") for v in values)

    def generator(self, *leave_out: str) -> torch.Generator:
        """Random numbers of this case alone, the same for cases that differ in ``leave_out``."""
        values = [
            getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in leave_out
        ]
        return torch.Generator().manual_seed(zlib.crc32(repr(values).encode()))


FACTORS: dict[str, list[Any]] = {
    "cache_format": list(FORMATS),
    "heads": [1, 3, 16, 20, 64, 128],
    "dims": [(512, 64), (512, 0), (256, 64), (256, 32), (128, 32), (96, 16)],
    "page": [1, 16, 61, 64, 256],
    "length": [0, 1, 15, 16, 17, 127, 129, 1000],
    "q_len": [1, 2, 5],
    "q_dtype": [torch.bfloat16, torch.float16, torch.float32],
    "layout": ["paged", "rank4", "two_tensor", "plain"],
    "keys": [
        "all",
        "causal",
        "leftpad",
        "causal_window",
        "window",
        "bool_mask",
        "float_mask",
        "each",
    ],
    "sink": [False, True],
    "queries": ["joined", "split", "transposed"],
}


def possible(choice: dict[str, Any]) -> bool:
    """Whether a (partial) choice of factors is one that the operators accept."""
    packed = choice.get("cache_format") in PACKED_FORMATS
    latent, rope = choice.get("dims", (32, 32))
    if packed and (latent % 32 or rope % 32):
        return False
    if choice.get("layout") == "two_tensor" and (packed or rope == 0):
        return False
    return choice.get("layout") != "plain" or choice.get("page", 64) == 64  # has no pages


def pairwise(
    factors: dict[str, list[Any]], possible: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """Few choices of all factors in which every possible pair of values of two factors occurs."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, x), (b, y)): None  # a dict: an ordered set
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if possible({a: x, b: y})
    }

    def gain(choice: dict[str, Any], name: str, value: Any) -> int:
        pairs = (
            sorted([(name, value), kv], key=lambda p: names.index(p[0])) for kv in choice.items()
        )
        return sum(tuple(pair) in missing for pair in pairs)

    choices = []
    while missing:
        choice = dict(next(iter(missing)))
        for name in rng.sample(names, len(names)):
            if name not in choice:
                values = [v for v in factors[name] if possible({**choice, name: v})]
                rng.shuffle(values)
                choice[name] = max(values, key=lambda v: gain(choice, name, v))
        for pair in itertools.combinations(((n, choice[n]) for n in names), 2):
            missing.pop(pair, None)
        choices.append(choice)
    return choices


def random_case(isa: str, seed: int) -> Case:
    """A case of arbitrary sizes."""
    rng = random.Random(seed)
    cache_format = rng.choice(FORMATS)
    if cache_format in PACKED_FORMATS:
        dims = (32 * rng.randint(1, 17), 32 * rng.randint(0, 3))
    else:
        dims = (rng.randint(1, 300), rng.choice([0, rng.randint(1, 80)]))
    choice = {"cache_format": cache_format, "dims": dims}
    layouts = [v for v in FACTORS["layout"] if possible({**choice, "layout": v})]
    return Case(
        isa,
        cache_format,
        heads=rng.randint(1, 40),
        dims=dims,
        page=rng.randint(1, 130),
        length=rng.randint(0, 600),
        q_len=rng.randint(1, 9),
        q_dtype=rng.choice(FACTORS["q_dtype"]),
        layout=rng.choice(layouts),
        keys=rng.choice(FACTORS["keys"]),
        sink=rng.random() < 0.3,
        queries=rng.choice(FACTORS["queries"]),
    )


@dataclass
class Problem:
    """Arguments of one call, and the values that its cache was made from."""

    case: Case
    arguments: dict[str, Any]
    rows: Tensor  # float32 [B, N, D], before storing; 0 where no query sees the cell
    _expected: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def share_expected(self, known: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Keeps expectations in ``known``, for problems that differ in level and page alone."""
        self._expected = known

    def expected(self) -> tuple[Tensor, Tensor]:
        """out and lse over the cache as stored, float64."""
        if "stored" not in self._expected:
            self._expected["stored"] = reference.mla_attention(**self.arguments)
        return self._expected["stored"]

    def expected_of_original(self) -> tuple[Tensor, Tensor]:
        """out and lse over the values before they were stored, float64."""
        if "original" not in self._expected:
            plain = {"kv_cache": self.rows, "kv_cache_dtype": "auto"}
            plain |= {"block_table": None, "k_pe_cache": None}
            self._expected["original"] = reference.mla_attention(**self.arguments | plain)
        return self._expected["original"]


def make_problem(
    case: Case, lengths: list[int] | None = None, q_factor: float = 1, key_factor: float = 1
) -> Problem:
    """Draws the tensors of a case.

    Args:
        case: the values depend on all of it but level, page and layout.
        lengths: of the sequences; default: the case's and a short one.
        q_factor: multiplies the queries (peaky attention).
        key_factor: multiplies one key of each sequence (an attention sink).
    """
    generator = case.generator("isa", "page", "layout")
    latent, rope = case.dims
    if lengths is None:
        lengths = [case.length, int(torch.randint(0, 130, (1,), generator=generator))]
    batch, most = len(lengths), max(*lengths, 1)
    q = q_factor * torch.randn(batch, case.q_len, case.heads, latent + rope, generator=generator)
    rows = torch.randn(batch, most, latent + rope, generator=generator)
    if key_factor != 1:
        for b, length in enumerate(lengths):
            rows[b, length // 3] *= key_factor

    arguments: dict[str, Any] = {
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "head_dim_v": latent,
        "softmax_scale": (128 + rope) ** -0.5,
        "kv_cache_dtype": case.cache_format if case.packed else "auto",
        **_visibility(case, lengths, generator),
        **_queries(case, q.to(case.q_dtype)),
    }
    if case.sink:
        arguments["attn_sink"] = torch.randn(case.heads, generator=generator)
    seen = _seen(case, arguments)
    arguments |= store(case, rows, lengths, seen, case.generator())
    return Problem(case, arguments, rows.masked_fill(~seen.unsqueeze(-1), 0))


def _queries(case: Case, q: Tensor) -> dict[str, Tensor]:
    if case.queries == "transposed":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if case.queries == "split":
        return {"q": q[..., : case.dims[0]], "q_pe": q[..., case.dims[0] :]}
    return {"q": q}


def _visibility(case: Case, lengths: list[int], generator: torch.Generator) -> dict[str, Any]:
    """The arguments that say which keys a query sees."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    result: dict[str, Any] = {"causal": case.keys in ("causal", "leftpad", "causal_window", "each")}
    if case.keys in ("leftpad", "each"):
        pads = [draw(0, length + 1) for length in lengths]
        result["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    if case.keys in ("causal_window", "window", "each"):
        result["window"] = (1, 7, 64, 200)[draw(0, 4)]
    if case.keys in ("bool_mask", "float_mask", "each"):
        columns = max(lengths) + draw(0, 20)
        full = (len(lengths), case.heads, case.q_len, columns)
        shapes = [
            (full[0], 1, full[2], full[3]),
            (full[0], 1, 1, full[3]),
            (1, full[1], full[2], full[3]),
            (full[2], full[3]),
            full,
        ]
        shape = shapes[draw(0, len(shapes))]
        keep = torch.rand(shape, generator=generator) < 0.7
        keep[..., columns // 4 : columns // 4 + 150] = False  # a hole of more than a tile
        if case.keys == "bool_mask":
            result["attn_mask"] = keep
        else:
            dtype = (torch.float32, case.q_dtype)[draw(0, 2)]
            mask = torch.randn(shape, generator=generator).to(dtype)
            hidden = (-torch.inf, torch.finfo(dtype).min)[draw(0, 2)]
            result["attn_mask"] = mask.masked_fill(~keep, hidden)
    return result


def _seen(case: Case, arguments: dict[str, Any]) -> Tensor:
    """bool [B, N]: cells in the key range of at least one query, masks aside."""
    lengths = arguments["cache_seqlens"].tolist()
    pads = arguments.get("cache_leftpad", torch.zeros(len(lengths))).tolist()
    seen = torch.zeros(len(lengths), max(*lengths, 1), dtype=torch.bool)
    for b, length in enumerate(lengths):
        keys = reference.visible_keys(
            case.q_len,
            length,
            arguments["causal"],
            arguments.get("window", 0),
            int(pads[b]),
            None,
            None,
        )
        seen[b, :length] = keys.any(dim=0)
    return seen


def store(
    case: Case, rows: Tensor, lengths: list[int], seen: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """Puts rows [B, N, D] into a cache of the case's format and layout.

    Cells that ``seen`` [B, N] leaves out, unused cells of used pages, and unused pages hold NaN
    (packed: 0xff in every byte, which makes scales NaN); unused entries of the block table are no
    blocks.
    """
    latent, rope = case.dims
    if case.packed:
        cells = reference.encode_rows(rows[..., :latent], rows[..., latent:], case.cache_format)
        poison: float = 255
    else:
        cells, poison = rows.to(FLOAT_FORMATS[case.cache_format]), torch.nan
    cells = cells.masked_fill(~seen.unsqueeze(-1), poison)

    if case.layout == "plain":
        spare = torch.full((len(cells), 3, cells.shape[-1]), poison, dtype=cells.dtype)
        kv_cache = torch.cat([cells, spare], dim=1)[:, : cells.shape[1]]  # a row stride of its own
        return {"kv_cache": kv_cache, "block_table": None}

    batch, most, width = cells.shape
    columns = -(-most // case.page)
    order = torch.randperm(batch * columns + 3, generator=generator)
    pool = torch.full((len(order), case.page, width), poison, dtype=cells.dtype)
    table = torch.full((batch, columns + 2), 2**30, dtype=torch.int32)
    for b, length in enumerate(lengths):
        used = -(-length // case.page)
        blocks = order[b * columns : b * columns + used]
        table[b, :used] = blocks
        here = torch.full((used * case.page, width), poison, dtype=cells.dtype)
        here[:length] = cells[b, :length]
        pool[blocks] = here.view(used, case.page, width)
    if case.layout == "rank4":
        pool = pool.unsqueeze(2)
    if case.layout == "two_tensor":
        wide = torch.cat([pool[..., latent:], pool[..., :8]], dim=-1)
        k_pe = wide[..., :rope]  # strides of its own
        return {
            "kv_cache": pool[..., :latent].contiguous(),
            "k_pe_cache": k_pe,
            "block_table": table,
        }
    return {"kv_cache": pool, "block_table": table}


def check(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Asserts shapes, dtypes, rows without keys, and the error bounds of each sequence."""
    case = problem.case
    expected, expected_lse = problem.expected()
    assert out.dtype == case.q_dtype
    assert out.shape == expected.shape
    assert lse.dtype == torch.float32
    assert lse.shape == expected_lse.shape
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "rows without keys have lse -inf, others not"
    assert (out.transpose(1, 2)[empty] == 0).all(), "rows without keys are exactly 0"
    assert out.isfinite().all()

    lse_error = (lse.double() - expected_lse).masked_fill(empty, 0).abs().max()
    lse_bound = PACKED_LSE_ERROR[case.arithmetic]["normal"] if case.packed else FLOAT_LSE_ERROR
    assert lse_error <= lse_bound, f"lse is off by {lse_error:.2e}"
    for b in range(len(out)):
        actual = out[b].double()
        if case.packed:
            original = problem.expected_of_original()[0][b]
            error, storage = (actual - original).norm(), (expected[b] - original).norm()
            bound = PACKED_RATIO[case.arithmetic] * storage
            if case.q_dtype != torch.float32:
                bound += UNIT_ROUNDOFF[case.q_dtype] * original.norm()
            message = f"sequence {b}: error {error / storage:.3f} times that of the storage"
        else:
            error, size = (actual - expected[b]).norm(), expected[b].norm()
            bound = FLOAT_ERROR[case.q_dtype] * size
            message = f"sequence {b}: relative error {error / size:.2e}"
        assert error <= bound, message
