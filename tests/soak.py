"""An hour (or any time) of sequences that come, grow, fork, shrink and leave, by hand:

    python tests/soak.py --minutes 60 --seed 1

Up to 64 sequences live in one cache of two layers per format. Every operation is repeated on plain
tensors, one per sequence; now and then a few sequences are compared: rows read back, and attention
over them. Memory is looked at once a minute and must stay flat from the fifth part of the time on.
Ends in a line ``N passed, N failed``: comparisons, and those that were wrong.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from torch_flash_mla import PagedLatentCache, ops, reference

LATENT, ROPE, LAYERS, MOST, LONGEST = 64, 32, 2, 64, 700
FORMATS = ("auto", "q8_kv", "q8_0", "q6_0", "q4_kv")


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Room:
    """A cache, and what its sequences hold: per sequence float32 [tokens, LAYERS, L + R]."""

    def __init__(self, kv_cache_dtype: str, seed: int) -> None:
        self.random = random.Random(f"{kv_cache_dtype}-{seed}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        self.format = kv_cache_dtype
        self.cache = PagedLatentCache(
            LAYERS, LATENT, ROPE, kv_cache_dtype=kv_cache_dtype, block_size=16
        )
        self.held: list[Tensor] = []
        self.compared = self.wrong = self.steps = 0

    def grow(self, batch: int, tokens: int) -> None:
        """Appends to every sequence; new ones begin empty."""
        shape = (batch, tokens, LAYERS, LATENT + ROPE)
        rows = torch.randn(shape, generator=self.generator)
        self.cache.reserve(batch, tokens)
        for layer in range(LAYERS):
            self.cache.append(layer, rows[:, :, layer, :LATENT], rows[:, :, layer, LATENT:])
        empty = [rows.new_empty(0, LAYERS, LATENT + ROPE)] * (batch - len(self.held))
        self.held = [torch.cat(both) for both in zip(self.held + empty, rows, strict=True)]

    def keep(self, lengths: list[int]) -> None:
        """Shortens every sequence to a length."""
        self.cache.truncate(lengths)
        self.held = [rows[:n] for rows, n in zip(self.held, lengths, strict=True)]

    def select(self, index: list[int]) -> None:
        """Sequences of the batch by number, some twice, some not at all."""
        self.cache.reorder(index)
        self.held = [self.held[i] for i in index]

    def step(self) -> None:
        """One random operation."""
        self.steps += 1
        batch, draw = len(self.held), self.random.random()
        lengths = [len(rows) for rows in self.held]
        if batch == 0 or (draw < 0.2 and batch < MOST):  # one joins
            prompt = self.random.randint(1, 200)
            self.grow(batch + 1, prompt)
            self.keep([*lengths, prompt])
        elif draw < 0.6 and max(lengths) < LONGEST:  # all grow
            self.grow(batch, self.random.choice((1, 1, 1, 4)))
        elif draw < 0.7:  # some shrink
            self.keep([self.random.randint(n // 2, n) for n in lengths])
        elif draw < 0.75 and 2 * batch <= MOST:  # all fork
            self.cache.fork(2)
            self.held = [rows for rows in self.held for _ in range(2)]
        elif draw < 0.85:  # beams
            self.select([self.random.randrange(batch) for _ in range(batch)])
        else:  # some leave
            stay = [i for i in range(batch) if self.random.random() < 0.8]
            self.select(stay or [0])
        if max((len(rows) for rows in self.held), default=0) >= LONGEST:
            self.keep([min(len(rows), LONGEST // 2) for rows in self.held])
        if self.steps % 20 == 0:
            self.compare()

    def compare(self) -> None:
        """A few sequences: rows read back and attention over them, in both layers."""
        batch, packed = len(self.held), self.format != "auto"
        some = sorted(self.random.sample(range(batch), min(batch, 3)))
        table, lengths = self.cache.block_table[some], self.cache.cache_seqlens[some]
        q = torch.randn(len(some), 1, 4, LATENT + ROPE, generator=self.generator)
        for layer in range(LAYERS):
            pool = self.cache.kv_cache(layer)
            rows = ops.gather_cache(
                pool, table, lengths, LATENT, LATENT + ROPE, torch.float32, self.format
            )
            out, _ = ops.mla_attention(
                q, pool, table, lengths, LATENT, 0.1, True, kv_cache_dtype=self.format
            )
            for at, sequence in enumerate(some):
                held = self.held[sequence][:, layer]
                n = len(held)
                if packed:
                    codes = reference.encode_rows(held[:, :LATENT], held[:, LATENT:], self.format)
                    stored = reference.decode_rows(codes, self.format, LATENT, ROPE)
                else:
                    stored = held.bfloat16()
                expected, _ = reference.mla_attention(
                    q[at : at + 1],
                    stored.float()[None],
                    None,
                    torch.tensor([n], dtype=torch.int32),
                    LATENT,
                    0.1,
                    True,
                )
                right = (
                    int(lengths[at]) == n
                    and torch.allclose(rows[at, :n], stored.float(), rtol=1e-5, atol=1e-6)
                    and (out[at].double() - expected[0]).norm() <= 0.05 * expected.norm() + 1e-6
                )
                self.compared += 1
                self.wrong += not right


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of one core to take")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rooms = [Room(name, options.seed) for name in FORMATS]
    begin, settled, most = time.monotonic(), 0.0, 0.0
    minute = 0
    while (now := time.monotonic() - begin) < options.minutes * 60:
        for room in rooms:
            room.step()
        time.sleep((time.monotonic() - begin - now) * (1 / options.share - 1))
        if now > 0.2 * 60 * options.minutes:
            settled = settled or resident_mib()
            most = max(most, resident_mib())
        if now >= 60 * minute:
            steps, sequences = sum(r.steps for r in rooms), sum(len(r.held) for r in rooms)
            print(
                f"{minute} min: {steps} steps, {sequences} sequences, {resident_mib():.0f} MiB",
                flush=True,
            )
            minute += 1
    grown = most - settled
    flat = grown <= 0.05 * settled + 8
    print(f"memory {settled:.0f} MiB after a fifth of the time, at most {most:.0f} MiB later")
    wrong = sum(room.wrong for room in rooms) + (not flat)
    print(f"{sum(room.compared for room in rooms)} passed, {wrong} failed")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
