"""Several Python threads that call the operators at the same time, each with threads of its own.

Some threads make the same call on the same tensors. In some cases another thread writes into every
integer tensor and mask meanwhile: then any answer and any documented error will do.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import torch
from torch import Tensor

from tests.fuzz import run as single
from tests.fuzz import sanitize, specs
from tests.fuzz.build import Call, build

_CALLS_OF_A_THREAD = 4


def draw(seed: int, index: int, isas: list[str]) -> dict[str, Any]:
    """The specs of the threads' calls. Level and determinism are those of the whole process."""
    rng = random.Random((seed << 40) + index + (1 << 90))
    isa, deterministic = rng.choice(isas), rng.random() < 0.2
    calls = []
    while len(calls) < rng.randint(2, 4):
        spec = specs.draw(seed, rng.getrandbits(30), [isa])
        if spec["kind"] not in ("attention", "kv_b", "append", "gather", "merge", "flash_mla"):
            continue
        calls.append(
            spec
            | {"mutations": [], "gradients": False, "twice": False, "deterministic": deterministic}
            | {"mode": "none", "least_rows": 1}
        )
    return {
        "kind": "threads",
        "calls": calls,
        "threads": [rng.randrange(len(calls)) for _ in range(rng.choice([2, 3, 6]))],
        "writer": rng.random() < 0.3,
        "data": rng.getrandbits(32),
    }


def run(spec: dict[str, Any]) -> None:
    """Runs a case.

    Raises:
        Wrong: an answer is not what it should be.
    """
    torch.set_num_threads(1)
    calls = [build(s) for s in spec["calls"]]
    if spec["writer"]:
        for call in calls:
            single.guarded(call, call.spec["guard"])
    problems: list[Exception] = []
    answers: list[tuple[Call, Any, single.Snapshot]] = []
    stop = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(spec["data"] + number)
        call = calls[spec["threads"][number]]
        for _ in range(_CALLS_OF_A_THREAD):
            mine = Call(call.spec, call.operator, dict(call.arguments), call.ordinary)
            mine.notes = call.notes
            if call.operator == "concat_and_cache_mla" and not spec["writer"]:
                for name in ("kv_cache", "k_pe_cache"):  # nobody else writes there
                    if name in mine.arguments:
                        mine.arguments[name] = mine.arguments[name].clone()
            torch.set_num_threads(1 if one_each else rng.randint(1, 4))
            before = single.Snapshot(mine.arguments)
            try:
                answer = single.function(mine)(**mine.arguments)
            except Exception as error:
                problems.append(error)
                return
            answers.append((mine, answer, before))

    def write() -> None:
        rng = random.Random(spec["data"])
        targets = [t for c in calls for t in c.arguments.values() if scribbled(t)]
        while targets and not stop.is_set():
            t = rng.choice(targets)
            if t.dtype == torch.bool:
                t.fill_(rng.random() < 0.5)
            else:
                t.fill_(rng.choice([-1, 0, 1, 7, 100, 2**30, 2**31 - 1, -(2**31)]))

    one_each = sanitize.running(sanitize.THREAD)
    first = calls[0].spec | ({"threads": 1} if one_each else {})
    with single.environment(first):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(spec["threads"]))]
        writer = threading.Thread(target=write)
        if spec["writer"]:
            writer.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        if spec["writer"]:
            writer.join()
    for error in problems:
        if not spec["writer"]:
            raise single.Wrong("refused", f"{type(error).__name__}: {error}")
        if not isinstance(error, (*single.ERRORS, MemoryError)):
            raise single.Wrong("exception", f"{type(error).__name__}: {error}")
    if not spec["writer"]:
        for call, answer, before in answers:
            single.judge(call, answer, before)


def scribbled(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and t.dtype in (torch.int32, torch.int64, torch.bool)
        and t.numel() > 0
        and 0 not in t.stride()
    )
