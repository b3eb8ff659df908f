"""A paged cache of latents for all layers of a model: one allocator, one block table, one pool per
layer.

Each token takes one row per layer, ``[latent | rope]``, in a pool of fixed-size blocks. A block
table maps the blocks of a sequence to blocks of the pool, the same for every layer, so sequences
can share the blocks of a common prefix (beams, parallel samples) and return them without moving
anything.

A change of the sequences is made beside the present state and taken over at the end, when all
memory that it needs has been allocated: one that fails leaves the cache as it was. Nor are tables
and lengths written to that a step has given to the operators; they are replaced, and whoever holds
them, in another thread too, goes on with what they said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import _cache_file, ops
from torch_flash_mla._integers import integer, integers
from torch_flash_mla.formats import FLOAT_DTYPES, PACKED_FORMATS, row_bytes

# Bounds of what callers may ask for. Tables are int32, and what is counted per block or sequence in
# Python must fit beside the pools.
MOST_TOKENS = 2**30  # of one sequence
MOST_BLOCKS = 2**27  # of one cache
MOST_SEQUENCES = 2**20
_MOST_LAYERS = 2**16
_MOST_DIM = 2**20

# A file may ask for more blocks than it holds (max_cache_len), but not for any number.
_MOST_RESERVED = 2**20
_MOST_RESERVED_PER_BLOCK = 16


class BlockAllocator:
    """Which blocks are in use, and by how many sequences. Plain bookkeeping, no tensors.

    Args:
        num_blocks: blocks at first.
        references: of each of them; with 0 they are free.
    """

    def __init__(self, num_blocks: int = 0, references: int = 0) -> None:
        self.references = [references] * num_blocks
        # A stack: low blocks first.
        self._free = [] if references else list(range(num_blocks - 1, -1, -1))

    def copy(self) -> BlockAllocator:
        """One that changes by itself."""
        copied = BlockAllocator()
        copied.references, copied._free = self.references.copy(), self._free.copy()
        return copied

    @property
    def num_blocks(self) -> int:
        return len(self.references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, num_blocks: int) -> None:
        """Adds blocks until there are ``num_blocks``."""
        new = range(num_blocks - 1, self.num_blocks - 1, -1)
        self._free = [*new, *self._free]
        self.references += [0] * len(new)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free blocks, each with one reference."""
        if count > self.num_free:
            raise RuntimeError(f"{count} cache blocks wanted, {self.num_free} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Adds one reference to each block."""
        for block in blocks:
            self.references[block] += 1

    def release(self, blocks: Sequence[int], idle: list[int] | None = None) -> None:
        """Drops one reference of each block; a block without references is free, or joins ``idle``,
        for whoever frees it later."""
        free = self._free if idle is None else idle
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                free.append(block)

    def free(self, idle: Sequence[int]) -> None:
        """Makes blocks without references free."""
        self._free += idle


class _Draft:
    """Who holds which blocks after a change. The cache knows nothing of it until it is taken over.

    Rows of ``blocks`` are replaced, never written to, so those of the cache stay as they are.
    """

    def __init__(self, cache: PagedLatentCache, sequences: int = 0) -> None:
        self.allocator = cache.allocator.copy()
        missing = max(0, sequences - len(cache._blocks))
        self.blocks: list[Sequence[int]] = [*cache._blocks, *[()] * missing]
        self.changed: dict[int, int] = {}  # by row: the first column that differs
        self.pools: list[Tensor] = []  # larger ones, if there must be

    def set_row(self, row: int, blocks: Sequence[int], first: int = 0) -> None:
        self.blocks[row] = blocks
        self.changed[row] = first


class PagedLatentCache:
    """Paged storage of MLA latents and rotary keys, quantised on demand.

    Rows 0 .. batch - 1 of ``block_table`` and ``cache_seqlens`` are the sequences of the batch. A
    step reserves room once, then every layer writes its own rows to the reserved slots::

        cache.reserve(batch, new_tokens)
        for layer in range(num_layers):
            cache.append(layer, kv_c, k_pe)
            out, lse = ops.mla_attention(
                q, cache.kv_cache(layer), cache.block_table[:batch], cache.cache_seqlens[:batch],
                ...
            )

    Without ``max_cache_len`` pools start empty and grow, by half while they are small and by an
    eighth from 64 blocks on: copying what is there costs about ten writes per token, and forks of a
    long prompt stay about as large as the prompt. With it, every tensor is allocated
    at once, each sequence owns blocks for its full length, and ``reserve`` and ``append`` are
    tensor operations only, so a compiled step captures them in one graph. Everything else
    (``truncate``, ``reorder``, ``fork``, ``free``, ``reset``, ``save``) runs between steps.

    One rule keeps shared blocks safe in both modes: blocks from a sequence's length on belong to
    that sequence alone. Whoever breaks it (a fork in the middle of a block, a truncation into a
    shared one) copies that block.

    Every method leaves the cache as it was when it raises, out of memory included. One thread at a
    time may change a cache. Others may attend meanwhile: ``block_table`` and ``cache_seqlens`` are
    replaced by each change, so a thread that has read the lengths of a finished step, then the
    table, then the pool, reads the tokens of that step while later ones are appended. With
    ``max_cache_len`` one thing differs: ``reserve`` adds to ``cache_seqlens`` in place, since a
    compiled step must find its tensors where they were; a thread that attends meanwhile takes
    a copy of the lengths. Truncated, freed or reordered sequences give blocks to others: who still
    attends with older tables may read the rows of another sequence, but nothing out of bounds.

    Args:
        num_layers: number of pools.
        latent_dim: L, for all layers or one per layer; None: ``define_layer`` tells each.
        rope_dim: R, for all layers or one per layer; 0 is fine.
        dtype: bfloat16, float16 or float32: element type of the rows in ``kv_cache_dtype="auto"``.
        kv_cache_dtype: "auto" or a packed format (``formats.PACKED_FORMATS``; L and R multiples of
            32).
        block_size: tokens per block.
        max_batch: sequences at first; a larger batch enlarges the tables unless ``max_cache_len``
            fixes them.
        max_cache_len: tokens per sequence, rounded up to whole blocks; None: as many as come.

    Attributes:
        block_table: int32 [max_batch, max_blocks].
        cache_seqlens: int32 [max_batch], tokens reserved so far.
        slot_mapping: int64 [batch, new_tokens] of the last ``reserve``; None before the first, and
            after sequences were truncated, freed or reordered.
        batch: sequences in use.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size, dtype or format that cannot be. Sequences have up to 2**30 tokens, a
            cache up to 2**20 sequences and 2**27 blocks.
    """

    block_table: Tensor
    cache_seqlens: Tensor
    slot_mapping: Tensor | None
    batch: int
    _blocks: list[Sequence[int]]  # by sequence; the first blocks hold its tokens

    def __init__(
        self,
        num_layers: int,
        latent_dim: int | Sequence[int | None] | None,
        rope_dim: int | Sequence[int | None] | None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        kv_cache_dtype: str = "auto",
        block_size: int = 64,
        max_batch: int = 1,
        max_cache_len: int | None = None,
    ) -> None:
        self.num_layers = integer("num_layers", num_layers, 0, _MOST_LAYERS)
        self.block_size = integer("block_size", block_size, 1, MOST_TOKENS)
        max_batch = integer("max_batch", max_batch, 1, MOST_SEQUENCES)
        self.max_blocks = None
        if max_cache_len is not None:
            tokens = integer("max_cache_len", max_cache_len, 1, MOST_TOKENS)
            self.max_blocks = -(-tokens // self.block_size)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {FLOAT_DTYPES}")
        self.latent_dims = _per_layer("latent_dim", latent_dim, self.num_layers)
        self.rope_dims = _per_layer("rope_dim", rope_dim, self.num_layers)
        self.dtype = dtype
        self.kv_cache_dtype = kv_cache_dtype
        self._row_shapes = [
            self._row_shape(latent, rope)
            for latent, rope in zip(self.latent_dims, self.rope_dims, strict=True)
        ]
        self.allocator = BlockAllocator()
        self._pools: list[Tensor] = []
        self._begin(max_batch)

    def define_layer(self, layer: int, latent_dim: int, rope_dim: int) -> None:
        """Gives a layer that was made without dims its pool. Before the layer's first ``append``.

        Args:
            layer: index of the pool.
            latent_dim: L.
            rope_dim: R.

        Raises:
            IndexError: no such layer.
            TypeError: a size that is no integer.
            ValueError: the layer has other dims already, or these cannot be.
        """
        layer = self._layer(layer)
        latent_dim = integer("latent_dim", latent_dim, 1, _MOST_DIM)
        rope_dim = integer("rope_dim", rope_dim, 0, _MOST_DIM)
        dims = self.latent_dims[layer], self.rope_dims[layer]
        if dims == (latent_dim, rope_dim):
            return
        if dims != (0, 0):
            raise ValueError(
                f"layer {layer}: got L, R = {latent_dim}, {rope_dim}, but it has L, R = {dims}"
            )
        row_shape = self._row_shape(latent_dim, rope_dim)
        with torch.inference_mode(False):
            pool = self._new_pool(row_shape, self.allocator.num_blocks)
        vars(self).update(
            _pools=_replaced(self._pools, layer, pool),
            _row_shapes=_replaced(self._row_shapes, layer, row_shape),
            latent_dims=_replaced(self.latent_dims, layer, latent_dim),
            rope_dims=_replaced(self.rope_dims, layer, rope_dim),
        )

    # Shape and size

    @property
    def max_batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def max_cache_len(self) -> int | None:
        """Tokens per sequence, in whole blocks, or None for as many as come."""
        return None if self.max_blocks is None else self.max_blocks * self.block_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return sum(row for _, row in self._row_shapes) * self._storage_dtype.itemsize

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some sequence holds, each counted once however many share it."""
        return self.allocator.num_blocks - self.allocator.num_free

    @property
    def nbytes(self) -> int:
        """Bytes allocated for pools, block table and lengths."""
        return sum(t.nbytes for t in (*self._pools, self.block_table, self.cache_seqlens))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layers={self.num_layers}, dtype={self.dtype}, "
            f"kv_cache_dtype={self.kv_cache_dtype!r}, block_size={self.block_size}, "
            f"blocks={self.allocator.num_blocks}, batch={self.batch}, "
            f"max_cache_len={self.max_cache_len}, nbytes={self.nbytes})"
        )

    # A step: reserve once, append and attend in each layer

    def reserve(self, batch: int, new_tokens: int, copies: int = 1) -> Tensor:
        """Makes room for ``new_tokens`` more tokens in each of the first ``batch`` sequences.

        Args:
            batch: sequences that get tokens.
            new_tokens: tokens for each.
            copies: sequences i * copies .. (i + 1) * copies - 1 are equal and get the same tokens
                now (one prompt, several samples of it). Then they share the blocks that these
                tokens fill: the first of them writes, slot -1 makes ``append`` skip the others.
                With fixed tensors nothing is shared.

        Returns:
            int64 [batch, new_tokens]: the slot of each token, also kept as ``slot_mapping`` for
            ``append``.

        Raises:
            TypeError: a number that is no integer.
            ValueError: the batch or the tokens do not fit the fixed tensors, or the bounds of the
                class. (A compiled step cannot look: there the tokens that do not fit are not
                written, and attention refuses the length.) Or ``copies`` that do not divide the
                batch, or of unequal lengths.
            RuntimeError, MemoryError: no memory.
        """
        if not torch.compiler.is_compiling():
            batch = integer("batch", batch, 0, MOST_SEQUENCES)
            new_tokens = integer("new_tokens", new_tokens, 0, MOST_TOKENS)
            copies = integer("copies", copies, 1)
        if self.max_blocks is None:
            return self._reserve_growing(batch, new_tokens, copies)
        return self._reserve_fixed(batch, new_tokens, copies)

    def _reserve_fixed(self, batch: int, new_tokens: int, copies: int) -> Tensor:
        self._check_rows(batch, f"batch: got {batch}")
        lengths = self.cache_seqlens[:batch]
        if not torch.compiler.is_compiling():
            present = lengths.tolist()
            longest = max(present, default=0)
            room = self.block_table.shape[1] * self.block_size
            if longest + new_tokens > room:
                raise ValueError(
                    f"new_tokens: got {new_tokens}, but a sequence of {longest} tokens is in a "
                    f"cache of max_cache_len={room}"
                )
            self._check_copies(present, copies)
        positions = lengths.long().unsqueeze(1) + torch.arange(new_tokens, device="cpu")
        fits = positions < self.block_table.shape[1] * self.block_size
        slots = torch.where(fits, self._slots(self.block_table, positions), -1)
        lengths += new_tokens
        self.batch = max(self.batch, batch)
        self.slot_mapping = slots
        return slots

    def _reserve_growing(self, batch: int, new_tokens: int, copies: int) -> Tensor:
        present = self.cache_seqlens.tolist()[:batch]
        present += [0] * (batch - len(present))
        longest = max(present, default=0)
        if longest + new_tokens > MOST_TOKENS:
            raise ValueError(
                f"new_tokens: got {new_tokens} for a sequence of {longest} tokens, expected at "
                f"most {MOST_TOKENS} in all"
            )
        self._check_copies(present, copies)
        draft = self._room(present, new_tokens, copies)
        change: dict[str, Any] = {} if draft is None else self._drawn(draft)
        table = change.get("block_table", self.block_table)
        with torch.inference_mode(False):
            lengths = _enlarged(self.cache_seqlens, (table.shape[0],))
            lengths[:batch] += new_tokens
        positions = lengths[:batch].long().unsqueeze(1) + torch.arange(-new_tokens, 0, device="cpu")
        slots = self._slots(table, positions)
        if copies > 1:
            columns = positions // self.block_size
            first, end = self._filled_blocks(lengths[:batch] - new_tokens, new_tokens)
            shared = (columns >= first[:, None]) & (columns < end[:, None])
            shared[::copies] = False  # these write
            slots = slots.masked_fill(shared, -1)
        change |= {"cache_seqlens": lengths, "slot_mapping": slots}
        change["batch"] = max(self.batch, batch)
        self._take_over(change, draft)
        return slots

    def append(self, layer: int, kv_c: Tensor, k_pe: Tensor) -> None:
        """Writes one layer's rows to the slots of the last ``reserve``. Nothing is differentiated
        through it.

        Args:
            layer: index of the pool.
            kv_c: bf16 / fp16 / fp32 [batch, new_tokens, L], the normed latent.
            k_pe: the same dtype [batch, new_tokens, R], the rotated key.

        Raises:
            IndexError: no such layer.
            ValueError: shapes that are not what was reserved; nothing is reserved.
        """
        layer = self._layer(layer)
        if self.slot_mapping is None:
            raise ValueError(
                "append before the first reserve, or after a change of the sequences: there is no "
                "slot to write to"
            )
        latent, rope = self.latent_dims[layer], self.rope_dims[layer]
        batch, tokens = self.slot_mapping.shape
        if kv_c.shape != (batch, tokens, latent):
            raise ValueError(f"kv_c: got {list(kv_c.shape)}, expected {[batch, tokens, latent]}")
        if k_pe.shape != (batch, tokens, rope):
            raise ValueError(f"k_pe: got {list(k_pe.shape)}, expected {[batch, tokens, rope]}")
        ops.concat_and_cache_mla(
            kv_c.detach().reshape(batch * tokens, latent),
            k_pe.detach().reshape(batch * tokens, rope),
            self._pools[layer],
            self.slot_mapping.reshape(-1),
            self.kv_cache_dtype,
        )

    @contextlib.contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Takes back what the block has reserved if it raises. (Rows that it has appended remain in
        blocks that are free then.)"""
        before = vars(self).copy()
        lengths = self.cache_seqlens.clone()
        try:
            yield
        except BaseException:
            before["cache_seqlens"].copy_(lengths)  # fixed tensors count in place
            vars(self).update(before)
            raise

    def kv_cache(self, layer: int) -> Tensor:
        """The pool of one layer: [num_blocks, block_size, L + R], or uint8 [.., row bytes]."""
        return self._pools[self._layer(layer)]

    # Between steps

    def truncate(self, lengths: Tensor | Sequence[int] | int) -> None:
        """Forgets tokens from the end: row i keeps its first ``lengths[i]`` tokens (an int: every
        row in use).

        Raises:
            TypeError: a length that is no integer.
            ValueError: a length that is negative or above the present one, or more lengths than
                sequences.
            RuntimeError, MemoryError: no memory (for copies of shared blocks).
        """
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.item()  # type: ignore[assignment]
        if isinstance(lengths, (Tensor, Iterable)):
            wanted = integers("lengths", lengths, 0)
        else:
            wanted = [integer("lengths", lengths, 0)] * self.batch
        present = self.cache_seqlens.tolist()
        if len(wanted) > self.batch:
            raise ValueError(
                f"lengths: got {len(wanted)} of them, but {self.batch} sequences are in use"
            )
        for row, length in enumerate(wanted):
            if length > present[row]:
                raise ValueError(f"lengths[{row}]: got {length}, expected 0 .. {present[row]}")
        self._shorten(dict(enumerate(wanted)))

    def free(self, sequence: int) -> None:
        """Empties one sequence and returns its blocks.

        Raises:
            IndexError: no such sequence.
            TypeError: no integer.
        """
        sequence = integer("sequence", sequence)
        if not 0 <= sequence < self.batch:
            raise IndexError(f"sequence: got {sequence}, but {self.batch} sequences are in use")
        self._shorten({sequence: 0})

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Makes row i a continuation of the former row ``index[i]``: beam search, selection,
        repetition.

        Whole blocks are shared, a partly filled last block is copied for all but one of a parent's
        children. The batch becomes ``len(index)``.

        Raises:
            TypeError: an index that is no integer (a mask is no index).
            ValueError: an index outside the batch, or more sequences than the fixed tensors hold.
            RuntimeError, MemoryError: no memory (for copies of partly filled blocks).
        """
        parents = integers("index", index, 0)
        for row, parent in enumerate(parents):
            if parent >= self.batch:
                raise ValueError(
                    f"index[{row}]: got {parent}, but {self.batch} sequences are in use"
                )
        if parents == list(range(self.batch)):
            return
        self._check_rows(len(parents), f"index: got {len(parents)} entries")
        lengths = self.cache_seqlens.tolist()
        blocks = self._blocks
        children = [(row, blocks[parent], lengths[parent]) for row, parent in enumerate(parents)]
        emptied: list = [(row, (), 0) for row in range(len(parents), self.batch)]
        self._rebuild(children + emptied, len(parents))

    def fork(self, n: int) -> None:
        """Repeats each sequence ``n`` times in place (rows 0, 0, .., 1, 1, ..), sharing its blocks.

        Raises:
            TypeError: ``n`` is no integer.
            ValueError: ``n`` below 1, or more sequences than the fixed tensors hold.
            RuntimeError, MemoryError: no memory (for copies of partly filled blocks).
        """
        n = integer("n", n, 1)
        self._check_rows(self.batch * n, f"n: got {n} for a batch of {self.batch}")
        self.reorder([row for row in range(self.batch) for _ in range(n)])

    def reset(self, batch: int | None = None) -> None:
        """Empties every sequence. A ``batch`` above ``max_batch`` allocates larger tensors.

        Raises:
            TypeError: ``batch`` is no integer.
            ValueError: a negative ``batch``, or one beyond the bounds of the class.
            RuntimeError, MemoryError: no memory for larger tensors.
        """
        if batch is not None:
            batch = integer("batch", batch, 0, MOST_SEQUENCES)
        self._begin(max(self.max_batch, batch or 0))

    # On disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sequences in use to a file that :meth:`load` reads: safetensors, shared blocks
        once, free blocks not at all, each tensor with a checksum.

        The file appears whole or not at all, and replaces one of the same name; its permissions are
        those that the umask leaves. Other threads and processes may save to the same name, and one
        may append meanwhile: the file then has the tokens of before.

        Raises:
            OSError: the file cannot be written. One that was there is as it was.
        """
        header, tensors = self.snapshot()
        _cache_file.write(path, type(self).__name__, header, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], mmap: bool = False, verify: bool = True
    ) -> PagedLatentCache:
        """A cache as :meth:`save` found it, with lengths, sharing, and fixed tensors if it had
        them. It can be used in every way; the file stays as it is.

        Args:
            path: a file of :meth:`save`.
            mmap: map the pools instead of reading them into memory. Processes then share the pages
                of one file, and those that are written to become private copies; a pool that grows
                is copied to memory. The file must stay as it is while it is mapped: replacing or
                deleting it is fine, as ``save`` does, but the system kills a process (SIGBUS) that
                reads where somebody has truncated the file in place. Fixed tensors are read anyway.
            verify: compare every tensor with its checksum, which reads the file once. Without it a
                mapped pool is read when attention first reads it, and damage to rows goes
                unnoticed. The rest of the file is always verified.

        Raises:
            OSError: the file cannot be opened or read.
            ValueError: not such a file, of another version, or damaged; the message says where.
            RuntimeError, MemoryError: no memory for it.
        """
        with _cache_file.opened(path, cls.__name__, mmap, verify) as (header, tensors):
            return cls.from_snapshot(header, tensors)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, _cache_file.Content]]:
        """What :meth:`save` stores: a header for JSON, and the pools by name, unused blocks left
        out."""
        lengths = self.cache_seqlens[: self.batch].tolist()
        held = [
            blocks[: self._blocks_of(n)] for blocks, n in zip(self._blocks, lengths, strict=False)
        ]
        used = sorted({block for blocks in held for block in blocks})
        place = {block: i for i, block in enumerate(used)}
        header = {
            "block_size": self.block_size,
            "kv_cache_dtype": self.kv_cache_dtype,
            "dtype": str(self.dtype).removeprefix("torch."),
            "latent_dims": self.latent_dims,
            "rope_dims": self.rope_dims,
            "max_batch": self.max_batch,
            "max_cache_len": self.max_cache_len,
            "lengths": lengths,
            "num_blocks": len(used),
            "block_table": [[place[block] for block in blocks] for blocks in held],
        }
        # Nobody reads the rows behind the end of a sequence, but what the memory held before has no
        # place in a file.
        ends = {
            place[blocks[-1]]: n % self.block_size
            for blocks, n in zip(held, lengths, strict=True)
            if n % self.block_size
        }
        contents = {
            f"pool.{layer}": _stored_blocks(pool, used, ends)
            for layer, pool in enumerate(self._pools)
            if pool.shape[-1]
        }
        return header, contents

    @classmethod
    def from_snapshot(
        cls, header: Mapping[str, Any], tensors: _cache_file.StoredTensors
    ) -> PagedLatentCache:
        """The inverse of :meth:`snapshot`. Everything in ``header`` is compared with the tensors
        before memory is taken for it. Errors are those of :meth:`load`."""
        fields = _cache_file.Fields(header)
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
        dtype = dtypes[fields.choice("dtype", dtypes)]
        kv_cache_dtype = fields.choice("kv_cache_dtype", ("auto", *PACKED_FORMATS))
        block_size = fields.integer("block_size", 1, MOST_TOKENS)
        latent_dims = fields.integers("latent_dims", 0, _MOST_DIM)
        rope_dims = fields.integers("rope_dims", 0, _MOST_DIM)
        max_batch = fields.integer("max_batch", 1, MOST_SEQUENCES)
        max_cache_len = fields.optional_integer("max_cache_len", 1, MOST_TOKENS)
        lengths = fields.integers("lengths", 0, max_cache_len or MOST_TOKENS)
        num_blocks = fields.integer("num_blocks", 0, MOST_BLOCKS)
        table = fields.lists("block_table", 0, num_blocks - 1)
        if len(latent_dims) != len(rope_dims):
            raise ValueError(f"rope_dims: {len(rope_dims)} of them for {len(latent_dims)} layers")
        if len(lengths) > max_batch or len(table) != len(lengths):
            raise ValueError(
                f"block_table: {len(table)} rows for {len(lengths)} lengths, of {max_batch}"
            )
        _check_sharing(lengths, table, num_blocks, block_size)
        if max_cache_len is not None:
            reserved = max_batch * -(-max_cache_len // block_size)
            most = max(_MOST_RESERVED, _MOST_RESERVED_PER_BLOCK * num_blocks)
            if reserved > most:
                raise ValueError(
                    f"max_cache_len: {reserved} blocks wanted by a file of {num_blocks}, expected "
                    f"at most {most}"
                )

        # A layer that nobody has defined has neither dims nor a pool.
        defined = [i for i, latent in enumerate(latent_dims) if latent]
        if any(rope_dims[i] for i in set(range(len(rope_dims))).difference(defined)):
            raise ValueError("rope_dims: of a layer without latent_dims")
        plain = cls(
            len(latent_dims),
            [latent or None for latent in latent_dims],
            rope_dims,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
        )
        for layer in defined:
            shape = (num_blocks, *plain._row_shapes[layer])
            tensors.check(f"pool.{layer}", plain._storage_dtype, shape)

        if max_cache_len is None:
            cache = plain
            cache._begin(max_batch)
        else:
            cache = cls(
                plain.num_layers,
                [latent or None for latent in latent_dims],
                rope_dims,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                block_size=block_size,
                max_batch=max_batch,
                max_cache_len=max_cache_len,
            )
        cache._adopt(lengths, table, num_blocks, tensors)
        return cache

    def _adopt(
        self,
        lengths: list[int],
        table: list[list[int]],
        num_blocks: int,
        tensors: _cache_file.StoredTensors,
    ) -> None:
        """Gives an empty cache the sequences of a snapshot, in blocks 0 .. num_blocks - 1."""
        if self.max_blocks is not None:
            total = self.allocator.num_blocks
        elif tensors.mmap:
            total = num_blocks
        else:
            total = max(num_blocks + 1, _grown(num_blocks))
        for layer, shape in enumerate(self._row_shapes):
            if tensors.mmap and total == num_blocks and shape[-1]:
                self._pools[layer] = tensors[f"pool.{layer}"]
                continue
            if self.max_blocks is None:
                self._pools[layer] = self._new_pool(shape, total)
            if shape[-1]:
                tensors.read(f"pool.{layer}", self._pools[layer][:num_blocks])

        draft = _Draft(self)
        draft.allocator = BlockAllocator(total)
        stored = draft.allocator.allocate(num_blocks)  # 0 .. num_blocks - 1, the low ones first
        for row in range(self.max_batch):
            blocks = table[row] if row < len(table) else []
            draft.allocator.share(blocks)
            reserved = (self.max_blocks or len(blocks)) - len(blocks)
            if blocks or reserved:
                draft.set_row(row, blocks + draft.allocator.allocate(reserved))
        draft.allocator.release(stored)
        change = self._drawn(draft)
        change["cache_seqlens"] = self._with_lengths(dict(enumerate(lengths)))
        change["batch"] = len(lengths)
        self._take_over(change)

    # Blocks

    @property
    def _storage_dtype(self) -> torch.dtype:
        return self.dtype if self.kv_cache_dtype == "auto" else torch.uint8

    def _begin(self, sequences: int) -> None:
        """Begins anew with empty sequences. Pools are kept where their size need not change."""
        per_row = self.max_blocks or 0
        total = sequences * per_row if per_row else self.allocator.num_blocks
        if total > MOST_BLOCKS:
            raise ValueError(
                f"max_cache_len: {per_row} blocks for each of {sequences} sequences, expected at "
                f"most {MOST_BLOCKS} in all"
            )
        with torch.inference_mode(False):  # later steps write to them in whatever mode they run
            pools = self._pools
            if not pools or total != self.allocator.num_blocks:
                pools = [self._new_pool(shape, total) for shape in self._row_shapes]
            columns = per_row or (self.block_table.shape[1] if total else 1)
            table = torch.zeros(sequences, columns, dtype=torch.int32, device="cpu")
            if per_row:
                torch.arange(total, dtype=torch.int32, out=table.view(-1), device="cpu")
            lengths = torch.zeros(sequences, dtype=torch.int32, device="cpu")
        if per_row:
            starts = range(0, total, per_row)
            blocks: list[Sequence[int]] = [range(first, first + per_row) for first in starts]
        else:
            blocks = [()] * sequences
        change = {
            "allocator": BlockAllocator(total, references=1 if per_row else 0),
            "_blocks": blocks,
            "_pools": pools,
            "block_table": table,
            "cache_seqlens": lengths,
            "slot_mapping": None,
            "batch": 0,
        }
        self._take_over(change)

    def _layer(self, layer: int) -> int:
        """An index of a pool."""
        if type(layer) is not int:
            layer = integer("layer", layer)
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer: got {layer}, but there are {self.num_layers}")
        return layer

    def _row_shape(self, latent: int, rope: int) -> tuple[int, int]:
        """Shape of one block; a layer without dims has rows without values."""
        if self.kv_cache_dtype == "auto" or latent == 0:
            return self.block_size, latent + rope
        return self.block_size, row_bytes(self.kv_cache_dtype, latent, rope)

    def _new_pool(self, row_shape: tuple[int, int], num_blocks: int) -> Tensor:
        return torch.empty(num_blocks, *row_shape, dtype=self._storage_dtype, device="cpu")

    def _slots(self, table: Tensor, positions: Tensor) -> Tensor:
        """int64 [batch, n]: slots of the tokens at ``positions`` (those beyond the table: any)."""
        columns = (positions // self.block_size).clamp(max=table.shape[1] - 1)
        blocks = table[: positions.shape[0]].gather(1, columns)
        return blocks.long() * self.block_size + positions % self.block_size

    def _room(self, lengths: list[int], new_tokens: int, copies: int) -> _Draft | None:
        """Growing mode: gives each sequence the blocks that its next tokens need; None: it has
        them."""
        batch = len(lengths)
        held = [len(blocks) for blocks in self._blocks[:batch]]
        held += [0] * (batch - len(held))
        wanted = [self._blocks_of(length + new_tokens) for length in lengths]
        if wanted == held and batch <= self.max_batch:
            return None
        shared = []  # columns of the blocks that a row takes from the first of its copies
        for row, length in enumerate(lengths):
            first, end = self._filled_blocks(length, new_tokens) if row % copies else (0, 0)
            shared.append(range(first, max(first, end)))
        missing = [
            want - have - len(common)
            for want, have, common in zip(wanted, held, shared, strict=True)
        ]
        draft = _Draft(self, batch)
        self._ensure_free(draft, sum(missing))
        for row, count in enumerate(missing):
            leader = draft.blocks[row - row % copies]
            common = [leader[column] for column in shared[row]]
            draft.allocator.share(common)
            added = common + draft.allocator.allocate(count)
            if added:
                draft.set_row(row, [*draft.blocks[row], *added], first=held[row])
        return draft

    def _filled_blocks(self, length: Any, new_tokens: int) -> tuple[Any, Any]:
        """Columns [first, end) of the blocks that the next tokens fill from their start; of an int
        or a tensor."""
        return -(-length // self.block_size), (length + new_tokens) // self.block_size

    def _check_copies(self, lengths: list[int], copies: int) -> None:
        if copies == 1:
            return
        if len(lengths) % copies:
            raise ValueError(
                f"copies: got {copies}, expected a divisor of the batch {len(lengths)}"
            )
        for row, length in enumerate(lengths):
            if length != lengths[row - row % copies]:
                raise ValueError(
                    f"copies: got {copies}, but sequences {row - row % copies} and {row} hold "
                    f"{lengths[row - row % copies]} and {length} tokens"
                )

    def _check_rows(self, batch: int, got: str) -> None:
        if self.max_blocks is not None and batch > self.max_batch:
            raise ValueError(f"{got}, but the cache was made for max_batch={self.max_batch}")
        if batch > MOST_SEQUENCES:
            raise ValueError(f"{got}, expected at most {MOST_SEQUENCES} sequences")

    def _shorten(self, rows: dict[int, int]) -> None:
        """Sets the lengths of some rows, none above the present one."""
        if self.max_blocks is not None and self.allocator.num_free == 0:  # each block has one owner
            lengths = self._with_lengths(rows)
            self._take_over({"cache_seqlens": lengths, "slot_mapping": None})
        else:
            blocks = self._blocks
            self._rebuild([(row, blocks[row], n) for row, n in rows.items()], self.batch)

    def _rebuild(self, rows: list[tuple[int, Sequence[int], int]], batch: int) -> None:
        """Makes each row ``(row, blocks, length)`` hold the first ``length`` tokens of ``blocks``.

        Full blocks are shared. The block that the next token goes to, and reserved ones behind it,
        must be the row's own: the first row that asks for one keeps it, unless somebody else has it
        as a full block; the others get a fresh one, with the tokens copied.
        """
        draft = _Draft(self, max((row + 1 for row, _, _ in rows), default=0))
        allocator = draft.allocator
        keeper: dict[int, int] = {}
        for row, blocks, length in rows:
            full = length // self.block_size
            for block in blocks[full : self._blocks_held(length)]:
                keeper.setdefault(block, row)
            allocator.share(blocks[:full])
        allocator.share(list(keeper))
        # Growing mode copies to blocks that are free today: nothing is lost if it must stop there.
        # Fixed tensors may have none.
        idle: list[int] | None = [] if self.max_blocks is None else None
        for row, _, _ in rows:
            allocator.release(draft.blocks[row], idle)

        tails: list[list[int | None]] = []  # the own blocks of each row; None: a fresh one
        for row, blocks, length in rows:
            full, held = length // self.block_size, self._blocks_held(length)
            tail: list[int | None] = []
            for block in blocks[full:held]:
                keeps = keeper[block] == row and allocator.references[block] == 1
                if keeper[block] == row and not keeps:
                    allocator.release([block], idle)
                tail.append(block if keeps else None)
            tails.append(tail + [None] * (held - full - len(tail)))

        count = sum(tail.count(None) for tail in tails)
        self._ensure_free(draft, count)
        fresh = iter(allocator.allocate(count))
        copies = []
        for (row, blocks, length), tail in zip(rows, tails, strict=True):
            full = length // self.block_size
            own = [next(fresh) if block is None else block for block in tail]
            if length % self.block_size and tail[0] is None:
                copies.append((blocks[full], own[0]))
            draft.set_row(row, [*blocks[:full], *own])
        allocator.free(idle or ())
        change = self._drawn(draft)
        change["cache_seqlens"] = self._with_lengths({row: n for row, _, n in rows})
        change |= {"batch": batch, "slot_mapping": None}
        self._take_over(change, draft, copies)

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _blocks_held(self, length: int) -> int:
        """Blocks that a row of this length holds: with fixed tensors always all."""
        return self._blocks_of(length) if self.max_blocks is None else self.max_blocks

    def _ensure_free(self, draft: _Draft, count: int) -> None:
        """Gives a draft larger pools if fewer than ``count`` blocks are free. Fixed ones always
        hold enough."""
        allocator = draft.allocator
        needed = allocator.num_blocks - allocator.num_free + count
        if needed <= allocator.num_blocks:
            return
        if needed > MOST_BLOCKS:
            raise ValueError(f"{needed} cache blocks wanted, expected at most {MOST_BLOCKS}")
        total = min(max(needed, _grown(allocator.num_blocks)), MOST_BLOCKS)
        with torch.inference_mode(False):
            draft.pools = [
                pool if len(pool) >= total else self._new_pool(shape, total)
                for pool, shape in zip(self._pools, self._row_shapes, strict=True)
            ]
        allocator.grow(total)

    def _drawn(self, draft: _Draft) -> dict[str, Any]:
        """The attributes that a draft changes, its table drawn."""
        rows, columns = len(draft.blocks), self.block_table.shape[1]
        widest = max((len(draft.blocks[row]) for row in draft.changed), default=0)
        if widest > columns:
            columns = max(widest, columns + columns // 2)
        with torch.inference_mode(False):
            table = _enlarged(self.block_table, (rows, columns))
            for row, first in draft.changed.items():
                blocks = draft.blocks[row]
                table[row, first : len(blocks)] = torch.tensor(
                    blocks[first:], dtype=torch.int32, device="cpu"
                )
        return {"allocator": draft.allocator, "_blocks": draft.blocks, "block_table": table}

    def _with_lengths(self, rows: dict[int, int]) -> Tensor:
        """The lengths with some of them changed, as a new tensor."""
        sequences = max(self.max_batch, max(rows, default=0) + 1)
        with torch.inference_mode(False):
            lengths = _enlarged(self.cache_seqlens, (sequences,))
            if rows:
                lengths[list(rows)] = torch.tensor(
                    list(rows.values()), dtype=torch.int32, device="cpu"
                )
        return lengths

    def _take_over(
        self,
        change: dict[str, Any],
        draft: _Draft | None = None,
        copies: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Makes a change the present state.

        Args:
            change: the attributes that it replaces.
            draft: has larger pools, perhaps.
            copies: blocks (from, to) whose contents move along.
        """
        if copies and self.max_blocks is not None:
            self._overwrite(change, copies)
            return
        mapping = torch.tensor(copies, device="cpu") if copies else None
        # Memory is there; from here on it is filled. Pools one by one, so that only one is there
        # twice; one that is larger than the allocator knows of does no harm.
        for layer, pool in enumerate(draft.pools if draft is not None else ()):
            old = self._pools[layer]
            if pool is not old:
                pool[: len(old)] = old
                self._pools[layer] = pool
        if mapping is not None:
            for pool in self._pools:
                if pool.shape[-1]:
                    ops.copy_blocks(pool, mapping)
        vars(self).update(change)  # at once, for signals and other threads too

    def _overwrite(self, change: dict[str, Any], copies: Sequence[tuple[int, int]]) -> None:
        """Takes over a change of fixed tensors: copies go to blocks that may hold rows of today."""
        sources, targets = torch.tensor(copies, device="cpu").unbind(1)
        pools = [pool for pool in self._pools if pool.shape[-1]]
        new = [pool[sources] for pool in pools]
        old = [pool[targets] for pool in pools]
        try:
            for pool, blocks in zip(pools, new, strict=True):
                pool[targets] = blocks
            vars(self).update(change)
        except BaseException:
            for pool, blocks in zip(pools, old, strict=True):
                pool[targets] = blocks
            raise


def _per_layer(name: str, value: int | Sequence[int | None] | None, num_layers: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(f"{name}: got {len(values)} values for {num_layers} layers")
    least = 0 if name == "rope_dim" else 1
    return [0 if v is None else integer(name, v, least, _MOST_DIM) for v in values]


def _check_sharing(
    lengths: list[int], table: list[list[int]], num_blocks: int, block_size: int
) -> None:
    """Every sequence has the blocks that it needs, every block is some sequence's, and blocks that
    are not full belong to one."""
    references = [0] * min(num_blocks, 1 + sum(map(len, table)))
    for row, (blocks, length) in enumerate(zip(table, lengths, strict=True)):
        if len(blocks) != -(-length // block_size):
            raise ValueError(f"block_table: row {row} has {len(blocks)} blocks for {length} tokens")
        for block in blocks:
            if block < len(references):
                references[block] += 1
    partial = [b[-1] for b, n in zip(table, lengths, strict=True) if n % block_size]
    if 0 in references or any(references[block] > 1 for block in partial):
        raise ValueError("block_table: a block is unused, or partly filled and shared")


def _stored_blocks(pool: Tensor, used: list[int], ends: dict[int, int]) -> _cache_file.Content:
    """The ``used`` blocks of a pool, for a file. Of those in ``ends``, the rows from there on are
    zero."""

    def pieces() -> Iterator[Tensor]:
        group = max(1, _cache_file.PIECE // (pool[0].nbytes if used else 1))
        for first in range(0, len(used), group):
            piece = pool[torch.tensor(used[first : first + group], device="cpu")]
            for block in ends.keys() & range(first, first + len(piece)):
                piece[block - first, ends[block] :] = 0
            yield piece

    return _cache_file.Content(pool.dtype, (len(used), *pool.shape[1:]), pieces)


def _grown(num_blocks: int) -> int:
    """Blocks of the next larger pool: half as many more, at 16 and above 8, at 64 and above an
    eighth."""
    return num_blocks + max(min(num_blocks // 2, 8), num_blocks // 8)


def _replaced(values: list[Any], index: int, value: Any) -> list[Any]:
    """A list with another value at ``index``."""
    return [*values[:index], value, *values[index + 1 :]]


def _enlarged(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a larger shape with ``old`` in its corner."""
    new = torch.zeros(shape, dtype=old.dtype, device="cpu")
    new[tuple(slice(n) for n in old.shape)] = old
    return new
