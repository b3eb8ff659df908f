"""Makes the call of a spec and judges what came of it."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torch_flash_mla
from tests import mla_cases
from tests.fuzz import mutations, oracle, rules
from tests.fuzz.build import Call, build
from tests.fuzz.guard import Arenas, extent, storage_bytes
from tests.fuzz.specs import Spec
from torch_flash_mla import ops, reference
from torch_flash_mla.formats import PACKED_FORMATS

# What the operators may raise (torch_flash_mla/ops.py).
ERRORS = (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError)
# What a message may name besides an argument of the operator.
SUBJECTS = ("FLASHMLA_ISA", "allocate", "out of memory", "forward-mode")

# By the bytes of one.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The weight of a part below which float32 may have 0 of it.
_LEAST_WEIGHT = 1e-37

_arenas = Arenas()


class Wrong(Exception):
    """What is wrong with an answer: a short kind, and the details."""

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(f"{kind}: {details}")
        self.kind, self.details = kind, details


def run(spec: Spec) -> None:
    """Runs a case.

    Raises:
        Wrong: the answer is not what it should be.
    """
    torch.set_num_threads(1)  # of the worker: what is around a call needs no more
    call = build(spec)
    if spec["mutations"]:
        _run_hostile(call)
    else:
        _run_valid(call)


@contextlib.contextmanager
def environment(spec: Spec, threads: int | None = None) -> Iterator[None]:
    """Level, threads and determinism of a case, for the operator alone."""
    level, threads_before = torch_flash_mla.cpu_isa(), torch.get_num_threads()
    if level != spec["isa"]:
        ops.set_isa(spec["isa"])
    torch.set_num_threads(threads or spec["threads"])
    # torch.use_deterministic_algorithms() also imports a compiler, to tell it.
    torch._C._set_deterministic_algorithms(spec["deterministic"])
    least_rows = ops.set_onednn_least_rows(spec.get("least_rows", 16))
    try:
        yield
    finally:
        ops.set_onednn_least_rows(least_rows)
        torch._C._set_deterministic_algorithms(False)
        torch.set_num_threads(threads_before)
        if level != spec["isa"]:
            ops.set_isa(level)


def function(call: Call) -> Any:
    return getattr(torch_flash_mla, call.operator)


def call_operator(call: Call, mode: str, threads: int | None = None) -> Any:
    """The operator's answer in the environment of its spec, under a grad mode."""
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with environment(call.spec, threads), modes.get(mode, contextlib.nullcontext)():
        return function(call)(**call.arguments)


def guarded(call: Call, where: str | None) -> None:
    """Moves the tensors of a call to where reading past them is death."""
    if where is None:
        return
    names = [k for k, v in call.arguments.items() if isinstance(v, Tensor)]
    placed = _arenas.place([call.arguments[k] for k in names], where == "end")
    call.arguments |= dict(zip(names, placed, strict=True))


# Calls that must be answered


def _run_valid(call: Call) -> None:
    spec = call.spec
    guarded(call, spec["guard"])
    if spec["kind"] == "huge":
        return _run_huge(call)
    before = Snapshot(call.arguments)
    try:
        answer = call_operator(call, spec["mode"])
    except Exception as error:
        raise Wrong("refused", f"{call.operator}: {type(error).__name__}: {error}") from None
    judge(call, answer, before)
    if spec.get("twice") and spec["deterministic"]:
        again = call_operator(call, spec["mode"], spec["threads"] % 3 + 1)
        for name, x, y in zip(("out", "lse"), answer, again, strict=True):
            if not same_bits(x, y):
                raise Wrong("not deterministic", f"{name} differs between numbers of threads")
    if spec.get("gradients"):
        _check_gradients(call)
    return None


def judge(call: Call, answer: Any, before: Snapshot) -> None:
    """Compares an answer, and what became of the arguments, with what they should be."""
    a = call.arguments
    if call.operator in ("mla_attention", "mla_attention_kv_b"):
        before.unchanged("an answer")
        out, lse = answer
        expected = oracle.attention(a, call.spec["isa"])
        problem = oracle.check_attention(a, out, lse, expected)
        if problem:
            raise Wrong(f"wrong {problem.split(':')[0].split(' ')[0]}", f"{about(call)}{problem}")
        if call.ordinary:
            _check_table(call, out, expected)
    elif call.operator == "gather_cache":
        before.unchanged("an answer")
        _check_gather(call, answer)
    elif call.operator == "merge_attn_states":
        before.unchanged("an answer")
        _check_merge(call, answer)
    elif call.operator == "concat_and_cache_mla":
        _check_append(call, before)
    elif call.operator == "copy_blocks":
        _check_copy(call, before)
    else:
        before.unchanged("an answer")
        _check_flash_mla(call, answer)


def about(call: Call) -> str:
    """How a call of attention is computed, and what may have to do with a fault of it."""
    how = oracle.precision(call.arguments, call.spec["isa"])
    form = "" if how.projections is None else call.spec["form"] + " "
    special = [n for n in ("mask", "indices", "leftpad", "causal") if call.spec[n]]
    return f"{how.arithmetic} {form}{'+'.join(special) or 'plain'}: "


class Snapshot:
    """The bytes behind the tensors of a call."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.bytes: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        for name, t in arguments.items():
            if readable(t):
                self._now[name] = _bytes_of(t)
                self.bytes[name] = self._now[name].clone()

    def as_it_was(self, name: str) -> Tensor:
        """The tensor with the values that it had."""
        t, old = self.arguments[name], self.bytes[name]
        if t.numel() == 0:
            return t.detach()
        first = 0 if len(old) == t.untyped_storage().nbytes() else extent(t)[0]
        offset = t.storage_offset() - first // t.element_size()
        return old.view(t.dtype).as_strided(t.shape, t.stride(), offset)

    def unchanged(self, after: str, but: tuple[str, ...] = ()) -> None:
        for name, old in self.bytes.items():
            if name not in but and not torch.equal(self._now[name], old):
                raise Wrong("changed", f"{name} was changed by a call that ended with {after}")


def readable(t: Any) -> bool:
    """A tensor with bytes of its own, not too many."""
    return (
        isinstance(t, Tensor)
        and not t.is_nested
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not t.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not t._is_zerotensor()
        and t.untyped_storage().nbytes() <= 1 << 26
    )


def _bytes_of(t: Tensor) -> Tensor:
    """All bytes of its storage; of one in an arena, those that the tensor spans."""
    with torch.no_grad():
        everything = storage_bytes(t)
    if everything.numel() == 1 << 20:
        begin, end = extent(t)
        return everything[begin:end]
    return everything


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = _INTEGERS[x.element_size()]
    return torch.equal(x.detach().contiguous().view(kind), y.detach().contiguous().view(kind))


def _check_table(call: Call, out: Tensor, expected: list[oracle.Expected]) -> None:
    """The bounds of mla_cases.py, for sequences of enough numbers to average rounding.

    They were measured on logits of a few units. Rows whose keys all carry a bias of thousands are
    left out, where float32 cannot hold a logit that exactly.
    """
    a = call.arguments
    how = oracle.precision(a, call.spec["isa"])
    if how.cache_format in PACKED_FORMATS or a["q"].numel() == 0:
        return
    bound = mla_cases.FLOAT_ERROR[a["q"].dtype]
    limit = oracle.largest_logit(bound)
    bound *= 1 if how.projections is None else 4
    outs = oracle.to_numpy(out.detach())
    for b, (tokens, e) in enumerate(zip(oracle.query_tokens(a), expected, strict=True)):
        mine = outs[tokens] if how_ragged(a) else outs[b]
        usable = ((e.status == oracle.FINITE) & (np.abs(e.lse) <= limit))[:, :, None]
        if usable.sum() * mine.shape[2] < 2000 or mine.shape[2] < 16:
            continue
        error = np.linalg.norm(np.where(usable, mine - e.out, 0))
        size = np.linalg.norm(np.where(usable, e.out, 0))
        if not error <= bound * size:
            text = f"{about(call)}relative error {error / size:.2e} of sequence {b}"
            raise Wrong("wrong beyond the table", text)


def how_ragged(a: dict[str, Any]) -> bool:
    return a.get("cu_seqlens_q") is not None


def _check_gradients(call: Call) -> None:
    """Against autograd through float64, where what a query does not see takes no part.

    Nor do rows whose logits float32 cannot hold exactly enough for the tolerance (`_check_table`).
    """
    a, spec = call.arguments, call.spec
    poison = spec["poison_seen"] or spec["poison_query"] or spec.get("poison_weight")
    if a["q"].numel() == 0 or poison or not call.ordinary:
        return
    names = ["q", "q_pe", "attn_sink", "w_kv_b"]
    names += ["kv_cache", "k_pe_cache"] if a["kv_cache"].is_floating_point() else []
    names = [n for n in names if a.get(n) is not None]
    draw = random.Random(spec["data"])
    chosen = [n for n in names if draw.random() < 0.6] or names[:1]
    half = a["q"].dtype != torch.float32 or a["kv_cache"].dtype in (torch.bfloat16, torch.float16)
    tolerance = 4e-3 if half else 1e-5
    gradients, far = [], None
    for double in (False, True):
        leaves = {n: a[n].detach().clone() for n in names}
        if double:
            leaves = {n: t.double() for n, t in leaves.items()}
        for n in chosen:
            leaves[n].requires_grad_()
        if double:
            out, lse = oracle.differentiable({**a, **leaves})
        else:
            with environment(spec):
                out, lse = function(call)(**{**a, **leaves})
        if far is None:
            far = lse.isfinite() & (lse.abs() > oracle.largest_logit(tolerance))
        # Numbers that are the same in 16 bits.
        weight = (torch.arange(out.numel()) * 37 % 65 - 32).double().view(out.shape) / 32
        weight = weight.masked_fill(far.transpose(-1, -2).unsqueeze(-1), 0)
        loss = (out.double() * weight).sum()
        loss = loss + lse.double().masked_fill(far | (lse == -torch.inf), 0).sum()
        gradients.append(torch.autograd.grad(loss, [leaves[n] for n in chosen], allow_unused=True))
    for n, actual, expected in zip(chosen, *gradients, strict=True):
        if actual is None:
            actual = torch.zeros_like(a[n])
        if expected is None:  # no sequence reaches it
            expected = torch.zeros(a[n].shape, dtype=torch.float64)
        if expected.numel() == 0:
            continue
        if not bool(actual.isfinite().all()):
            raise Wrong("wrong gradient", f"of {n} is not finite")
        error, size = (actual.double() - expected).norm(), expected.norm()
        # Rounding is of terms that may cancel: those of the largest size there are.
        terms = 1 + float(expected.abs().max())
        if not error <= tolerance * size + 1e-6 * terms * math.sqrt(expected.numel()):
            raise Wrong("wrong gradient", f"of {n}: off by {error:.2e} of {size:.2e}")


def _check_gather(call: Call, answer: Tensor) -> None:
    a = call.arguments
    expected = reference.gather_cache(**a)
    if answer.dtype != expected.dtype or answer.shape != expected.shape:
        raise Wrong("wrong gather", f"{answer.dtype} {answer.shape}, expected {expected.shape}")
    if not bool(((answer == expected) | (answer.isnan() & expected.isnan())).all()):
        raise Wrong("wrong gather", "values differ")


def _check_merge(call: Call, answer: Any) -> None:
    a = call.arguments
    out, lse = answer
    expected, expected_lse = reference.merge_attn_states(**a)
    shapes = out.shape == expected.shape and lse.shape == a["lse_a"].shape
    if out.dtype != a["out_a"].dtype or not shapes:
        raise Wrong("wrong merge", f"shapes {out.shape} {lse.shape}")
    empty = (a["lse_a"] == -math.inf) & (a["lse_b"] == -math.inf)
    if not torch.equal(lse == -math.inf, empty):
        raise Wrong("wrong merge", "lse is not minus infinity exactly where both parts are empty")
    if bool((out.transpose(-2, -3)[empty] != 0).any()):
        raise Wrong("wrong merge", "out is not 0 where both parts are empty")
    expected = expected.double()
    # A part that counts has NaN, be its weight as small as it will. So may an infinity be whose
    # weight is 0 in float32.
    unknown = expected.isnan() | _infinities_of_no_weight(a)
    if bool((out.isnan() & ~unknown).any()) or not torch.equal(lse.isnan(), expected_lse.isnan()):
        raise Wrong("wrong merge", "nan where there should be none")
    out, expected = out.masked_fill(unknown, 0), expected.masked_fill(unknown, 0)
    infinite = expected.isinf()
    if bool((out.double() != expected)[infinite].any()):
        raise Wrong("wrong merge", "an infinity is lost")
    out, expected = out.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
    size_a, size_b = (a[n].abs().nan_to_num(posinf=0) for n in ("lse_a", "lse_b"))
    size = torch.maximum(size_a, size_b)
    sink = a.get("attn_sink")
    if sink is not None:
        size = torch.maximum(size, sink.abs().nan_to_num(posinf=0).unsqueeze(-1))
    # A difference of two numbers is off by what each of them may be.
    shift = 4 * 2.0**-24 * size.double() + 4e-6
    off = ((lse.double() - expected_lse).abs().masked_fill(empty, 0) > shift).any()
    if bool(off):
        raise Wrong("wrong merge", f"lse off: {lse}, expected {expected_lse}")
    weight = (2 * shift).clamp(max=1).transpose(-1, -2).unsqueeze(-1)
    parts = sum(
        p.double().abs().masked_fill((s == -math.inf).transpose(-1, -2).unsqueeze(-1), 0)
        for p, s in ((a["out_a"], a["lse_a"]), (a["out_b"], a["lse_b"]))
    )
    unit = mla_cases.UNIT_ROUNDOFF[out.dtype]
    parts = parts.masked_fill(unknown | infinite, 0)
    bound = weight * parts + 1.01 * unit * expected.abs() + 1e-6 * parts + 2.0**-25
    if bool(((out.double() - expected).abs() > bound).any()):
        raise Wrong("wrong merge", "out off")


def _infinities_of_no_weight(a: dict[str, Any]) -> Tensor:
    """Where a part of a merge is infinite and the part of it that counts underflows."""
    total = torch.logaddexp(a["lse_a"].double(), a["lse_b"].double())
    if a.get("attn_sink") is not None:
        total = torch.logaddexp(total, a["attn_sink"].double().unsqueeze(-1))
    found = torch.zeros(a["out_a"].shape, dtype=torch.bool)
    for part in "ab":
        weight = (a[f"lse_{part}"].double() - total).exp().transpose(-1, -2).unsqueeze(-1)
        found |= a[f"out_{part}"].isinf() & (weight < _LEAST_WEIGHT)
    return found


def _check_append(call: Call, before: Snapshot) -> None:
    """The bytes of the whole storage: those of the format where a slot is, the old elsewhere."""
    a = call.arguments
    caches = [a[n] for n in ("kv_cache", "k_pe_cache") if a.get(n) is not None]
    written = [n for n in before.bytes if any(rules.share_memory(a[n], c) for c in caches)]
    before.unchanged("an answer", but=(*written, "kv_cache", "k_pe_cache"))
    kv_c, k_pe, slot_mapping = (before.as_it_was(n) for n in ("kv_c", "k_pe", "slot_mapping"))
    tokens, slots = slot_mapping.numel(), slot_mapping.reshape(-1).tolist()
    kv_c = kv_c.reshape(tokens, kv_c.shape[-1])
    k_pe = k_pe.reshape(tokens, k_pe.shape[-1])
    name = a["kv_cache_dtype"]
    if name in PACKED_FORMATS:
        parts = {"kv_cache": reference.encode_rows(kv_c, k_pe, name)}
    elif a.get("k_pe_cache") is not None:
        parts = {n: t.to(a[n].dtype) for n, t in (("kv_cache", kv_c), ("k_pe_cache", k_pe))}
    else:
        parts = {"kv_cache": torch.cat([kv_c, k_pe], dim=-1).to(a["kv_cache"].dtype)}
    for cache_name, rows in parts.items():
        cache = a[cache_name]
        page = cache.shape[1]
        writers: dict[int, list[int]] = {}
        for token, slot in enumerate(slots):
            if slot >= 0:
                writers.setdefault(slot, []).append(token)
        old = before.bytes[cache_name]
        now = _bytes_of(cache)
        untouched = torch.ones(len(old), dtype=torch.bool)
        first_byte = 0 if len(old) == cache.untyped_storage().nbytes() else extent(cache)[0]
        for slot, who in writers.items():
            cell = cache[slot // page, slot % page].reshape(-1)
            if not any(_same_row(cell, rows[t], name) for t in who):
                raise Wrong("wrong append", f"{cache_name}: slot {slot} is not what was written")
            # The other part may lie in the same memory, as columns of the same rows.
            for part in (a[n] for n in parts):
                if part.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr():
                    begin, end = extent(part[slot // page, slot % page].reshape(-1))
                    untouched[max(begin - first_byte, 0) : max(end - first_byte, 0)] = False
        if not torch.equal(old[untouched], now[untouched]):
            raise Wrong("wrong append", f"{cache_name}: bytes outside the slots were written")


def _same_row(cell: Tensor, row: Tensor, name: str) -> bool:
    if name not in PACKED_FORMATS:
        return bool(((cell == row) | (cell.isnan() & row.isnan())).all())
    if torch.equal(cell, row):
        return True
    # NaN has many encodings, and where a scale is NaN its codes say nothing.
    return mutations.same_packed(cell, row, name)


def _check_copy(call: Call, before: Snapshot) -> None:
    cache, mapping = call.arguments["kv_cache"], call.arguments["block_mapping"]
    before.unchanged("an answer", but=("kv_cache",))
    old = before.bytes["kv_cache"]
    if cache.numel() == 0:
        return
    # Bytes, as torch copies a bool as 0 or 1 whatever its byte is.
    view = before.as_it_was("kv_cache")
    view = torch.view_as_real(view) if view.is_complex() else view
    view = view.view(_INTEGERS[view.element_size()])
    for source, target in mapping.tolist():
        view[target] = view[source].clone()
    if not torch.equal(old, _bytes_of(cache)):
        raise Wrong("wrong copy", "not the blocks that were asked for, or others too")


def _check_flash_mla(call: Call, answer: Any) -> None:
    """FlashMLA's functions in terms of mla_attention: lse is plus infinity without keys."""
    parts, isa = call.notes["parts"], call.spec["isa"]
    sparse = call.operator == "flash_mla_sparse_fwd"
    out, lse = answer[0], answer[2] if sparse else answer[1]
    if sparse:
        out, lse = out.unsqueeze(1), lse.unsqueeze(2)
    if bool((lse == -math.inf).any()):
        raise Wrong("wrong flash_mla", "lse is minus infinity")
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    expected = oracle.attention(parts[0], isa)
    if len(parts) == 2:
        expected = [
            _merged(x, y, call.arguments.get("attn_sink"))
            for x, y in zip(
                oracle.attention(parts[0] | {"attn_sink": None}, isa),
                oracle.attention(parts[1] | {"attn_sink": None}, isa),
                strict=True,
            )
        ]
    problem = oracle.check_attention(parts[0], out, lse, expected)
    if problem:
        raise Wrong(f"wrong {problem.split(' ')[0]}", f"{call.operator}: {problem}")
    if not sparse:
        return
    logits = answer[1]
    if (logits is None) == call.arguments["return_max_logits"]:
        raise Wrong("wrong flash_mla", "max_logits given, or not")


def _merged(x: oracle.Expected, y: oracle.Expected, sink: Tensor | None) -> oracle.Expected:
    with np.errstate(all="ignore"):
        lse = np.logaddexp(x.lse, y.lse)
        total = lse if sink is None else np.logaddexp(lse, oracle.to_numpy(sink))
        wx, wy = (np.nan_to_num(np.exp(e.lse - total)) for e in (x, y))
    bound = wx * x.out_bound + wy * y.out_bound
    # A part without keys has no weight.
    lse_bounds = [np.nan_to_num(e.lse_bound, posinf=0) for e in (x, y)]
    off = 4 * sum(lse_bounds)  # how far the weights may be off
    norms = np.linalg.norm(x.out, axis=2) + np.linalg.norm(y.out, axis=2)
    unit = x.out_bound * 0 + 2.0**-7
    return oracle.Expected(
        wx[:, :, None] * x.out + wy[:, :, None] * y.out,
        lse,
        bound + np.minimum(off, 1) * norms + unit * norms,
        np.maximum(*lse_bounds) + 1e-5,
        np.maximum(x.status, y.status),
    )


def _run_huge(call: Call) -> None:
    """An answer or an error, soon: whoever waits is the parent's limit on time."""
    before = Snapshot(call.arguments)
    try:
        answer = call_operator(call, "no_grad")
    except Exception as error:
        check_error(call, error)
        before.unchanged("an error")
        return
    if call.operator in ("concat_and_cache_mla", "merge_attn_states", "gather_cache"):
        return
    a = call.arguments
    out, lse = answer
    if out.numel() == 0 or out.numel() > 1 << 20:
        return
    row = (
        oracle.sequence_rows(a, 0, 1, a["kv_cache"].shape[-1], 0)[0][0]
        if (a["kv_cache_dtype"] == "auto")
        else oracle.decode(
            a["kv_cache"].reshape(-1, a["kv_cache"].shape[-1])[:1].numpy(),
            a["kv_cache_dtype"],
            32,
            0,
        )[0][0].astype(np.float64)
    )
    seen = min(call.spec["seen"], int(a["cache_seqlens"][0]))
    if call.spec["what"] not in ("length", "table"):
        seen = int(a["cache_seqlens"][0])
    expected = row.sum() * 0.25 + math.log(seen) if seen else -math.inf
    if seen and not abs(float(lse.flatten()[0]) - expected) <= 0.2:
        raise Wrong("wrong huge", f"lse {float(lse.flatten()[0])}, expected {expected}")
    if seen and not np.allclose(out.flatten()[: len(row)].numpy(), row, atol=0.05):
        raise Wrong("wrong huge", "out is not the row that all keys are")


# Calls that may have to be refused


def check_error(call: Call, error: Exception) -> None:
    """The documented kinds, and a message that names an argument."""
    text = str(error)
    first = text.split("\n")[0][:200]
    if not isinstance(error, (*ERRORS, MemoryError)):
        raise Wrong("exception", f"{call.operator}: {type(error).__name__}: {first}")
    if "INTERNAL ASSERT" in text:
        raise Wrong("internal assert", f"{call.operator}: {first}")
    names = rules.argument_names(call.operator)
    if not any(re.search(rf"\b{name}\b", text) for name in names) and not any(
        s in text for s in SUBJECTS
    ):
        raise Wrong("message", f"{call.operator}: {type(error).__name__}: {first}")


def _run_hostile(call: Call) -> None:
    spec = call.spec
    guarded(call, spec["guard"])
    changes = mutations.mutate(call)
    verdict, reason = rules.judge(call.operator, call.arguments)
    before = Snapshot(call.arguments)
    try:
        answer = call_operator(call, spec["mode"])
    except Exception as error:
        check_error(call, error)
        before.unchanged("an error")
        if verdict == rules.VALID:
            first = str(error).split("\n")[0][:200]
            raise Wrong(
                "refused", f"{call.operator} after {changes}: {type(error).__name__}: {first}"
            ) from None
        return
    if verdict == rules.INVALID:
        raise Wrong("accepted", f"{call.operator} after {changes}: {reason}")
    call.ordinary = False
    original = call.arguments
    plain = mutations.resolved(call)
    if plain is None:
        before.unchanged("an answer", but=("kv_cache", "k_pe_cache"))
        return
    if call.operator in ("concat_and_cache_mla", "copy_blocks"):
        caches = [original[n] for n in ("kv_cache", "k_pe_cache") if original.get(n) is not None]
        if plain is not original or (len(caches) == 2 and rules.share_memory(*caches)):
            return
    if call.notes:  # what FlashMLA's functions should return is known for their own arguments
        return
    if plain is not original and rules.judge(call.operator, plain)[0] != rules.VALID:
        return
    call.arguments = plain
    try:
        judge(call, answer, before)
    except Wrong as wrong:
        raise Wrong(wrong.kind, f"{wrong.details} after {changes}") from None
