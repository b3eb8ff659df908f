"""The package among the rest of a PyTorch program: modes, autocast, function transforms, copies,
worker processes, threads. Adds about half a minute to the fast tests.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mla_cases
import pytest
import torch
from mla_cases import Case, make_problem
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DynamicCache
from transformers_cases import small_model

import torch_flash_mla
from torch_flash_mla import MLAAttention, MLACache, PagedLatentCache, ops, patch
from torch_flash_mla.integrations.transformers import PatchReport

B, Sq, H, L, R, P, V = 2, 3, 4, 64, 32, 24, 40
SCALE = (P + R) ** -0.5


# Modes


class Stream:
    """A layer, and steps that append to its cache and attend to it."""

    def __init__(self, **cache: Any) -> None:
        torch.manual_seed(3)
        dims = {"kv_lora_rank": L, "qk_rope_head_dim": R, "qk_nope_head_dim": P, "v_head_dim": V}
        self.layer = MLAAttention(48, H, q_lora_rank=20, **dims)
        self.make_cache(**cache)

    def make_cache(self, **cache: Any) -> None:
        self.cache = PagedLatentCache(1, L, R, dtype=torch.float32, block_size=4, **cache)
        self.start = 0

    def step(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        positions = torch.arange(self.start, self.start + tokens).float()
        phase = positions[None, :, None] * 10000 ** (-torch.arange(0, R, 2) / R)
        slots = self.cache.reserve(batch, tokens)
        self.start += tokens
        tables = self.cache.block_table[:batch], self.cache.cache_seqlens[:batch]
        return self.layer(hidden, phase.cos(), phase.sin(), self.cache.kv_cache(0), *tables, slots)


@pytest.mark.parametrize("cache", [{}, {"max_batch": B, "max_cache_len": 32}])
def test_modes_mix(cache: dict[str, int]) -> None:
    """Whatever mode made a cache or wrote to it, the others go on with it, to the same numbers."""
    modes: list[Callable[[], Any]] = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    pieces = torch.randn(6, B, Sq, 48)
    plain = Stream(**cache)
    expected = [plain.step(piece) for piece in pieces]
    for first in range(3):
        stream = Stream(**cache)
        with modes[first]():
            stream.make_cache(**cache)
        for i, piece in enumerate(pieces):
            with modes[(first + i) % 3]():
                out = stream.step(piece)
            assert torch.equal(out, expected[i])
            assert out.is_inference() == (modes[(first + i) % 3] is torch.inference_mode)
    assert expected[0].requires_grad
    expected[-1].sum().backward()
    assert plain.layer.kv_b_proj.weight.grad is not None


def test_a_layer_under_autocast() -> None:
    """Its projections round to bfloat16, whose parts and weights then meet in the operators."""
    pieces = torch.randn(3, B, Sq, 48)
    exact, rounded = Stream(), Stream()
    with torch.no_grad():
        for piece in pieces:
            expected = exact.step(piece)
            with torch.autocast("cpu", torch.bfloat16):
                out = rounded.step(piece)
            assert out.dtype == torch.bfloat16
            error = (out - expected).norm() / expected.norm()
            assert 1e-5 < error < 2e-2  # it did round


def test_training_under_autocast() -> None:
    stream, same = Stream(), Stream()
    piece = torch.randn(B, Sq, 48)
    same.step(piece).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = stream.step(piece)
    out.float().square().sum().backward()
    for name in ("kv_b_proj", "q_b_proj", "o_proj"):
        expected = getattr(same.layer, name).weight.grad
        actual = getattr(stream.layer, name).weight.grad
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 5e-2 * expected.norm()


# Function transforms


def draw_call(kv_b: bool = False) -> dict[str, Tensor | None]:
    """Tensors of one sample: everything that can vary from sample to sample."""
    width = P if kv_b else L
    shuffled = torch.randperm(8).int()
    tensors: dict[str, Tensor | None] = {
        "q": torch.randn(B, Sq, H, width),
        "kv_cache": torch.randn(8, 4, L),
        "block_table": shuffled[: B * 3].view(B, 3),
        "cache_seqlens": torch.randint(1, 13, (B,), dtype=torch.int32),
        "attn_mask": torch.rand(B, 1, Sq, 12) < 0.8,
        "cache_leftpad": torch.randint(0, 2, (B,), dtype=torch.int32),
        "indices": torch.stack([torch.randperm(12)[:6].int() for _ in range(B * Sq)]),
        "topk_length": torch.randint(1, 7, (B,), dtype=torch.int32),
        "attn_sink": torch.randn(H),
        "q_pe": torch.randn(B, Sq, H, R),
        "k_pe_cache": torch.randn(8, 4, R),
    }
    tensors["indices"] = tensors["indices"].view(B, Sq, 6)  # type: ignore[union-attr]
    if kv_b:
        tensors["w_kv_b"] = torch.randn(H, P + V, L) / 8
    return tensors


def check_vmap(
    function: Callable[..., Any],
    samples: list[dict[str, Tensor | None]],
    mapped: set[str],
    dims: dict[str, int] | None = None,
) -> None:
    """vmap over the ``mapped`` arguments, at ``dims``, beside one call for each sample."""
    names = sorted(mapped)
    at = [(dims or {}).get(name, 0) for name in names]
    rest = {name: value for name, value in samples[0].items() if name not in mapped}
    stacked = [torch.stack([s[n] for s in samples], dim=d) for n, d in zip(names, at, strict=True)]
    actual = torch.func.vmap(
        lambda *values: function(**rest, **dict(zip(names, values, strict=True))), in_dims=tuple(at)
    )(*stacked)
    each = [function(**rest, **{name: sample[name] for name in names}) for sample in samples]
    if isinstance(actual, Tensor):
        actual, each = (actual,), [(result,) for result in each]
    for column, results in zip(actual, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(column, torch.stack(results), rtol=1e-5, atol=1e-6)


def attention(**tensors: Any) -> tuple[Tensor, Tensor]:
    settings = {"softmax_scale": SCALE, "causal": True, "window": 9}
    if "w_kv_b" in tensors:
        return ops.mla_attention_kv_b(**tensors, head_dim_v=V, **settings)
    return ops.mla_attention(**tensors, head_dim_v=L, **settings)


@pytest.mark.parametrize("kv_b", [False, True])
class TestVmap:
    @pytest.mark.parametrize("name", [*draw_call(), "w_kv_b"])
    def test_each_argument(self, name: str, kv_b: bool) -> None:
        samples = [draw_call(kv_b) for _ in range(3)]
        if name in samples[0]:
            check_vmap(attention, samples, {name})

    def test_all_arguments(self, kv_b: bool) -> None:
        samples = [draw_call(kv_b) for _ in range(3)]
        check_vmap(attention, samples, set(samples[0]))
        without_sink = set(samples[0]) - {"attn_sink", "w_kv_b"}
        last = {"q": -1, "attn_mask": -1, "kv_cache": 1, "block_table": 1, "indices": 2}
        check_vmap(attention, samples, without_sink, last)

    def test_without_block_table(self, kv_b: bool) -> None:
        samples = [draw_call(kv_b) for _ in range(3)]
        for sample in samples:
            sample |= {"block_table": None, "kv_cache": torch.randn(B, 12, L)}
            sample |= {"k_pe_cache": torch.randn(B, 12, R)}
        check_vmap(attention, samples, {"q"})
        check_vmap(attention, samples, {"q", "cache_seqlens", "kv_cache"})

    @pytest.mark.parametrize("shape", [(12,), (Sq, 12), (1, 1, 1, 12), (H, 1, 12), (B, H, Sq, 12)])
    def test_masks_of_every_rank(self, shape: tuple[int, ...], kv_b: bool) -> None:
        samples = [draw_call(kv_b) for _ in range(3)]
        for sample in samples:
            sample["attn_mask"] = torch.randn(shape)
        check_vmap(attention, samples, {"q"})
        check_vmap(attention, samples, {"attn_mask"})
        check_vmap(attention, samples, {"q", "attn_mask"})

    def test_gradients(self, kv_b: bool) -> None:
        call = draw_call(kv_b)
        q = torch.randn(3, *call.pop("q").shape, requires_grad=True)  # type: ignore[union-attr]
        total = torch.func.vmap(lambda one: attention(q=one, **call)[0])(q).square().sum()
        expected = sum(attention(q=one, **call)[0].square().sum() for one in q)
        actual, wanted = (torch.autograd.grad(x, q)[0] for x in (total, expected))
        torch.testing.assert_close(actual, wanted)


def test_vmap_of_ragged_queries() -> None:
    """Where queries of one sample belong has no dimension of sequences: sample by sample."""
    call = draw_call()
    call["cu_seqlens_q"] = torch.tensor([0, 4, 6], dtype=torch.int32)
    call |= {"attn_mask": None, "indices": None, "topk_length": None}

    def draw() -> dict[str, Tensor | None]:
        return {**call, "q": torch.randn(6, H, L), "q_pe": torch.randn(6, H, R)}

    samples = [draw() for _ in range(3)]
    check_vmap(attention, samples, {"q", "q_pe"})
    samples[1]["cu_seqlens_q"] = torch.tensor([0, 0, 6], dtype=torch.int32)
    check_vmap(attention, samples, {"q", "q_pe", "cu_seqlens_q"})


def test_vmap_in_vmap() -> None:
    call = draw_call()
    q = torch.randn(2, 3, *call.pop("q").shape)  # type: ignore[union-attr]
    function = torch.func.vmap(torch.func.vmap(lambda one: attention(q=one, **call)))
    for actual, expected in zip(
        function(q),
        zip(*(attention(q=one, **call) for one in q.flatten(0, 1)), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(actual.flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("mapped", ["kv_cache", "block_table", "cache_seqlens"])
def test_vmap_of_gather_cache(mapped: str) -> None:
    names = ("kv_cache", "block_table", "cache_seqlens")
    samples = [{name: draw_call()[name] for name in names} for _ in range(3)]

    def gather(**tensors: Any) -> Tensor:
        return ops.gather_cache(**tensors, head_dim_v=L - 8, head_dim=L, dtype=torch.float32)

    check_vmap(gather, samples, {mapped})
    check_vmap(gather, samples, set(names))


def test_vmap_of_merge_attn_states() -> None:
    samples: list[dict[str, Tensor | None]] = [
        {
            "out_a": torch.randn(B, Sq, H, L),
            "lse_a": torch.randn(B, H, Sq),
            "out_b": torch.randn(B, Sq, H, L),
            "lse_b": torch.randn(B, H, Sq),
            "attn_sink": torch.randn(H),
        }
        for _ in range(3)
    ]
    for mapped in ({"out_a"}, {"lse_a", "lse_b"}, {"attn_sink"}, set(samples[0])):
        check_vmap(ops.merge_attn_states, samples, mapped)


def test_vmap_does_not_write() -> None:
    pool, slots = torch.zeros(3, 4, 4, L + R), torch.tensor([0, 1])
    rows, rope = torch.ones(3, 2, L), torch.ones(2, R)
    with pytest.raises(NotImplementedError, match="concat_and_cache_mla: writes into kv_cache"):
        torch.func.vmap(lambda x, c: ops.concat_and_cache_mla(x, rope, c, slots))(rows, pool)
    with pytest.raises(NotImplementedError, match="copy_blocks: writes into kv_cache"):
        torch.func.vmap(lambda c: ops.copy_blocks(c, torch.tensor([[0, 1]])))(pool)
    assert (pool == 0).all()


def test_transforms_that_are_refused() -> None:
    """No silent zero: gradients by transform and in forward mode have no formula here."""
    call = draw_call()
    q = call.pop("q")

    def loss(one: Tensor) -> Tensor:
        return attention(q=one, **call)[0].sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(q)
    with pytest.raises(NotImplementedError, match=r"forward-mode gradients \(jvp\) of attention"):
        torch.func.jvp(loss, (q,), (q,))
    weight = torch.randn(H, P + V, L)
    rest = {**call, "w_kv_b": weight, "q": torch.randn(B, Sq, H, P)}
    with torch.autograd.forward_ad.dual_level():
        rest["w_kv_b"] = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="use reverse mode"):
            attention(**rest)


# Copies and pickles


def copies(thing: Any) -> Iterator[Any]:
    yield copy.deepcopy(thing)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        yield pickle.loads(pickle.dumps(thing, protocol))


@pytest.mark.parametrize("cache", [{}, {"max_batch": B, "max_cache_len": 32}])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "q8_kv"])
def test_a_copied_stream_goes_its_own_way(kv_cache_dtype: str, cache: dict[str, int]) -> None:
    """Module and cache, filled: a copy continues like the original and shares nothing with it."""
    stream = Stream(kv_cache_dtype=kv_cache_dtype, **cache)
    stream.layer.kv_cache_dtype = kv_cache_dtype
    first, second, other = torch.randn(3, B, Sq, 48)
    stream.step(first)
    twins = [copy.copy(stream) for _ in copies(None)]
    for twin, layer, pages in zip(twins, copies(stream.layer), copies(stream.cache), strict=True):
        twin.layer, twin.cache = layer, pages
        twin.step(other)
    expected = stream.step(second)
    for twin in twins:
        twin.cache.truncate(Sq)
        twin.start = Sq
        assert torch.equal(twin.step(second), expected)


def test_a_report_is_a_value() -> None:
    report = patch(small_model("deepseek_v3"), "q8_kv")
    for twin in copies(report):
        assert isinstance(twin, PatchReport)
        assert twin == report
        assert str(twin) == str(report)


def test_public_functions_pickle() -> None:
    for name in torch_flash_mla.__all__:
        thing = getattr(torch_flash_mla, name)
        # A text is copied, functions and classes come back by their name.
        same = all(twin == thing for twin in copies(thing))
        assert same and (isinstance(thing, str) or all(t is thing for t in copies(thing))), name
    meta, _ = torch_flash_mla.get_mla_metadata()
    assert all(type(twin) is type(meta) for twin in copies(meta))


LOADER = """
import pickle, sys, torch
model, cache, unused = pickle.load(open(sys.argv[1], "rb"))
torch.set_num_threads(2)
ids = torch.arange(2, 12).unsqueeze(0)
with torch.no_grad():
    results = model(ids, past_key_values=cache).logits, model(ids, past_key_values=unused).logits
torch.save((results, cache.get_seq_length(), unused.get_seq_length()), sys.argv[2])
"""


def test_a_patched_model_and_its_cache_in_another_process(tmp_path: Path) -> None:
    """Loaded by a program that imports nothing of this package: unpickling does."""
    model = small_model("deepseek_v3")
    patch(model)
    cache, unused = MLACache(model.config), MLACache(model.config, max_cache_len=64)
    with torch.no_grad():
        model(torch.arange(3, 10).unsqueeze(0), past_key_values=cache)
    (tmp_path / "all.pickle").write_bytes(pickle.dumps((model, cache, unused)))
    command = [sys.executable, "-c", LOADER, str(tmp_path / "all.pickle"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    actual, *lengths = torch.load(tmp_path / "out.pt")
    assert [int(length) for length in lengths] == [17, 10]
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        for result, past in zip(actual, (cache, DynamicCache(config=model.config)), strict=True):
            expected = model(ids, past_key_values=past).logits
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# Processes and threads


class AttentionDataset(Dataset):
    """Items are results of the operators; computed wherever the item is asked for."""

    def __init__(self) -> None:
        case = Case(torch_flash_mla.cpu_isa(), heads=6, dims=(64, 32), q_len=2, keys="causal")
        self.problem = make_problem(case, [700, 40])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        q = self.problem.arguments["q"] * (index + 1)
        return ops.mla_attention(**self.problem.arguments | {"q": q})


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_forked_workers(workers: int) -> None:
    """Operators run before the fork, on several threads, and then in the workers."""
    dataset = AttentionDataset()
    expected = [dataset[i] for i in range(len(dataset))]
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )
    for _ in range(2):
        for actual, (out, lse) in zip(loader, expected, strict=True):
            torch.testing.assert_close(actual[0], out)  # workers have one thread: other splits
            torch.testing.assert_close(actual[1], lse)
    again = dataset[1]  # and the parent goes on
    assert torch.equal(again[0], expected[1][0])


def test_two_threads_at_once() -> None:
    """Calls of different sizes and formats at the same time do not mix their working memory."""
    isa = torch_flash_mla.cpu_isa()
    cases = [
        Case(isa, "bf16", heads=16, dims=(128, 32), q_len=2, keys="causal"),
        Case(isa, "q8_kv", heads=5, dims=(96, 32), q_len=1, sink=True),
        Case(isa, "q4_kv", heads=20, dims=(64, 32), q_len=3, keys="float_mask"),
        Case(isa, "fp32", heads=3, dims=(33, 7), q_len=4, keys="window"),
    ]
    problems = [make_problem(case, [900 - 150 * i, 30]) for i, case in enumerate(cases)]
    for problem in problems:
        problem.expected(), problem.case.packed and problem.expected_of_original()
    start = threading.Barrier(2)

    def work(order: list[int]) -> None:
        start.wait()
        for i in order * 25:
            out, lse = ops.mla_attention(**problems[i].arguments)
            mla_cases.check(problems[i], out, lse)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, order) for order in ([0, 1, 2, 3], [3, 2, 0, 1, 1])]:
            done.result()


def test_threads_append_to_their_own_caches() -> None:
    def fill(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        cache = PagedLatentCache(2, L, R, dtype=torch.float32, kv_cache_dtype="q8_0", block_size=3)
        for tokens in range(1, 20):
            cache.reserve(1, tokens)
            for layer in range(2):
                rows = torch.randn(1, tokens, L + R, generator=generator)
                cache.append(layer, rows[..., :L], rows[..., L:])
        tables = cache.block_table[:1], cache.cache_seqlens[:1]
        how = (L, L + R, torch.float32, "q8_0", 190)
        return [ops.gather_cache(cache.kv_cache(layer), *tables, *how) for layer in range(2)]

    expected = [fill(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(fill, range(4)))
    for one, other in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@dataclasses.dataclass
class Counter:
    """Counts in a thread of its own, as fast as it gets the interpreter."""

    count: int = 0
    stop: bool = False

    def run(self) -> None:
        while not self.stop:
            self.count += 1
            time.sleep(1e-4)

    def during(self, function: Callable[[], Any]) -> int:
        """How far it came while ``function`` ran. Whoever has the interpreter keeps it until he
        gives it away: the switch interval is longer than any test."""
        before = self.count
        function()
        return self.count - before


@pytest.fixture
def counter() -> Iterator[Counter]:
    interval = sys.getswitchinterval()
    counter = Counter()
    thread = threading.Thread(target=counter.run, daemon=True)
    thread.start()
    sys.setswitchinterval(1000)
    yield counter
    sys.setswitchinterval(interval)
    counter.stop = True
    thread.join()


def test_operators_release_the_interpreter(counter: Counter) -> None:
    """Another Python thread goes on during each of them, and stands still without the release."""
    holding = ctypes.PyDLL(None)  # calls without releasing the interpreter
    assert counter.during(lambda: holding.usleep(50_000)) == 0
    assert counter.during(lambda: time.sleep(0.05)) > 0

    tokens, blocks = 1 << 16, 1 << 10
    pool = torch.randn(blocks, 64, 96).bfloat16()
    table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    seqlens = torch.tensor([tokens], dtype=torch.int32)
    q = torch.randn(1, 64, 16, 96).bfloat16()
    weight = torch.randn(16, P + V, L).bfloat16()
    states = torch.randn(1, 4096, 64, L), torch.randn(1, 64, 4096)
    pairs = torch.stack([torch.arange(blocks // 2), torch.arange(blocks // 2, blocks)], dim=1)
    gather = (table, seqlens, L, 96, torch.float32)
    long_calls: dict[str, Callable[[], Any]] = {
        "mla_attention": lambda: ops.mla_attention(q, pool, table, seqlens, L, SCALE),
        "mla_attention_kv_b": lambda: ops.mla_attention_kv_b(
            q[..., : P + R], pool, table, seqlens, weight, V, SCALE
        ),
        "concat_and_cache_mla": lambda: ops.concat_and_cache_mla(
            pool.view(tokens, 96)[:, :L], pool.view(tokens, 96)[:, L:], twin, torch.arange(tokens)
        ),
        "gather_cache": lambda: ops.gather_cache(pool, *gather),
        "copy_blocks": lambda: ops.copy_blocks(twin, pairs),
        "merge_attn_states": lambda: ops.merge_attn_states(*states, *states),
    }
    twin = pool.clone()
    for name, call in long_calls.items():
        assert any(counter.during(call) > 0 for _ in range(20)), f"{name} holds the interpreter"
