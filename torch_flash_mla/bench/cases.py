"""Inputs of the operators, with the work they stand for. Dimensions default to DeepSeek's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import ops
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

FLOAT_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = (*FLOAT_FORMATS, *PACKED_FORMATS)
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Dims:
    """Widths of an MLA layer: latent, rope, and per head the rope-free part of keys, and values."""

    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


def query_dtype(format_name: str) -> torch.dtype:
    """The dtype a model would use with a cache of this format."""
    return FLOAT_FORMATS.get(format_name, torch.bfloat16)


def arithmetic(format_name: str) -> str:
    """What computes the format with the instruction set in use: f32, bf16, int16, int8."""
    dtype = FLOAT_FORMATS.get(format_name)
    name = str(dtype).removeprefix("torch.") if dtype else format_name
    return ops.arithmetic(name, query_dtype(format_name))


def token_bytes(format_name: str, dims: Dims) -> int:
    dtype = FLOAT_FORMATS.get(format_name)
    width = dims.latent + dims.rope
    return width * dtype.itemsize if dtype else row_bytes(format_name, dims.latent, dims.rope)


@dataclass(frozen=True)
class PagedCache:
    """Sequences of random tokens in shuffled pages."""

    format_name: str
    dims: Dims
    kv_cache: Tensor
    k_pe_cache: Tensor | None
    block_table: Tensor  # int32 [B, max_blocks]
    cache_seqlens: Tensor  # int32 [B]

    @property
    def kv_cache_dtype(self) -> str:
        return "auto" if self.format_name in FLOAT_FORMATS else self.format_name

    @property
    def tokens(self) -> int:
        return int(self.cache_seqlens.sum())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[B, longest, L + R], zero beyond each length."""
        width = self.dims.latent + self.dims.rope
        rows = self.kv_cache
        if self.k_pe_cache is not None:
            rows = torch.cat([self.kv_cache, self.k_pe_cache], -1)
        return ops.gather_cache(
            rows,
            self.block_table,
            self.cache_seqlens,
            self.dims.latent,
            width,
            dtype,
            self.kv_cache_dtype,
            int(self.cache_seqlens.max()),
        )


def paged_cache(
    format_name: str, lengths: list[int], dims: Dims = Dims(), two_tensors: bool = False
) -> PagedCache:
    """Fills a cache with standard normal tokens, as many as ``lengths`` says per sequence.

    Args:
        two_tensors: latent and rope part in tensors of their own (float formats).
    """
    torch.manual_seed(0)
    blocks = [-(-n // BLOCK_SIZE) for n in lengths]
    order = torch.randperm(max(1, sum(blocks)))
    table = torch.zeros(len(lengths), max(1, *blocks), dtype=torch.int32)
    dtype = FLOAT_FORMATS.get(format_name)
    kv_cache_dtype = "auto" if dtype else format_name
    shape = (len(order), BLOCK_SIZE)
    k_pe_cache = None
    if two_tensors:
        if dtype is None:
            raise ValueError(f"{format_name} rows hold the rope part themselves: one tensor only")
        kv_cache = torch.empty(*shape, dims.latent, dtype=dtype)
        k_pe_cache = torch.empty(*shape, dims.rope, dtype=dtype)
    else:
        row = dims.latent + dims.rope if dtype else token_bytes(format_name, dims)
        kv_cache = torch.empty(*shape, row, dtype=dtype or torch.uint8)
    first = 0
    for b, n in enumerate(lengths):
        table[b, : blocks[b]] = order[first : first + blocks[b]]
        first += blocks[b]
        token = torch.arange(n)
        slots = table[b, token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        latent, rope = torch.randn(n, dims.latent), torch.randn(n, dims.rope)
        ops.concat_and_cache_mla(latent, rope, kv_cache, slots, kv_cache_dtype, k_pe_cache)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return PagedCache(format_name, dims, kv_cache, k_pe_cache, table, seqlens)


@dataclass(frozen=True)
class Decode:
    """``queries`` new tokens of each sequence against the cache, absorbed form."""

    cache: PagedCache
    heads: int
    queries: int = 1
    topk: int = 0  # 0: dense; else so many random keys per query token

    def call(self) -> Callable[[], object]:
        arguments, options = self._arguments()
        return lambda: ops.mla_attention(*arguments, **options)

    def empty(self) -> Callable[[], object]:
        """A call with the same arguments that allocates the results, and nothing else."""
        arguments, options = self._arguments()
        return lambda: ops.allocate(*arguments, **options)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache, dims = self.cache, self.cache.dims
        batch = len(cache.cache_seqlens)
        width = dims.latent + dims.rope
        torch.manual_seed(1)
        q = torch.randn(batch, self.queries, self.heads, width).to(query_dtype(cache.format_name))
        indices = None
        if self.topk:
            rows = [
                torch.randperm(int(n))[: self.topk].sort().values
                for n in cache.cache_seqlens
                for _ in range(self.queries)
            ]
            indices = torch.stack(rows).view(batch, self.queries, -1).int()
        q_pe = None
        if cache.k_pe_cache is not None:
            q, q_pe = q.split([dims.latent, dims.rope], -1)
        arguments = (
            q,
            cache.kv_cache,
            cache.block_table,
            cache.cache_seqlens,
            dims.latent,
            dims.scale,
        )
        options = {
            "causal": self.queries > 1,
            "indices": indices,
            "q_pe": q_pe,
            "k_pe_cache": cache.k_pe_cache,
            "kv_cache_dtype": cache.kv_cache_dtype,
        }
        return arguments, options

    @property
    def keys(self) -> int:
        """Cache rows read by one query token, all sequences together."""
        if not self.topk:
            return self.cache.tokens
        return sum(min(self.topk, int(n)) for n in self.cache.cache_seqlens)

    @property
    def flop(self) -> float:
        dims = self.cache.dims
        return 2.0 * self.heads * self.queries * self.keys * (2 * dims.latent + dims.rope)

    @property
    def bytes(self) -> float:
        return float(self.keys * token_bytes(self.cache.format_name, self.cache.dims))


@dataclass(frozen=True)
class Step:
    """One new token of each sequence, from the model's own queries to its values.

    Each call takes the next of several weights, as the layers of a model follow one another: when
    its turn comes again, a weight has left the caches.
    """

    cache: PagedCache
    heads: int
    mebibytes: int  # of all weights together

    def tensors(self) -> dict[str, Tensor]:
        """What a call needs, with one weight."""
        cache, dims = self.cache, self.cache.dims
        dtype = query_dtype(cache.format_name)
        torch.manual_seed(1)
        batch = len(cache.cache_seqlens)
        q = torch.randn(batch, 1, self.heads, dims.nope + dims.rope).to(dtype)
        return {
            "q": q,
            "kv_cache": cache.kv_cache,
            "block_table": cache.block_table,
            "cache_seqlens": cache.cache_seqlens,
            "w_kv_b": _weight(self.heads, dims, dtype),
        }

    def scalars(self) -> dict[str, Any]:
        """The other arguments."""
        dims = self.cache.dims
        return {
            "head_dim_v": dims.value,
            "softmax_scale": dims.scale,
            "causal": True,
            "kv_cache_dtype": self.cache.kv_cache_dtype,
        }

    def call(self) -> Callable[[], object]:
        return rotating_step(ops.mla_attention_kv_b, self.tensors(), self.scalars(), self.mebibytes)

    @property
    def weight_bytes(self) -> int:
        dims = self.cache.dims
        item = query_dtype(self.cache.format_name).itemsize
        return self.heads * (dims.nope + dims.value) * dims.latent * item


def rotating_step(
    attention: Callable[..., object],
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
    mebibytes: int,
) -> Callable[[], object]:
    """Calls of mla_attention_kv_b that go through copies of the weight, so many MiB of them."""
    rest = dict(tensors)
    weight = rest.pop("w_kv_b")
    copies = max(1, mebibytes * 2**20 // weight.nbytes)
    weights = itertools.cycle(weight.expand(copies, -1, -1, -1).contiguous().unbind())
    return lambda: attention(w_kv_b=next(weights), **rest, **scalars)


def _weight(heads: int, dims: Dims, dtype: torch.dtype) -> Tensor:
    """kv_b_proj's, [H, P + V, L]."""
    w = torch.randn(heads, dims.nope + dims.value, dims.latent) * dims.latent**-0.5
    return w.to(dtype)


@dataclass(frozen=True)
class Prefill:
    """New tokens of sequences, causal, from the model's own queries to its values."""

    cache: PagedCache  # sequences of equal length: the history, then the new tokens
    heads: int
    tokens: int  # new ones of a sequence

    @property
    def batch(self) -> int:
        return len(self.cache.cache_seqlens)

    @property
    def history(self) -> int:
        return self.cache.tokens // self.batch - self.tokens

    def call(self, form: str) -> Callable[[], object]:
        cache, dims = self.cache, self.cache.dims
        dtype = query_dtype(cache.format_name)
        torch.manual_seed(1)
        q = torch.randn(self.batch, self.tokens, self.heads, dims.nope + dims.rope).to(dtype)
        w_kv_b = self.weight()
        arguments = (q, cache.kv_cache, cache.block_table, cache.cache_seqlens, w_kv_b, dims.value)
        options: dict[str, Any] = {
            "causal": True,
            "k_pe_cache": cache.k_pe_cache,
            "kv_cache_dtype": cache.kv_cache_dtype,
            "form": form,
        }
        return lambda: ops.mla_attention_kv_b(*arguments, dims.scale, **options)

    def weight(self) -> Tensor:
        """kv_b_proj's, [H, P + V, L]."""
        return _weight(self.heads, self.cache.dims, query_dtype(self.cache.format_name))

    @property
    def flop(self) -> float:
        """Useful work: each query against the keys it sees, in the model's own widths, and keys and
        values of each new token made from its latent once."""
        dims, n = self.cache.dims, self.tokens
        pairs = n * self.history + n * (n + 1) / 2
        attention = 2.0 * pairs * (dims.nope + dims.rope + dims.value)
        making = 2.0 * n * dims.latent * (dims.nope + dims.value)
        return self.batch * self.heads * (attention + making)

    def products(self) -> Callable[[], object]:
        """The two products of the absorbed form by themselves: torch.bmm on dense operands."""
        dims, n = self.cache.dims, self.batch * self.tokens
        dtype = query_dtype(self.cache.format_name)
        w_uk, w_uv = (part.contiguous() for part in self.weight().split([dims.nope, dims.value], 1))
        q = torch.randn(self.heads, n, dims.nope).to(dtype)
        latent = torch.randn(self.heads, n, dims.latent).to(dtype)
        return lambda: (torch.bmm(q, w_uk), torch.bmm(latent, w_uv.transpose(1, 2)))


@dataclass(frozen=True)
class Append:
    """``tokens`` new rows into random slots of a cache."""

    format_name: str
    tokens: int
    dims: Dims = Dims()

    def call(self) -> Callable[[], object]:
        arguments = self._arguments()
        return lambda: ops.concat_and_cache_mla(*arguments)

    def empty(self) -> Callable[[], object]:
        """A call with the same arguments that does nothing."""
        arguments = self._arguments()
        return lambda: ops.append_nothing(*arguments)

    def _arguments(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        blocks = max(4, -(-self.tokens // BLOCK_SIZE))
        cache = paged_cache(self.format_name, [blocks * BLOCK_SIZE], self.dims)
        dtype = query_dtype(self.format_name)
        kv_c = torch.randn(self.tokens, self.dims.latent).to(dtype)
        k_pe = torch.randn(self.tokens, self.dims.rope).to(dtype)
        slots = torch.randperm(blocks * BLOCK_SIZE)[: self.tokens]
        return kv_c, k_pe, cache.kv_cache, slots, cache.kv_cache_dtype

    @property
    def bytes(self) -> float:
        """Read and written."""
        read = (self.dims.latent + self.dims.rope) * query_dtype(self.format_name).itemsize
        return float(self.tokens * (read + token_bytes(self.format_name, self.dims)))
