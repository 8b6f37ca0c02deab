"""Experts on different ranks: rows travel to the rank of their expert and back; and which tokens an expert with a capacity takes.

An exchange is started and waited for in separate autograd nodes. What is computed in between needs nothing of it and runs while
the rows travel; its backward runs while their gradients travel the other way.

A rank sends its rows and their weights once, but those for its own experts, and what its experts made of others' rows once;
backward sends as much. Before them 8 E (R - 1) / R bytes of counts travel, for E experts on R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_single
from .failures import naming_the_missing
from .layout import Layout


class ExpertExchange:
    """Takes rows to the ranks of their experts and back: of E experts on R ranks, rank j has j E/R .. (j + 1) E/R - 1.

    Raises ValueError where R does not divide E.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        if experts % self.ranks:
            raise ValueError(f"{experts} experts do not divide over {self.ranks} ranks")

    def start(self, rows: Tensor, weights: Tensor, counts: Tensor) -> "Dispatch":
        """Sets out rows [r, d], sorted by expert, and their weights [r]; counts [E] int64 of them are for each expert.

        Rows and weights are of any floating dtype and must not be written before `Dispatch.wait`; r may be 0. The host waits for
        the counts of the other ranks, which say how many rows come, and for nothing else.
        """
        leaving = counts.reshape(self.ranks, -1).contiguous()
        coming = torch.empty_like(leaving)
        with naming_the_missing("expert exchange"):
            dist.all_to_all_single(coming, leaving, group=self.group)
            sent, received = torch.stack([leaving.sum(1), coming.sum(1)]).tolist()
        r = sum(received)
        to_experts = _Way(self.group, sent, received, sort_after=_interchange(coming, r))
        to_sources = _Way(self.group, received, sent, sort_before=_interchange(coming.t(), r))
        travelling = _Travelling(to_experts, to_sources)
        return Dispatch(_Start.apply(travelling, rows, weights), travelling, coming.sum(0))


@dataclass(frozen=True)
class _Way:
    """From the sources to the experts, or back."""

    group: dist.ProcessGroup
    sent: Sequence[int]
    """Rows to each rank."""
    received: Sequence[int]
    """Rows from each rank."""
    sort_before: Tensor | None = None
    """The index that puts rows in the order of the ranks they go to; None where they are."""
    sort_after: Tensor | None = None
    """The index that puts rows, which come rank by rank, in the order that is wanted; None where they are."""

    def leave(self, rows: Tensor) -> "_Message":
        """Starts the exchange of rows [r, ...]."""
        leaving = _sorted(rows, self.sort_before).contiguous()
        coming = leaving.new_empty(sum(self.received), *rows.shape[1:])
        work = dist.all_to_all_single(coming, leaving, self.received, self.sent, group=self.group, async_op=True)
        return _Message(work, leaving, coming, self.sort_after)


@dataclass(frozen=True)
class _Message:
    work: Any
    leaving: Tensor
    """Kept, so that it is not freed before it has left."""
    coming: Tensor
    sort_after: Tensor | None

    def wait(self) -> Tensor:
        with naming_the_missing("expert exchange"):
            self.work.wait()
        return _sorted(self.coming, self.sort_after)


@dataclass
class _Travelling:
    """Tensors on their way there, later their gradients on the way back."""

    there: _Way
    back: _Way
    messages: list[_Message] = field(default_factory=list)

    def leave(self, way: _Way, tensors: Sequence[Tensor]) -> None:
        self.messages = [way.leave(tensor) for tensor in tensors]

    def arrive(self) -> tuple[Tensor, ...]:
        messages, self.messages = self.messages, []
        return tuple(message.wait() for message in messages)


@dataclass(frozen=True)
class Dispatch:
    """Rows on their way to their experts."""

    ticket: Tensor
    travelling: _Travelling
    counts: Tensor

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows for this rank's experts [r', d], their weights [r'], and how many are for each, [E/R] int64.

        They are sorted by expert, those of one expert by source rank, then in the source's order.
        """
        rows, weights = _Wait.apply(self.ticket, self.travelling)
        return rows, weights, self.counts

    def send_back(self, y: Tensor) -> "Return":
        """Sets out what the experts made of the rows, y [r', o] in their order, towards their sources."""
        travelling = _Travelling(self.travelling.back, self.travelling.there)
        return Return(_Start.apply(travelling, y), travelling)


@dataclass(frozen=True)
class Return:
    """What the experts made of this rank's rows, on its way back."""

    ticket: Tensor
    travelling: _Travelling

    def wait(self) -> Tensor:
        """[r, o], in the order of the rows that set out."""
        (y,) = _Wait.apply(self.ticket, self.travelling)
        return y


class _Start(torch.autograd.Function):
    """Forward starts the exchange, backward waits for that of the gradients, which `_Wait.backward` started."""

    @staticmethod
    def forward(ctx: Any, travelling: _Travelling, *tensors: Tensor) -> Tensor:
        ctx.travelling = travelling
        travelling.leave(travelling.there, tensors)
        # A ticket ties the two nodes together. It has no elements, since r here and there differ.
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.travelling.arrive()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, travelling: _Travelling) -> tuple[Tensor, ...]:
        ctx.travelling = travelling
        return travelling.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.travelling.leave(ctx.travelling.back, grads)
        return grads[0].new_empty(0), None


def _sorted(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _interchange(lengths: Tensor, rows: int) -> Tensor | None:
    """Rows lie in runs of lengths [i, j], ordered by i, then by j: the index [rows] int64 that orders them by j, then by i.

    None where that is the same order. `rows`, their number, spares the host a wait.
    """
    if 1 in lengths.shape:
        return None
    before, after = lengths.flatten(), lengths.t().flatten()
    begins = (before.cumsum(0) - before).view(lengths.shape).t().flatten()
    moved_by = begins - (after.cumsum(0) - after)
    return torch.arange(rows, device=lengths.device) + moved_by.repeat_interleave(after, output_size=rows)


class ExpertCapacity:
    """Which tokens an expert takes when it takes only so many of a micro-step: the first, by sequence and place in it.

    The ranks of `group` hold the micro-step, cp innermost: sequences of lower dp ranks come first, and `layout` says who has which
    segments of each. Without a group this rank has all of it. The tokens that are taken do not depend on the mesh.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup | None = None) -> None:
        self.layout, self.group = layout, group
        self.dp_rank, self.cp_rank = divmod(dist.get_rank(group) if group is not None else 0, layout.ranks)

    def keep(self, chosen: Tensor, sequences: int, limit: int, experts: int) -> Tensor:
        """Which choices to keep, [t, k] bool, so that each expert has `limit` tokens over all ranks at most.

        chosen [t, k] int64, each token's experts, all different, in 0 .. experts - 1; the tokens are `sequences` rows, in each of
        which this rank's segments follow one another.
        """
        hits = torch.zeros(len(chosen), experts, dtype=torch.int32, device=chosen.device).scatter_(1, chosen, 1)
        # Of one segment of one sequence after another.
        hits = hits.view(sequences * self.layout.segments_per_rank, -1, experts)
        up_to_here = hits.cumsum(1, dtype=torch.int32)
        place = self._before(up_to_here[:, -1], sequences)[:, None] + up_to_here
        return place.view(-1, experts).gather(1, chosen) <= limit

    def _before(self, counts: Tensor, sequences: int) -> Tensor:
        """Hits in the segments here, [b m, E] -> hits in all that come before each of them, [b m, E]."""
        if self.group is None:
            return counts.cumsum(0, dtype=counts.dtype) - counts
        of_all = counts.new_empty(dist.get_world_size(self.group) * len(counts), counts.shape[1])
        with naming_the_missing("expert capacity"):
            gather_single(of_all, counts.contiguous(), self.group)
        cp, m = self.layout.ranks, self.layout.segments_per_rank
        # [dp, cp, b, m, E], as it came, to [dp b, n, E] in the order of sequences and segments.
        by_sequence = of_all.view(-1, cp, sequences, m, counts.shape[1]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        in_order = by_sequence[:, [rank * m + place for rank, place in self.layout.places]]
        before = in_order.flatten(0, 1).cumsum(0, dtype=counts.dtype).view_as(in_order) - in_order
        own = before[self.dp_rank * sequences : (self.dp_rank + 1) * sequences, self.layout.segments(self.cp_rank)]
        return own.flatten(0, 1)
