"""`kernels.attention.causal_attention` for one rank's tokens of a sharded sequence: Ulysses around a ring, or gathered keys."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.attention import Piece, RunningAttention, Span, attention_gradients, check_operands, cut, document_rows, flat
from ...kernels.documents import Documents
from ..collectives import gather_single, point_to_point, scatter_single
from ..failures import naming_the_missing
from ..layout import Layout
from .strategies import Strategy, ring_spans, ulysses_degree


class SequenceAttention:
    """Attends from this rank's queries to the keys of all ranks; the heads are those of this tp rank, taken from the tensors.

    degree: how many neighbouring ranks exchange heads under usp; None: as many as divide heads and ranks.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup, strategy: Strategy, degree: int | None = None) -> None:
        self.layout, self.group, self.strategy, self.degree = layout, group, strategy, degree
        self.rank = dist.get_rank(group)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """q [b, l, h, e], k and v [b, l, hk, e] of this rank's segments -> [b, l, h, e]. documents: of the whole sequences.

        Raises ValueError, on every rank alike, for shapes, heads or documents that do not fit.
        """
        check_operands(q, k, v)
        u = ulysses_degree(self.strategy, self.layout.ranks, q.shape[2], self.degree)
        length = q.shape[1] * self.layout.ranks
        spans = ring_spans(self.layout, u, length)
        rows = document_rows(documents, q.shape[0], length)
        if u == 1:
            return self._attend(q, k, v, spans, rows, u)
        exchange = _Exchange(self.layout, self.group, u)
        q, k, v = exchange.to_heads(q, k, v)
        return exchange.to_tokens(self._attend(q, k, v, spans, rows, u))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[Span, ...]], rows: Sequence[Sequence[int]], u: int
    ) -> Tensor:
        place = self.rank // u
        blocks: _Blocks = _Ring(self.group, u)
        lots = [spans[(place - step) % len(spans)] for step in range(len(spans))]
        if self.strategy == "allgather":
            blocks, lots = _Gathered(self.layout, self.group), [((0, q.shape[1] * self.layout.ranks),)]
        plan = [cut(spans[place], keys, rows) for keys in lots]
        return _Attend.apply(flat(q), torch.stack([k, v]), blocks, plan).view(q.shape)


class _Blocks(Protocol):
    """How the keys and values of other ranks come here, and gradients go back."""

    def visit(self, kv: Tensor) -> Iterator[Tensor]:
        """This rank's [2, b, l, hk, e] -> blocks of the same kind, one after another."""

    def give_back(self, gradients: Iterable["_Gradients"], kv: Tensor) -> Tensor:
        """This rank's gradients of the visiting blocks, as they are computed -> the sum of all ranks' of this rank's `kv`."""


_Gradients = tuple[Tensor | None, Tensor | None]
"""Of the keys and values of a block, [b l, hk, e]; None where no query sees them."""


class _Attend(torch.autograd.Function):
    @staticmethod
    @naming_the_missing("attention")
    def forward(ctx: Any, q: Tensor, kv: Tensor, blocks: _Blocks, plan: list[list[Piece]]) -> Tensor:
        """q [b l, h, e], this rank's keys and values [2, b, l, hk, e], the pieces for each block -> [b l, h, e]."""
        running = RunningAttention(q)
        for block, pieces in zip(blocks.visit(kv), plan, strict=True):
            k, v = block.flatten(1, 2)
            running.add(k, v, pieces)
        out, lse = running.result()
        ctx.save_for_backward(q, kv, out, lse)
        ctx.blocks, ctx.plan = blocks, plan
        return out

    @staticmethod
    @naming_the_missing("attention")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        dq = _wide_zeros(q)

        def gradients() -> Iterator[_Gradients]:
            for block, pieces in zip(ctx.blocks.visit(kv), ctx.plan, strict=True):
                k, v = block.flatten(1, 2)
                part, dk, dv = attention_gradients(dout, q, k, v, out, lse, pieces)
                if part is not None:
                    dq.add_(part)
                yield dk, dv

        dkv = ctx.blocks.give_back(gradients(), kv)
        return dq.to(q.dtype), dkv.to(kv.dtype), None, None


class _Ring:
    """Keys and values go round the ranks that hold the same heads, u apart; their gradients follow them and come home."""

    def __init__(self, group: dist.ProcessGroup, u: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group, self.places = group, ranks // u
        self.next, self.previous = (rank + u) % ranks, (rank - u) % ranks

    def visit(self, kv: Tensor) -> Iterator[Tensor]:
        """This rank's own block first, then that of the rank before, ...; the next travels while the caller works on one."""
        for _ in range(self.places - 1):
            arrived = self._pass_on(kv, 0)
            yield kv
            kv = arrived()
        yield kv

    def give_back(self, gradients: Iterable[_Gradients], kv: Tensor) -> Tensor:
        """The sum goes round one step behind the block that it belongs to, and one step more, home."""
        arrived: Callable[[], Tensor] = functools.partial(_wide_zeros, kv)
        for parts in gradients:
            total = arrived()
            _add(total, parts)
            arrived = self._pass_on(total, 1)
        return arrived()

    def _pass_on(self, tensor: Tensor, tag: int) -> Callable[[], Tensor]:
        """Starts sending to the next rank; what is returned waits for what the one before sends."""
        if self.places == 1:
            return lambda: tensor
        buffer = torch.empty_like(tensor)
        operations = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=self.next, tag=tag),
            dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=self.previous, tag=tag),
        ]
        works = point_to_point(operations, self.group)

        def arrived() -> Tensor:
            for work in works:
                work.wait()
            # What was sent lives as long as `operations`, which this keeps.
            operations.clear()
            return buffer

        return arrived


class _Gathered:
    """All keys and values come at once. They do so again in backward, since a layer may not keep what grows with L."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group

    def visit(self, kv: Tensor) -> Iterator[Tensor]:
        """One block, of the whole sequence."""
        gathered = kv.new_empty(self.layout.ranks, *kv.shape)
        # gloo wants the parts one after another along the first dim.
        gather_single(gathered.flatten(0, 1), kv, self.group)
        segments = gathered.unflatten(3, (self.layout.segments_per_rank, -1))
        yield torch.cat([segments[rank, :, :, place] for rank, place in self.layout.places], 2)

    def give_back(self, gradients: Iterable[_Gradients], kv: Tensor) -> Tensor:
        """One reduce-scatter, in fp32 at least."""
        ranks, own = self.layout.ranks, _wide_zeros(kv)
        parts = own.new_zeros(ranks, *own.shape)
        segments = parts.unflatten(3, (self.layout.segments_per_rank, -1))
        for whole in gradients:
            for i, part in enumerate(whole):
                if part is not None:
                    ordered = part.unflatten(0, (kv.shape[1], len(self.layout.places), -1))
                    for segment, (rank, place) in enumerate(self.layout.places):
                        segments[rank, i, :, place] += ordered[:, segment]
        scatter_single(own, parts.flatten(0, 1), self.group)
        return own


class _Exchange:
    """Ulysses among u neighbouring ranks of a group: from some tokens of all heads to all of their tokens for some heads."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup, u: int) -> None:
        self.group, self.u = group, u
        rank = dist.get_rank(group)
        first = rank - rank % u
        # The others of the group take part with nothing, which needs no groups beside the one at hand.
        self.share = [int(first <= peer < first + u) for peer in range(layout.ranks)]
        self.segments = layout.segments_per_rank
        self.order = [(owner - first, place) for owner, place in layout.places if first <= owner < first + u]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """q [b, l, h, e], k and v [b, l, hk, e] -> [b, u l, h / u, e] and [b, u l, lcm(hk, u) / u, e], in one message.

        Where there are fewer key heads than ranks, or they do not divide, each is sent to several.
        """
        repeats = math.lcm(k.shape[2], self.u) // k.shape[2]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        shares = [t.unflatten(2, (self.u, -1)) for t in (q, k, v)]
        mine = _ToHeads.apply(torch.cat(shares, 3).flatten(2, 3), self)
        return mine.split([share.shape[3] for share in shares], 2)

    def to_tokens(self, out: Tensor) -> Tensor:
        """[b, u l, h / u, e] -> [b, l, h, e]."""
        return _ToTokens.apply(out, self)

    def gather(self, x: Tensor) -> Tensor:
        """[b, l, u c, e] -> [b, u l, c, e], the tokens in the order of the sequence."""
        x = self._all_to_all(x.unflatten(2, (self.u, -1)).movedim(2, 0))
        runs = x.unflatten(2, (self.segments, -1))
        return torch.cat([runs[rank, :, place] for rank, place in self.order], 1)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather`, which, as it only moves numbers, is its adjoint too."""
        runs = x.unflatten(1, (len(self.order), -1))
        ranks = [[runs[:, i] for i, (owner, _) in enumerate(self.order) if owner == rank] for rank in range(self.u)]
        return self._all_to_all(torch.stack([torch.cat(own, 1) for own in ranks])).movedim(0, 2).flatten(2, 3)

    def _all_to_all(self, x: Tensor) -> Tensor:
        """[u, ...]: part i to the i-th rank, and what each sent here."""
        x = x.contiguous()
        out = torch.empty_like(x)
        with naming_the_missing("attention"):
            dist.all_to_all_single(out, x, self.share, self.share, group=self.group)
        return out


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.scatter(grad), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gather(grad), None


def _wide_zeros(like: Tensor) -> Tensor:
    """Where gradients add up: fp32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32), memory_format=torch.contiguous_format)


def _add(total: Tensor, parts: _Gradients) -> None:
    for sum_, part in zip(total, parts, strict=True):
        if part is not None:
            sum_ += part.view(sum_.shape)
