"""Causal attention over a sharded sequence, exact: keys and values are gathered, each segment's queries see those before them."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.attention import causal_attention
from .collectives import all_gather
from .layout import Layout


class SequenceAttention:
    """`kernels.attention.causal_attention` for the tokens of this rank; the gradients of keys and values are reduce-scattered."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group
        self.own = layout.segments(dist.get_rank(group))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, l, h, e], k and v [b, l, hk, e] of this rank's segments -> [b, l, h, e]."""
        run = q.shape[1] // self.layout.segments_per_rank
        keys, values = self._gather(torch.stack([k, v])).unbind()
        outs = [
            causal_attention(queries, keys[:, : (segment + 1) * run], values[:, : (segment + 1) * run])
            for segment, queries in zip(self.own, q.split(run, 1), strict=True)
        ]
        return torch.cat(outs, 1)

    def _gather(self, kv: Tensor) -> Tensor:
        """[2, b, l, hk, e] of this rank -> [2, b, L, hk, e] in sequence order."""
        gathered = all_gather(kv, self.group)
        segments = gathered.unflatten(3, (self.layout.segments_per_rank, -1))
        return torch.cat([segments[rank, :, :, place] for rank, place in self.layout.places], 2)
