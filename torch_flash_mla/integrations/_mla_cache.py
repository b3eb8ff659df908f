"""MLACache: a transformers Cache that keeps the latents of MLA layers in pages.

The layers of one model share a :class:`~torch_flash_mla.cache.PagedLatentCache`: its first layer
(the *leader*) reserves room for a step and does what concerns whole sequences (reorder, crop,
select); the others only write their rows. Layers that are not MLA (sliding window, linear
attention, shared KV) stay those of transformers.

``update()`` has to return tensors, but the pages are no tensors of a shape that transformers knows.
It returns *carriers*: NaN tensors of the expected shape that take no memory and point to their
cache layer. The attention function of a patched layer follows the pointer; an unpatched one yields
NaN instead of silent garbage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
)

from torch_flash_mla import ops
from torch_flash_mla.cache import PagedLatentCache

_CARRIER = "_mla_cache_layer"


def cache_layer_of(key: Tensor) -> LatentPages | None:
    """The cache layer behind a carrier, None for an ordinary tensor."""
    return getattr(key, _CARRIER, None)


class _SharedPages:
    """The pages of all MLA layers of one cache, made when the first rows show batch and dtype."""

    def __init__(
        self,
        num_layers: int,
        dtype: torch.dtype | None,
        kv_cache_dtype: str,
        block_size: int,
        max_cache_len: int | None,
    ) -> None:
        self.num_layers = num_layers
        self.dtype = dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.block_size = block_size
        self.max_cache_len = max_cache_len
        self.paged: PagedLatentCache | None = None

    def allocate(self, batch: int, dtype: torch.dtype) -> PagedLatentCache:
        if self.paged is None:
            self.paged = PagedLatentCache(
                self.num_layers,
                None,
                None,
                dtype=self.dtype or dtype,
                kv_cache_dtype=self.kv_cache_dtype,
                block_size=self.block_size,
                max_batch=batch,
                max_cache_len=self.max_cache_len,
            )
        return self.paged


class LatentPages(CacheLayerMixin):
    """One MLA layer of an :class:`MLACache`. Mixed into the layer classes of transformers below."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # its one head_dim cannot describe a latent and a rotary key

    pages: _SharedPages
    index: int  # this layer's pool

    def attach(self, pages: _SharedPages, index: int) -> None:
        self.pages, self.index = pages, index

    @property
    def is_leader(self) -> bool:
        return self.index == 0

    # What the attention function reads

    @property
    def kv_cache_dtype(self) -> str:
        return self.pages.kv_cache_dtype

    def kv_cache(self) -> Tensor:
        """``[num_blocks, block_size, L + R]``, or uint8 ``[num_blocks, block_size, row bytes]``."""
        return self._paged.kv_cache(self.index)

    def block_table(self) -> Tensor:
        """int32 ``[B, max_blocks]``."""
        return self._paged.block_table[: self._paged.batch]

    def cache_seqlens(self) -> Tensor:
        """int32 ``[B]``, including the tokens of the present step."""
        return self._paged.cache_seqlens[: self._paged.batch]

    def gather(self, max_seqlen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The cached rows as [B, 1, S, L] and [B, 1, S, R], zero beyond each length."""
        latent, rope = self._paged.latent_dims[self.index], self._paged.rope_dims[self.index]
        rows = ops.gather_cache(
            self.kv_cache(),
            self.block_table(),
            self.cache_seqlens(),
            latent,
            latent + rope,
            dtype,
            self.kv_cache_dtype,
            max_seqlen,
        )
        kv_c, k_pe = rows.unsqueeze(1).split([latent, rope], dim=-1)
        return kv_c, k_pe

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[1] != 1 or value_states.shape[1] != 1:
            raise ValueError(
                f"MLACache holds compressed keys with one head, got {key_states.shape[1]}: "
                "this attention layer is not MLA, or caches expanded keys (transformers < 5.15)"
            )
        if key_states.device.type != "cpu":
            raise ValueError(f"MLACache lives on the CPU, got keys on {key_states.device}")
        self.dtype, self.device = key_states.dtype, key_states.device
        paged = self.pages.allocate(key_states.shape[0], key_states.dtype)
        paged.define_layer(self.index, key_states.shape[3], value_states.shape[3])
        with torch.inference_mode(False):
            self._nan = torch.full((), float("nan"), dtype=key_states.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores [B, 1, T, L] and [B, 1, T, R]; returns carriers [B, 1, S, L] and [B, 1, S, R].

        Raises:
            ValueError: keys with several heads (the layer is not MLA), or not on the CPU; a row
                that does not fit ``max_cache_len``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, latent = key_states.shape
        paged = self._paged
        if self.is_leader:
            if paged.batch == 0 and batch > paged.max_batch:  # reset, then used with more sequences
                paged.reset(batch)
            paged.reserve(batch, tokens)
        paged.append(
            self.index, key_states[:, 0].to(paged.dtype), value_states[:, 0].to(paged.dtype)
        )
        length = self._carrier_length()
        self.keys = self._nan.expand(batch, 1, length, latent)
        self.values = self._nan.expand(batch, 1, length, value_states.shape[3])
        # Not self.keys itself: a cycle would keep the pages until the garbage collector comes.
        carrier = self._nan.expand(batch, 1, length, latent)
        setattr(carrier, _CARRIER, self)
        return carrier, self.values

    def reset(self) -> None:
        self.keys = self.values = None
        if self.is_leader and self.pages.paged is not None:
            self.pages.paged.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens of every sequence."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a number of tokens to remove, 0 or negative, got {tokens_to_remove}"
            )
        if self.is_leader and tokens_to_remove < 0 and self._filled:
            self._paged.truncate((self.cache_seqlens() + tokens_to_remove).clamp(min=0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_leader and self._filled:
            self._paged.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_leader and self._filled:
            self._paged.fork(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_leader and self._filled:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self._paged.reorder(indices)

    def offload(self) -> None:
        """Nothing to do: the pages are in main memory."""

    def prefetch(self) -> None:
        """Nothing to do: the pages are in main memory."""

    # Parts

    @property
    def _paged(self) -> PagedLatentCache:
        assert self.pages.paged is not None, "used before the first update"
        return self.pages.paged

    @property
    def _filled(self) -> bool:
        return self.pages.paged is not None and self.pages.paged.batch > 0

    def _carrier_length(self) -> int:
        raise NotImplementedError


class GrowingLatentLayer(LatentPages, DynamicLayer):
    """Grows with the text: lengths are read as Python ints, as those of a DynamicCache are."""

    def get_seq_length(self) -> int:
        return int(self.cache_seqlens()[0]) if self._filled else 0

    def _carrier_length(self) -> int:
        return self.get_seq_length()


class FixedLatentLayer(LatentPages, StaticLayer):
    """At most ``max_cache_len`` tokens; a step changes only values of tensors, so it compiles."""

    def get_seq_length(self) -> Any:
        """A tensor once there is one, as for a StaticLayer: int32 []."""
        return self._paged.cache_seqlens[0] if self.is_initialized else 0

    def _carrier_length(self) -> int:
        return self.max_cache_len


class GrowingIndexedLatentLayer(DynamicIndexedLayer, GrowingLatentLayer):
    """Has the keys of a sparse-attention indexer too, kept as transformers keeps them."""


class FixedIndexedLatentLayer(StaticIndexedLayer, FixedLatentLayer):
    """Has the keys of a sparse-attention indexer too, kept as transformers keeps them."""

    is_croppable = False


class MLACache(Cache):
    """A cache for ``generate()`` and ``model.forward`` of a patched model.

    It stores values, not the graph that made them: train without a cache, or with one of
    transformers.

    Args:
        config: the model's config (or that of its text part): decides which layers are replaced.
        kv_cache_dtype: "auto" (the rows keep their dtype) or a packed format such as "q8_kv".
        max_cache_len: None grows as needed; a number allocates room for that many tokens at the
            first use, which makes the cache compilable (``is_compileable``).
        block_size: tokens per page.
        dtype: element type of unpacked rows; None takes that of the first rows that come.
        layers: indices of the MLA layers; None takes every layer with full or indexed attention.

    Raises:
        ValueError: a size, format or dtype that cannot be, or layers that turn out not to be MLA;
            mostly at the first use, which shows dims and dtype.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kv_cache_dtype: str = "auto",
        max_cache_len: int | None = None,
        block_size: int = 64,
        dtype: torch.dtype | None = None,
        layers: Iterable[int] | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size: got {block_size}, expected at least 1")
        text_config = config.get_text_config(decoder=True)
        arguments: dict[str, int] = {}
        ours: dict[type, type[LatentPages]]
        if max_cache_len is None:
            stock = DynamicCache(config=text_config).layers
            ours = {
                DynamicLayer: GrowingLatentLayer,
                DynamicIndexedLayer: GrowingIndexedLatentLayer,
            }
        else:
            # Whole pages: masks, carriers and pages then agree on the width.
            max_cache_len = -(-max_cache_len // block_size) * block_size
            arguments["max_cache_len"] = max_cache_len
            stock = StaticCache(text_config, max_cache_len).layers
            ours = {StaticLayer: FixedLatentLayer, StaticIndexedLayer: FixedIndexedLatentLayer}
        wanted = set(range(len(stock)) if layers is None else layers)
        replaced = [i for i, layer in enumerate(stock) if i in wanted and type(layer) in ours]
        self.pages = _SharedPages(len(replaced), dtype, kv_cache_dtype, block_size, max_cache_len)
        for index, i in enumerate(replaced):
            layer = ours[type(stock[i])](**arguments)
            layer.attach(self.pages, index)
            stock[i] = layer
        super().__init__(layers=stock)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for latents and tables (layers that stayed stock are not counted)."""
        return 0 if self.pages.paged is None else self.pages.paged.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all MLA layers; 0 before the first use."""
        return 0 if self.pages.paged is None else self.pages.paged.bytes_per_token
