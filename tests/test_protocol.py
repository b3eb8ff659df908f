"""Tensors as torch makes them besides plain ones, and sizes that are 0 or nearly too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_flash_mla import ops, reference

L, R = 8, 4


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lazily_negated(*shape: int) -> Tensor:
    t = torch.zeros(*shape, dtype=torch.complex64).conj().imag
    assert t.is_neg()
    return t


def misaligned(values: Tensor) -> Tensor:
    memory = bytearray(values.numel() * values.itemsize + 1)
    t = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=1)
    return t.view(values.shape).copy_(values)


class TestLazy:
    def test_a_cache_is_refused(self) -> None:
        cache = lazily_negated(1, 8, L + R)
        with pytest.raises(RuntimeError, match="kv_cache: a lazily"):
            ops.concat_and_cache_mla(
                torch.ones(1, L), torch.ones(1, R), cache, torch.zeros(1).long()
            )
        with pytest.raises(RuntimeError, match="kv_cache: a lazily"):
            ops.copy_blocks(torch.zeros(2, 4, dtype=torch.complex64).conj(), torch.tensor([[0, 1]]))
        with pytest.raises(RuntimeError, match="kv_cache: a lazily"):
            ops.copy_blocks(torch._efficientzerotensor((2, 4)), torch.tensor([[0, 1]]))

    def test_sources_are_resolved(self) -> None:
        for rows in (lazily_negated(2, L), torch._efficientzerotensor((2, L))):
            cache = torch.ones(1, 8, L + R)
            ops.concat_and_cache_mla(rows, torch.ones(2, R), cache, torch.tensor([1, 3]))
            assert cache[0, :4, 0].tolist() == [1, 0, 1, 0]

    def test_queries_are_resolved(self) -> None:
        q = torch.randn(1, 1, 2, L + R, dtype=torch.complex64).conj().imag
        cache = torch.randn(1, 8, L + R)
        lazy = ops.mla_attention(q, cache, None, ints(8), L, 0.1)
        plain = ops.mla_attention(q.resolve_neg(), cache, None, ints(8), L, 0.1)
        torch.testing.assert_close(lazy, plain)

    def test_a_lazy_clone_is_written_alone(self) -> None:
        cache = torch.zeros(1, 8, L + R)
        clone = torch._lazy_clone(cache)
        ops.concat_and_cache_mla(torch.ones(1, L), torch.ones(1, R), clone, torch.zeros(1).long())
        assert cache.sum() == 0 and clone.sum() == L + R
        blocks = torch.arange(4.0).view(2, 2)
        clone = torch._lazy_clone(blocks)
        ops.copy_blocks(clone, torch.tensor([[0, 1]]))
        assert blocks.tolist() == [[0, 1], [2, 3]] and clone.tolist() == [[0, 1], [0, 1]]


class TestMemory:
    def test_misaligned_integers_are_copied(self) -> None:
        q, cache = torch.randn(1, 1, 2, L + R), torch.randn(2, 4, L + R)
        plain = ops.mla_attention(q, cache, ints(1, 0).view(1, 2), ints(7), L, 0.1)
        table, lengths = misaligned(ints(1, 0)).view(1, 2), misaligned(ints(7))
        torch.testing.assert_close(ops.mla_attention(q, cache, table, lengths, L, 0.1), plain)
        slots = misaligned(torch.tensor([2]))
        ops.concat_and_cache_mla(torch.ones(1, L), torch.ones(1, R), cache, slots)
        assert (cache[0, 2] == 1).all()

    def test_misaligned_numbers_are_refused(self) -> None:
        q, cache = torch.randn(1, 1, 2, L + R), torch.randn(1, 8, L + R)
        with pytest.raises(RuntimeError, match="q: its data is not aligned"):
            ops.mla_attention(misaligned(q), cache, None, ints(8), L, 0.1)
        with pytest.raises(RuntimeError, match="kv_cache: its data is not aligned"):
            ops.mla_attention(q, misaligned(cache), None, ints(8), L, 0.1)

    def test_rows_of_the_cache_itself(self) -> None:
        """They are read before any is written."""
        cache = torch.arange(8.0).view(1, 8, 1).repeat(1, 1, 4).contiguous()
        expected = cache.clone()
        expected[0, 1:] = cache[0, :-1]
        ops.concat_and_cache_mla(cache[0, :-1], cache[0, :-1, :0], cache, torch.arange(1, 8))
        assert torch.equal(cache, expected)

    def test_cells_that_share_memory(self) -> None:
        rows = torch.ones(1, 2), torch.ones(1, 0)
        for cache in (
            torch.zeros(20).as_strided((4, 4, 2), (2, 1, 1)),
            torch.zeros(1, 8, 1).expand(1, 8, 2),
        ):
            with pytest.raises((RuntimeError, ValueError), match="kv_cache: "):
                ops.concat_and_cache_mla(*rows, cache, torch.zeros(1).long())
            assert cache.sum() == 0
        blocks = torch.arange(10.0).as_strided((4, 4), (2, 1))
        before = blocks.clone()
        with pytest.raises(RuntimeError, match=r"kv_cache: .* share memory"):
            ops.copy_blocks(blocks, torch.tensor([[0, 3], [1, 2]]))
        assert torch.equal(blocks, before)

    def test_two_tensors_of_one_cache(self) -> None:
        both = torch.zeros(1, 8, L + R)
        rows = torch.ones(1, L), torch.full((1, R), 2.0)
        ops.concat_and_cache_mla(*rows, both[..., :L], torch.zeros(1).long(), "auto", both[..., L:])
        assert both[0, 0].tolist() == [1.0] * L + [2.0] * R
        with pytest.raises(ValueError, match="k_pe_cache: shares memory"):
            ops.concat_and_cache_mla(
                *rows, both[..., :L], torch.zeros(1).long(), "auto", both[..., L - 1 : -1]
            )

    def test_copy_blocks_is_whole_or_nothing(self) -> None:
        with torch.inference_mode():
            blocks = torch.arange(8.0).view(4, 2).clone()
        ops.copy_blocks(blocks, torch.tensor([[0, 1], [2, 3]]))
        assert blocks.tolist() == [[0, 1], [0, 1], [4, 5], [4, 5]]
        leaf = torch.zeros(4, 2, requires_grad=True)
        with pytest.raises(RuntimeError, match="kv_cache: requires grad"):
            ops.copy_blocks(leaf, torch.tensor([[0, 1]]))

    @pytest.mark.parametrize("form", ["absorbed", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_whose_rows_share_memory(self, isa: str, form: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        w = torch.randn(1, 1, 24, dtype=dtype).as_strided((1, 41, 24), (984, 0, 1))
        q, cache = torch.randn(1, 3, 1, 40 + R).to(dtype), torch.randn(1, 50, 24 + R).to(dtype)
        given = (q, cache, None, ints(50), w, 1, 0.1, True)
        out, _ = ops.mla_attention_kv_b(*given, form=form)
        expected, _ = reference.mla_attention_kv_b(*given)
        assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


class TestKinds:
    @pytest.mark.parametrize("kind", ["sparse", "nested", "nested meta", "none", "quantised"])
    def test_named(self, kind: str) -> None:
        q: Any = torch.zeros(1, 1, 1, L + R)
        if kind == "sparse":
            q = q.to_sparse()
        elif kind.startswith("nested"):
            device = "meta" if kind == "nested meta" else "cpu"
            q = torch.nested.nested_tensor([torch.zeros(1, 1, L + R)], device=device)
        elif kind == "quantised":
            q = torch.quantize_per_tensor(q, 0.1, 0, torch.quint8)
        else:
            q = None
        with pytest.raises((RuntimeError, TypeError), match=r"\bq\b"):
            ops.mla_attention(q, torch.zeros(1, 8, L + R), None, ints(3), L, 0.1)

    def test_what_the_backward_pass_cannot_keep(self) -> None:
        with torch.inference_mode():
            cache = torch.zeros(1, 8, L + R)
        q = torch.zeros(1, 1, 1, L + R, requires_grad=True)
        with pytest.raises(RuntimeError, match="kv_cache: an inference tensor"):
            ops.mla_attention(q, cache, None, ints(3), L, 0.1)
        with torch.no_grad():
            ops.mla_attention(q, cache, None, ints(3), L, 0.1)


class TestSizes:
    @pytest.mark.parametrize("zero", ["batch", "tokens", "heads", "keys", "topk"])
    @pytest.mark.parametrize("form", ["auto", "absorbed", "expanded"])
    def test_zero(self, zero: str, form: str) -> None:
        b, s, h, n = (0 if zero == name else 2 for name in ("batch", "tokens", "heads", "keys"))
        q = torch.zeros(b, s, h, 6 + R, requires_grad=True)
        w = torch.zeros(h, 6 + 3, L)
        more: dict[str, Any] = {"form": form}
        if zero == "topk":
            if form == "expanded":
                return
            more["indices"] = torch.zeros(b, s, 0, dtype=torch.int32)
        cache = torch.zeros(2, max(n, 1), L + R)
        out, lse = ops.mla_attention_kv_b(q, cache, None, ints(*[n] * b), w, 3, 0.1, **more)
        assert out.shape == (b, s, h, 3) and lse.shape == (b, h, s)
        (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
        assert q.grad is not None and q.grad.shape == q.shape

    def test_lengths_near_the_largest_integer(self) -> None:
        cache, q = torch.zeros(1, 64, L), torch.zeros(1, 1, 1, L)
        table = torch.zeros(1, 1, dtype=torch.int32).expand(1, 2**25)
        for window in (1, 100, 300):
            _, lse = ops.mla_attention(q, cache, table, ints(2**31 - 1), L, 0.1, window=window)
            assert lse.exp().item() == pytest.approx(window)

    def test_rows_beyond_any_sequence(self) -> None:
        out = ops.gather_cache(
            torch.ones(1, 1, 1, dtype=torch.bfloat16),
            None,
            ints(1),
            1,
            1,
            torch.bfloat16,
            "auto",
            9,
        )
        assert out.flatten().tolist() == [1] + [0] * 8

    def test_very_wide_values(self) -> None:
        """One head's keys and values alone exceed the buffer of the expanded form."""
        torch.manual_seed(0)
        w = torch.randn(1, 40000 + 60000, 4) * 0.01
        q, cache = torch.randn(1, 2, 1, 40000), torch.randn(1, 300, 4)
        given = (q, cache, None, ints(300), w, 60000, 0.01, True)
        out, _ = ops.mla_attention_kv_b(*given, form="expanded")
        expected, _ = ops.mla_attention_kv_b(*given, form="absorbed")
        assert (out - expected).norm() <= 1e-3 * expected.norm()

    def test_duplicate_indices_count_as_often_as_listed(self) -> None:
        torch.manual_seed(0)
        cache, q = torch.randn(1, 64, 96), torch.randn(1, 1, 3, 96, requires_grad=True)
        rows = [5, 9, 3, 3, 3]
        given = (cache, None, ints(64), 64, 0.2)
        listed = ints(*rows).view(1, 1, -1)
        out, _ = ops.mla_attention(q, *given, indices=listed)
        expected, _ = reference.mla_attention(q.detach(), *given, indices=listed)
        assert torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        x = q.detach().double().requires_grad_()
        k = cache[0].double()[rows]
        ((torch.einsum("bqhd,kd->bqhk", x, k) * 0.2).softmax(-1) @ k[:, :64]).sum().backward()
        assert q.grad is not None and x.grad is not None
        assert torch.allclose(q.grad.double(), x.grad, rtol=1e-4, atol=1e-5)
