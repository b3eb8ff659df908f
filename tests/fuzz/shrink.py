"""Makes a failing spec smaller, as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.specs import Spec

# What a field is worth trying to be, simplest first.
_SIMPLE: dict[str, list[Any]] = {
    "guard": [None],
    "mode": ["none"],
    "deterministic": [False],
    "threads": [1],
    "strided": [False],
    "slices": [""],
    "shared": [False],
    "mask": [None],
    "indices": [None],
    "leftpad": [None],
    "sink": [None],
    "window": [0],
    "causal": [False],
    "split": [False],
    "ragged": [False],
    "q_layout": ["plain"],
    "w_layout": ["plain"],
    "layout": ["plain", "paged"],
    "page": [16, 64],
    "poison_seen": [False],
    "poison_query": [None],
    "poison_weight": [False],
    "poison": ["zero", "nan"],
    "gradients": [False],
    "twice": [False],
    "scale": [1.0],
    "logits": [{"kind": "normal", "size": 1.0}],
    "q_dtype": ["float32", "bfloat16"],
    "least_rows": [16],
    "latent": [32],
    "rope": [0, 32],
    "nope": [1],
    "value": [1],
    "form": ["absorbed", "expanded"],
    "isa": ["scalar", "avx2", "avx512_vnni", "avx512_bf16"],
    "rows": ["normal"],
    "rows_layout": ["plain"],
    "shape": ["plain"],
    "slots": ["distinct"],
    "lse_layout": ["plain"],
}
_SMALLER = ("heads", "tokens", "blocks", "batch", "width", "topk", "pairs")


def candidates(spec: Spec) -> Iterator[Spec]:
    """Specs with one thing less."""
    done = spec["mutations"]
    for i in range(len(done)):
        yield spec | {"mutations": done[:i] + done[i + 1 :]}
    for name, values in _SIMPLE.items():
        if name not in spec:
            continue
        for value in values:
            if spec[name] == value:
                break
            yield spec | {name: value}
    lengths, queries = spec.get("lengths"), spec.get("queries")
    if lengths:
        for i in range(len(lengths)):
            fewer = {"lengths": lengths[:i] + lengths[i + 1 :]}
            for name in ("queries", "leftpad"):
                if isinstance(spec.get(name), list):
                    fewer[name] = spec[name][:i] + spec[name][i + 1 :]
            if len(lengths) > 1:
                yield spec | fewer
        for i, n in enumerate(lengths):
            for less in (n // 2, n - 1):
                if 0 <= less < n:
                    yield spec | {"lengths": [*lengths[:i], less, *lengths[i + 1 :]]}
    if queries and max(queries) > 1:
        yield spec | {"queries": [min(q, 2) for q in queries]}
        yield spec | {"queries": [q // 2 for q in queries]}
        yield spec | {"queries": [max(q - 1, 0) for q in queries]}
    for name in _SMALLER:
        n = spec.get(name)
        if isinstance(n, int) and n > 1:
            for less in {1, n // 2, n - 1}:
                yield spec | {name: less}
    if isinstance(spec.get("mask"), dict):
        for change in ({"of_heads": False}, {"of_batch": False}, {"extra": 0}, {"dtype": "bool"}):
            mask = spec["mask"] | change
            if mask != spec["mask"]:
                yield spec | {"mask": mask}


def shrink(spec: Spec, fails: Callable[[Spec], bool], most: int = 150) -> Spec:
    """The smallest spec found with ``most`` tries for which ``fails`` still holds."""
    tries = 0
    smaller = True
    while smaller and tries < most:
        smaller = False
        for candidate in candidates(spec):
            if candidate == spec:
                continue
            tries += 1
            if tries > most:
                break
            if fails(candidate):
                spec, smaller = candidate, True
                break
    return spec
