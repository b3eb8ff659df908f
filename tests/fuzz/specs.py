"""Specs: what a case is, as plain data that (seed, index) determine. `build.py` reads them.

Every field stands on its own, so that `shrink.py` can change one: lists of sequences are as long as
they are, whatever else is asked for that cannot be is left out when the call is built.
"""

from __future__ import annotations

import random
from typing import Any

from tests import mla_cases
from torch_flash_mla.formats import PACKED_FORMATS

Spec = dict[str, Any]

# Multiply-adds of a call that the float64 oracle may take, where what else it does with a pair of a
# query row and a key counts as some: one call in seven may be large, and one with damaged arguments
# is refused for those, or right, whatever its size.
_WORK = [(800_000, 6), (5_000_000, 1)]
_WORK_OF_DAMAGED = 300_000
_OF_A_PAIR = 64

PACKED_DIMS = [(32, 0), (32, 32), (64, 0), (64, 32), (64, 64), (96, 32), (128, 32), (160, 64)]
FLOAT_DIMS = [
    *[(1, 0), (1, 1), (2, 3), (7, 0), (16, 8), (16, 16), (31, 33), (33, 7), (48, 16), (64, 0)],
    *[(64, 32), (64, 64), (96, 16), (100, 20), (128, 0), (128, 32), (129, 1), (160, 64)],
]
LARGE_DIMS = [(512, 64), (512, 0), (256, 64)]
DTYPES = ["bfloat16", "float16", "float32"]
GUARDS = ["end", "end", "start", None, None]

KINDS = [
    ("attention", 50),
    ("kv_b", 18),
    ("append", 10),
    ("gather", 7),
    ("copy", 3),
    ("merge", 6),
    ("flash_mla", 4),
    ("huge", 2),
]


def pick(rng: random.Random, weighted: list[tuple[Any, float]]) -> Any:
    return rng.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]


def draw(seed: int, index: int, isas: list[str]) -> Spec:
    """The spec of a case."""
    rng = random.Random((seed << 40) + index)
    kind = pick(rng, KINDS)
    damaged = kind != "huge" and rng.random() < 0.3
    spec: Spec = {
        "kind": kind,
        "isa": rng.choice(isas),
        "threads": pick(rng, [(1, 8), (2, 2), (3, 1)]),
        "deterministic": rng.random() < 0.15,
        "mode": pick(rng, [("none", 6), ("no_grad", 2), ("inference", 2)]),
        "guard": rng.choice(GUARDS),
        "data": rng.getrandbits(32),
    }
    spec.update(_DRAW[kind](rng))
    if kind in ("attention", "kv_b", "flash_mla"):
        _bound(spec, rng, _WORK_OF_DAMAGED if damaged else pick(rng, _WORK))
    count = pick(rng, [(1, 6), (2, 3), (3, 1)]) if damaged else 0
    spec["mutations"] = [rng.getrandbits(32) for _ in range(count)]
    return spec


def _bound(spec: Spec, rng: random.Random, most: int) -> None:
    """Makes a call of attention smaller until its work is at most that."""
    of_a_pair = spec["latent"] + spec["rope"] + _OF_A_PAIR
    while spec["heads"] * of_a_pair * _pairs(spec) > most:
        for name in ("lengths", "leftpad"):
            if spec[name]:
                spec[name] = [n // 2 for n in spec[name]]
        if rng.random() < 0.5:
            spec["queries"] = [q // 2 for q in spec["queries"]]
        else:
            spec["heads"] = (spec["heads"] + 1) // 2


def _pairs(spec: Spec) -> int:
    """Tokens of queries times keys."""
    return sum(q * n for q, n in zip(spec["queries"], spec["lengths"], strict=True))


def _dims(rng: random.Random, packed: bool) -> tuple[int, int]:
    if rng.random() < 0.03:
        return rng.choice(LARGE_DIMS)
    return rng.choice(PACKED_DIMS if packed else FLOAT_DIMS)


def _length(rng: random.Random) -> int:
    return pick(
        rng,
        [
            (0, 6),
            (1, 6),
            (rng.randint(2, 20), 20),
            (16 * rng.randint(1, 10), 20),
            (rng.choice([127, 128, 129, 63, 64, 65, 256]), 12),
            (rng.randint(20, 150), 30),
            (rng.randint(150, 300), 6),
        ],
    )


def _heads(rng: random.Random) -> int:
    return pick(
        rng,
        [
            (0, 1),
            (1, 15),
            (rng.randint(2, 8), 50),
            (rng.choice([15, 16, 17, 32, 33]), 20),
            (rng.randint(9, 40), 14),
        ],
    )


def _queries(rng: random.Random) -> int:
    return pick(rng, [(0, 1), (1, 40), (rng.randint(2, 9), 50), (40, 4), (rng.randint(10, 40), 5)])


def _cache(rng: random.Random) -> Spec:
    name = rng.choice(mla_cases.FORMATS)
    packed = name in PACKED_FORMATS
    latent, rope = _dims(rng, packed)
    layouts = ["paged", "paged", "rank4", "plain"]
    if not packed and rope:
        layouts.append("two_tensor")
    return {
        "format": name,
        "latent": latent,
        "rope": rope,
        "page": pick(
            rng,
            [
                (1, 1),
                (rng.randint(2, 15), 2),
                (16, 2),
                (rng.choice([32, 64, 128]), 4),
                (rng.randint(17, 130), 2),
            ],
        ),
        "layout": rng.choice(layouts),
        "slices": pick(rng, [("", 6), ("row", 1), ("token", 1), ("block", 1), ("all", 1)]),
        "shared": rng.random() < 0.08,
    }


def _attention(rng: random.Random) -> Spec:
    spec = _cache(rng)
    heads = _heads(rng)
    batch = pick(rng, [(0, 1), (1, 40), (2, 40), (3, 14), (5, 5)])
    lengths = [_length(rng) for _ in range(batch)]
    ragged = rng.random() < 0.2
    most = _queries(rng)
    queries = [rng.choice([0, 1, most, rng.randint(0, most)]) if ragged else most for _ in lengths]
    spec.update(
        heads=heads,
        lengths=lengths,
        queries=queries,
        ragged=ragged,
        q_dtype=rng.choice(DTYPES),
        split=rng.random() < 0.25,
        q_layout=pick(rng, [("plain", 5), ("transposed", 2), ("wide", 2), ("gaps", 1)]),
        strided=rng.random() < 0.2,  # integer tensors and the like
        least_rows=rng.choice([1, 1, 16]),
        causal=rng.random() < 0.5,
        window=pick(rng, [(0, 70), (1, 5), (rng.randint(2, 200), 20), (2**31 - 1, 2), (2**40, 2)]),
        leftpad=None,
        mask=None,
        indices=None,
        sink=pick(rng, [(None, 74), ("normal", 16), ("large", 6), ("infinite", 4)]),
        scale=pick(rng, [(1.0, 84), (-1.0, 8), (0.0, 4), (3.0, 4)]),
        logits=_logits(rng, spec["format"] in PACKED_FORMATS),
        poison=rng.choice(["nan", "inf", "-inf", "bytes", "huge"]),
        poison_seen=rng.random() < 0.06,
        poison_query=pick(rng, [(None, 88), ("blind", 8), ("any", 4)]),
        gradients=rng.random() < 0.04,
        twice=rng.random() < 0.3,  # deterministic: once more with other threads
    )
    if rng.random() < 0.2:
        spec["leftpad"] = [
            pick(rng, [(rng.randint(0, n), 6), (n, 2), (0, 1), (max(n - 1, 0), 1)]) for n in lengths
        ]
    if rng.random() < 0.35:
        spec["mask"] = {
            "dtype": rng.choice(["bool", "bool", "float32", "float16", "bfloat16"]),
            "of_batch": rng.random() < 0.6,
            "of_heads": rng.random() < 0.4,
            "of_tokens": rng.random() < 0.6,
            "dims": rng.randint(1, 4),
            "pattern": rng.choice(
                ["holes", "holes", "interval", "middle", "rows", "none", "full", "columns"]
            ),
            "hidden": rng.choice(["-inf", "lowest"]),
            "low": pick(rng, [(0, 8), (-1e4, 1), (-1e9, 1), (-1e30, 1)]),
            "extra": rng.choice([0, 0, 1, 17, 200]),
            "layout": pick(rng, [("plain", 7), ("strided", 2), ("expanded", 1)]),
        }
    if rng.random() < 0.14:
        spec["indices"] = {
            "topk": rng.choice([0, 1, 5, 16, 17, 64, 130]),
            "kind": rng.choice(["some", "repeated", "padded", "any"]),
            "lengths": rng.random() < 0.5,
        }
    return spec


def _logits(rng: random.Random, packed: bool) -> Spec:
    """Which keys and queries: how large the logits are."""
    kind = pick(
        rng,
        [
            ("normal", 55),
            ("peaky", 8),
            ("sink", 6),
            ("centre", 14),
            ("factor", 10),
            ("scaled", 3),
            ("wild", 4),
        ],
    )
    size = 1.0
    if kind == "centre":
        size = rng.choice([-1, 1]) * rng.choice([30, 60, 90, 100, 150, 400, 1000, 1e5, 1e30])
    elif kind in ("factor", "scaled"):
        size = rng.choice([1e2, 1e3, -1e3, 1e4, 1e6, 1e15, 1e25, 1e34, 1e-4, 1e-20, 1e-37])
    return {"kind": kind, "size": float(size)}


def _kv_b(rng: random.Random) -> Spec:
    spec = _attention(rng)
    spec.update(
        nope=rng.choice([1, 8, 16, 17, 32, 40]),
        value=rng.choice([1, 8, 16, 24, 32, 33]),
        form=rng.choice(["auto", "absorbed", "expanded"]),
        w_layout=pick(rng, [("plain", 6), ("expanded", 1), ("transposed", 1), ("wide", 1)]),
        poison_weight=rng.random() < 0.04,
        gradients=rng.random() < 0.04,
    )
    if spec["indices"] is not None and spec["form"] == "expanded":
        spec["form"] = "auto"
    return spec


def _append(rng: random.Random) -> Spec:
    spec = _cache(rng)
    tokens = pick(rng, [(0, 1), (1, 4), (rng.randint(2, 40), 5)])
    spec.update(
        blocks=rng.choice([0, 1, 2, 3, 5]),
        tokens=tokens,
        dtype=rng.choice(DTYPES),
        rows=rng.choice(["normal", "normal", "wild", "special"]),
        slots=rng.choice(["distinct", "distinct", "skips", "repeated"]),
        shape=rng.choice(["plain", "plain", "head", "batch"]),
        rows_layout=rng.choice(["plain", "wide", "transposed"]),
        strided=rng.random() < 0.2,
        page=min(spec["page"], 20),
        shared=False,
    )
    return spec


def _gather(rng: random.Random) -> Spec:
    spec = _cache(rng)
    batch = pick(rng, [(0, 1), (1, 3), (2, 3), (4, 1)])
    spec.update(
        lengths=[min(_length(rng), 100) for _ in range(batch)],
        dtype=rng.choice(DTYPES),
        rows=rng.choice(["normal", "wild"]),
        strided=rng.random() < 0.2,
        most=pick(rng, [(None, 3), (0, 1), (rng.randint(0, 150), 4)]),
        poison=rng.choice(["nan", "inf", "-inf", "bytes", "huge"]),
    )
    if spec["layout"] == "two_tensor":
        spec["layout"] = "paged"
    return spec


def _copy(rng: random.Random) -> Spec:
    return {
        "dtype": rng.choice(["float32", "bfloat16", "uint8", "float64", "int16", "bool"]),
        "shape": [
            rng.choice([0, 1, 2, 5, 9]),
            *[rng.randint(0, 9) for _ in range(rng.randint(1, 3))],
        ],
        "slices": rng.choice(["", "", "row", "block", "transposed"]),
        "pairs": rng.randint(0, 6),
        "strided": rng.random() < 0.2,
    }


def _merge(rng: random.Random) -> Spec:
    return {
        "dtype": rng.choice(DTYPES),
        "ragged": rng.random() < 0.3,
        "batch": rng.choice([0, 1, 1, 2, 3]),
        "tokens": rng.choice([0, 1, 1, 3, 9]),
        "heads": _heads(rng),
        "width": rng.choice([0, 1, 7, 16, 33, 64, 130]),
        "layout": rng.choice(["plain", "plain", "transposed", "wide"]),
        "lse_layout": rng.choice(["plain", "plain", "transposed", "strided"]),
        "sink": rng.choice([None, None, "normal", "large", "infinite"]),
        "lse": rng.choice([1.0, 1.0, 30.0, 1e3, 1e20, 3e38]),
        "empty": rng.choice([0.0, 0.2, 1.0]),
        "poison": rng.random() < 0.5,
    }


def _flash_mla(rng: random.Random) -> Spec:
    spec = _attention(rng)
    spec.update(
        function=rng.choice(["dense", "sparse", "extra", "prompt"]),
        ragged=False,
        split=False,
        window=0,
        leftpad=None,
        mask=None,
        gradients=False,
        twice=False,
        topk=rng.choice([1, 5, 16, 64]),
        indexer=rng.choice([0, 0, 3]),
        max_logits=rng.random() < 0.5,
        poison_query=None,
        poison_seen=False,
        queries=[max(spec["queries"], default=0)] * len(spec["lengths"]),
        layout=rng.choice(["paged", "rank4"]),
        indices=None,
        slices="",
        shared=False,
    )
    if spec["function"] == "prompt" and spec["format"] in PACKED_FORMATS:
        spec["format"] = "fp32"
    if spec["logits"]["kind"] in ("factor", "scaled", "centre", "wild"):
        spec["logits"] = {"kind": "normal", "size": 1.0}
    return spec


def _huge(rng: random.Random) -> Spec:
    """Sizes near the limits of int32, through strides of 0."""
    near = [2**31 - 1, 2**31 - 127, 2**31 - 128, 2**31 - 129, 2**31, 2**31 + 4, 2**32, 2**32 + 3]
    return {
        "what": rng.choice(
            ["length", "table", "gather", "rows", "tokens", "heads", "batch", "append", "merge"]
        ),
        "size": rng.choice([*near, rng.randint(2**30, 2**33), 2**40, 2**61, 2**62]),
        "seen": rng.choice([1, 16, 100, 128, 129]),
        "by": rng.choice(["window", "leftpad", "indices"]),
        "format": rng.choice(mla_cases.FORMATS),
        # Every block of a table is looked at: 2^27 of them take half a second.
        "page": pick(rng, [(1, 1), (16, 1), (100, 2), (1000, 8), (4096, 8)]),
        "causal": rng.random() < 0.5,
        "form": rng.choice([None, None, "auto", "expanded"]),
    }


_DRAW = {
    "attention": _attention,
    "kv_b": _kv_b,
    "append": _append,
    "gather": _gather,
    "copy": _copy,
    "merge": _merge,
    "flash_mla": _flash_mla,
    "huge": _huge,
}
