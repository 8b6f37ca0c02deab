"""Embedding and cross entropy where each rank of the tp axis holds a run of the vocabulary's rows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..kernels.cross_entropy import IGNORED
from .collectives import reduce_from


class VocabularyShards:
    """The two ends of a model whose vocabulary is cut into equal runs of rows over a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)

    def embed(self, ids: Tensor, rows: Tensor) -> Tensor:
        """ids [...] over the whole vocabulary, rows [v, d] of this rank -> [..., d], the same on every rank."""
        local, here = self._local(ids, rows.shape[0])
        return reduce_from(F.embedding(local, rows) * here[..., None], self.group)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As `kernels.cross_entropy.cross_entropy_sum`, from this rank's logits [..., v]; the same scalar on every rank."""
        return _CrossEntropySum.apply(logits, labels, self)

    def whole(self, logits: Tensor) -> Tensor:
        """This rank's logits [..., v] -> those of the whole vocabulary; no gradient."""
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, logits.detach().contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def _local(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Row numbers on this rank (0 for those elsewhere), and which are here."""
        local = ids - self.rank * rows
        here = (local >= 0) & (local < rows)
        return local * here, here


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shards: VocabularyShards) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = wide.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=shards.group)
        wide = wide - highest[..., None]
        local, here = shards._local(labels, logits.shape[-1])
        # Two sums in one message: of the exponentials, and the label's own logit, which only one rank has.
        sums = torch.stack([wide.exp().sum(-1), wide.gather(-1, local[..., None]).squeeze(-1) * here])
        dist.all_reduce(sums, group=shards.group)
        log_total = sums[0].log()
        counted = labels != IGNORED
        ctx.save_for_backward(wide.sub_(log_total[..., None]).exp_(), local, here, counted)
        ctx.dtype = logits.dtype
        return ((log_total - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, local, here, counted = ctx.saved_tensors
        dlogits = probabilities.scatter_add(-1, local[..., None], -here[..., None].to(probabilities.dtype))
        return (dlogits * (grad * counted[..., None])).to(ctx.dtype), None, None
