"""The tokens just before each segment, which a short causal convolution needs: point to point, with the gradient's way back."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.scan import without_memory
from .failures import naming_the_missing
from .layout import Layout
from .segments import Passing, Segments


def halo_messages(layout: Layout, rank: int, reverse: bool = False) -> int:
    """How many segments' last tokens a rank sends to others; in reverse, how many gradients of what came."""
    owners = layout.owners[::-1] if reverse else layout.owners
    return sum(giver == rank != taker for giver, taker in itertools.pairwise(owners))


class SequenceHalo:
    """Hands the last tokens of each segment to the one after it, wherever that lies."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.sequence = Segments(tuple(layout.owners), group)
        self.segments = layout.segments_per_rank

    def start(self, tails: Tensor) -> "Halo":
        """The last tokens of each segment here, [b, m, w, c], set out; computation goes on until `Halo.wait`."""
        travelling = _Travelling(self, tails.shape)
        return Halo(_Start.apply(tails, travelling), travelling)

    def start_last(self, inputs: Sequence[Tensor], reach: int) -> "Halo":
        """As `start`, of the last `reach` tokens of each segment of the inputs [b, l, c], side by side."""
        tails = [t.unflatten(1, (self.segments, -1))[:, :, -reach:] for t in inputs]
        return self.start(torch.cat(tails, -1))

    def pass_on(self, tensors: Tensor, step: int) -> Passing:
        """Segment i's tensor [b, m, ...] goes to segment i + step."""
        own, n = self.sequence.own, len(self.sequence.owners)
        outgoing = dict(zip(own, tensors.unbind(1), strict=True))
        sources = range(max(0, -step), min(n, n - step))
        return self.sequence.pass_on(outgoing, sources, step, tensors[:, 0])

    def stack(self, arrived: dict[int, Tensor], shape: torch.Size, like: Tensor) -> Tensor:
        """What came to the segments here, [b, m, ...]; zeros where nothing did."""
        out = like.new_zeros(shape)
        for place, segment in enumerate(self.sequence.own):
            if segment in arrived:
                out[:, place] = arrived[segment]
        return out


@dataclass
class _Travelling:
    """What is on its way, first forwards, later backwards."""

    halo: SequenceHalo
    shape: torch.Size
    passing: Passing | None = None

    def wait(self, like: Tensor) -> Tensor:
        assert self.passing is not None
        with naming_the_missing("conv halo"):
            arrived, self.passing = self.passing.wait(), None
        return self.halo.stack(arrived, self.shape, like)


@dataclass(frozen=True)
class Halo:
    """The tokens before each segment, on their way."""

    ticket: Tensor
    travelling: _Travelling

    def wait(self) -> Tensor:
        """The tokens before each segment here, [b, m, w, c]; zeros before the first."""
        return _Wait.apply(self.ticket, self.travelling)


class _Start(torch.autograd.Function):
    """Forward starts the exchange, backward waits for that of the gradients, which `_Wait.backward` started."""

    @staticmethod
    def forward(ctx: Any, tails: Tensor, travelling: _Travelling) -> Tensor:
        ctx.travelling = travelling
        travelling.passing = travelling.halo.pass_on(tails, 1)
        return without_memory(tails)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.travelling.wait(grad), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, travelling: _Travelling) -> Tensor:
        ctx.travelling = travelling
        return travelling.wait(ticket)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.travelling.passing = ctx.travelling.halo.pass_on(grad, -1)
        return grad, None
