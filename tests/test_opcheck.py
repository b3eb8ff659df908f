"""The operators as citizens of PyTorch: opcheck, gradients, torch.compile, torch.jit.script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from decode_step import append_and_attend
from torch import Tensor

from torch_flash_mla import ops, reference
from torch_flash_mla.formats import PACKED_FORMATS, row_bytes

FORMATS = ("float32", "bfloat16", "float16", "float32+k_pe", *PACKED_FORMATS)
FLOAT32_FORMATS = ("float32", "float32+k_pe")
LATENT, ROPE, NOPE, VALUE, HEADS = 64, 32, 16, 24, 3
BLOCK_SIZE, LENGTHS = 8, (21, 0, 2)  # a partly filled block, nothing, and fewer keys than queries
SCALE = 0.2


@dataclass
class Case:
    """Arguments of an attention call over one cache format, pages in random order."""

    kv_cache_dtype: str
    dtype: torch.dtype = torch.float32
    q_len: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS

    def __post_init__(self) -> None:
        batch = len(self.lengths)
        blocks = 3 * batch + 1
        two_tensors = self.kv_cache_dtype.endswith("+k_pe")
        name = self.kv_cache_dtype.removesuffix("+k_pe")
        self.block_table = torch.randperm(blocks)[: 3 * batch].view(batch, 3).int()
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        self.k_pe_cache = None
        self.format = "auto"
        if name in PACKED_FORMATS:
            self.format = name
            shape = (blocks, BLOCK_SIZE, row_bytes(name, LATENT, ROPE))
            self.kv_cache = torch.empty(shape, dtype=torch.uint8)
        else:
            element = getattr(torch, name)
            width = LATENT if two_tensors else LATENT + ROPE
            self.kv_cache = torch.empty(blocks, BLOCK_SIZE, width, dtype=element)
            if two_tensors:
                self.k_pe_cache = torch.empty(blocks, BLOCK_SIZE, ROPE, dtype=element)
        slots = torch.arange(blocks * BLOCK_SIZE)
        ops.concat_and_cache_mla(*self.tokens(len(slots)), self.kv_cache, slots, *self.format_rest)
        self.q = torch.randn(batch, self.q_len, HEADS, LATENT + ROPE).to(self.dtype)
        self.q_model = torch.randn(batch, self.q_len, HEADS, NOPE + ROPE).to(self.dtype)
        self.w_kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT).to(self.dtype) / 8

    @property
    def format_rest(self) -> tuple[str, Tensor | None]:
        return self.format, self.k_pe_cache

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, LATENT), torch.randn(count, ROPE)

    @property
    def keys(self) -> dict[str, Any]:
        return {"k_pe_cache": self.k_pe_cache, "kv_cache_dtype": self.format, **self.options}

    def attention(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sequences = (self.kv_cache, self.block_table, self.cache_seqlens)
        return (self.q, *sequences, LATENT, SCALE, True), self.keys

    def attention_kv_b(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sequences = (self.kv_cache, self.block_table, self.cache_seqlens)
        return (self.q_model, *sequences, self.w_kv_b, VALUE, SCALE, True), self.keys


def require_grad(*tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and t.is_floating_point():
            t.requires_grad_()


def check(op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> None:
    torch.library.opcheck(op, arguments, keywords or {}, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_opcheck_attention(kv_cache_dtype: str, grad: bool) -> None:
    case = Case(kv_cache_dtype)
    if grad:
        require_grad(case.q, case.kv_cache, case.k_pe_cache)
    check(torch.ops.flashmla.mla_attention.default, *case.attention())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_opcheck_attention_kv_b(kv_cache_dtype: str, grad: bool) -> None:
    case = Case(kv_cache_dtype)
    if grad:
        require_grad(case.q_model, case.w_kv_b, case.kv_cache, case.k_pe_cache)
    check(torch.ops.flashmla.mla_attention_kv_b.default, *case.attention_kv_b())


def ragged(case: Case, kv_b: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of a case with 2, 0 and 4 query tokens."""
    (q, *rest), keywords = case.attention_kv_b() if kv_b else case.attention()
    tokens = q.flatten(0, 1)[:6].clone().requires_grad_(q.requires_grad)
    return (tokens, *rest), {
        **keywords,
        "cu_seqlens_q": torch.tensor([0, 2, 2, 6], dtype=torch.int32),
    }


@pytest.mark.parametrize("kv_b", [False, True])
def test_opcheck_ragged(kv_b: bool) -> None:
    case = Case("float32")
    require_grad(case.q, case.q_model, case.w_kv_b, case.kv_cache)
    name = "mla_attention_kv_b" if kv_b else "mla_attention"
    check(getattr(torch.ops.flashmla, name).default, *ragged(case, kv_b))


@pytest.mark.parametrize("options", ["none", "mask", "indices"])
@pytest.mark.parametrize("kv_b", [False, True])
def test_gradients_of_ragged_queries(kv_b: bool, options: str) -> None:
    case = Case("float32", lengths=(21, 9, 5))
    if options == "mask":
        case.options = {"attn_mask": torch.randn(HEADS, 6, 24)}
    elif options == "indices":
        lists = [[20, 0], [3, -1], [1, 40], [1, 0], [-1, 3], [0, 2]]
        case.options = {"indices": torch.tensor(lists, dtype=torch.int32)}
    require_grad(case.q, case.q_model, case.w_kv_b, case.kv_cache)
    arguments, keywords = ragged(case, kv_b)
    inputs = [arguments[0], case.kv_cache, *([case.w_kv_b] if kv_b else [])]
    gradients = []
    for module in (ops, reference):
        function = getattr(module, "mla_attention_kv_b" if kv_b else "mla_attention")
        out, lse = function(*arguments, **keywords)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
        loss = loss + lse[lse.isfinite()].sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-5)


def test_opcheck_every_option() -> None:
    case = Case("float32", q_len=5)
    case.options = {
        "attn_mask": torch.rand(3, 1, 5, 24) > 0.3,
        "cache_leftpad": torch.tensor([2, 0, 1], dtype=torch.int32),
        "attn_sink": torch.randn(HEADS, requires_grad=True),
        "q_pe": case.q[..., LATENT:].detach().clone().requires_grad_(),
        "window": 9,
    }
    case.q = case.q[..., :LATENT].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(torch.ops.flashmla.mla_attention.default, *case.attention())


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_opcheck_cache(kv_cache_dtype: str) -> None:
    case = Case(kv_cache_dtype)
    slots = torch.tensor([3, -1, 17])
    tokens = case.tokens(3)
    check(
        torch.ops.flashmla.concat_and_cache_mla.default,
        (*tokens, case.kv_cache, slots, *case.format_rest),
    )
    check(torch.ops.flashmla.copy_blocks.default, (case.kv_cache, torch.tensor([[0, 4], [0, 2]])))
    if case.k_pe_cache is None:
        width, dtype = LATENT + ROPE, torch.bfloat16
        sequences = (case.kv_cache, case.block_table, case.cache_seqlens)
        for rows in (None, 30):
            check(
                torch.ops.flashmla.gather_cache.default,
                (*sequences, LATENT, width, dtype, case.format, rows),
            )


def test_opcheck_merge() -> None:
    out_a, out_b = torch.randn(2, 2, 3, HEADS, 10)
    lse_a, lse_b = torch.randn(2, 2, HEADS, 3)
    check(torch.ops.flashmla.merge_attn_states.default, (out_a, lse_a, out_b, lse_b))
    sink = torch.randn(HEADS)
    check(torch.ops.flashmla.merge_attn_states.default, (out_a, lse_a, out_b, lse_b, sink))


# Gradients


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None and expected is not None
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sink": {"attn_sink": torch.tensor([0.5, -1.0, 3.0])},
    "window+leftpad": {"window": 5, "cache_leftpad": torch.tensor([2, 0, 1], dtype=torch.int32)},
    "bool mask": {"attn_mask": torch.arange(3 * 24).view(3, 24) % 5 != 0},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 24)},
    "indices": {
        "indices": torch.tensor([2, 0, -1, 9, 20, 8, 1, 4], dtype=torch.int32).expand(3, 3, 8),
        "topk_length": torch.tensor([8, 4, 8], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "float32+k_pe", "bfloat16", "q8_kv"])
@pytest.mark.parametrize("kv_b", [False, True])
def test_gradients_equal_autograd_of_the_reference(
    kv_cache_dtype: str, options: str, kv_b: bool
) -> None:
    case = Case(kv_cache_dtype, options=dict(OPTIONS[options]), lengths=(21, 9, 5))
    arguments, keywords = case.attention_kv_b() if kv_b else case.attention()
    function = "mla_attention_kv_b" if kv_b else "mla_attention"
    queries = case.q_model if kv_b else case.q
    inputs = [queries, case.kv_cache, case.k_pe_cache, keywords.get("attn_sink")]
    inputs += [case.w_kv_b] if kv_b else []
    inputs = [t for t in inputs if t is not None and t.is_floating_point()]
    require_grad(*inputs)

    gradients = []
    for module in (ops, reference):
        out, lse = getattr(module, function)(*arguments, **keywords)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        loss = (out * weight).sum() + lse.sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 4e-3 if kv_cache_dtype == "bfloat16" else 1e-5)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
@pytest.mark.parametrize("kv_cache_dtype", FLOAT32_FORMATS)
@pytest.mark.parametrize("kv_b", [False, True])
def test_gradcheck(kv_cache_dtype: str, kv_b: bool) -> None:
    """Against finite differences, with tolerances of the float32 that the operators compute in."""
    case = Case(kv_cache_dtype, q_len=1)
    arguments, keywords = case.attention_kv_b() if kv_b else case.attention()
    chosen = torch.tensor([2])
    case.cache_seqlens.copy_(torch.tensor([4, 0, 2]))

    def function(queries: Tensor, kv_cache: Tensor) -> Tensor:
        out, lse = (ops.mla_attention_kv_b if kv_b else ops.mla_attention)(
            queries, kv_cache, *arguments[2:], **keywords
        )
        return out[..., ::4], lse[chosen]

    queries = (arguments[0]).requires_grad_()
    torch.autograd.gradcheck(
        function,
        (queries, case.kv_cache.requires_grad_()),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
        nondet_tol=1e-6,
        fast_mode=True,
    )


def test_gradients_add_up_over_shared_blocks() -> None:
    case = Case("float32")
    case.block_table = case.block_table[:1].expand(3, -1)
    case.cache_seqlens.fill_(20)
    require_grad(case.kv_cache)
    arguments, keywords = case.attention()
    (actual,) = torch.autograd.grad(
        ops.mla_attention(*arguments, **keywords)[0].sum(), case.kv_cache
    )
    (expected,) = torch.autograd.grad(
        reference.mla_attention(*arguments, **keywords)[0].sum(), case.kv_cache
    )
    close(actual, expected, 1e-5)


def test_queries_without_keys_have_no_gradient() -> None:
    case = Case("float32")
    require_grad(case.q, case.kv_cache)
    arguments, keywords = case.attention()
    out, lse = ops.mla_attention(*arguments, **keywords)
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    assert case.q.grad is not None and case.kv_cache.grad is not None
    without_keys = (lse == -torch.inf).transpose(1, 2)
    assert without_keys[1].all() and without_keys[2, 0].all()
    assert (case.q.grad[without_keys] == 0).all() and (case.q.grad[~without_keys] != 0).all()
    assert case.kv_cache.grad.isfinite().all()


def test_a_sink_of_minus_infinity_has_no_gradient() -> None:
    """Beside queries without keys, too, where nothing is left to share."""
    case = Case("float32")
    arguments, keywords = case.attention()
    sink = torch.zeros(arguments[0].shape[2])
    sink[0] = -torch.inf
    sink.requires_grad_()
    out, lse = ops.mla_attention(*arguments, **keywords | {"attn_sink": sink})
    assert (lse == -torch.inf).any()
    out.sum().backward()
    assert sink.grad is not None and sink.grad[0] == 0 and (sink.grad[1:] != 0).all()


def test_gradients_ignore_cells_that_nobody_sees() -> None:
    case = Case("float32")
    case.options["cache_leftpad"] = torch.tensor([3, 0, 0], dtype=torch.int32)
    with torch.no_grad():
        hidden = case.block_table[0, 0]
        case.kv_cache[hidden, :3] = torch.nan
    require_grad(case.q, case.kv_cache)
    arguments, keywords = case.attention()
    ops.mla_attention(*arguments, **keywords)[0].sum().backward()
    assert case.q.grad is not None and case.q.grad.isfinite().all()
    assert case.kv_cache.grad is not None and case.kv_cache.grad.isfinite().all()


def test_backward_in_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("float32", q_len=5)
    require_grad(case.q, case.kv_cache)
    arguments, keywords = case.attention()

    def gradients() -> tuple[Tensor, ...]:
        out, lse = ops.mla_attention(*arguments, **keywords)
        loss = out.sum() + lse[0].sum()
        return torch.autograd.grad(loss, (case.q, case.kv_cache))

    whole = gradients()
    monkeypatch.setattr("torch_flash_mla._autograd._MAX_PROBABILITIES", 1)
    for actual, expected in zip(gradients(), whole, strict=True):
        close(actual, expected.double(), 1e-5)


def test_gradient_of_a_mask_is_refused() -> None:
    case = Case("float32", options={"attn_mask": torch.zeros(24, requires_grad=True)})
    arguments, keywords = case.attention()
    with pytest.raises(RuntimeError, match=r"attn_mask: requires grad.*attn_mask\.detach"):
        ops.mla_attention(*arguments, **keywords)


def test_backward_over_a_mutated_cache_is_refused() -> None:
    case = Case("float32")
    require_grad(case.q)
    arguments, keywords = case.attention()
    out, _ = ops.mla_attention(*arguments, **keywords)
    ops.concat_and_cache_mla(*case.tokens(1), case.kv_cache, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# torch.compile, torch.jit.script


def step_arguments(case: Case, batch: int) -> tuple[Any, ...]:
    lengths = torch.randint(1, 24, (batch,), dtype=torch.int32)
    table = torch.randint(0, 10, (batch, 3), dtype=torch.int32)
    last = (lengths - 1).long()
    slots = table.gather(1, (last // BLOCK_SIZE).unsqueeze(1)).squeeze(1) * 8 + last % BLOCK_SIZE
    return (
        *case.tokens(batch),
        slots,
        torch.randn(batch, 1, HEADS, NOPE + ROPE),
        case.w_kv_b,
        case.kv_cache,
        table,
        lengths,
        case.format,
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_training_step(backend: str) -> None:
    torch._dynamo.reset()
    case = Case("float32")
    require_grad(case.q_model, case.w_kv_b, case.kv_cache)
    arguments, keywords = case.attention_kv_b()
    inputs = (case.q_model, case.w_kv_b, case.kv_cache)

    def loss(*arguments: Any) -> Tensor:
        return ops.mla_attention_kv_b(*arguments, **keywords)[0].sin().sum()

    expected = torch.autograd.grad(loss(*arguments), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    actual = torch.autograd.grad(compiled(*arguments), inputs)
    torch.testing.assert_close(actual, expected)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            return append_and_attend(*arguments, "auto")

    case = Case("float32")
    arguments = step_arguments(case, 3)[:-1]
    program = torch.export.export(Layer(), arguments).run_decompositions()
    before = case.kv_cache.clone()
    expected = append_and_attend(*arguments, "auto")
    case.kv_cache.copy_(before)
    torch.testing.assert_close(program.module()(*arguments), expected)


def test_script() -> None:
    case = Case("q8_kv")
    arguments = step_arguments(case, 3)
    torch.testing.assert_close(
        torch.jit.script(append_and_attend)(*arguments), append_and_attend(*arguments)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_b", [False, True])
def test_autocast_changes_nothing(kv_b: bool, dtype: torch.dtype) -> None:
    case = Case("float32")
    arguments, keywords = case.attention_kv_b() if kv_b else case.attention()
    queries = case.q_model if kv_b else case.q
    require_grad(queries)

    def results() -> tuple[Tensor, ...]:
        out, lse = (ops.mla_attention_kv_b if kv_b else ops.mla_attention)(*arguments, **keywords)
        return out, lse, *torch.autograd.grad(out.sum(), queries)

    expected = results()
    with torch.autocast("cpu", dtype=dtype):
        actual = results()
    torch.testing.assert_close(actual, expected)


def test_inference() -> None:
    """Without gradients asked for, none are recorded; inference mode works."""
    case = Case("float32")
    arguments, keywords = case.attention()
    assert not ops.mla_attention(*arguments, **keywords)[0].requires_grad
    with torch.inference_mode():
        ops.concat_and_cache_mla(*case.tokens(1), case.kv_cache, torch.tensor([0]))
        assert ops.mla_attention(*arguments, **keywords)[0].is_inference()
