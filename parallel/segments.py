"""The segments of a sequence on the ranks of a group, and what one hands to another point to point."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import point_to_point


@dataclass(frozen=True)
class Segments:
    """owners[i] is the rank of the group that holds segment i; a rank holds its segments in ascending order."""

    owners: tuple[int, ...]
    group: dist.ProcessGroup

    @functools.cached_property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group)

    @functools.cached_property
    def ranks(self) -> int:
        """The size of the group."""
        return dist.get_world_size(self.group)

    @functools.cached_property
    def own(self) -> list[int]:
        """The segments of this rank."""
        return self.of(self.rank)

    def of(self, rank: int) -> list[int]:
        """The segments of a rank."""
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many segments each rank holds."""
        return [self.owners.count(rank) for rank in range(self.ranks)]

    @functools.cached_property
    def order(self) -> list[int]:
        """Sorts what comes rank by rank, each rank's segments ascending, into the order of the sequence."""
        by_rank = sorted(range(len(self.owners)), key=lambda i: (self.owners[i], i))
        return sorted(range(len(self.owners)), key=by_rank.__getitem__)

    def pass_on(self, outgoing: dict[int, Tensor], sources: Iterable[int], step: int, like: Tensor) -> "Passing":
        """Each segment of `sources`, the same on all ranks, hands its tensor, shaped as `like`, to the one `step` after it.

        outgoing has the tensors of the sources here. The result's `wait` gives what came, by the segment it came to.
        """
        operations: list[dist.P2POp] = []
        arrived: dict[int, Tensor] = {}
        for source in sources:
            target = source + step
            giver, taker = self.owners[source], self.owners[target]
            if giver == taker == self.rank:
                arrived[target] = outgoing[source]
            elif giver == self.rank:
                operations.append(self._operation(dist.isend, outgoing[source].contiguous(), taker, target))
            elif taker == self.rank:
                arrived[target] = torch.empty_like(like, memory_format=torch.contiguous_format)
                operations.append(self._operation(dist.irecv, arrived[target], giver, target))
        return Passing(point_to_point(operations, self.group), operations, arrived)

    def _operation(self, kind: Any, buffer: Tensor, peer: int, tag: int) -> dist.P2POp:
        return dist.P2POp(kind, buffer, group=self.group, group_peer=peer, tag=tag)


@dataclass(frozen=True)
class Passing:
    """Messages between segments that are on their way."""

    works: Sequence[Any]
    operations: Sequence[dist.P2POp]
    """Kept, so that no buffer is freed before its message has left."""
    arrived: dict[int, Tensor]

    def wait(self) -> dict[int, Tensor]:
        """What came, by the segment it came to."""
        for work in self.works:
            work.wait()
        return self.arrived
