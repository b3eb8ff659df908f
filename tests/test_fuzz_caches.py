"""The state machines of ``fuzz/caches.py``, and a failure at every single allocation of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz import caches

from torch_flash_mla import PagedLatentCache


@pytest.mark.parametrize("seed", range(3))
def test_state_machines(seed: int) -> None:
    """``fuzz.caches.run(seed, 12000)`` is the same at length."""
    summary = caches.run(seed, 500)
    assert not summary.wrong
    assert summary.failed > 150
    assert summary.refused > 30


CHANGES: dict[str, Callable[[PagedLatentCache], Any]] = {
    "reserve": lambda cache: cache.reserve(2, 9),
    "reserve more sequences": lambda cache: cache.reserve(4, 9),
    "reserve copies": lambda cache: cache.reserve(2, 9, 2),
    "truncate": lambda cache: cache.truncate([1, 3]),
    "reorder": lambda cache: cache.reorder([1, 1, 0, 1]),
    "swap": lambda cache: cache.reorder([1, 0]),
    "select": lambda cache: cache.reorder([1]),
    "fork": lambda cache: cache.fork(2),
    "free": lambda cache: cache.free(0),
    "reset": lambda cache: cache.reset(),
    "reset to more": lambda cache: cache.reset(5),
    "define_layer": lambda cache: cache.define_layer(2, 7, 1),
}


@pytest.mark.parametrize("kind", [caches.OutOfMemory, caches.Interrupt])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_failure_of_a_change(
    change: str, fixed: bool, shared: bool, kind: type[caches.Injected]
) -> None:
    limit = {"max_batch": 4, "max_cache_len": 16} if fixed else {}
    n = 0
    while True:
        n += 1
        cache = PagedLatentCache(
            3, [4, 3, None], [2, 0, None], dtype=torch.float32, block_size=2, **limit
        )
        machine = _Watched(cache)
        machine.extend(2, 5)
        if shared:
            cache.reorder([1, 1])
            machine.texts = [machine.texts[1]] * 2
            machine.extend(2, 2)
        before = machine.remembered()
        try:
            with caches._Failure(kind, n):
                CHANGES[change](cache)
        except kind:
            machine.check_unchanged(before)
            CHANGES[change](cache)  # nothing is left that would be in its way
        else:
            break
    assert n > 1


class _Watched(caches.Machine):
    """A cache that the test changes itself."""

    fixed = True  # lengths may change in place

    def __init__(self, cache: PagedLatentCache) -> None:
        self.cache = cache
        self.texts: list[list[int]] = []
        self.held: list[Any] = []
        self.next = 1

    @property
    def paged(self) -> PagedLatentCache:
        return self.cache

    def extend(self, batch: int, tokens: int) -> None:
        self.cache.reserve(batch, tokens)
        new = [self.new_tokens(tokens) for _ in range(batch)]
        for layer, (latent, rope) in enumerate(((4, 2), (3, 0))):
            rows = caches._rows(torch.tensor(new) + layer, latent + rope)
            self.cache.append(layer, rows[..., :latent], rows[..., latent:])
        former = self.texts or [[]] * batch
        self.texts = [text + more for text, more in zip(former, new, strict=True)]
