"""PagedLatentCache against a model of it in plain tensors, and what its docstrings promise."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from torch_flash_mla import ops
from torch_flash_mla.cache import BlockAllocator, PagedLatentCache
from torch_flash_mla.formats import PACKED_FORMATS
from torch_flash_mla.reference import decode_rows, encode_rows, sequence_rows

LAYERS = [(4, 2), (3, 0)]  # L, R of each layer
MOST = 24  # tokens and sequences of the fixed caches in the state machine
BATCH = 6


def new_cache(**options) -> PagedLatentCache:
    latent, rope = zip(*LAYERS, strict=True)
    return PagedLatentCache(len(LAYERS), latent, rope, dtype=torch.float32, **options)


def rows_of(cache: PagedLatentCache, layer: int, sequence: int) -> Tensor:
    """float64 [length, L + R]: what attention would read."""
    latent, rope = cache.latent_dims[layer], cache.rope_dims[layer]
    length = int(cache.cache_seqlens[sequence])
    pool = cache.kv_cache(layer)
    return sequence_rows(
        pool, cache.block_table, sequence, length, latent, latent + rope, cache.kv_cache_dtype
    )


def through_file(cache: PagedLatentCache, mmap: bool) -> PagedLatentCache:
    with tempfile.TemporaryDirectory() as folder:
        cache.save(f"{folder}/cache")
        return PagedLatentCache.load(f"{folder}/cache", mmap=mmap)


class CacheMachine(RuleBasedStateMachine):
    """Random operations on a cache, and on a list of tensors per sequence and layer."""

    fixed = False

    @initialize(block_size=st.sampled_from([1, 2, 5]), seed=st.integers(0, 2**32))
    def make(self, block_size, seed):
        self.generator = torch.Generator().manual_seed(seed)
        limit = {"max_batch": BATCH, "max_cache_len": MOST} if self.fixed else {}
        self.cache = new_cache(block_size=block_size, **limit)
        self.model: list[list[Tensor]] = []

    @rule(batch=st.integers(1, 3), tokens=st.integers(1, 7))
    def append(self, batch, tokens):
        batch = max(batch, len(self.model))
        longest = max((len(layers[0]) for layers in self.model), default=0)
        if self.fixed and longest + tokens > self.cache.max_cache_len:
            with pytest.raises(ValueError, match="new_tokens"):
                self.cache.reserve(batch, tokens)
            return
        self.model += [[torch.empty(0, sum(dims)) for dims in LAYERS]] * (batch - len(self.model))
        slots = self.cache.reserve(batch, tokens)
        assert slots.unique().numel() == batch * tokens
        for layer, (latent, rope) in enumerate(LAYERS):
            new = torch.randn(batch, tokens, latent + rope, generator=self.generator)
            self.cache.append(layer, new[..., :latent], new[..., latent:])
            for sequence in range(batch):
                layers = list(self.model[sequence])
                layers[layer] = torch.cat([layers[layer], new[sequence]])
                self.model[sequence] = layers

    @precondition(lambda self: 0 < len(self.model) <= BATCH // 2)
    @rule(tokens=st.integers(1, 12), free=st.booleans())
    def fork_and_append_copies(self, tokens, free):
        """The same tokens for two copies of each sequence."""
        if free:
            self.reset(None)
            self.model = [[torch.empty(0, sum(dims)) for dims in LAYERS]] * 2
        else:
            self.fork()
        batch = len(self.model)
        longest = max(len(layers[0]) for layers in self.model)
        if self.fixed and longest + tokens > self.cache.max_cache_len:
            return
        self.cache.reserve(batch, tokens, copies=2)
        for layer, (latent, rope) in enumerate(LAYERS):
            new = torch.randn(batch // 2, tokens, latent + rope, generator=self.generator)
            new = new.repeat_interleave(2, dim=0)
            self.cache.append(layer, new[..., :latent], new[..., latent:])
            self.model = [list(layers) for layers in self.model]
            for sequence, layers in enumerate(self.model):
                layers[layer] = torch.cat([layers[layer], new[sequence]])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(layers[0]))) for layers in self.model]
        self.cache.truncate(torch.tensor(lengths))
        self.model = [
            [rows[:n] for rows in layers] for layers, n in zip(self.model, lengths, strict=True)
        ]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reorder(self, data):
        parents = st.integers(0, len(self.model) - 1)
        index = data.draw(st.lists(parents, min_size=1, max_size=BATCH))
        self.cache.reorder(torch.tensor(index))
        self.model = [self.model[parent] for parent in index]

    @precondition(lambda self: 0 < len(self.model) <= BATCH // 2)
    @rule()
    def fork(self):
        self.cache.fork(2)
        self.model = [layers for layers in self.model for _ in range(2)]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.integers(0, len(self.model) - 1))
        self.cache.free(sequence)
        self.model[sequence] = [rows[:0] for rows in self.model[sequence]]

    @rule(batch=st.sampled_from([None, 1, BATCH]))
    def reset(self, batch):
        self.cache.reset(batch)
        self.model = []

    @rule(
        how=st.sampled_from(
            [
                copy.deepcopy,
                lambda cache: pickle.loads(pickle.dumps(cache)),
                lambda cache: through_file(cache, mmap=True),
                lambda cache: through_file(cache, mmap=False),
            ]
        )
    )
    def replace_by_copy(self, how):
        self.cache = how(self.cache)

    @invariant()
    def rows_are_those_of_the_model(self):
        assert self.cache.batch == len(self.model)
        for sequence, layers in enumerate(self.model):
            for layer, rows in enumerate(layers):
                assert torch.equal(rows_of(self.cache, layer, sequence), rows.double())

    @invariant()
    def blocks_are_accounted_for(self):
        cache, allocator = self.cache, self.cache.allocator
        references = [0] * allocator.num_blocks
        for blocks in cache._blocks:
            for block in blocks:
                references[block] += 1
        assert references == allocator.references
        free = [block for block, count in enumerate(references) if count == 0]
        assert sorted(allocator._free) == free

    @invariant()
    def blocks_from_the_length_on_have_one_owner(self):
        for sequence, blocks in enumerate(self.cache._blocks):
            full = int(self.cache.cache_seqlens[sequence]) // self.cache.block_size
            assert all(self.cache.allocator.references[block] == 1 for block in blocks[full:])


class FixedCacheMachine(CacheMachine):
    fixed = True


@pytest.mark.parametrize("machine", [CacheMachine, FixedCacheMachine])
def test_state_machine(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )


def filled(tokens: int, batch: int = 1, **options) -> PagedLatentCache:
    cache = new_cache(**options)
    extend(cache, tokens, batch)
    return cache


def extend(cache: PagedLatentCache, tokens: int, batch: int) -> None:
    cache.reserve(batch, tokens)
    for layer, (latent, rope) in enumerate(LAYERS):
        cache.append(layer, torch.randn(batch, tokens, latent), torch.randn(batch, tokens, rope))


def test_forks_share_whole_blocks():
    """Eight continuations of a prompt of 10.5 blocks hold its blocks once, and 8 partial ones."""
    cache = filled(42, block_size=4)
    cache.fork(8)
    in_use = cache.allocator.num_blocks - cache.allocator.num_free
    assert in_use == 10 + 8
    prompt = rows_of(cache, 0, 0)
    extend(cache, 3, 8)
    continuations = [rows_of(cache, 0, sequence) for sequence in range(8)]
    for rows in continuations:
        assert torch.equal(rows[:42], prompt)
    assert len({tuple(rows[42].tolist()) for rows in continuations}) == 8


def test_pools_grow_in_steps_and_shrink_never():
    cache = new_cache(block_size=2)
    sizes = set()
    for _ in range(200):
        extend(cache, 1, 1)
        sizes.add(cache.allocator.num_blocks)
    assert len(sizes) <= 18
    assert cache.nbytes <= 1.6 * 200 * cache.bytes_per_token + 4096
    before = cache.nbytes
    cache.reset()
    assert cache.nbytes == before


@pytest.mark.parametrize("kv_cache_dtype", PACKED_FORMATS)
def test_packed_formats(kv_cache_dtype):
    cache = PagedLatentCache(2, 64, 32, kv_cache_dtype=kv_cache_dtype, block_size=3)
    x = torch.randn(2, 7, 96)
    cache.reserve(2, 7)
    for layer in range(2):
        cache.append(layer, x[..., :64], x[..., 64:])
    stored = encode_rows(x[..., :64], x[..., 64:], kv_cache_dtype)
    for sequence in range(2):
        expected = decode_rows(stored[sequence], kv_cache_dtype, 64, 32)
        assert torch.equal(rows_of(cache, 1, sequence), expected.double())
    assert cache.bytes_per_token == 2 * stored.shape[-1]


def test_size_of_a_real_model():
    """DeepSeek-V2-Lite, 64k tokens in q8_kv: 985.5 MiB of rows, allocated without being touched."""
    cache = PagedLatentCache(27, 512, 64, kv_cache_dtype="q8_kv", max_cache_len=65536)
    assert cache.bytes_per_token == 27 * 584
    assert sum(cache.kv_cache(layer).nbytes for layer in range(27)) / 2**20 == 985.5


def test_layers_defined_later():
    cache = PagedLatentCache(2, None, None, dtype=torch.float32, block_size=4)
    cache.reserve(1, 5)
    for layer, (latent, rope) in enumerate(LAYERS):
        cache.define_layer(layer, latent, rope)
        cache.define_layer(layer, latent, rope)
        cache.append(layer, torch.ones(1, 5, latent), torch.ones(1, 5, rope))
    assert (rows_of(cache, 1, 0) == 1).all()
    with pytest.raises(ValueError, match="layer 1"):
        cache.define_layer(1, 7, 7)


def test_inference_mode_and_normal_mode_mix():
    """Growing inside inference mode must not make tensors that fail outside of it."""
    cache = new_cache(block_size=2)
    with torch.inference_mode():
        extend(cache, 5, 2)
    extend(cache, 5, 2)
    with torch.inference_mode():
        cache.fork(2)
    extend(cache, 1, 4)
    cache.truncate(3)
    assert cache.cache_seqlens[:4].tolist() == [3] * 4


def test_nothing_is_differentiated_through_the_cache():
    cache = new_cache()
    cache.reserve(1, 2)
    cache.append(0, torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 2, 2))
    assert not cache.kv_cache(0).requires_grad


def test_compiled_steps_are_one_graph():
    """200 steps on fixed tensors: one graph, no recompile, even after changes between steps."""
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True)
    def step(cache: PagedLatentCache, new: Tensor, q: Tensor) -> Tensor:
        cache.reserve(2, 1)
        cache.append(0, new[..., :4], new[..., 4:])
        cache.append(1, new[..., :3], new[..., :0])
        tables = cache.block_table[:2], cache.cache_seqlens[:2]
        return ops.mla_attention(q, cache.kv_cache(0), *tables, 4, 1.0)[0]

    cache = filled(3, batch=2, max_batch=2, max_cache_len=300, block_size=8)
    new = torch.randn(200, 2, 1, 6)
    start = [rows_of(cache, 0, sequence) for sequence in range(2)]
    for token in new:
        out = step(cache, token, torch.ones(2, 1, 1, 6))
    assert graphs.frame_count == 1
    for sequence in range(2):
        expected = torch.cat([start[sequence], new[:, sequence, 0].double()])
        assert torch.equal(rows_of(cache, 0, sequence), expected)

    cache.truncate(20)
    cache.reorder([1, 1])
    again = step(cache, new[0], torch.ones(2, 1, 1, 6))
    assert graphs.frame_count == 1
    assert out.shape == again.shape
    assert cache.cache_seqlens.tolist() == [21, 21]


def test_compiled_steps_beyond_the_end_write_nothing():
    """A compiled step cannot refuse: its tokens are dropped, and attention refuses the length."""
    cache = filled(8, max_cache_len=8, block_size=4)
    before = cache.kv_cache(0).clone()
    graphs = CompileCounterWithBackend("aot_eager")
    slots = torch.compile(lambda c: c.reserve(1, 2), backend=graphs, fullgraph=True)(cache)
    assert slots.tolist() == [[-1, -1]]
    cache.append(0, torch.ones(1, 2, 4), torch.ones(1, 2, 2))
    assert torch.equal(cache.kv_cache(0), before)
    arguments = cache.kv_cache(0), cache.block_table, cache.cache_seqlens
    with pytest.raises(ValueError, match="cache_seqlens"):
        ops.mla_attention(torch.ones(1, 1, 1, 6), *arguments, 4, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size: got 0"),
        ({"max_batch": 0}, "max_batch: got 0"),
        ({"max_cache_len": 0}, "max_cache_len: got 0"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
        ({"kv_cache_dtype": "q3"}, "kv_cache_dtype: got 'q3'"),
        ({"latent_dim": [32]}, "latent_dim: got 1 values for 2 layers"),
        ({"latent_dim": 0}, "latent_dim: got 0"),
        ({"rope_dim": -1}, "rope_dim: got -1"),
        ({"rope_dim": 16, "kv_cache_dtype": "q8_0"}, "rope_dim: got 16"),
    ],
)
def test_impossible_caches(options, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        PagedLatentCache(**{"num_layers": 2, "latent_dim": 64, "rope_dim": 32, **options})


def test_errors():
    cache = new_cache(block_size=4)
    with pytest.raises(ValueError, match="before the first reserve"):
        cache.append(0, torch.ones(1, 1, 4), torch.ones(1, 1, 2))
    cache.reserve(2, 3)
    with pytest.raises(ValueError, match="kv_c: got"):
        cache.append(0, torch.ones(2, 2, 4), torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="k_pe: got"):
        cache.append(0, torch.ones(2, 3, 4), torch.ones(2, 3, 3))
    for lengths in ([4, 0], [-1, 0], [0, 0, 0]):
        with pytest.raises(ValueError, match="lengths"):
            cache.truncate(lengths)
    for index in ([0, 2], [-1]):
        with pytest.raises(ValueError, match="index"):
            cache.reorder(index)
    with pytest.raises(IndexError, match="sequence"):
        cache.free(2)
    with pytest.raises(ValueError, match="n: got 0"):
        cache.fork(0)
    assert cache.cache_seqlens[:2].tolist() == [3, 3]

    fixed = new_cache(max_batch=2, max_cache_len=5, block_size=4)
    with pytest.raises(ValueError, match="max_batch"):
        fixed.reserve(3, 1)
    with pytest.raises(ValueError, match="new_tokens"):
        fixed.reserve(2, 9)  # two blocks hold 8
    fixed.reserve(2, 8)
    with pytest.raises(ValueError, match="max_batch"):
        fixed.fork(2)
    fixed.reset(batch=4)
    assert fixed.max_batch == 4


INTEGERS = [1.0, True, "1", None, torch.tensor(1.0), torch.tensor(True), -1, 2**40]


@pytest.mark.parametrize("value", INTEGERS, ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_integers_are_integers(fixed, value):
    """Floats, bools and numbers out of bounds are refused by name, and nothing has changed."""
    limit = {"max_batch": 3, "max_cache_len": 16} if fixed else {}
    cache = filled(3, batch=2, block_size=4, **limit)
    optional: list[Any] = [] if value is None else [("batch", lambda: cache.reset(value))]
    calls: list[Any] = [
        ("batch", lambda: cache.reserve(value, 1)),
        ("new_tokens", lambda: cache.reserve(1, value)),
        ("copies", lambda: cache.reserve(2, 1, value)),
        (r"lengths(\[0\])?", lambda: cache.truncate(value)),
        (r"lengths\[1\]", lambda: cache.truncate([1, value])),
        (r"index\[1\]", lambda: cache.reorder([1, value])),
        ("n", lambda: cache.fork(value)),
        ("sequence", lambda: cache.free(value)),
        ("layer", lambda: cache.kv_cache(value)),
        ("layer", lambda: cache.append(value, torch.ones(2, 3, 4), torch.ones(2, 3, 2))),
        *optional,
    ]
    before = cache.batch, cache.cache_seqlens.tolist(), cache.block_table.tolist()
    rows = [rows_of(cache, 0, sequence) for sequence in range(2)]
    for name, call in calls:
        with pytest.raises((TypeError, ValueError, IndexError), match=f"^{name}: got "):
            call()
        assert before == (cache.batch, cache.cache_seqlens.tolist(), cache.block_table.tolist())
        assert all(torch.equal(rows_of(cache, 0, i), rows[i]) for i in range(2))
    made = {"num_layers": 2, "latent_dim": 64, "rope_dim": 32}
    optional = ["latent_dim", "rope_dim", "max_cache_len"]
    for name in (*made, "block_size", "max_batch", "max_cache_len"):
        if value is None and name in optional:
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
            PagedLatentCache(**{**made, name: value})


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda x: torch.tensor(x).numpy().item()])
def test_what_counts_as_an_integer(kind):
    cache = new_cache(block_size=kind(4))
    cache.reserve(kind(2), kind(3))
    cache.truncate(kind(2))
    cache.fork(kind(2))
    cache.reorder([kind(1), kind(2)])
    cache.free(kind(0))
    assert cache.cache_seqlens[:2].tolist() == [0, 2]


def test_bounds_come_before_memory():
    """What no machine has is refused at once: by the bounds of the class, or by the system."""
    start = time.monotonic()
    cache = filled(3, block_size=4)
    for batch, tokens in ((1, 2**30), (2**20, 2**30), (1, 2**31), (2**21, 0)):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"batch: |new_tokens: |allocate|block"
        ):
            cache.reserve(batch, tokens)
    for options in ({"max_cache_len": 2**30}, {"max_cache_len": 2**30, "max_batch": 2**20}):
        with pytest.raises((ValueError, RuntimeError), match=r"max_cache_len: |allocate"):
            PagedLatentCache(27, 512, 64, **options)
    assert cache.cache_seqlens.tolist() == [3]
    assert time.monotonic() - start < 5


def test_slots_beyond_int32():
    """4096 blocks of a million tokens (of a layer without rows)."""
    cache = PagedLatentCache(1, None, None, block_size=2**20, max_batch=4096, max_cache_len=2**20)
    assert cache.reserve(4096, 2)[-1].tolist() == [4095 * 2**20, 4095 * 2**20 + 1]


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_a_change_replaces_tables_and_lengths(fixed):
    """A call that has them goes on with what they said. Fixed tensors: see the next test."""
    limit = {"max_batch": 4, "max_cache_len": 32} if fixed else {}
    cache = filled(3, batch=2, block_size=2, **limit)
    changes = [
        lambda: cache.fork(2),
        lambda: cache.truncate(2),
        lambda: cache.reorder([1, 0]),
        lambda: cache.free(0),
        lambda: cache.reset(),
        lambda: cache.reset(3),
    ]
    if not fixed:
        changes = [lambda: extend(cache, 1, 2), lambda: extend(cache, 9, 3), *changes]
    for change in changes:
        tensors = cache.block_table, cache.cache_seqlens
        contents = [tensor.clone() for tensor in tensors]
        change()
        for tensor, content in zip(tensors, contents, strict=True):
            assert torch.equal(tensor, content)


def test_a_step_of_fixed_tensors_keeps_them():
    """A compiled step finds everything where it was: lengths are added to in place."""
    cache = filled(3, batch=2, block_size=2, max_batch=2, max_cache_len=32)
    tensors = cache.block_table, cache.cache_seqlens, cache.kv_cache(0)
    table = cache.block_table.clone()
    extend(cache, 4, 2)
    assert all(
        a is b
        for a, b in zip(
            tensors, (cache.block_table, cache.cache_seqlens, cache.kv_cache(0)), strict=True
        )
    )
    assert torch.equal(cache.block_table, table)
    assert cache.cache_seqlens.tolist() == [7, 7]


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_attending_while_another_thread_appends(fixed):
    """Who took the lengths of a finished step, then table and pool, gets the result of that step,
    bit by bit, as long as later tokens are only appended."""
    limit = {"max_batch": 4, "max_cache_len": 4000} if fixed else {}
    cache = PagedLatentCache(1, 64, 0, dtype=torch.float32, block_size=1, **limit)
    q = torch.randn(4, 1, 2, 64)
    finished = []  # lengths, and the result that belongs to them
    errors = []
    done = threading.Event()

    def attend(lengths):
        return ops.mla_attention(q, cache.kv_cache(0), cache.block_table, lengths, 64, 0.1)[0]

    def append():
        try:
            for _ in range(300):
                cache.reserve(4, 3)
                cache.append(0, torch.randn(4, 3, 64), torch.empty(4, 3, 0))
                lengths = cache.cache_seqlens.clone() if fixed else cache.cache_seqlens
                finished.append((lengths, attend(lengths)))
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=append)
    thread.start()
    compared = 0
    while not done.is_set():
        if finished:
            lengths, expected = finished[-1]
            table = cache.block_table  # after the lengths, and before the pool
            out, _ = ops.mla_attention(q, cache.kv_cache(0), table, lengths, 64, 0.1)
            assert torch.equal(out, expected)
            compared += 1
    thread.join()
    assert not errors
    assert compared > 20


def test_memory_that_is_really_exhausted():
    """A fork that the system has no memory for: every sequence keeps its own rows."""
    program = """if True:
        import resource, torch
        from torch_flash_mla import PagedLatentCache
        cache = PagedLatentCache(1, 4096, 0, dtype=torch.float32, block_size=256)
        cache.reserve(2, 100)
        rows = torch.stack([torch.full((100, 4096), 1.0), torch.full((100, 4096), 2.0)])
        cache.append(0, rows, torch.zeros(2, 100, 0))
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        for change in (
            lambda: cache.reorder([1] * 8), lambda: cache.fork(8), lambda: cache.reserve(2, 5000)
        ):
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
            try:
                change()
            except (RuntimeError, MemoryError) as error:
                print(type(error).__name__, "allocate" in str(error))
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            slots = cache.block_table.long() * 256
            print(cache.kv_cache(0).view(-1, 4096)[slots[:2, 0], 0].tolist(), cache.batch)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "RuntimeError True\n[1.0, 2.0] 2\n" * 3, done.stdout + done.stderr


def test_a_change_needs_a_new_step():
    """Slots of before a change may be somebody else's."""
    cache = filled(6, batch=2, block_size=4)
    for change in (lambda: cache.truncate(3), lambda: cache.fork(2), cache.reset):
        cache.reserve(2, 1)
        change()
        with pytest.raises(ValueError, match="after a change of the sequences"):
            cache.append(0, torch.ones(2, 1, 4), torch.ones(2, 1, 2))


def test_allocator():
    allocator = BlockAllocator(3)
    assert allocator.allocate(2) == [0, 1]
    allocator.share([1])
    allocator.release([0, 1])
    assert allocator.references == [0, 1, 0]
    with pytest.raises(RuntimeError, match="3 cache blocks wanted, 2 are free"):
        allocator.allocate(3)
    allocator.grow(5)
    assert allocator.num_free == 4
    assert sorted(allocator.allocate(4)) == [0, 2, 3, 4]
