"""One context over several processes: which tokens a rank keeps, and how it attends to all of them.

The ranks of a group run one model on the same tokens. The pages of a context go round: token p
belongs to rank (p // page) % size, in every layer, so each rank keeps and reads the same share of
it, whatever its length. In a layer every rank has the same queries. It attends to the keys it
keeps, the results and their log-sum-exps go to all ranks in one all-gather, and each merges them in
the same order. What travels are values of heads [Sq, H, V], not latents, which are several times as
wide.

A rank's keys are a subset of the positions, in order, so masks are those of transformers with the
columns of these keys. For causal prompts, where transformers makes none, a mask is made for a
thousand queries at a time; the keys behind them are left out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_flash_mla import ops

# Queries per call and all-gather. Their mask takes as many bytes for each key of this rank, a few
# percent of what the key itself takes in all layers.
_MOST_QUERIES = 1024

_SAMPLE = 8  # values that ranks compare


class ContextShare:
    """The part of a context that this rank of a group keeps.

    Args:
        group: the ranks, this one among them.
        page: tokens per page.

    Attributes:
        rank, size: place in the group, and number of its ranks.
        bytes_sent: what this rank has put into all-gathers for attention.

    Raises:
        TypeError: no process group.
        ValueError: a group without this process.
    """

    def __init__(self, group: Any, page: int) -> None:
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: this process is no member of the group")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group: got {type(group).__name__}, expected a ProcessGroup of "
                "torch.distributed"
            )
        self.group, self.page = group, page
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0
        self._compared: set[int] = set()  # layers whose weights are known to be the same

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextShare:
        return copy.copy(self)  # a group is a connection: copies of a cache share it

    # Which tokens

    def count(self, length: int) -> int:
        """How many of the first ``length`` tokens this rank keeps."""
        rounds, rest = divmod(length, self.size * self.page)
        return rounds * self.page + min(max(rest - self.rank * self.page, 0), self.page)

    def positions(self, first: int, last: int) -> Tensor:
        """int64: those of the tokens ``first .. last - 1`` that this rank keeps."""
        index = torch.arange(self.count(first), self.count(last), device="cpu")
        return (index // self.page * self.size + self.rank) * self.page + index % self.page

    def _index(self, positions: Tensor) -> Tensor:
        """Places in the pages of this rank, the inverse of :meth:`positions`; -1: elsewhere."""
        page = positions // self.page
        here = (positions >= 0) & (page % self.size == self.rank)
        return torch.where(here, page // self.size * self.page + positions % self.page, -1)

    # Attention

    def attend(
        self,
        pages: Any,
        query: Tensor,
        weight: Tensor,
        head_dim_v: int,
        scaling: float,
        length: int,
        mask: Tensor | None,
        is_causal: bool,
        indices: Tensor | None,
        attn_sink: Tensor | None,
    ) -> Tensor:
        """Attention to the keys of all ranks: out [B, Sq, H, V].

        Args:
            pages: those of this rank (:class:`~.cache.Pages`).
            query: [B, Sq, H, P + R].
            weight: [H, P + V, L].
            length: tokens of the context, the new ones included.
            mask, indices: with the columns and positions of the whole context.
            is_causal: whether queries without a mask see no later keys.
        """
        wants_gradient = torch.is_grad_enabled() and query.requires_grad
        q_length = query.shape[1]
        outs = []
        with torch.no_grad():
            self._compare_weights(pages.index, weight)
            for first in range(0, q_length, _MOST_QUERIES):
                last = min(first + _MOST_QUERIES, q_length)
                part = None if mask is None else mask.expand(-1, -1, q_length, -1)[:, :, first:last]
                here, part = self._visible(length, q_length, first, last, part, is_causal)
                out, lse = ops.mla_attention_kv_b(
                    query[:, first:last],
                    pages.kv_cache(),
                    pages.block_table(),
                    torch.full((len(query),), here, dtype=torch.int32, device="cpu"),
                    weight,
                    head_dim_v,
                    scaling,
                    attn_mask=part,
                    indices=None if indices is None else self._index(indices[:, first:last]),
                    kv_cache_dtype=pages.kv_cache_dtype,
                )
                outs.append(self._merged(out, lse, attn_sink))
        out = torch.cat(outs, 1) if len(outs) != 1 else outs[0]
        return _OutOfReach.apply(query, out) if wants_gradient else out

    def _visible(
        self,
        length: int,
        q_length: int,
        first: int,
        last: int,
        mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[int, Tensor | None]:
        """How many keys of this rank the queries ``first .. last - 1`` may see, and the mask for
        these, None for all."""
        if mask is not None:
            return self.count(length), mask[..., self.positions(0, length)]
        if not is_causal:
            return self.count(length), None
        before = length - q_length  # query s is token before + s
        positions = self.positions(0, before + last)
        if last - first == 1:
            return len(positions), None
        own = torch.arange(before + first, before + last, device="cpu")
        return len(positions), (positions <= own[:, None])[None, None]

    def _merged(self, out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
        """The attention of which each rank has a part [B, Sq, H, V] and its log-sum-exp."""
        message = torch.cat([x.reshape(-1).view(torch.uint8) for x in (lse, out)])
        received = self._all_gather(message)
        self.bytes_sent += message.nbytes
        states = []
        for part in received:
            sums, values = part.split([lse.nbytes, out.nbytes])
            values = values.view(out.dtype).view(out.shape).float()
            states.append((values, sums.view(lse.dtype).view(lse.shape)))
        *others, last = states
        merged = functools.reduce(lambda a, b: ops.merge_attn_states(*a, *b), others)
        return ops.merge_attn_states(*merged, *last, attn_sink=attn_sink)[0].to(out.dtype)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(received, tensor, group=self.group)
        return received

    # What must be the same everywhere

    def compare_step(self, tokens: Tensor, length: int) -> None:
        """Refuses a step in which the ranks do not do the same.

        Args:
            tokens: [B, T, L], what the first layer is about to store.
            length: tokens of the context so far.
        """
        last = tokens[:, -1:, :_SAMPLE].float()
        self._compare(
            [tokens.shape[0], tokens.shape[1], length, self.page],
            last.sum((0, 1)),
            0.1 * float(last.square().sum(0).mean().sqrt()),
            "the tokens of this step",
            "every rank runs the model on the same input, after the same history, with the same "
            "block_size (and samples with the same seed)",
        )

    def _compare_weights(self, layer: int, weight: Tensor) -> None:
        """Refuses ranks with different kv_b_proj; looks once per layer."""
        if layer in self._compared:
            return
        values = weight.reshape(-1)
        sample = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE].float()
        self._compare(
            list(weight.shape),
            sample,
            0.01 * float(sample.abs().max()),
            f"kv_b_proj (layer {layer} of the cache)",
            "every rank holds the same model, with all of its heads",
        )
        self._compared.add(layer)

    def _compare(
        self, exact: Sequence[int], near: Tensor, tolerance: float, what: str, expected: str
    ) -> None:
        """Raises ValueError, on all ranks, if one has other numbers than rank 0.

        ``near`` may differ by ``tolerance``: the ranks may be processors of different kinds.
        """
        values = torch.zeros(1 + len(exact) + _SAMPLE, dtype=torch.float64, device="cpu")
        first = 1 + len(exact)
        values[0] = tolerance
        values[1:first] = torch.tensor(exact, device="cpu")
        values[first : first + len(near)] = near
        received = self._all_gather(values)
        allowed = torch.zeros_like(values)
        allowed[0], allowed[first:] = torch.inf, received[0][0]  # all judge by the same
        for rank, theirs in enumerate(received):
            if bool(((theirs - received[0]).abs() > allowed).any()):
                raise ValueError(
                    f"process_group: {what} differ between rank 0 and rank {rank}: {expected}"
                )


class _OutOfReach(torch.autograd.Function):
    """The result of attention over several processes, which hands no gradients on."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "gradients through an MLACache with a process_group: train without a cache"
        )
