"""What the programs of examples/cpp compute, in Python. Imports nothing but torch: processes that
load a saved program without this package use it too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layer = Callable[..., Tensor]


def numbers(first: int, *shape: int) -> Tensor:
    """sin(first), sin(first + 1), ..."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(first, first + count, dtype=torch.float32).sin().view(shape)


def slots_of(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """int64 [B, tokens]: where the tokens at ``positions`` of each sequence go."""
    blocks = table.long()[:, positions // block_size]
    return (blocks * block_size + positions % block_size).contiguous()


@torch.no_grad()
def attention_demo(layer: Layer) -> Tensor:
    """attention_demo.h: [4, 6], three values of each of two sequences after each of four steps."""
    hidden, rope, block_size = numbers(0, 2, 9, 64), 32, 16
    frequency = 10000 ** (torch.arange(0, rope, 2, dtype=torch.float32) / -rope)
    kv_cache = torch.empty(8, block_size, 64 + rope + 8, dtype=torch.uint8)
    table = torch.tensor([[3, 0], [1, 6]], dtype=torch.int32)
    rows, position = [], 0
    for new_tokens in (5, 1, 1, 2):
        positions = torch.arange(position, position + new_tokens)
        position += new_tokens
        angle = positions.view(1, -1, 1) * frequency
        out = layer(
            hidden[:, positions].contiguous(),
            angle.cos(),
            angle.sin(),
            kv_cache,
            table,
            torch.full((2,), position, dtype=torch.int32),
            slots_of(table, positions, block_size),
        )
        rows.append(out[:, -1, :3].flatten())
    return torch.stack(rows)


# A package computes norms in another order than eager mode, so 8-bit codes of cache and queries may
# round otherwise: logits differ by this part of the largest. Of two tokens as likely as each other
# eager mode may prefer the other one.
PACKAGE_TOLERANCE = 2e-3


@torch.no_grad()
def decode(
    step: Layer, prompt: bytes, new_tokens: int, follow: list[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """decode.cpp: ids of the prompt and of the tokens that the tiny model adds; their logits.

    ``follow``: takes the new tokens from there.
    """
    tokens, block_size, blocks = list(prompt), 64, 32
    all_logits = []
    caches = [torch.empty(blocks, block_size, 512 + 64 + 8, dtype=torch.uint8) for _ in range(4)]
    table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    done = 0
    for _ in range(new_tokens):
        new = torch.tensor([tokens[done:]])
        slots = slots_of(table, torch.arange(done, len(tokens)), block_size)
        done = len(tokens)
        length = torch.tensor([done], dtype=torch.int32)
        logits = step(new, caches, table, length, slots)
        all_logits.append(logits[0, -1])
        tokens.append(follow[done] if follow else int(logits[0, -1].argmax()))
    return tokens, torch.stack(all_logits)
