"""The sub-commands: what each one measures. A suite yields rows, plain dicts, one per measurement.

Rates are in 1e9 per second, durations in seconds. ``share`` is the part of the instruction roof
that a rate reaches, the roof measured in the same seconds; ``torch`` columns hold PyTorch's own
attention (see ``baselines``), ``against`` an external command, ``other`` another build.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch

import torch_flash_mla
from torch_flash_mla.bench import baselines, cases, roof
from torch_flash_mla.bench.measure import Effort, race

Row = dict[str, object]

# PyTorch's math path holds all logits at once, in several copies.
_MOST_LOGITS = 1 << 29
Suite = Callable[["Options"], Iterator[Row]]


@dataclass(frozen=True)
class Options:
    """What to sweep. ``lengths`` are keys (decode), prompts (prefill), new tokens (append)."""

    isas: tuple[str, ...]
    threads: int
    formats: tuple[str, ...]
    heads: tuple[int, ...]
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    onednn_rows: int  # from which on the level onednn makes its products; 0: as shipped
    batch: int
    topk: int
    dims: cases.Dims
    two_tensors: bool
    forms: tuple[str, ...]
    history: tuple[int, ...]
    baseline: bool
    against: str
    shapes: tuple[tuple[int, int], ...]  # sequences and keys of a step
    effort: Effort
    memory: int  # MiB to read for the memory roof


def roofs(options: Options) -> Iterator[Row]:
    """The dot products of every level, and memory."""
    pairs = list(itertools.product(options.isas, roof.ARITHMETICS))
    flop = {pair: roof.flop_of_spin(*pair) for pair in pairs}
    calls: dict[Hashable, Callable[[], object]] = {
        pair: roof.spin(*pair) for pair in pairs if flop[pair] > 0
    }
    read_bytes, read = roof.memory_reader(options.memory)
    seconds = race({**calls, "memory": read}, options.effort)
    for pair in pairs:
        if pair not in calls:
            continue
        isa, arithmetic = pair
        instruction = roof.INSTRUCTIONS.get(pair, "")
        rate = flop[pair] / seconds[pair] / 1e9
        yield {"isa": isa, "arithmetic": arithmetic, "instruction": instruction, "gflops": rate}
    rate = read_bytes / seconds["memory"] / 1e9
    yield {"isa": "memory", "instruction": f"read {options.memory} MiB", "gbs": rate}


class _Roofs:
    """The roofs that a set of contenders needs, as contenders of their own."""

    def __init__(self) -> None:
        self._flop: dict[Hashable, float] = {}
        self.calls: dict[Hashable, Callable[[], object]] = {}

    def add(self, isa: str, arithmetic: str) -> None:
        pair = ("roof", isa, arithmetic)
        self._flop[pair] = roof.flop_of_spin(isa, arithmetic)
        self.calls[pair] = roof.spin(isa, arithmetic)

    def rate(self, isa: str, arithmetic: str, seconds: dict[Hashable, float]) -> float:
        pair = ("roof", isa, arithmetic)
        return self._flop[pair] / seconds[pair] / 1e9


def _arithmetic(isa: str, format_name: str) -> str:
    with torch_flash_mla.force_isa(isa):
        return cases.arithmetic(format_name)


class _Against:
    """The external command of a case, run once per round; its best rate."""

    def __init__(self, command: str, format_name: str, **values: object) -> None:
        self._command, self._format_name, self._values = command, format_name, values
        self.rate = 0.0

    def __call__(self) -> None:
        if self._command:
            rate = baselines.rate_of_command(self._command, self._format_name, **self._values)
            self.rate = max(self.rate, rate)


def _compare(row: Row, against: _Against) -> Row:
    """Adds what the other contenders reached, as far as they ran."""
    if against.rate:
        row["against_gflops"] = against.rate
    for name in ("torch", "torch_padded", "against"):
        if f"{name}_gflops" in row:
            row[f"times_{name}"] = row["gflops"] / row[f"{name}_gflops"]  # type: ignore[operator]
    return row


def decode(options: Options) -> Iterator[Row]:
    """New tokens against a cache: GFLOP/s, memory, share of the roof, PyTorch.

    With at most 64 keys a call is mostly overhead: ``above`` is the time above an operator of the
    same arguments that allocates the results and does nothing.
    """
    for n_kv, format_name in itertools.product(options.lengths, options.formats):
        two_tensors = options.two_tensors and format_name in cases.FLOAT_FORMATS
        cache = cases.paged_cache(format_name, [n_kv] * options.batch, options.dims, two_tensors)
        for heads, queries in itertools.product(options.heads, options.queries):
            case = cases.Decode(cache, heads, queries, options.topk)
            call = case.call()
            roofs = _Roofs()
            contenders: dict[Hashable, Callable[[], object]] = {}
            for isa in options.isas:
                roofs.add(isa, _arithmetic(isa, format_name))
                contenders[isa] = roof.on_level(isa, call)
            if options.baseline and not options.topk:
                contenders["torch"] = baselines.sdpa_decode(case)
            if case.keys <= 64:
                contenders["empty"] = roof.on_level(options.isas[-1], case.empty())
            against = _Against(
                options.against,
                format_name,
                heads=heads,
                n_kv=n_kv,
                queries=queries,
                isa=options.isas[-1],
            )
            seconds = race({**contenders, **roofs.calls}, options.effort, against)
            for isa in options.isas:
                if isa not in seconds:
                    continue
                arithmetic = _arithmetic(isa, format_name)
                rate = case.flop / seconds[isa] / 1e9
                top = roofs.rate(isa, arithmetic, seconds)
                row: Row = {
                    "format": format_name,
                    "isa": isa,
                    "arithmetic": arithmetic,
                    "batch": options.batch,
                    "n_kv": n_kv,
                    "heads": heads,
                    "queries": queries,
                    "topk": options.topk,
                    "tensors": 2 if two_tensors else 1,
                    "seconds": seconds[isa],
                    "gflops": rate,
                    "gbs": case.bytes / seconds[isa] / 1e9,
                    "roof_gflops": top,
                    "share": rate / top,
                }
                if "torch" in seconds:
                    row["torch_gflops"] = case.flop / seconds["torch"] / 1e9
                if "empty" in seconds:
                    row["above"] = seconds[isa] - seconds["empty"]
                yield _compare(row, against)


def step(options: Options) -> Iterator[Row]:
    """A decoding step of mla_attention_kv_b, the operator that models call, weights from memory.

    Beside it, in the same seconds: attention alone (mla_attention, of ready queries), and a plain
    read of memory (``Tensor.sum``). The floor is the time of attention plus that of reading the
    weight once at the pace of the plain read; ``floor_share`` is the part of a step's time that the
    floor takes. --against names the root of another build of this package: the same step there, in
    a process of its own that takes its turn (``other``).
    """
    read_bytes, read = roof.memory_reader(options.memory)
    for heads, (batch, n_kv) in itertools.product(options.heads, options.shapes):
        for format_name in options.formats:
            cache = cases.paged_cache(format_name, [n_kv] * batch, options.dims)
            case = cases.Step(cache, heads, options.memory)
            call, alone = case.call(), cases.Decode(cache, heads).call()
            contenders: dict[Hashable, Callable[[], object]] = {"read": read}
            for isa in options.isas:
                contenders[isa, "step"] = roof.on_level(isa, call)
                contenders[isa, "attention"] = roof.on_level(isa, alone)
            with baselines.OtherBuild(options.against, case, options.effort) as other:
                seconds = race(contenders, options.effort, other)
            bandwidth = read_bytes / seconds["read"]
            for isa in options.isas:
                took, attention = seconds[isa, "step"], seconds[isa, "attention"]
                weight = case.weight_bytes / bandwidth
                row: Row = {
                    "format": format_name,
                    "isa": isa,
                    "heads": heads,
                    "batch": batch,
                    "n_kv": n_kv,
                    "seconds": took,
                    "attention": attention,
                    "weight": weight,
                    "gbs": bandwidth / 1e9,
                    "floor_share": (attention + weight) / took,
                }
                if other.seconds:
                    row["other"] = other.seconds
                    row["times_other"] = other.seconds / took
                yield row


def prefill(options: Options) -> Iterator[Row]:
    """New tokens after a history, causal, from the model's queries to its values.

    Rates count useful work, whatever form computes it: 2 (P + R + V) flop per query, head and
    visible key, and 2 L (P + V) per head and new token for making its key and value. PyTorch makes
    keys and values of the whole history and attends to them, as transformers calls it and with
    values padded for its flash path. The roof is that of the queries' dtype. ``times_best``: the
    time of "auto" by that of the better form, where all three ran. ``products``: what the two
    products of the absorbed form take by themselves (up to 8 new tokens).
    """
    shapes = itertools.product(options.lengths, options.history, options.formats)
    for n, history, format_name in shapes:
        two_tensors = options.two_tensors and format_name in cases.FLOAT_FORMATS
        lengths = [history + n] * options.batch
        cache = cases.paged_cache(format_name, lengths, options.dims, two_tensors)
        dtype = cases.query_dtype(format_name)
        (expanded,) = (f for f, d in cases.FLOAT_FORMATS.items() if d == dtype)
        for heads in options.heads:
            case = cases.Prefill(cache, heads, n)
            roofs = _Roofs()
            contenders: dict[Hashable, Callable[[], object]] = {}
            for isa in options.isas:
                roofs.add(isa, _arithmetic(isa, expanded))
                for form in options.forms:
                    contenders[isa, form] = roof.on_level(isa, case.call(form))
            if n <= 8:
                contenders["products"] = case.products()
            if options.baseline:
                if options.batch * n * (history + n) * heads <= _MOST_LOGITS:
                    contenders["torch"] = baselines.sdpa_prefill(case, pad=False)
                contenders["torch_padded"] = baselines.sdpa_prefill(case, pad=True)
            against = _Against(
                options.against,
                format_name,
                heads=heads,
                n_kv=history + n,
                queries=n,
                isa=options.isas[-1],
            )
            seconds = race({**contenders, **roofs.calls}, options.effort, against)
            for isa, form in itertools.product(options.isas, options.forms):
                if (isa, form) not in seconds:
                    continue
                rate = case.flop / seconds[isa, form] / 1e9
                top = roofs.rate(isa, _arithmetic(isa, expanded), seconds)
                row: Row = {
                    "format": format_name,
                    "isa": isa,
                    "form": form,
                    "arithmetic": _arithmetic(isa, expanded),
                    "batch": options.batch,
                    "tokens": n,
                    "history": history,
                    "heads": heads,
                    "seconds": seconds[isa, form],
                    "gflops": rate,
                    "roof_gflops": top,
                    "share": rate / top,
                }
                if "products" in seconds:
                    row["products"] = seconds["products"]
                others = [seconds[isa, f] for f in ("absorbed", "expanded") if (isa, f) in seconds]
                if form == "auto" and len(others) == 2:
                    row["times_best"] = seconds[isa, form] / min(others)
                for name in ("torch", "torch_padded"):
                    if name in seconds:
                        row[f"{name}_gflops"] = case.flop / seconds[name] / 1e9
                yield _compare(row, against)


def append(options: Options) -> Iterator[Row]:
    """New tokens into the cache.

    ``above`` is the time above an operator of the same arguments that does nothing.
    """
    for tokens, format_name in itertools.product(options.lengths, options.formats):
        case = cases.Append(format_name, tokens, options.dims)
        call = case.call()
        contenders: dict[Hashable, Callable[[], object]] = {
            isa: roof.on_level(isa, call) for isa in options.isas
        }
        empty = roof.on_level(options.isas[-1], case.empty())
        with torch.inference_mode():
            seconds = race({**contenders, "empty": empty}, options.effort)
        for isa in options.isas:
            yield {
                "format": format_name,
                "isa": isa,
                "tokens": tokens,
                "seconds": seconds[isa],
                "seconds_per_token": seconds[isa] / tokens,
                "gbs": case.bytes / seconds[isa] / 1e9,
                "above": seconds[isa] - seconds["empty"],
            }


def _with_threads(
    count: int, deterministic: bool, call: Callable[[], object]
) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(count)
        if not deterministic:
            return call()
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def threads(options: Options) -> Iterator[Row]:
    """Decode with 1, 2, 4, .. threads: one sequence per length, and a ragged batch of 64.

    ``times_one`` is the speed beside one thread, ``deterministic`` the duration with
    ``torch.use_deterministic_algorithms(True)``.
    """
    counts = sorted({1, options.threads, *(2**i for i in range(12) if 2**i < options.threads)})
    generator = torch.Generator().manual_seed(0)
    shapes = {f"1 x {n}": [n] for n in options.lengths}
    longest = max(1, min(4000, *options.lengths))
    ragged = torch.randint(1, longest + 1, (64,), generator=generator).tolist()
    shapes[f"64 x 1..{longest}"] = ragged
    for (name, lengths), format_name in itertools.product(shapes.items(), options.formats):
        cache = cases.paged_cache(format_name, lengths, options.dims)
        for heads, isa in itertools.product(options.heads, options.isas):
            case = cases.Decode(cache, heads)
            call = roof.on_level(isa, case.call())
            arithmetic = _arithmetic(isa, format_name)
            spin = roof.spin(isa, arithmetic)
            contenders: dict[Hashable, Callable[[], object]] = {}
            spun = {}
            for count in counts:
                torch.set_num_threads(count)
                spun[count] = roof.flop_of_spin(isa, arithmetic)
                contenders["plain", count] = _with_threads(count, False, call)
                contenders["deterministic", count] = _with_threads(count, True, call)
                contenders["roof", count] = _with_threads(count, False, spin)
            try:
                seconds = race(contenders, options.effort)
            finally:
                torch.set_num_threads(options.threads)
            for count in counts:
                rate = case.flop / seconds["plain", count] / 1e9
                top = spun[count] / seconds["roof", count] / 1e9
                yield {
                    "sequences": name,
                    "format": format_name,
                    "isa": isa,
                    "heads": heads,
                    "threads": count,
                    "seconds": seconds["plain", count],
                    "gflops": rate,
                    "roof_gflops": top,
                    "share": rate / top,
                    "times_one": seconds["plain", 1] / seconds["plain", count],
                    "deterministic": seconds["deterministic", count],
                }
