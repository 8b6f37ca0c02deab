"""The tokens just before each segment, which a short causal convolution needs: point to point, with the gradient's way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout


class SequenceHalo:
    """Hands the last tokens of each segment to the one after it, wherever that lies."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.owners, self.group = layout.owners, group
        self.rank = dist.get_rank(group)
        self.own = layout.segments(self.rank)
        self.segments = layout.segments_per_rank

    def exchange(self, tails: Tensor) -> Tensor:
        """The last tokens of each segment here, [b, m, w, c] -> those before each segment here; zeros before the first."""
        return _Exchange.apply(tails, self)

    def pass_on(self, tensors: Tensor, step: int) -> Tensor:
        """Segment i's tensor [b, m, ...] goes to segment i + step; what comes to the segments here, zeros where nothing does."""
        out = torch.zeros_like(tensors)
        operations, arriving = [], []
        for place, segment in enumerate(self.own):
            target, source = segment + step, segment - step
            if 0 <= target < len(self.owners):
                if self.owners[target] == self.rank:
                    out[:, self.own.index(target)] = tensors[:, place]
                else:
                    operations.append(self._operation(dist.isend, tensors[:, place].contiguous(), target, target))
            if 0 <= source < len(self.owners) and self.owners[source] != self.rank:
                buffer = torch.empty_like(tensors[:, place], memory_format=torch.contiguous_format)
                operations.append(self._operation(dist.irecv, buffer, source, segment))
                arriving.append((place, buffer))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for place, buffer in arriving:
            out[:, place] = buffer
        return out

    def _operation(self, kind: Any, buffer: Tensor, segment: int, tag: int) -> dist.P2POp:
        return dist.P2POp(kind, buffer, group=self.group, group_peer=self.owners[segment], tag=tag)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tails: Tensor, halo: SequenceHalo) -> Tensor:
        ctx.halo = halo
        return halo.pass_on(tails, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.halo.pass_on(grad, -1), None
