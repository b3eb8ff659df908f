"""MLACache: a transformers Cache that keeps the latents of MLA layers in pages.

The layers of one model share a :class:`~torch_flash_mla.cache.PagedLatentCache`: the one that comes
first (the *leader*: layer 0, or the first of a pipeline stage) reserves room for a step and does
what concerns whole sequences (reorder, crop, select); the others only write their rows. Layers that
are not MLA (sliding window, linear attention, shared KV) stay those of transformers.

``update()`` has to return tensors, but the pages are no tensors of a shape that transformers knows.
It returns *carriers*: NaN tensors of the expected shape that take no memory and point to their
cache layer. The attention function of a patched layer follows the pointer and says so; an unpatched
one yields NaN, and the next ``update()`` refuses to go on. ``keys`` and ``values`` of a layer, for
those who look into a cache, are copies of what the pages hold.

Continuations of one prompt share its pages: ``fork`` makes them from a cache that holds the prompt,
``share_prompt`` announces a prompt that comes several times at once. ``save`` and ``load`` keep a
prompt on disk (``cache.py`` stores the pages, ``layer_state.py`` the other layers, this file what
model it was).

What concerns whole sequences is done in the layers that stayed stock first, and in the pages last:
they change at once or not at all, and if they do not, the other layers are put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
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

from torch_flash_mla import _cache_file, ops
from torch_flash_mla._integers import integer, integers
from torch_flash_mla.cache import MOST_SEQUENCES, MOST_TOKENS, PagedLatentCache
from torch_flash_mla.integrations.transformers import layer_state
from torch_flash_mla.integrations.transformers.compat import CACHE_ARGUMENT as CACHE_ARGUMENT
from torch_flash_mla.integrations.transformers.compat import STORES_NOTHING
from torch_flash_mla.integrations.transformers.context_parallel import ContextShare
from torch_flash_mla.integrations.transformers.fingerprint import (
    decoder_config,
    difference,
    fingerprint,
)
from torch_flash_mla.integrations.transformers.selection import is_disabled, teach_selection

_CARRIER = "_mla_cache_layer"
_OF_PAGES = {"pages", "index", "_nan"}  # attributes that no file holds


class Pages:
    """What the attention function reads of one layer's pages."""

    # Whether each sequence ends at its own length and sees its own tokens only: masks that
    # transformers makes for a batch of one width do not apply.
    causal_by_length = False

    # The share of the context that the pages hold, where other processes hold the rest.
    context: ContextShare | None = None

    @property
    def kv_cache_dtype(self) -> str:
        raise NotImplementedError

    def dims(self) -> tuple[int, int]:
        """L and R."""
        raise NotImplementedError

    def kv_cache(self) -> Tensor:
        """``[num_blocks, block_size, L + R]``, or uint8 ``[num_blocks, block_size, row bytes]``."""
        raise NotImplementedError

    def block_table(self) -> Tensor:
        """int32 ``[B, max_blocks]``."""
        raise NotImplementedError

    def cache_seqlens(self) -> Tensor:
        """int32 ``[B]``, including the tokens of the present step."""
        raise NotImplementedError

    def take(self) -> None:
        """Tells the cache that its carriers have come to an attention that can read them."""

    def gather(self, max_seqlen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The cached rows as [B, 1, S, L] and [B, 1, S, R], zero beyond each length."""
        latent, rope = self.dims()
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

    def carriers(self, nan: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """[B, 1, S, L], from which :func:`cache_layer_of` comes back here, and [B, 1, S, R]."""
        latent, rope = self.dims()
        carrier = nan.expand(batch, 1, length, latent)
        setattr(carrier, _CARRIER, self)
        return carrier, nan.expand(batch, 1, length, rope)


def cache_layer_of(key: Tensor) -> Pages | None:
    """The pages behind a carrier, None for an ordinary tensor."""
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
        max_batch: int,
        context: ContextShare | None,
    ) -> None:
        self.num_layers = num_layers
        self.dtype = dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.block_size = block_size
        self.max_cache_len = max_cache_len
        self.max_batch = max_batch
        self.context = context
        self.context_length = 0  # of which ``paged`` holds a share; not counted without a context
        self.copies, self.copied_tokens = 1, 0  # rows that come equal, for how many tokens
        self.leader: int | None = None  # index of the layer that comes first in a step
        self.written: tuple[int, ...] = ()  # layers that have their rows of the present step
        self.carrier_is_out = False  # no attention has taken it yet
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
                max_batch=max(batch, self.max_batch),
                max_cache_len=self.max_cache_len,
            )
        return self.paged


class LatentPages(Pages, CacheLayerMixin):
    """One MLA layer of an :class:`MLACache`. Mixed into the layer classes of transformers below."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # its one head_dim cannot describe a latent and a rotary key

    pages: _SharedPages
    index: int  # this layer's pool

    def attach(self, pages: _SharedPages, index: int) -> None:
        self.pages, self.index = pages, index

    @property
    def context(self) -> ContextShare | None:  # type: ignore[override]
        return self.pages.context

    @property
    def is_leader(self) -> bool:
        return self.index == (0 if self.pages.leader is None else self.pages.leader)

    def take(self) -> None:
        self.pages.carrier_is_out = False

    # What the attention function reads

    @property
    def kv_cache_dtype(self) -> str:
        return self.pages.kv_cache_dtype

    def dims(self) -> tuple[int, int]:
        return self._paged.latent_dims[self.index], self._paged.rope_dims[self.index]

    def kv_cache(self) -> Tensor:
        return self._paged.kv_cache(self.index)

    def block_table(self) -> Tensor:
        return self._paged.block_table[: self._paged.batch]

    def cache_seqlens(self) -> Tensor:
        return self._paged.cache_seqlens[: self._paged.batch]

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
        self._make_carrier(key_states.dtype)
        self.is_initialized = True

    def _make_carrier(self, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self._nan = torch.full((), float("nan"), dtype=dtype, device="cpu")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores [B, 1, T, L] and [B, 1, T, R]; returns carriers [B, 1, S, L] and [B, 1, S, R].

        Raises:
            ValueError: keys with several heads (the layer is not MLA), or not on the CPU; another
                number of sequences than the cache holds; a row that does not fit ``max_cache_len``.
            RuntimeError: the carriers of the last update were not taken (the model is not patched);
                or another layer begins a step than before.
        """
        if self.pages.carrier_is_out:
            raise RuntimeError(
                "the keys of an MLACache went to an attention that cannot read its pages: call "
                "torch_flash_mla.patch(model) first, or select attn_implementation='mla_cpu'; a "
                "model that stays stock needs a cache of transformers. (If a call was interrupted, "
                "reset() the cache.)"
            )
        first, compiling = self.pages.leader is None, torch.compiler.is_compiling()
        if not (first or self.is_leader or compiling):
            self._check_step()
        begins = first or self.is_leader or not self.is_initialized
        guarded = begins and not compiling
        with self._unchanged_on_error() if guarded else contextlib.nullcontext():
            if first:
                self.pages.leader = self.index
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            paged = self._paged
            rows = key_states[:, 0].to(paged.dtype), value_states[:, 0].to(paged.dtype)
            if self.is_leader:
                self._reserve(rows[0])
            paged.append(self.index, *self._kept(rows))
        # What raised above may be repeated. A leader that is compiled begins steps of layers that
        # are not.
        if self.is_leader:
            self.pages.written = (self.index,)
        elif not compiling:
            self.pages.written += (self.index,)
        self.pages.carrier_is_out = True
        return self.carriers(self._nan, paged.batch, self._carrier_length())

    def _restore_carriers(self) -> None:
        """What the first ``update`` makes, for a layer from a file."""
        if 0 in self.dims()[:1] or self.dtype is None:
            raise ValueError(f"pool.{self.index}: missing, or without a dtype")
        self._make_carrier(self.dtype)

    def _check_step(self) -> None:
        """Refuses rows of a step that the leader has not begun: there is no room for them."""
        if self.index in self.pages.written:
            raise RuntimeError(
                f"pool {self.index} of an MLACache got rows twice since pool {self.pages.leader}, "
                "which came first, got any: a cache serves one model, or the same part of it"
            )

    def _reserve(self, rows: Tensor) -> None:
        """Makes room for a step, in all layers: ``rows`` are the latents [B, T, L] of this one."""
        paged, pages = self._paged, self.pages
        batch, tokens = rows.shape[:2]
        if paged.batch == 0 and batch > paged.max_batch:  # reset, then used with more sequences
            paged.reset(batch)
        if paged.batch not in (0, batch):
            raise ValueError(
                f"the cache holds {paged.batch} sequences, but {batch} came: use fork(n) for n "
                "continuations of each, or reset() to begin anew"
            )
        copies = self._copies(tokens)
        if pages.context is None:
            paged.reserve(batch, tokens, copies)
            return
        first, last = pages.context_length, pages.context_length + tokens
        pages.context.compare_step(rows, first)
        paged.reserve(batch, len(pages.context.positions(first, last)), copies)
        pages.context_length = last

    def _kept(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Those of the step's rows [B, T, L] and [B, T, R] that this process keeps."""
        context, last = self.pages.context, self.pages.context_length
        if context is None:
            return rows
        first = last - rows[0].shape[1]
        kept = context.positions(first, last) - first
        return rows[0][:, kept], rows[1][:, kept]

    @contextlib.contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Forgets what the block has begun if it raises: a first use, room for a step."""
        layer, pages = vars(self).copy(), vars(self.pages).copy()
        paged = self.pages.paged
        try:
            with contextlib.nullcontext() if paged is None else paged.unchanged_on_error():
                yield
        except BaseException:
            vars(self).clear()
            vars(self).update(layer)
            vars(self.pages).update(pages)
            raise

    # What those read who look into a cache

    @property
    def keys(self) -> Tensor | None:
        """A copy of the latents [B, 1, S, L], as a layer of transformers holds them; None as long
        as there are none. NaN where another process keeps them."""
        stored = self._stored()
        return None if stored is None else stored[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        _refuse_assignment("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """A copy of the rotary keys [B, 1, S, R]; see ``keys``."""
        stored = self._stored()
        return None if stored is None else stored[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        _refuse_assignment("values", values)

    def _stored(self) -> tuple[Tensor, Tensor] | None:
        if not (self.is_initialized and self._filled):
            return None
        assert self.dtype is not None
        context, length = self.pages.context, self._carrier_length()
        if context is None:
            return self.gather(length, self.dtype)
        positions = context.positions(0, length)
        here = self.gather(len(positions), self.dtype)
        latents, ropes = (
            rows.new_full((len(rows), 1, length, rows.shape[3]), float("nan")).index_copy_(
                2, positions, rows
            )
            for rows in here
        )
        return latents, ropes

    # Sequences come and go for all layers at once: MLACache does it.

    def reset(self) -> None:
        self.pages.copies = 1
        self.pages.carrier_is_out = False

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do here."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Nothing to do here."""

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

    def _copies(self, tokens: int) -> int:
        """How many rows in a row get the same ``tokens`` next tokens."""
        return 1


class GrowingLatentLayer(LatentPages, DynamicLayer):
    """Grows with the text: lengths are read as Python ints, as those of a DynamicCache are."""

    def get_seq_length(self) -> int:
        if not self._filled:
            return 0
        pages = self.pages
        return int(self.cache_seqlens()[0]) if pages.context is None else pages.context_length

    def _carrier_length(self) -> int:
        return self.get_seq_length()

    def _copies(self, tokens: int) -> int:
        pages = self.pages
        copies, after = pages.copies, self.get_seq_length() + tokens
        if after >= pages.copied_tokens:
            pages.copies = 1  # the prompt is over, also for a cache that is cropped later
        return copies if after <= pages.copied_tokens else 1


class FixedLatentLayer(LatentPages, StaticLayer):
    """At most ``max_cache_len`` tokens; a step changes only values of tensors, so it compiles."""

    def get_seq_length(self) -> Any:
        """A tensor once there is one, as for a StaticLayer: int32 []."""
        return 0 if self.pages.paged is None else self.pages.paged.cache_seqlens[0]

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
    transformers. With ``TORCH_FLASH_MLA_DISABLE=1`` every layer is that of transformers, so that
    programs which make a cache run on stock models.

    Args:
        config: the model's config (or that of its text part): decides which layers are replaced.
        kv_cache_dtype: "auto" (the rows keep their dtype) or a packed format such as "q8_kv".
        max_cache_len: None grows as needed; a number allocates room for that many tokens at the
            first use, which makes the cache compilable (``is_compileable``).
        block_size: tokens per page.
        dtype: element type of unpacked rows; None takes that of the first rows that come.
        layers: indices of the MLA layers; None takes every layer with full or indexed attention.
        max_batch: with ``max_cache_len``, room for this many sequences at least: those that
            ``fork`` will make of fewer.
        process_group: the processes that keep one context together, each a share of its pages; see
            docs/context_parallel.md. Every one of them runs the same model on the same tokens.

    Raises:
        TypeError: a size that is no integer, a group that is none.
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
        max_batch: int = 1,
        process_group: Any = None,
    ) -> None:
        block_size = integer("block_size", block_size, 1, MOST_TOKENS)
        max_batch = integer("max_batch", max_batch, 1, MOST_SEQUENCES)
        context = None if process_group is None else ContextShare(process_group, block_size)
        if context is not None and max_cache_len is not None:
            raise ValueError(
                f"max_cache_len: got {max_cache_len} with a process_group, whose caches grow: a "
                "compiled step cannot exchange results with other processes"
            )
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
            max_cache_len = integer("max_cache_len", max_cache_len, 1, MOST_TOKENS)
            # Whole pages: masks, carriers and pages then agree on the width.
            max_cache_len = -(-max_cache_len // block_size) * block_size
            arguments["max_cache_len"] = max_cache_len
            stock = StaticCache(text_config, max_cache_len).layers
            ours = {StaticLayer: FixedLatentLayer, StaticIndexedLayer: FixedIndexedLatentLayer}
        wanted = set(range(len(stock)) if layers is None else integers("layers", layers, 0))
        if is_disabled():
            wanted = set()
        else:
            teach_selection()  # the model may select the attention by its name
        replaced = [i for i, layer in enumerate(stock) if i in wanted and type(layer) in ours]
        if not replaced and kv_cache_dtype != "auto" and layers is None and not is_disabled():
            raise ValueError(
                f"kv_cache_dtype: got {kv_cache_dtype!r}, but no layer of this config keeps pages "
                "of latents, so nothing would have that format: expected auto"
            )
        self.pages = _SharedPages(
            len(replaced),
            dtype,
            kv_cache_dtype,
            block_size,
            max_cache_len,
            max_batch,
            None if context is None or context.size == 1 else context,
        )
        self._shared_prefix: tuple[int, int] | None = None  # copies, tokens, after a fork
        for index, i in enumerate(replaced):
            layer = ours[type(stock[i])](**arguments)
            layer.attach(self.pages, index)
            stock[i] = layer
        Cache.__init__(self, layers=stock)
        if max_cache_len is None and type(self) is MLACache:
            self.__class__ = GrowingMLACache

    @property
    def nbytes(self) -> int:
        """Bytes allocated for latents and tables (layers that stayed stock are not counted)."""
        return 0 if self.pages.paged is None else self.pages.paged.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all MLA layers; 0 before the first use."""
        return 0 if self.pages.paged is None else self.pages.paged.bytes_per_token

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to each other one of its ``process_group`` for
        attention."""
        return 0 if self.pages.context is None else self.pages.context.bytes_sent

    @property
    def batch_size(self) -> int:
        """Sequences that the cache holds; -1 before the first use."""
        if self.pages.num_layers == 0:  # all layers are stock
            keys = (getattr(layer, "keys", None) for layer in self.layers)
            return next((len(x) for x in keys if isinstance(x, Tensor)), -1)
        paged = self.pages.paged
        return paged.batch if paged is not None and paged.batch else -1

    @property
    def can_forget(self) -> bool:
        """Whether every layer that stores something can forget its last tokens: no sliding windows
        or recurrent states."""
        return all(
            isinstance(layer, (LatentPages, *STORES_NOTHING))
            or type(layer) in (DynamicLayer, StaticLayer)
            for layer in self.layers
        )

    # Several continuations of one prompt

    def fork(self, n: int) -> None:
        """Makes ``n`` continuations of each sequence, rows 0, 0, .., 1, 1, .. (the order of
        ``num_return_sequences``), which share its pages: each copies only the last one, if that is
        partly filled. Layers that stayed stock are copied.

        ``generate()`` then takes ``n`` rows per former row. Suffixes of different lengths are
        padded between prompt and suffix, where the attention mask is 0 for the padding.
        ``batch_select_indices`` and ``crop`` lead back to the prompt.

        Raises:
            TypeError: ``n`` is no integer.
            ValueError: ``n`` below 1, an empty cache, or more sequences than the ``max_batch`` of a
                cache with ``max_cache_len``.
            RuntimeError, MemoryError: no memory. Nothing has changed, whatever was raised.
        """
        paged, batch = self.pages.paged, self.batch_size
        n = integer("n", n, 1, MOST_SEQUENCES)
        if batch < 1:
            raise ValueError("fork of an empty cache: run the prompt through the model first")
        if paged is not None and paged.max_blocks is not None and paged.batch * n > paged.max_batch:
            raise ValueError(
                f"n: got {n} for a batch of {paged.batch}, but the cache of fixed size was made "
                f"for {paged.max_batch} sequences: MLACache(..., max_batch={paged.batch * n})"
            )
        prefix = n, int(self.get_seq_length())
        self.reorder_cache(torch.arange(batch, device="cpu").repeat_interleave(n))
        self._shared_prefix = prefix

    def share_prompt(self, copies: int, tokens: int) -> None:
        """Announces that the rows of the next forward passes come as ``copies`` equal ones in a
        row, until the cache holds ``tokens`` tokens: their pages are stored once, as after a
        :meth:`fork`. Of use for growing caches only; ``generate()`` of a patched model does it for
        ``num_return_sequences`` and beams.
        """
        copies = integer("copies", copies, 1, MOST_SEQUENCES)
        tokens = integer("tokens", tokens, 0, MOST_TOKENS)
        self.pages.copies, self.pages.copied_tokens = copies, tokens
        self._shared_prefix = (copies, tokens) if copies > 1 else None

    # transformers has reorder_cache for every kind of layer, the other two only for some.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with layer_state.unchanged_on_error(self.layers):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            for layer in self.layers:
                if hasattr(layer, "batch_size"):  # static layers remember it
                    layer.batch_size = len(beam_idx)
            if self.pages.paged is not None and self.batch_size > 0:
                self.pages.paged.reorder(beam_idx)
        self._shared_prefix = None
        self.pages.copies = 1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens of every sequence.

        Raises:
            TypeError: no integer.
            ValueError: a positive one.
            RuntimeError: a layer of transformers that cannot go back; or no memory (MemoryError
                too). Nothing has changed, whatever was raised.
        """
        tokens_to_remove = integer("tokens_to_remove", tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a number of tokens to remove, 0 or negative, got {tokens_to_remove}"
            )
        with layer_state.unchanged_on_error(self.layers):
            super().crop(tokens_to_remove)
            paged = self.pages.paged
            if self.pages.context is not None and paged is not None:
                length = max(0, self.pages.context_length + tokens_to_remove)
                paged.truncate(self.pages.context.count(length))
                self.pages.context_length = length
            elif tokens_to_remove < 0 and paged is not None:
                lengths = paged.cache_seqlens[: paged.batch] + tokens_to_remove
                paged.truncate(lengths.clamp(min=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.batch_size > 0:
            self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size > 0:
            self.fork(repeats)

    def reset(self) -> None:
        if self.pages.paged is not None:
            self.pages.paged.reset()  # what may fail comes first
        self.pages.context_length = 0
        self.pages.leader = None
        self._shared_prefix = None
        super().reset()

    def check_continuation(self, attention_mask: Tensor) -> None:
        """Refuses a mask that cannot belong to a continuation of what the cache holds.

        Args:
            attention_mask: [B, S] as for ``generate()``, cached tokens first.

        Raises:
            ValueError: another number of sequences; fewer tokens than are cached; rows that share a
                prompt, with masks that differ in it (padding on the left of a cached prompt: it
                belongs behind it).
        """
        if self.batch_size < 0:
            return
        batch, width = attention_mask.shape
        if batch != self.batch_size:
            raise ValueError(
                f"attention_mask: got {batch} sequences, but the cache holds {self.batch_size}: "
                "use fork(n) for n continuations of each"
            )
        length = int(self.get_seq_length())
        if width < length:
            raise ValueError(
                f"attention_mask: got {width} tokens, but the cache holds {length}: it (or "
                "input_ids) must begin with the cached ones"
            )
        if self._shared_prefix is not None:
            copies, prefix = self._shared_prefix
            masks = attention_mask[:, : min(prefix, length)].view(batch // copies, copies, -1)
            if not torch.equal(masks, masks[:, :1].expand_as(masks)):
                raise ValueError(
                    "attention_mask: sequences that share a cached prompt differ within it; pad "
                    "between the prompt and what follows, not on the left of the prompt"
                )

    # On disk

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """Writes what the cache holds to a safetensors file for :meth:`load`.

        Pages that sequences share are stored once. Layers that stayed stock (sliding window, linear
        attention, indexer keys) are stored with their whole state. The file appears whole or not at
        all, and replaces one of the same name. It does not say which tokens the prompt had.

        Args:
            path: the file; its folder must exist.
            model: the model that filled the cache. Its config, and a sample of each of its weights,
                go into the file, and :meth:`load` compares them.

        Raises:
            ValueError: an empty cache, a stock layer with a state that cannot be stored, or
                TORCH_FLASH_MLA_DISABLE, with which a cache has no pages.
            OSError: the file cannot be written.
        """
        paged = self.pages.paged
        _refuse_if_disabled("save")
        if paged is None or paged.batch == 0:
            raise ValueError("save of an empty cache: run the prompt through the model first")
        pages, contents = paged.snapshot()
        header = {
            "pages": pages,
            "model": fingerprint(model),
            "shared_prefix": self._shared_prefix,
            "context": self._share(),
            "layers": [i for i, layer in enumerate(self.layers) if isinstance(layer, LatentPages)],
            "states": [
                layer_state.encode(layer, f"layer.{i}", _of_pages(layer), contents)
                for i, layer in enumerate(self.layers)
            ],
        }
        _cache_file.write(path, "MLACache", header, contents)

    def _share(self) -> dict[str, int] | None:
        """Which share of how many tokens this is."""
        context, length = self.pages.context, self.pages.context_length
        if context is None:
            return None
        return {"rank": context.rank, "size": context.size, "length": length}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        mmap: bool = False,
        verify: bool = True,
        process_group: Any = None,
    ) -> MLACache:
        """The cache of a file that :meth:`save` wrote. It can grow, be cropped, forked and saved;
        the file stays as it is.

        Args:
            path: the file.
            model: the model that will continue; it must be the one that filled the cache.
            mmap: map the file instead of reading it; see
                :meth:`torch_flash_mla.PagedLatentCache.load`.
            verify: compare every tensor with its checksum; see there.
            process_group: for the file of a rank: a group of as many, in which this process has the
                same rank.

        Raises:
            OSError: the file cannot be opened or read.
            ValueError: no such file, of another version, damaged, made by another model, or the
                share of another rank; the message says where, or how they differ. Or
                TORCH_FLASH_MLA_DISABLE is set.
            RuntimeError, MemoryError: no memory for it.
        """
        _refuse_if_disabled("load")
        with _cache_file.opened(path, "MLACache", mmap, verify) as (header, tensors):
            fields = _cache_file.Fields(header)
            different = difference(dict(fields.mapping("model")), fingerprint(model))
            if different is not None:
                raise _cache_file.RefusedFile(f"a cache of another model: {different}")
            paged = PagedLatentCache.from_snapshot(fields.mapping("pages"), tensors)
            config = decoder_config(model)
            cache = cls(
                config,
                paged.kv_cache_dtype,
                paged.max_cache_len,
                paged.block_size,
                paged.dtype,
                fields.integers("layers", 0, config.num_hidden_layers - 1),
                paged.max_batch,
                process_group,
            )
            if cache.pages.num_layers != paged.num_layers:
                raise ValueError(f"pools of {paged.num_layers} of {cache.pages.num_layers} layers")
            if paged.batch == 0:
                raise ValueError("lengths: no sequences")
            cache.pages.paged = paged
            cache._take_share(fields["context"])
            if header["shared_prefix"] is not None:
                copies, prefix = fields.integers("shared_prefix", 0, MOST_TOKENS)
                if copies == 0 or paged.batch % copies:
                    raise ValueError(f"shared_prefix: {copies} copies in a batch of {paged.batch}")
                cache._shared_prefix = copies, prefix
            states = fields.sequence("states")
            if len(states) != len(cache.layers):
                raise ValueError(f"states: of {len(states)} of {len(cache.layers)} layers")
            for i, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
                attributes = layer_state.decode(
                    layer, f"layer.{i}", _of_pages(layer), state, tensors, paged.batch
                )
                vars(layer).update(attributes)
                if isinstance(layer, LatentPages) and layer.is_initialized:
                    layer._restore_carriers()
        return cache

    def _take_share(self, stored: Any) -> None:
        """Compares the share of a file with that of this process."""
        fields = None if stored is None else _cache_file.Fields(stored, "context")
        share = "all of it"
        if fields is not None:
            rank, size = fields.integer("rank", 0), fields.integer("size", 1)
            share = f"the share of rank {rank} of {size}"
        context, here = self.pages.context, "all of it"
        if context is not None:
            here = f"the share of rank {context.rank} of {context.size}"
        if share != here:
            raise _cache_file.RefusedFile(
                f"it holds of its context {share}, and this process keeps {here}: every rank loads "
                "its own file, with a process_group of as many ranks as there were"
            )
        if fields is None or context is None:
            return
        length, paged = fields.integer("length", 0, MOST_TOKENS), self.pages.paged
        assert paged is not None
        if paged.cache_seqlens[: paged.batch].tolist() != [context.count(length)] * paged.batch:
            raise ValueError(f"context.length: got {length}, which is not that of the pages")
        self.pages.context_length = length


class GrowingMLACache(MLACache, DynamicCache):
    """What an ``MLACache`` without ``max_cache_len`` is: code that looks for the ``DynamicCache``
    that ``generate()`` makes by default finds one."""


def _refuse_assignment(name: str, value: Tensor | None) -> None:
    """None is what transformers gives a layer that it makes."""
    if value is not None:
        raise AttributeError(
            f"{name} of a layer of an MLACache is a copy of what its pages hold and cannot be set: "
            "use update(), crop() and reorder_cache()"
        )


def _refuse_if_disabled(what: str) -> None:
    if is_disabled():
        raise ValueError(
            f"{what} of an MLACache: its layers are stock, without pages, because "
            "TORCH_FLASH_MLA_DISABLE is set"
        )


def _of_pages(layer: Any) -> set[str]:
    """Attributes of a layer that stand for its pages: no file holds them."""
    return _OF_PAGES if isinstance(layer, LatentPages) else set()
