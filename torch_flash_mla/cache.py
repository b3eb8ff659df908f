"""A paged cache of latents for all layers of a model: one allocator, one block table, one pool per
layer.

Each token takes one row per layer, ``[latent | rope]``, in a pool of fixed-size blocks. A block
table maps the blocks of a sequence to blocks of the pool, the same for every layer, so sequences
can share the blocks of a common prefix (beams, parallel samples) and return them without moving
anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_flash_mla import ops
from torch_flash_mla.formats import FLOAT_DTYPES, row_bytes

_GROWTH = 1.5


class BlockAllocator:
    """Which blocks are in use, and by how many sequences. Plain bookkeeping, no tensors."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low blocks first

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

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each block; a block without references is free."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free.append(block)


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

    Without ``max_cache_len`` pools start empty and grow by half. With it, every tensor is allocated
    at once, each sequence owns blocks for its full length, and ``reserve`` and ``append`` are
    tensor operations only, so a compiled step captures them in one graph. Everything else
    (``truncate``, ``reorder``, ``fork``, ``free``, ``reset``) runs between steps.

    One rule keeps shared blocks safe in both modes: blocks from a sequence's length on belong to
    that sequence alone. Whoever breaks it (a fork in the middle of a block, a truncation into a
    shared one) copies that block.

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
        slot_mapping: int64 [batch, new_tokens] of the last ``reserve``; None before the first.
        batch: sequences in use.

    Raises:
        ValueError: a size, dtype or format that cannot be.
    """

    block_table: Tensor
    cache_seqlens: Tensor
    slot_mapping: Tensor | None
    batch: int

    def __init__(
        self,
        num_layers: int,
        latent_dim: int | Sequence[int] | None,
        rope_dim: int | Sequence[int] | None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        kv_cache_dtype: str = "auto",
        block_size: int = 64,
        max_batch: int = 1,
        max_cache_len: int | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size: got {block_size}, expected at least 1")
        if max_batch < 1:
            raise ValueError(f"max_batch: got {max_batch}, expected at least 1")
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len: got {max_cache_len}, expected at least 1 or None")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {FLOAT_DTYPES}")
        self.num_layers = num_layers
        self.latent_dims = _per_layer("latent_dim", latent_dim, num_layers)
        self.rope_dims = _per_layer("rope_dim", rope_dim, num_layers)
        self.dtype = dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.block_size = block_size
        self.max_blocks = None if max_cache_len is None else -(-max_cache_len // block_size)
        self._row_shapes = [
            self._row_shape(latent, rope)
            for latent, rope in zip(self.latent_dims, self.rope_dims, strict=True)
        ]
        self._allocate(max_batch)

    def define_layer(self, layer: int, latent_dim: int, rope_dim: int) -> None:
        """Gives a layer that was made without dims its pool. Before the layer's first ``append``.

        Raises:
            ValueError: the layer has other dims already.
        """
        dims = self.latent_dims[layer], self.rope_dims[layer]
        if dims == (latent_dim, rope_dim):
            return
        if dims != (0, 0):
            raise ValueError(
                f"layer {layer}: got L, R = {latent_dim}, {rope_dim}, but it has L, R = {dims}"
            )
        self.latent_dims[layer], self.rope_dims[layer] = latent_dim, rope_dim
        self._row_shapes[layer] = self._row_shape(latent_dim, rope_dim)
        with torch.inference_mode(False):
            self._pools[layer] = self._new_pool(self._row_shapes[layer])

    # Shape and size

    @property
    def max_batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def max_cache_len(self) -> int | None:
        """Tokens per sequence, in whole blocks; None: as many as come."""
        return None if self.max_blocks is None else self.max_blocks * self.block_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return sum(row for _, row in self._row_shapes) * self._storage_dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pools, block table and lengths."""
        return sum(t.nbytes for t in (*self._pools, self.block_table, self.cache_seqlens))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layers={self.num_layers}, dtype={self.dtype}, "
            f"kv_cache_dtype={self.kv_cache_dtype!r}, block_size={self.block_size}, "
            f"blocks={self.allocator.num_blocks}, batch={self.batch}, "
            f"max_cache_len={self.max_cache_len}, nbytes={self.nbytes})"
        )

    # A step: reserve once, append and attend in each layer

    def reserve(self, batch: int, new_tokens: int) -> Tensor:
        """Makes room for ``new_tokens`` more tokens in each of the first ``batch`` sequences.

        Returns:
            int64 [batch, new_tokens]: the slot of each token, also kept as ``slot_mapping`` for
            ``append``.

        Raises:
            ValueError: the batch or the tokens do not fit the fixed tensors. (A compiled step
                cannot look: there the tokens that do not fit are not written, and attention refuses
                the length.)
        """
        self._ensure_rows(batch)
        if self.max_blocks is None:
            self._make_room(batch, new_tokens)
        elif not torch.compiler.is_compiling():
            self._check_room(batch, new_tokens)
        self.batch = max(self.batch, batch)

        lengths = self.cache_seqlens[:batch]
        positions = lengths.long().unsqueeze(1) + torch.arange(new_tokens)
        last_column = self.block_table.shape[1] - 1
        columns = (positions // self.block_size).clamp(max=last_column)
        blocks = self.block_table[:batch].gather(1, columns)
        slots = blocks * self.block_size + positions % self.block_size
        if self.max_blocks is not None:
            slots = torch.where(positions < self.max_blocks * self.block_size, slots, -1)
        lengths += new_tokens
        self.slot_mapping = slots
        return slots

    def append(self, layer: int, kv_c: Tensor, k_pe: Tensor) -> None:
        """Writes one layer's rows to the slots of the last ``reserve``. Nothing is differentiated
        through it.

        Args:
            layer: index of the pool.
            kv_c: bf16 / fp16 / fp32 [batch, new_tokens, L], the normed latent.
            k_pe: the same dtype [batch, new_tokens, R], the rotated key.

        Raises:
            ValueError: shapes that are not what was reserved.
        """
        if self.slot_mapping is None:
            raise ValueError("append before the first reserve: there is no slot to write to")
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

    def kv_cache(self, layer: int) -> Tensor:
        """The pool of one layer: [num_blocks, block_size, L + R], or uint8 [.., row bytes]."""
        return self._pools[layer]

    # Between steps

    def truncate(self, lengths: Tensor | Sequence[int] | int) -> None:
        """Forgets tokens from the end: row i keeps its first ``lengths[i]`` tokens (an int: every
        row in use).

        Raises:
            ValueError: a length that is negative or above the present one, or more lengths than
                sequences.
        """
        wanted = [lengths] * self.batch if isinstance(lengths, int) else _int_list(lengths)
        present = self.cache_seqlens.tolist()
        if len(wanted) > self.batch:
            raise ValueError(
                f"lengths: got {len(wanted)} of them, but {self.batch} sequences are in use"
            )
        for row, length in enumerate(wanted):
            if not 0 <= length <= present[row]:
                raise ValueError(f"lengths[{row}]: got {length}, expected 0 .. {present[row]}")
        self._shorten(dict(enumerate(wanted)))

    def free(self, sequence: int) -> None:
        """Empties one sequence and returns its blocks.

        Raises:
            IndexError: no such sequence.
        """
        if not 0 <= sequence < self.batch:
            raise IndexError(f"sequence: got {sequence}, but {self.batch} sequences are in use")
        self._shorten({sequence: 0})

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Makes row i a continuation of the former row ``index[i]``: beam search, selection,
        repetition.

        Whole blocks are shared, a partly filled last block is copied for all but one of a parent's
        children. The batch becomes ``len(index)``.

        Raises:
            ValueError: an index outside the batch, or more sequences than the fixed tensors hold.
        """
        parents = _int_list(index)
        for row, parent in enumerate(parents):
            if not 0 <= parent < self.batch:
                raise ValueError(
                    f"index[{row}]: got {parent}, but {self.batch} sequences are in use"
                )
        if parents == list(range(self.batch)):
            return
        self._ensure_rows(len(parents))
        lengths = self.cache_seqlens.tolist()
        blocks = self._blocks
        children = [(row, blocks[parent], lengths[parent]) for row, parent in enumerate(parents)]
        emptied: list = [(row, [], 0) for row in range(len(parents), self.batch)]
        self._rebuild(children + emptied)
        self.batch = len(parents)

    def fork(self, n: int) -> None:
        """Repeats each sequence ``n`` times in place (rows 0, 0, .., 1, 1, ..), sharing its blocks.

        Raises:
            ValueError: ``n`` below 1, or more sequences than the fixed tensors hold.
        """
        if n < 1:
            raise ValueError(f"n: got {n}, expected at least 1")
        self.reorder([row for row in range(self.batch) for _ in range(n)])

    def reset(self, batch: int | None = None) -> None:
        """Empties every sequence. A ``batch`` above ``max_batch`` allocates larger tensors."""
        if batch is not None and batch > self.max_batch:
            self._allocate(batch)
            return
        self._shorten(dict.fromkeys(range(self.max_batch), 0))
        self.batch = 0
        self.slot_mapping = None

    # Blocks

    @property
    def _storage_dtype(self) -> torch.dtype:
        return self.dtype if self.kv_cache_dtype == "auto" else torch.uint8

    def _allocate(self, max_batch: int) -> None:
        """Makes all tensors anew, for ``max_batch`` empty sequences."""
        per_row = self.max_blocks or 0
        self.allocator = BlockAllocator(max_batch * per_row)
        self._blocks = [self.allocator.allocate(per_row) for _ in range(max_batch)]
        self.batch = 0
        self.slot_mapping = None
        with torch.inference_mode(False):  # later steps write to them in whatever mode they run
            self.block_table = torch.zeros(max_batch, max(per_row, 1), dtype=torch.int32)
            self.cache_seqlens = torch.zeros(max_batch, dtype=torch.int32)
            self._pools = [self._new_pool(shape) for shape in self._row_shapes]
        for row in range(max_batch):
            self._write_table(row)

    def _row_shape(self, latent: int, rope: int) -> tuple[int, int]:
        """Shape of one block; a layer without dims has rows without values."""
        if self.kv_cache_dtype == "auto" or latent == 0:
            return self.block_size, latent + rope
        return self.block_size, row_bytes(self.kv_cache_dtype, latent, rope)

    def _new_pool(self, row_shape: tuple[int, int]) -> Tensor:
        return torch.empty(self.allocator.num_blocks, *row_shape, dtype=self._storage_dtype)

    def _check_room(self, batch: int, new_tokens: int) -> None:
        longest = max(self.cache_seqlens[:batch].tolist(), default=0)
        room = self.block_table.shape[1] * self.block_size
        if longest + new_tokens > room:
            raise ValueError(
                f"new_tokens: got {new_tokens}, but a sequence of {longest} tokens is in a cache "
                f"of max_cache_len={room}"
            )

    def _make_room(self, batch: int, new_tokens: int) -> None:
        """Growing mode: gives each sequence the blocks that its next tokens need."""
        lengths = self.cache_seqlens[:batch].tolist()
        missing = [
            max(0, self._blocks_of(length + new_tokens) - len(blocks))
            for length, blocks in zip(lengths, self._blocks, strict=False)
        ]
        self._ensure_free(sum(missing))
        for row, count in enumerate(missing):
            if count:
                self._blocks[row] += self.allocator.allocate(count)
                self._write_table(row, first=len(self._blocks[row]) - count)

    def _shorten(self, rows: dict[int, int]) -> None:
        """Sets the lengths of some rows, none above the present one."""
        if (
            self.max_blocks is not None and self.allocator.num_free == 0
        ):  # every block has one owner
            self._write_lengths(rows)
        else:
            self._rebuild([(row, self._blocks[row], length) for row, length in rows.items()])

    def _rebuild(self, rows: list[tuple[int, list[int], int]]) -> None:
        """Makes each row ``(row, blocks, length)`` hold the first ``length`` tokens of ``blocks``.

        Full blocks are shared. The block that the next token goes to, and reserved ones behind it,
        must be the row's own: the first row that asks for one keeps it, unless somebody else has it
        as a full block; the others get a fresh one, with the tokens copied.
        """
        allocator = self.allocator
        keeper: dict[int, int] = {}
        for row, blocks, length in rows:
            full = length // self.block_size
            for block in blocks[full : self._blocks_held(length)]:
                keeper.setdefault(block, row)
            allocator.share(blocks[:full])
        allocator.share(list(keeper))
        for row, _, _ in rows:
            allocator.release(self._blocks[row])

        copies = []
        for row, blocks, length in rows:
            full = length // self.block_size
            held = self._blocks_held(length)
            own = []
            for position, block in enumerate(blocks[full:held], start=full):
                if keeper[block] == row:
                    if allocator.references[block] == 1:
                        own.append(block)
                        continue
                    allocator.release([block])
                self._ensure_free(1)
                own += allocator.allocate(1)
                if position == full and length % self.block_size:
                    copies.append((block, own[-1]))
            self._ensure_free(held - full - len(own))
            own += allocator.allocate(held - full - len(own))
            self._blocks[row] = blocks[:full] + own
            self._write_table(row)
        self._write_lengths({row: length for row, _, length in rows})
        if copies:
            mapping = torch.tensor(copies, dtype=torch.int64)
            for pool in self._pools:
                if pool.shape[-1]:
                    ops.copy_blocks(pool, mapping)

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_size)

    def _blocks_held(self, length: int) -> int:
        """Blocks that a row of this length holds: with fixed tensors always all."""
        return self._blocks_of(length) if self.max_blocks is None else self.max_blocks

    def _ensure_free(self, count: int) -> None:
        """Enlarges the pools until ``count`` blocks are free. Fixed ones always hold enough."""
        needed = self.allocator.num_blocks - self.allocator.num_free + count
        if needed <= self.allocator.num_blocks:
            return
        self.allocator.grow(max(needed, int(_GROWTH * self.allocator.num_blocks)))
        for layer, old in enumerate(self._pools):
            with torch.inference_mode(False):
                pool = self._new_pool(self._row_shapes[layer])
            pool[: old.shape[0]] = old
            self._pools[layer] = pool

    def _ensure_rows(self, batch: int) -> None:
        if batch <= self.max_batch:
            return
        if self.max_blocks is not None:
            raise ValueError(
                f"batch: got {batch}, but the cache was made for max_batch={self.max_batch}"
            )
        self._blocks += [[] for _ in range(batch - self.max_batch)]
        with torch.inference_mode(False):
            self.block_table = _enlarged(self.block_table, (batch, self.block_table.shape[1]))
            self.cache_seqlens = _enlarged(self.cache_seqlens, (batch,))

    def _write_table(self, row: int, first: int = 0) -> None:
        """Copies the blocks of a row, from the ``first`` on, into the block table."""
        blocks = self._blocks[row]
        columns = self.block_table.shape[1]
        if len(blocks) > columns:
            columns = max(len(blocks), int(_GROWTH * columns))
            with torch.inference_mode(False):
                self.block_table = _enlarged(self.block_table, (self.max_batch, columns))
        self.block_table[row, first : len(blocks)] = torch.tensor(blocks[first:], dtype=torch.int32)

    def _write_lengths(self, rows: dict[int, int]) -> None:
        if rows:
            self.cache_seqlens[list(rows)] = torch.tensor(list(rows.values()), dtype=torch.int32)


def _per_layer(name: str, value: int | Sequence[int] | None, num_layers: int) -> list[int]:
    if value is None:
        return [0] * num_layers
    values = [value] * num_layers if isinstance(value, int) else list(value)
    if len(values) != num_layers:
        raise ValueError(f"{name}: got {len(values)} values for {num_layers} layers")
    lowest = 0 if name == "rope_dim" else 1
    if any(v < lowest for v in values):
        raise ValueError(f"{name}: got {min(values)}, expected at least {lowest}")
    return values


def _int_list(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _enlarged(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a larger shape with ``old`` in its corner."""
    new = torch.zeros(shape, dtype=old.dtype)
    new[tuple(slice(n) for n in old.shape)] = old
    return new
