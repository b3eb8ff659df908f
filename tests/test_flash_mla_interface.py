"""The interface of FlashMLA: its signatures, its conventions, and the reference's numbers.

Adds about a quarter of a minute to the fast tests.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

import pytest
import torch
from mla_cases import FLOAT_ERROR, FLOAT_LSE_ERROR
from torch import Tensor

from torch_flash_mla import flash_mla_interface as interface
from torch_flash_mla import reference

L, R, H = 128, 32, 20
SCALE = (96 + R) ** -0.5  # of a head with 96 dims without rope: not what the default would be


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= bound, f"relative error {error:.2e}"


def close_lse(actual: Tensor, expected: Tensor) -> None:
    """The reference says minus infinity where no key is seen, FlashMLA plus infinity."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    empty = expected == -torch.inf
    assert torch.equal(actual == torch.inf, empty)
    assert (actual.double() - expected)[~empty].abs().max() <= FLOAT_LSE_ERROR


@dataclass
class Pool:
    """A paged cache in which everything that nobody may read is NaN."""

    cache: Tensor  # [num_blocks, block_size, 1, D]
    block_table: Tensor
    lengths: list[int]

    @property
    def seqlens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32)

    def slots(self, positions: Tensor) -> Tensor:
        """Positions int32 [B, Sq, topk] as rows of the pool; -1 stays."""
        size = self.cache.shape[1]
        flat = positions.clamp(min=0).long().flatten(1)
        block = self.block_table.long().gather(1, flat // size).view(positions.shape)
        rows = block * size + positions % size
        return rows.masked_fill(positions < 0, -1).int()


def make_pool(lengths: list[int], block_size: int, dtype: torch.dtype) -> Pool:
    columns = -(-max(lengths) // block_size)
    order = torch.randperm(len(lengths) * columns + 2)
    table = torch.full((len(lengths), columns), 2**30, dtype=torch.int32)
    pool = torch.full((len(order), block_size, 1, L + R), torch.nan, dtype=dtype)
    for b, length in enumerate(lengths):
        used = -(-length // block_size)
        table[b, :used] = order[b * columns : b * columns + used]
        for i in range(used):
            filled = min(block_size, length - i * block_size)
            pool[table[b, i], :filled, 0] = torch.randn(filled, L + R).to(dtype)
    return Pool(pool, table, lengths)


def draw_lists(pool: Pool, q_len: int, topk: int) -> Tensor:
    """int32 [B, Sq, topk]: positions in any order, -1 among them; the last query has none."""
    lists = torch.full((len(pool.lengths), q_len, topk), -1, dtype=torch.int32)
    for b, length in enumerate(pool.lengths):
        for s in range(q_len - 1):
            count = min(topk, length)
            where = torch.randperm(topk)[:count]
            lists[b, s, where] = torch.randperm(length)[:count].int()
            lists[b, s, torch.rand(topk) < 0.2] = -1
    return lists


def test_signatures_are_those_of_flash_mla() -> None:
    """Names, order and defaults, of the releases of 2025 and 2026; what we add is keyword-only."""

    def of(function: object) -> dict[str, object]:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return {p.name: p.default for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD}

    empty = inspect.Parameter.empty
    decode = {
        "q": empty,
        "k_cache": empty,
        "block_table": empty,
        "cache_seqlens": empty,
        "head_dim_v": empty,
        "tile_scheduler_metadata": None,  # required there
        "num_splits": None,
        "softmax_scale": None,
        "causal": False,
        "is_fp8_kvcache": False,
        "indices": None,
        "attn_sink": None,
        "extra_k_cache": None,
        "extra_indices_in_kvcache": None,
        "topk_length": None,
        "extra_topk_length": None,
        "enable_batch_invariant": False,
    }
    sparse = {
        "q": empty,
        "kv": empty,
        "indices": empty,
        "sm_scale": empty,
        "d_v": 512,
        "attn_sink": None,
        "topk_length": None,
        "indexer_topk": 0,
    }
    for function, expected in (
        (interface.flash_mla_with_kvcache, decode),
        (interface.flash_mla_sparse_fwd, sparse),
    ):
        assert list(of(function).items()) == list(expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(isa: str, causal: bool, dtype: torch.dtype) -> None:
    pool = make_pool([300, 2, 129], block_size=64, dtype=dtype)
    q = torch.randn(3, 4, H, L + R).to(dtype)  # of sequence 1 two queries come before its first key
    meta, num_splits = interface.get_mla_metadata(pool.seqlens, 4 * H, 1)
    out, lse = interface.flash_mla_with_kvcache(
        q, pool.cache, pool.block_table, pool.seqlens, L, meta, num_splits, SCALE, causal
    )
    expected, expected_lse = reference.mla_attention(
        q, pool.cache, pool.block_table, pool.seqlens, L, SCALE, causal
    )
    assert out.dtype == dtype
    close(out, expected, FLOAT_ERROR[dtype])
    close_lse(lse, expected_lse)
    assert (lse == torch.inf).sum() == (2 * H if causal else 0)
    assert (out.transpose(1, 2)[lse == torch.inf] == 0).all()


def test_the_default_scale_is_that_of_flash_mla() -> None:
    pool = make_pool([50], block_size=16, dtype=torch.float32)
    q = torch.randn(1, 1, H, L + R)
    out, _ = interface.flash_mla_with_kvcache(q, pool.cache, pool.block_table, pool.seqlens, L)
    arguments = (q, pool.cache, pool.block_table, pool.seqlens, L)
    close(out, reference.mla_attention(*arguments, (L + R) ** -0.5)[0], FLOAT_ERROR[q.dtype])
    right = reference.mla_attention(*arguments, SCALE)[0]
    assert (out - right).norm() > 0.01 * right.norm()  # they do differ


@pytest.mark.parametrize("metadata", [None, (torch.zeros(4, 8), torch.zeros(2)), "anything"])
def test_what_steers_a_gpu_is_not_used(metadata: object) -> None:
    pool = make_pool([70], block_size=64, dtype=torch.bfloat16)
    q = torch.randn(1, 1, H, L + R).bfloat16()
    arguments = (q, pool.cache, pool.block_table, pool.seqlens, L)
    expected = interface.flash_mla_with_kvcache(*arguments, *interface.get_mla_metadata(), SCALE)
    actual = interface.flash_mla_with_kvcache(*arguments, metadata, metadata, SCALE)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("block_size", [1, 61, 64])
@pytest.mark.parametrize("sink", [None, "finite", torch.inf, -torch.inf])
def test_sparse(isa: str, sink: str | float | None, block_size: int) -> None:
    pool = make_pool([300, 5], block_size, dtype=torch.bfloat16)
    positions = draw_lists(pool, q_len=3, topk=70)
    counts = torch.tensor([50, 70], dtype=torch.int32)
    attn_sink = None
    if sink is not None:
        attn_sink = torch.randn(H) if sink == "finite" else torch.full((H,), sink)
    q = torch.randn(2, 3, H, L + R).bfloat16()
    out, lse = interface.flash_mla_with_kvcache(
        q, pool.cache, None, None, L, *interface.get_mla_metadata(), SCALE,
        indices=pool.slots(positions), attn_sink=attn_sink, topk_length=counts,
    )  # fmt: skip
    expected, expected_lse = reference.mla_attention(
        q, pool.cache, pool.block_table, pool.seqlens, L, SCALE, indices=positions,
        topk_length=counts, attn_sink=attn_sink,
    )  # fmt: skip
    close_lse(lse, expected_lse)
    if sink == torch.inf:
        assert (out == 0).all()
    else:
        close(out, expected, FLOAT_ERROR[q.dtype])
    assert (lse[:, :, -1] == torch.inf).all()  # the last query has an empty list
    assert (out[:, -1] == 0).all()


@pytest.mark.parametrize("sink", [False, True])
def test_two_pools(isa: str, sink: bool) -> None:
    """A second pool with pages and lists of its own: as if all rows were in one."""
    first, second = (
        make_pool([200, 30], 64, torch.float32),
        make_pool([90, 40], 16, torch.float32),
    )
    lists = draw_lists(first, 3, 40), draw_lists(second, 3, 30)
    counts = torch.tensor([[40, 25], [0, 30]], dtype=torch.int32)
    attn_sink = torch.randn(H) if sink else None
    q = torch.randn(2, 3, H, L + R)
    out, lse = interface.flash_mla_with_kvcache(
        q, first.cache, None, None, L, *interface.get_mla_metadata(), SCALE,
        indices=first.slots(lists[0]), attn_sink=attn_sink, topk_length=counts[0],
        extra_k_cache=second.cache, extra_indices_in_kvcache=second.slots(lists[1]),
        extra_topk_length=counts[1],
    )  # fmt: skip

    together = torch.zeros(2, 300, L + R)
    position_lists = []
    for pool, start, positions, count in zip((first, second), (0, 200), lists, counts, strict=True):
        for b, length in enumerate(pool.lengths):
            rows = reference.sequence_rows(pool.cache, pool.block_table, b, length, L, L + R)
            together[b, start : start + length] = rows
        beyond = torch.arange(positions.shape[2]) >= count[:, None, None]
        hidden = (positions < 0) | beyond
        position_lists.append((positions + start).masked_fill(hidden, -1))
    expected, expected_lse = reference.mla_attention(
        q, together, None, torch.full((2,), 300), L, SCALE,
        indices=torch.cat(position_lists, dim=2), attn_sink=attn_sink,
    )  # fmt: skip
    close(out, expected, FLOAT_ERROR[q.dtype])
    close_lse(lse, expected_lse)
    assert (lse[:, :, -1] == torch.inf).all()


def test_packed_caches_of_this_package() -> None:
    """kv_cache_dtype, an addition: the same call over 8-bit rows."""
    pool = make_pool([150], block_size=64, dtype=torch.float32)
    packed = reference.encode_rows(
        pool.cache[..., :L].nan_to_num(), pool.cache[..., L:].nan_to_num(), "q8_kv"
    )
    q = torch.randn(1, 2, H, L + R)
    arguments = (pool.block_table, pool.seqlens, L)
    out, lse = interface.flash_mla_with_kvcache(
        q, packed, *arguments, softmax_scale=SCALE, causal=True, kv_cache_dtype="q8_kv"
    )
    expected, expected_lse = reference.mla_attention(
        q, packed, *arguments, SCALE, causal=True, kv_cache_dtype="q8_kv"
    )
    close(out, expected, 0.02)  # arithmetic of packed formats: tests/test_accuracy.py
    assert (lse - expected_lse).abs().max() < 0.1


@dataclass
class Prompt:
    q: Tensor
    kv: Tensor
    indices: Tensor
    attn_sink: Tensor | None = None
    topk_length: Tensor | None = None

    def expected(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """float64 out [Sq, H, L], max_logits [Sq, H] and lse [Sq, H], query by query."""
        results = []
        for s, chosen in enumerate(self.indices[:, 0]):
            count = len(chosen) if self.topk_length is None else int(self.topk_length[s])
            chosen = chosen[:count]
            keys = self.kv[chosen[(chosen >= 0) & (chosen < len(self.kv))].long(), 0].double()
            logits = torch.einsum("hd,td->ht", self.q[s].double(), keys) * scale
            top = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(dim=-1)
            sink = None if self.attn_sink is None else self.attn_sink.double()
            bias = torch.zeros(H, 1, len(keys), dtype=torch.float64)
            out, lse = reference.attend(self.q[s : s + 1].double(), keys, L, scale, bias, sink)
            results.append((out[0], top, lse[:, 0]))
        out, top, lse = (torch.stack(column) for column in zip(*results, strict=True))
        return out, top, lse


def make_prompt(dtype: torch.dtype = torch.bfloat16, q_len: int = 9, rows: int = 100) -> Prompt:
    kv = torch.randn(rows, 1, L + R).to(dtype)
    kv[17] = torch.nan  # in nobody's list
    seen = torch.tensor([i for i in range(rows) if i != 17])
    indices = torch.stack([seen[torch.randperm(len(seen))[:33]] for _ in range(q_len)])
    indices[torch.rand(indices.shape) < 0.1] = -1
    indices[torch.rand(indices.shape) < 0.1] = rows  # FlashMLA skips these, too
    indices[4] = -1
    return Prompt(torch.randn(q_len, H, L + R).to(dtype), kv, indices.int().unsqueeze(1))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_prefill(isa: str, dtype: torch.dtype, sink: bool) -> None:
    prompt = make_prompt(dtype)
    if sink:
        prompt.attn_sink = torch.randn(H)
        prompt.topk_length = torch.randint(1, 34, (9,), dtype=torch.int32)
    out, top, lse = interface.flash_mla_sparse_fwd(
        prompt.q, prompt.kv, prompt.indices, SCALE, L, prompt.attn_sink, prompt.topk_length
    )
    expected, expected_top, expected_lse = prompt.expected(SCALE)
    assert out is not None and top is not None and lse is not None
    assert out.dtype == dtype
    close(out, expected, FLOAT_ERROR[dtype])
    close_lse(lse, expected_lse)
    assert torch.equal(top == -torch.inf, expected_top == -torch.inf)
    assert (top[4] == -torch.inf).all()
    seen = expected_top != -torch.inf
    close(top[seen], expected_top[seen], 1e-5)


def test_the_indexer_sees_a_part_of_each_list() -> None:
    prompt = make_prompt()
    prompt.topk_length = torch.tensor([33, 5, 12, 30, 33, 1, 20, 13, 11], dtype=torch.int32)
    results = interface.flash_mla_sparse_fwd(
        prompt.q, prompt.kv, prompt.indices, SCALE, L, None, prompt.topk_length, 12
    )
    shorter = dataclasses.replace(prompt, topk_length=prompt.topk_length.clamp(max=12))
    assert len(results) == 4
    assert results[2] is not None and results[3] is not None
    close_lse(results[2], prompt.expected(SCALE)[2])
    close_lse(results[3], shorter.expected(SCALE)[2])


def test_the_largest_logits_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompt(torch.float32)
    arguments = (prompt.q, prompt.kv, prompt.indices, -SCALE, L)
    top = interface.flash_mla_sparse_fwd(*arguments)[1]
    monkeypatch.setattr(interface, "_MAX_GATHERED", 2 * 33 * (L + R + H))  # two queries at a time
    assert torch.equal(top, interface.flash_mla_sparse_fwd(*arguments)[1])
    assert interface.flash_mla_sparse_fwd(*arguments, return_max_logits=False)[1] is None


@pytest.mark.parametrize(("q_len", "rows", "topk"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_prompts(q_len: int, rows: int, topk: int) -> None:
    out, top, lse = interface.flash_mla_sparse_fwd(
        torch.randn(q_len, H, L + R),
        torch.randn(rows, 1, L + R),
        torch.zeros(q_len, 1, topk, dtype=torch.int32),
        SCALE,
        L,
    )
    assert out is not None and top is not None and lse is not None
    assert out.shape == (q_len, H, L)
    assert (out == 0).all()
    assert (top == -torch.inf).all()
    assert top.shape == lse.shape == (q_len, H)
    assert (lse == torch.inf).all()


def test_one_graph() -> None:
    torch.compiler.reset()
    pool = make_pool([150, 20], block_size=64, dtype=torch.bfloat16)
    prompt = make_prompt()
    lists = pool.slots(draw_lists(pool, 1, 40))

    def step(q: Tensor) -> tuple[Tensor | None, ...]:
        meta = interface.get_mla_metadata()
        arguments = (pool.block_table, pool.seqlens, L, *meta, SCALE)
        dense = interface.flash_mla_with_kvcache(q, pool.cache, *arguments, causal=True)
        sparse = interface.flash_mla_with_kvcache(q, pool.cache, *arguments, indices=lists)
        kv, indices = prompt.kv, prompt.indices[:2]
        return *dense, *sparse, *interface.flash_mla_sparse_fwd(q[:, 0], kv, indices, SCALE, L)

    q = torch.randn(2, 1, H, L + R).bfloat16()
    expected = step(q)
    actual = torch.compile(step, fullgraph=True, backend="eager")(q)
    assert len(actual) == 7
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def refused(error: type[Exception], match: str, **changes: object) -> None:
    arguments: dict[str, object] = {
        "q": torch.randn(2, 1, H, L + R),
        "k_cache": torch.zeros(4, 16, 1, L + R),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "cache_seqlens": torch.tensor([20, 3], dtype=torch.int32),
        "head_dim_v": L,
    }
    with pytest.raises(error, match=match):
        interface.flash_mla_with_kvcache(**(arguments | changes))  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    lists = torch.zeros(2, 1, 3, dtype=torch.int32)
    extra = torch.zeros(4, 16, 1, L + R)
    counts = torch.zeros(2, dtype=torch.int32)
    refused(NotImplementedError, "is_fp8_kvcache: float8 caches", is_fp8_kvcache=True)
    refused(TypeError, "^k_cache: dtype Float8_e4m3fn", k_cache=extra.to(torch.float8_e4m3fn))
    refused(TypeError, "whose format must be named", k_cache=extra.byte())
    refused(ValueError, "use_deterministic_algorithms", enable_batch_invariant=True)
    refused(ValueError, "causal: got True with indices", causal=True, indices=lists)
    refused(ValueError, "block_table: got None", block_table=None)
    refused(ValueError, "cache_seqlens: got None", cache_seqlens=None)
    refused(ValueError, "topk_length: given without indices", topk_length=counts)
    refused(ValueError, "extra_k_cache: given without indices", extra_k_cache=extra)
    refused(ValueError, "one without the other", indices=lists, extra_k_cache=extra)
    refused(ValueError, "one without the other", indices=lists, extra_indices_in_kvcache=lists)
    refused(ValueError, "given without extra_k_cache", indices=lists, extra_topk_length=counts)
    refused(ValueError, r"^k_cache: .* expected \[num_blocks", k_cache=torch.zeros(4, 16, 2, L + R))
    refused(TypeError, "indices: dtype Long, expected Int", indices=lists.long())
    refused(ValueError, r"indices: shape \[1, 1, 3\], expected", indices=lists[:1])
    refused(ValueError, "^k_cache: shape", k_cache=extra.unsqueeze(0), indices=lists)
    both = {"indices": lists, "extra_k_cache": extra, "extra_indices_in_kvcache": lists}
    refused(TypeError, "^extra_k_cache: dtype", **both | {"extra_k_cache": extra.double()})
    refused(ValueError, "^extra_topk_length: shape", **both, extra_topk_length=counts[:1])
    refused(
        TypeError, "^extra_indices_in_kvcache: dtype Long",
        **both | {"extra_indices_in_kvcache": lists.long()},
    )  # fmt: skip


def test_batch_invariance_follows_determinism() -> None:
    pool = make_pool([1500, 20], block_size=64, dtype=torch.bfloat16)
    q = torch.randn(2, 1, H, L + R).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        both, alone = (
            interface.flash_mla_with_kvcache(
                q[:n], pool.cache, pool.block_table[:n], pool.seqlens[:n], L, None, None, SCALE,
                enable_batch_invariant=True,
            )[0]
            for n in (2, 1)
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(both[:1], alone)


def test_what_sparse_prefill_refuses() -> None:
    prompt = make_prompt()
    q, kv, indices = prompt.q, prompt.kv, prompt.indices
    for changed, match in (
        ((q.unsqueeze(0), kv, indices), r"q: shape .*, expected \[Sq, H, D\]"),
        ((q, kv.squeeze(1), indices), r"kv: shape .*, expected \[S, 1, D\]"),
        ((q, kv.expand(-1, 2, -1), indices), r"kv: shape .*, expected \[S, 1, D\]"),
        ((q, kv, indices.squeeze(1)), r"indices: shape .*, expected \[Sq, 1, topk\]"),
        ((q, kv, indices[1:]), "with Sq = 9"),
    ):
        with pytest.raises(ValueError, match=match):
            interface.flash_mla_sparse_fwd(*changed, SCALE, L)
    with pytest.raises(TypeError, match="q: got NoneType, expected a tensor"):
        interface.flash_mla_sparse_fwd(None, kv, indices, SCALE, L)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^kv: dtype Double"):
        interface.flash_mla_sparse_fwd(q, kv.double(), indices, SCALE, L)
    with pytest.raises(ValueError, match=r"^d_v: 0, expected"):
        interface.flash_mla_sparse_fwd(q, kv, indices, SCALE, 0)
    with pytest.raises(ValueError, match=r"^sm_scale: inf, expected"):
        interface.flash_mla_sparse_fwd(q, kv, indices, float("inf"), L)
    with pytest.raises(ValueError, match="indexer_topk: 34, expected 0 to 33"):
        interface.flash_mla_sparse_fwd(q, kv, indices, SCALE, L, indexer_topk=34)
    with pytest.raises(TypeError, match="indexer_topk: got str, expected an int"):
        interface.flash_mla_sparse_fwd(q, kv, indices, SCALE, L, indexer_topk="33")
