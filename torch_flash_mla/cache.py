"""A paged cache of latents for all layers of a model: one allocator, one block table, one pool per
layer.

Each token takes one row per layer, ``[latent | rope]``, in a pool of fixed-size blocks. A block
table maps the blocks of a sequence to blocks of the pool, the same for every layer, so sequences
can share the blocks of a common prefix (beams, parallel samples) and return them without moving
anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_flash_mla import _cache_file, ops
from torch_flash_mla.formats import FLOAT_DTYPES, row_bytes


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

    Without ``max_cache_len`` pools start empty and grow, by half while they are small and by an
    eighth from 64 blocks on: copying what is there costs about ten writes per token, and forks of a
    long prompt stay about as large as the prompt. With it, every tensor is allocated
    at once, each sequence owns blocks for its full length, and ``reserve`` and ``append`` are
    tensor operations only, so a compiled step captures them in one graph. Everything else
    (``truncate``, ``reorder``, ``fork``, ``free``, ``reset``, ``save``) runs between steps.

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

    def define_layer(
        self, layer: int, latent_dim: int, rope_dim: int, stored: Tensor | None = None
    ) -> None:
        """Gives a layer that was made without dims its pool. Before the layer's first ``append``.

        Args:
            layer: index of the pool.
            latent_dim: L.
            rope_dim: R.
            stored: contents of the first blocks, [blocks, block_size, row], taken over without a
                copy where it is the whole pool.

        Raises:
            ValueError: the layer has other dims already, or ``stored`` is no such pool.
        """
        dims = self.latent_dims[layer], self.rope_dims[layer]
        if dims == (latent_dim, rope_dim):
            return
        if dims != (0, 0):
            raise ValueError(
                f"layer {layer}: got L, R = {latent_dim}, {rope_dim}, but it has L, R = {dims}"
            )
        row_shape = self._row_shape(latent_dim, rope_dim)
        if stored is not None and (
            stored.dtype != self._storage_dtype
            or stored.shape[1:] != row_shape
            or stored.shape[0] > self.allocator.num_blocks
        ):
            raise ValueError(
                f"pool.{layer}: got {stored.dtype} {list(stored.shape)}, expected "
                f"{self._storage_dtype} {[self.allocator.num_blocks, *row_shape]}"
            )
        self.latent_dims[layer], self.rope_dims[layer] = latent_dim, rope_dim
        self._row_shapes[layer] = row_shape
        if stored is not None and stored.shape[0] == self.allocator.num_blocks:
            self._pools[layer] = stored
            return
        with torch.inference_mode(False):
            pool = self._new_pool(row_shape)
        if stored is not None:
            pool[: stored.shape[0]] = stored
        self._pools[layer] = pool

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
            ValueError: the batch or the tokens do not fit the fixed tensors. (A compiled step
                cannot look: there the tokens that do not fit are not written, and attention refuses
                the length.) Or ``copies`` that do not divide the batch, or of unequal lengths.
        """
        if copies != 1:
            self._check_copies(batch, copies)
        self._ensure_rows(batch)
        if self.max_blocks is None:
            self._make_room(batch, new_tokens, copies)
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
        elif copies > 1:
            first, end = self._filled_blocks(lengths, new_tokens)
            shared = (columns >= first[:, None]) & (columns < end[:, None])
            shared[::copies] = False  # these write
            slots = slots.masked_fill(shared, -1)
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

    # On disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sequences in use to a file that :meth:`load` reads: safetensors, shared blocks
        once, free blocks not at all.

        The file appears whole or not at all, and replaces one of the same name. Blocks that do not
        lie in order in their pool are copied first, which takes their size in memory.

        Raises:
            OSError: the file cannot be written.
        """
        header, tensors = self.snapshot()
        _cache_file.write(path, type(self).__name__, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> PagedLatentCache:
        """A cache as :meth:`save` found it, with lengths, sharing, and fixed tensors if it had
        them. It can be used in every way; the file stays as it is.

        Args:
            path: a file of :meth:`save`.
            mmap: map the pools instead of reading them. Pages come from the file when attention
                first reads them, those that are written to become private copies, and a pool that
                grows is copied to memory then. The file must not be rewritten in place meanwhile
                (replacing or deleting it is fine). Fixed tensors are always read at once.

        Raises:
            OSError: the file cannot be opened.
            ValueError: not such a file, of another version, or damaged. (The rows themselves carry
                no checksum.)
        """
        header, tensors = _cache_file.read(path, cls.__name__)
        with _cache_file.decoding(path):
            return cls.from_snapshot(header, tensors, mmap)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
        self._clear_behind(lengths)
        in_order = used == list(range(len(used)))
        tensors = {}
        for layer, pool in enumerate(self._pools):
            if pool.shape[-1]:
                rows = pool[: len(used)] if in_order else pool[torch.tensor(used)]
                tensors[f"pool.{layer}"] = rows
        return header, tensors

    @classmethod
    def from_snapshot(
        cls, header: Mapping[str, Any], tensors: Any, mmap: bool = True
    ) -> PagedLatentCache:
        """The inverse of :meth:`snapshot`; ``tensors[name]`` gives a pool. Arguments and errors are
        those of :meth:`load`."""
        dtype = getattr(torch, header["dtype"], None)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: got {header['dtype']!r}, expected one of {FLOAT_DTYPES}")
        latent_dims, rope_dims = header["latent_dims"], header["rope_dims"]
        cache = cls(
            len(latent_dims),
            None,
            None,
            dtype=dtype,
            kv_cache_dtype=header["kv_cache_dtype"],
            block_size=header["block_size"],
            max_batch=header["max_batch"],
            max_cache_len=header["max_cache_len"],
        )
        cache._adopt(header["lengths"], header["block_table"], header["num_blocks"], not mmap)
        for layer, (latent, rope) in enumerate(zip(latent_dims, rope_dims, strict=True)):
            if latent or rope:
                cache.define_layer(layer, latent, rope, tensors[f"pool.{layer}"])
        return cache

    def _adopt(
        self, lengths: list[int], table: list[list[int]], num_blocks: int, with_room: bool
    ) -> None:
        """Gives an empty cache the sequences of a snapshot, in blocks 0 .. num_blocks - 1."""
        batch = len(lengths)
        if not 0 <= num_blocks <= sum(map(len, table)):
            raise ValueError(f"num_blocks: got {num_blocks} for {sum(map(len, table))} entries")
        if batch > self.max_batch or len(table) != batch:
            raise ValueError(f"block_table: got {len(table)} rows for {batch} of {self.max_batch}")
        if self.max_cache_len is not None and max(lengths, default=0) > self.max_cache_len:
            raise ValueError(f"lengths: got {max(lengths)}, expected at most {self.max_cache_len}")
        references = [0] * num_blocks
        for row, (blocks, length) in enumerate(zip(table, lengths, strict=True)):
            if length < 0 or len(blocks) != self._blocks_of(length):
                raise ValueError(f"block_table: row {row} has {len(blocks)} blocks for {length}")
            for block in blocks:
                if not 0 <= block < num_blocks:
                    raise ValueError(f"block_table: got {block}, expected 0 .. {num_blocks - 1}")
                references[block] += 1
        partial = [b[-1] for b, n in zip(table, lengths, strict=True) if n % self.block_size]
        if 0 in references or any(references[block] > 1 for block in partial):
            raise ValueError("block_table: a block is unused, or partly filled and shared")

        if self.max_blocks is not None:
            total = self.max_batch * self.max_blocks
        else:
            total = max(num_blocks + 1, _grown(num_blocks)) if with_room else num_blocks
        self.allocator = BlockAllocator(total)
        stored = self.allocator.allocate(num_blocks)  # 0 .. num_blocks - 1, the low ones first
        for row in range(self.max_batch):
            blocks = table[row] if row < batch else []
            self.allocator.share(blocks)
            reserved = (self.max_blocks or len(blocks)) - len(blocks)
            self._blocks[row] = blocks + self.allocator.allocate(reserved)
            self._write_table(row)
        self.allocator.release(stored)
        self._write_lengths(dict(enumerate(lengths)))
        self.batch = batch

    def _clear_behind(self, lengths: list[int]) -> None:
        """Zeroes the rows behind the end in the last block of each sequence: nobody reads them, but
        what the memory held before has no place in a file."""
        slots = [
            blocks[n // self.block_size] * self.block_size + offset
            for blocks, n in zip(self._blocks, lengths, strict=False)
            if n % self.block_size
            for offset in range(n % self.block_size, self.block_size)
        ]
        if slots:
            index = torch.tensor(slots)
            for pool in self._pools:
                if pool.shape[-1]:
                    pool.view(-1, pool.shape[-1])[index] = 0

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

    def _make_room(self, batch: int, new_tokens: int, copies: int) -> None:
        """Growing mode: gives each sequence the blocks that its next tokens need."""
        lengths = self.cache_seqlens[:batch].tolist()
        missing = []
        shared = []  # columns of the blocks that a row takes from the first of its copies
        for row, length in enumerate(lengths):
            first, end = self._filled_blocks(length, new_tokens) if row % copies else (0, 0)
            shared.append(slice(first, max(first, end)))
            count = self._blocks_of(length + new_tokens) - len(self._blocks[row])
            missing.append(max(0, count - max(0, end - first)))
        self._ensure_free(sum(missing))
        for row, count in enumerate(missing):
            before = len(self._blocks[row])
            common = self._blocks[row - row % copies][shared[row]]
            self.allocator.share(common)
            self._blocks[row] += common + self.allocator.allocate(count)
            if len(self._blocks[row]) > before:
                self._write_table(row, first=before)

    def _filled_blocks(self, length: Any, new_tokens: int) -> tuple[Any, Any]:
        """Columns [first, end) of the blocks that the next tokens fill from their start; of an int
        or a tensor."""
        return -(-length // self.block_size), (length + new_tokens) // self.block_size

    def _check_copies(self, batch: int, copies: int) -> None:
        if copies < 1 or batch % copies:
            raise ValueError(f"copies: got {copies}, expected a divisor of the batch {batch}")
        lengths = self.cache_seqlens[: min(batch, self.max_batch)].tolist()
        lengths += [0] * (batch - len(lengths))
        for row, length in enumerate(lengths):
            if length != lengths[row - row % copies]:
                raise ValueError(
                    f"copies: got {copies}, but sequences {row - row % copies} and {row} hold "
                    f"{lengths[row - row % copies]} and {length} tokens"
                )

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
        self.allocator.grow(max(needed, _grown(self.allocator.num_blocks)))
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
            columns = max(len(blocks), columns + columns // 2)
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


def _grown(num_blocks: int) -> int:
    """Blocks of the next larger pool: half as many more, at 16 and above 8, at 64 and above an
    eighth."""
    return num_blocks + max(min(num_blocks // 2, 8), num_blocks // 8)


def _int_list(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _enlarged(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a larger shape with ``old`` in its corner."""
    new = torch.zeros(shape, dtype=old.dtype)
    new[tuple(slice(n) for n in old.shape)] = old
    return new
