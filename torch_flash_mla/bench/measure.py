"""Timing against noise: contenders take turns, a round gives a median, the best round counts.

Other work on a machine only ever slows a measurement down, and it comes and goes over seconds. So
everything that is compared runs interleaved in the same seconds, and the least disturbed round of
each contender is its result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``rounds`` turns of about ``seconds`` for each contender."""

    rounds: int = 5
    seconds: float = 0.2
    least: int = 3  # calls in a turn, however slow


def median_seconds(call: Callable[[], object], effort: Effort) -> float:
    """Median duration of a call over one turn. Very short calls are timed in bundles."""
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    bundle = max(1, int(20e-6 / max(once, 1e-7)))  # the clock itself takes part of a microsecond
    times: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(times) < effort.least or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(bundle):
            call()
        times.append((time.perf_counter() - begin) / bundle)
    return statistics.median(times)


def race(
    contenders: Mapping[Hashable, Callable[[], object]],
    effort: Effort,
    after_round: Callable[[], None] | None = None,
) -> dict[Hashable, float]:
    """Seconds per call of each contender: medians of interleaved turns, the best of them.

    A contender that raises NotImplementedError is left out of the result. ``after_round`` takes its
    turn too: something that times itself.
    """
    best: dict[Hashable, float] = {}
    running = {}
    for name, call in contenders.items():
        try:
            call()  # warm up: scratch, pages, compiled primitives
            running[name] = call
        except NotImplementedError:
            pass
    for _ in range(effort.rounds):
        for name, call in running.items():
            seconds = median_seconds(call, effort)
            best[name] = min(best.get(name, seconds), seconds)
        if after_round is not None:
            after_round()
    return best
