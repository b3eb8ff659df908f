"""State machines: both caches against lists of tokens, with a failure inside every step.

Each step is one call. It is made with the n-th allocation of memory failing, or with an interrupt
at its n-th operation, for an n that is drawn; if that comes to pass, the cache must be what it was,
to the last reference. Then the call is made again and must do what it should. Some calls are ones
that must be refused, and they too must change nothing.

The tokens are numbers, and the rows of token i hold nothing but i, so what a sequence reads is
compared with what was written to it, whatever was shared, copied, truncated or loaded in between.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from torch_flash_mla import MLACache, PagedLatentCache
from torch_flash_mla.integrations.transformers.cache import cache_layer_of

REFUSED = (TypeError, ValueError, IndexError)
Text = list[int]


@dataclass
class Summary:
    """What a run did, and everything that went wrong in it."""

    seed: int
    steps: int = 0
    failed: int = 0  # injected failures that a call met
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"caches: seed {self.seed}, {self.steps} steps, {self.failed} injected failures, "
            f"{self.refused} refusals, {len(self.wrong)} wrong"
        )


class Injected(Exception):
    """A failure that was asked for."""


class OutOfMemory(Injected, RuntimeError):
    pass


class Interrupt(Injected, KeyboardInterrupt):
    pass


class _Failure(TorchDispatchMode):
    """Makes the n-th allocation of memory fail, or interrupts the n-th operation."""

    def __init__(self, kind: type[Injected], n: int) -> None:
        super().__init__()
        self.kind, self.left = kind, n

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.kind is Interrupt or _allocates(func):
            self.left -= 1
            if self.left == 0:
                raise self.kind(str(func))
        return func(*args, **(kwargs or {}))


def _allocates(func: Any) -> bool:
    """Whether an operator makes new tensors, or is one of ours, which may need memory inside."""
    made = any(x.alias_info is None and "Tensor" in str(x.type) for x in func._schema.returns)
    return made or func.namespace == "flashmla" or "lift_fresh" in func._schema.name


class Machine:
    """A cache and the tokens of its sequences."""

    def __init__(self, draw: random.Random, folder: str) -> None:
        self.draw = draw
        self.path = f"{folder}/cache"
        self.texts: list[Text] = []
        self.next = 1
        self.held: list[tuple[Tensor, Tensor]] = []  # tensors of earlier steps, what they held

    cache: Any
    fixed: bool

    def operations(self) -> list[Callable[[], None]]:
        raise NotImplementedError

    @property
    def paged(self) -> PagedLatentCache | None:
        raise NotImplementedError

    def new_tokens(self, count: int) -> Text:
        self.next += count
        return list(range(self.next - count, self.next))

    # A step

    def step(self, summary: Summary) -> None:
        self.summary = summary
        summary.steps += 1
        self.draw.choice(self.operations())()
        self.check()

    def call(self, function: Callable[[], Any]) -> None:
        """Makes a call that must succeed, once with a failure inside."""
        kind = self.draw.choice([OutOfMemory, OutOfMemory, Interrupt])
        before = self.remembered()
        try:
            with _Failure(kind, int(self.draw.triangular(1, 30, 1))):
                function()
        except Injected:
            self.summary.failed += 1
            self.check_unchanged(before)
            function()

    def refuse(
        self, function: Callable[[], Any], kinds: tuple[type[Exception], ...] = REFUSED
    ) -> None:
        """Makes a call that must be refused."""
        before = self.remembered()
        try:
            function()
        except kinds:
            self.summary.refused += 1
            self.check_unchanged(before)
        else:
            raise AssertionError("accepted")

    # What must hold

    def remembered(self) -> dict[str, Any]:
        paged = self.paged
        if paged is None:
            return {"paged": None}
        return {
            "paged": paged,
            "attributes": vars(paged).copy(),
            "references": paged.allocator.references.copy(),
            "free": paged.allocator._free.copy(),
            "blocks": [tuple(blocks) for blocks in paged._blocks],
            "table": paged.block_table.clone(),
            "lengths": paged.cache_seqlens.clone(),
        }

    def check_unchanged(self, before: dict[str, Any]) -> None:
        paged = self.paged
        assert paged is before["paged"]
        if paged is not None:
            assert vars(paged).keys() == before["attributes"].keys()
            for name, value in before["attributes"].items():
                assert vars(paged)[name] is value, name
            assert paged.allocator.references == before["references"]
            assert paged.allocator._free == before["free"]
            assert [tuple(blocks) for blocks in paged._blocks] == before["blocks"]
            assert torch.equal(paged.block_table, before["table"])
            assert torch.equal(paged.cache_seqlens, before["lengths"])
        self.check()

    def check(self) -> None:
        """The tokens are those of the texts, and blocks are accounted for."""
        paged = self.paged
        if paged is None:
            assert not self.texts
            return
        assert paged.batch == len(self.texts)
        assert paged.cache_seqlens[: paged.batch].tolist() == [len(x) for x in self.texts]
        size, allocator = paged.block_size, paged.allocator
        references = [0] * allocator.num_blocks
        for blocks in paged._blocks:
            for block in blocks:
                references[block] += 1
        assert references == allocator.references
        assert sorted(allocator._free) == [i for i, n in enumerate(references) if n == 0]
        for blocks, text in zip(paged._blocks, self.texts, strict=False):
            assert all(references[block] == 1 for block in blocks[len(text) // size :])
        slots = []
        for row, text in enumerate(self.texts):
            position = torch.arange(len(text))
            slots.append(paged.block_table[row][position // size].long() * size + position % size)
        expected = torch.tensor([token for text in self.texts for token in text])
        for layer in range(paged.num_layers):
            pool = paged.kv_cache(layer)
            assert len(pool) >= allocator.num_blocks
            if slots and pool.shape[-1]:
                rows = pool.view(-1, pool.shape[-1])[torch.cat(slots)]
                assert torch.equal(rows, _rows(expected + layer, pool.shape[-1]))
        self.check_held(paged)

    def check_held(self, paged: PagedLatentCache) -> None:
        """Nobody has written to tables and lengths that an earlier call may hold."""
        for tensor, content in self.held:
            assert torch.equal(tensor, content)
        tensors = [paged.block_table] if self.fixed else [paged.block_table, paged.cache_seqlens]
        self.held = self.held[-6:] + [(x, x.clone()) for x in tensors]


def _rows(tokens: Tensor, width: int) -> Tensor:
    return tokens.float().unsqueeze(-1).expand(*tokens.shape, width).contiguous()


class PagedMachine(Machine):
    """PagedLatentCache."""

    DIMS = ((4, 2), (3, 0))
    MOST = (7, 24)  # tokens and sequences of fixed tensors
    BATCH = 6

    def __init__(self, draw: random.Random, folder: str, fixed: bool) -> None:
        super().__init__(draw, folder)
        self.fixed = fixed
        most = draw.choice(self.MOST)
        limit = {"max_batch": self.BATCH, "max_cache_len": most} if fixed else {}
        latent, rope = zip(*self.DIMS, strict=True)
        self.cache = PagedLatentCache(
            len(self.DIMS),
            latent,
            rope,
            dtype=torch.float32,
            block_size=draw.choice([1, 2, 5]),
            **limit,
        )

    @property
    def paged(self) -> PagedLatentCache:
        return self.cache

    def operations(self) -> list[Callable[[], None]]:
        always = [self.extend, self.extend, self.extend, self.reset, self.hostile, self.replace]
        if not self.texts:
            return always
        return [*always, self.truncate, self.truncate, self.reorder, self.fork, self.free]

    def extend(self) -> None:
        """Reserves and appends, now and then for copies."""
        copies = self.draw.choice([1, 1, 2])
        texts = self.texts
        batch = max(len(texts), self.draw.randint(1, 3))
        tokens = self.draw.randint(0, 7)
        texts = texts + [[]] * (batch - len(texts))
        if copies == 2 and (batch % 2 or any(texts[i] != texts[i - i % 2] for i in range(batch))):
            copies = 1
        longest = max(map(len, texts))
        if self.fixed and longest + tokens > self.cache.max_cache_len:
            self.refuse(lambda: self.cache.reserve(batch, tokens, copies))
            return
        new = [self.new_tokens(tokens) for _ in range(batch)]
        new = [new[i - i % copies] for i in range(batch)]
        addresses = self.cache.block_table, self.cache.cache_seqlens
        self.call(lambda: self.cache.reserve(batch, tokens, copies))
        if self.fixed:  # what a compiled step relies on
            assert addresses[0] is self.cache.block_table
            assert addresses[1] is self.cache.cache_seqlens
        for layer, (latent, rope) in enumerate(self.DIMS):
            rows = _rows(torch.tensor(new).view(batch, tokens) + layer, latent + rope)
            # The rows are not there before; an append that fails is made again.
            with contextlib.suppress(Injected), _Failure(OutOfMemory, self.draw.randint(1, 6)):
                self.cache.append(layer, rows[..., :latent], rows[..., latent:])
            self.cache.append(layer, rows[..., :latent], rows[..., latent:])
        self.texts = [text + more for text, more in zip(texts, new, strict=True)]

    def truncate(self) -> None:
        lengths = [self.draw.randint(0, len(text)) for text in self.texts]
        form = self.draw.randrange(3)
        if form == 0:
            lengths = [min(lengths)] * len(lengths)
        argument = [lengths[0], torch.tensor(lengths), lengths][form]
        self.call_then(
            lambda: self.cache.truncate(argument),
            [text[:n] for text, n in zip(self.texts, lengths, strict=True)],
        )

    def reorder(self) -> None:
        count = self.draw.randint(1, self.BATCH)
        index = [self.draw.randrange(len(self.texts)) for _ in range(count)]
        argument = torch.tensor(index) if self.draw.random() < 0.5 else index
        self.call_then(lambda: self.cache.reorder(argument), [self.texts[i] for i in index])

    def fork(self) -> None:
        n = self.draw.randint(1, 3)
        if n * len(self.texts) > self.BATCH:
            if self.fixed:
                self.refuse(lambda: self.cache.fork(n))
            return
        self.call_then(lambda: self.cache.fork(n), [x for x in self.texts for _ in range(n)])

    def free(self) -> None:
        sequence = self.draw.randrange(len(self.texts))
        texts = [[] if i == sequence else text for i, text in enumerate(self.texts)]
        self.call_then(lambda: self.cache.free(sequence), texts)

    def reset(self) -> None:
        batch = self.draw.choice([None, 0, 1, self.BATCH])
        self.call_then(lambda: self.cache.reset(batch), [])

    def call_then(self, function: Callable[[], Any], texts: list[Text]) -> None:
        # During a failing call the old texts must hold, afterwards the new ones.
        self.call(function)
        self.texts = texts

    def replace(self) -> None:
        """Goes on with a copy, or with what comes back from a file."""
        kind = self.draw.randrange(4)
        if kind == 0:
            self.cache = copy.deepcopy(self.cache)
        elif kind == 1:
            self.cache = pickle.loads(pickle.dumps(self.cache))
        else:
            self.call(lambda: self.cache.save(self.path))
            self.cache = PagedLatentCache.load(self.path, mmap=kind == 3)

    def hostile(self) -> None:
        cache, batch = self.cache, len(self.texts)
        calls: list[Callable[[], Any]] = [
            lambda: cache.reserve(-1, 1),
            lambda: cache.reserve(1, -1),
            lambda: cache.reserve(1.0, 1),
            lambda: cache.reserve(1, True),
            lambda: cache.reserve(2**40, 1),
            lambda: cache.reserve(1, 2**40),
            lambda: cache.reserve(3, 1, 2),
            lambda: cache.truncate([1.5]),
            lambda: cache.truncate(-1),
            lambda: cache.truncate([0] * (batch + 1)),
            lambda: cache.truncate(torch.ones(1)),
            lambda: cache.truncate(10**6) if batch else cache.truncate([1]),
            lambda: cache.reorder([batch]),
            lambda: cache.reorder([-1]),
            lambda: cache.reorder([0.7]),
            lambda: cache.reorder(torch.ones(2, dtype=torch.bool)),
            lambda: cache.reorder("01"),
            lambda: cache.fork(0),
            lambda: cache.fork("2"),
            lambda: cache.fork(2**40) if batch else cache.fork(-1),
            lambda: cache.free(batch),
            lambda: cache.free(-1),
            lambda: cache.free(0.0),
            lambda: cache.reset(-3),
            lambda: cache.reset(2.0),
            lambda: cache.reset(2**40),
            lambda: cache.append(0, torch.zeros(1, 99, 4), torch.zeros(1, 99, 2)),
            lambda: cache.append(2, torch.zeros(1, 1, 4), torch.zeros(1, 1, 2)),
            lambda: cache.append(-1, torch.zeros(1, 1, 4), torch.zeros(1, 1, 2)),
            lambda: cache.define_layer(0, 7, 7),
            lambda: cache.kv_cache(-1),
        ]
        self.refuse(self.draw.choice(calls))


class _Model(nn.Module):
    """What a cache file knows a model by."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(2))


class LatentMachine(Machine):
    """MLACache: pages of three layers, with and without layers that transformers keeps."""

    LATENT, ROPE, WINDOW, MOST, BATCH = 4, 2, 5, 24, 6

    def __init__(self, draw: random.Random, folder: str, fixed: bool) -> None:
        super().__init__(draw, folder)
        self.fixed, self.hybrid = fixed, draw.random() < 0.5
        types = ["full_attention", "indexed_attention", "full_attention"]
        if self.hybrid:
            types[1:1] = ["sliding_attention", "linear_attention"]
        self.types = types
        config = PreTrainedConfig(
            num_hidden_layers=len(types), layer_types=types, sliding_window=self.WINDOW
        )
        self.model = _Model(config)
        self.cache = MLACache(
            config,
            max_cache_len=self.MOST if fixed else None,
            max_batch=self.BATCH,
            block_size=draw.choice([1, 2, 3]),
        )
        self.batch = draw.randint(1, 2)  # layers of transformers keep the batch over a reset

    @property
    def paged(self) -> PagedLatentCache | None:
        return self.cache.pages.paged

    def operations(self) -> list[Callable[[], None]]:
        always = [self.forward, self.forward, self.forward, self.hostile]
        if not self.texts:
            return always
        return [*always, self.reorder, self.select, self.fork, self.crop, self.crop, self.reset,
                self.replace]  # fmt: skip

    def forward(self) -> None:
        """One pass of a model: every layer gets its rows of the new tokens."""
        length = len(self.texts[0]) if self.texts else 0
        batch, tokens = len(self.texts) or self.batch, self.draw.randint(1, 6)
        new = torch.tensor([self.new_tokens(tokens) for _ in range(batch)])
        if self.fixed and length + tokens > self.cache.layers[0].max_cache_len:
            self.refuse(lambda: self.update(0, new, 0))
            return
        if not self.texts and not self.fixed and batch == 2 and self.draw.random() < 0.5:
            self.cache.share_prompt(2, tokens)
            new[1] = new[0]
        texts = self.texts or [[]] * batch
        after = [text + more for text, more in zip(texts, new.tolist(), strict=True)]
        pool = 0
        for layer, kind in enumerate(self.types):
            if kind not in ("full_attention", "indexed_attention"):
                self.update(layer, new, 0)
            elif pool == 0:
                self.call(lambda layer=layer: self.update(layer, new, 0))
                pool, self.texts = 1, after
            else:  # the tokens are reserved: a layer that fails is run again
                try:
                    with _Failure(OutOfMemory, self.draw.randint(1, 6)):
                        self.update(layer, new, pool)
                except Injected:
                    self.update(layer, new, pool)
                pool += 1
            if kind == "indexed_attention":
                self.cache.update_indexer(_rows(new, 3), layer)

    def update(self, layer: int, new: Tensor, pool: int) -> None:
        kind = self.types[layer]
        if kind == "linear_attention":
            state = _rows(new[:, -1:], 3)
            self.cache.update_conv_state(_rows(new, 3).transpose(1, 2), layer, conv_kernel_size=2)
            self.cache.update_recurrent_state(state, layer)
            return
        rows = _rows(new + pool, self.LATENT + self.ROPE).unsqueeze(1)
        keys, values = rows.split([self.LATENT, self.ROPE], dim=-1)
        carrier, _ = self.cache.update(keys, values, layer)
        pages = cache_layer_of(carrier)
        if pages is not None:
            pages.take()  # as an attention that reads them does

    def reorder(self) -> None:
        count = self.draw.randint(1, self.BATCH)
        index = [self.draw.randrange(len(self.texts)) for _ in range(count)]
        self.call(lambda: self.cache.reorder_cache(torch.tensor(index)))
        self.texts = [self.texts[i] for i in index]
        self.batch = len(self.texts)

    def select(self) -> None:
        keep = torch.tensor([self.draw.random() < 0.7 for _ in self.texts])
        keep[self.draw.randrange(len(self.texts))] = True
        self.call(lambda: self.cache.batch_select_indices(keep))
        self.texts = [text for text, kept in zip(self.texts, keep.tolist(), strict=True) if kept]
        self.batch = len(self.texts)

    def fork(self) -> None:
        n = self.draw.randint(1, 3)
        if n * len(self.texts) > self.BATCH:
            if self.fixed:
                self.refuse(lambda: self.cache.fork(n))
            return
        self.call(lambda: self.cache.fork(n))
        self.texts = [text for text in self.texts for _ in range(n)]
        self.batch = len(self.texts)

    def crop(self) -> None:
        count = self.draw.randint(0, len(self.texts[0]))
        if self.hybrid:  # recurrent states cannot go back
            self.refuse(lambda: self.cache.crop(-count), (RuntimeError,))
            return
        if count == len(self.texts[0]):
            count -= 1  # transformers takes an empty layer for an unused one
        self.call(lambda: self.cache.crop(-count))
        self.texts = [text[: len(text) - count] for text in self.texts]

    def reset(self) -> None:
        self.cache.reset()
        self.texts = []

    def replace(self) -> None:
        kind = self.draw.randrange(3)
        if kind == 0:
            self.cache = copy.deepcopy(self.cache)
            return
        self.call(lambda: self.cache.save(self.path, self.model))
        self.cache = MLACache.load(self.path, self.model, mmap=kind == 2)

    def hostile(self) -> None:
        cache, batch = self.cache, len(self.texts)
        calls: list[Callable[[], Any]] = [
            lambda: cache.fork(0),
            lambda: cache.fork(1.5),
            lambda: cache.crop(1),
            lambda: cache.crop(0.5),
            lambda: cache.crop(True),
            lambda: cache.share_prompt(0, 1),
            lambda: cache.share_prompt(2, -1),
            lambda: cache.share_prompt(2.0, 1),
            lambda: MLACache(self.model.config, block_size=1.0),
            lambda: MLACache(self.model.config, max_cache_len=-1),
            lambda: MLACache(self.model.config, max_batch=True),
        ]
        if batch:
            keys = torch.zeros(batch + 1, 1, 1, self.LATENT)
            calls += [
                lambda: cache.update(keys, keys[..., : self.ROPE], 0),
                lambda: cache.update(keys[:batch, :, :, :-1], keys[:batch, ..., : self.ROPE], 0),
                lambda: cache.fork(2**40),
                lambda: cache.reorder_cache(torch.tensor([batch])),
                lambda: cache.reorder_cache(torch.tensor([0.5])),
            ]
        self.refuse(self.draw.choice(calls), (*REFUSED, RuntimeError))

    def remembered(self) -> dict[str, Any]:
        layers = [
            {k: copy.deepcopy(v) for k, v in vars(layer).items() if k not in ("pages", "_nan")}
            for layer in self.cache.layers
        ]
        shared = self.cache._shared_prefix
        return {**super().remembered(), "layers": layers, "shared": shared}

    def check_unchanged(self, before: dict[str, Any]) -> None:
        super().check_unchanged(before)
        assert self.cache._shared_prefix == before["shared"]
        for layer, attributes in zip(self.cache.layers, before["layers"], strict=True):
            present = {k: v for k, v in vars(layer).items() if k not in ("pages", "_nan")}
            assert present.keys() == attributes.keys()
            for name, value in attributes.items():
                assert _same(present[name], value), name

    def check(self) -> None:
        paged = self.paged
        if paged is None or paged.batch == 0:
            assert not self.texts
            return
        super().check()
        tokens = torch.tensor(self.texts)
        for kind, layer in zip(self.types, self.cache.layers, strict=True):
            if kind == "linear_attention":
                last = _rows(tokens[:, -1:], 3)
                assert torch.equal(layer.recurrent_states[0], last)
                wide = torch.nn.functional.pad(tokens, (2, 0))[:, -2:]
                assert torch.equal(layer.conv_states[0], _rows(wide, 3).transpose(1, 2))
            if kind == "indexed_attention" and layer.is_indexer_initialized:
                keys = layer.indexer_keys[:, : tokens.shape[1]]
                assert torch.equal(keys, _rows(tokens, 3))
            if kind == "sliding_attention":
                width = self.WINDOW if self.fixed else self.WINDOW - 1
                recent = tokens[:, -width:]
                keys = layer.keys[:, 0, : recent.shape[1]]
                assert torch.equal(keys, _rows(recent, self.LATENT))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b


def machines(draw: random.Random, folder: str) -> Iterator[Machine]:
    """One after the other."""
    while True:
        for kind in (PagedMachine, LatentMachine):
            for fixed in (False, True):
                yield kind(draw, folder, fixed)


def run(seed: int, count: int, steps: int = 40) -> Summary:
    """``count`` steps in machines of ``steps`` each.

    A step that goes wrong is described in the summary, and its machine given up.
    """
    summary = Summary(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            draw = random.Random(seed)
            for number, machine in enumerate(machines(draw, folder)):
                for step in range(steps):
                    if summary.steps == count:
                        return summary
                    try:
                        machine.step(summary)
                    except Exception as error:
                        where = traceback.extract_tb(error.__traceback__)[-1]
                        summary.wrong.append(
                            f"{type(machine).__name__} {number}, step {step}: "
                            f"{type(error).__name__} in line {where.lineno}: {error}"
                        )
                        break
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("machines never end")
