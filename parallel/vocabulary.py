"""Embedding and cross entropy where each rank of the tp axis holds a run of the vocabulary's rows."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..kernels.cross_entropy import projected_cross_entropy_sum
from .collectives import gather_single, reduce_from, scatter_to


class VocabularyShards:
    """The two ends of a model whose vocabulary is cut into equal runs of rows over a group.

    sequence_parallel: embedded tokens, of which every rank has the ids, are shared out over the group.
    """

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool = False) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self.rank = dist.get_rank(group)

    def embed(self, ids: Tensor, rows: Tensor, padding: int | None = None) -> Tensor:
        """ids [b, l] over the whole vocabulary, rows [v, d] of this rank -> [b, l, d], the same on every rank, or a part of l.

        padding: a token whose row has no gradient.
        """
        local, here = self._local(ids, rows.shape[0])
        place = -1 if padding is None else padding - self.rank * rows.shape[0]
        part = F.embedding(local, rows, place if 0 <= place < rows.shape[0] else None) * here[..., None]
        return scatter_to(part, self.group, 1) if self.sequence_parallel else reduce_from(part, self.group)

    def projected_cross_entropy_sum(self, x: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """As `kernels.cross_entropy.projected_cross_entropy_sum`, from this rank's rows [v, d] and the x and labels of all.

        One message a chunk of tokens, of 12 bytes a token in fp32: a chunk takes milliseconds of matmul, so that a message costs
        next to nothing, where one for all chunks would need their logits kept, or computed twice.
        """
        return projected_cross_entropy_sum(x, rows, labels, self.rank * rows.shape[0], self._gather)

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

    def _gather(self, own: Tensor) -> Tensor:
        """This rank's [k, t] -> every rank's, [ranks, k, t]."""
        every = own.new_empty(dist.get_world_size(self.group), *own.shape)
        gather_single(every.flatten(0, 1), own, self.group)
        return every
