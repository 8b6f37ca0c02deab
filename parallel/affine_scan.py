"""State passing: the exclusive scan of affine maps over segments of the sequence that lie on different ranks.

Over a segment a recurrence is S_out = T S_in + U. Maps compose, (T2, U2) after (T1, U1) = (T2 T1, T2 U1 + U2), so each rank
folds its tokens into one map a segment, the ranks exchange these, and each segment runs from the state that enters it:
exact for any number of ranks and any layout. The adjoint is the same scan in reverse, with the gradients of S_in for U.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.scan import exclusive_scan
from .collectives import all_gather
from .layout import Layout


class SequenceScan:
    """A `kernels.scan.Scan` over the ranks of a group: scalar transitions, each rank receives every segment's map."""

    sharded = True

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group
        self.segments = layout.segments_per_rank
        self.own = layout.segments(dist.get_rank(group))

    def forward(self, log_T: Tensor, U: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """log_T [b, s, h], U [b, s, h, ...], s a multiple of the segments here -> S_in as U, and the final state [b, h, ...].

        Raises ValueError for an initial state: the whole sequence's is not a rank's to give.
        """
        if initial is not None:
            raise ValueError("SequenceScan: an initial state over ranks is not available yet")
        return self._scan(log_T, U, reverse=False)

    def backward(self, log_T: Tensor, dS_in: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of U, and of the initial state. Raises ValueError for a gradient of the final state."""
        if dfinal is not None:
            raise ValueError("SequenceScan: a gradient of the final state over ranks is not available yet")
        return self._scan(log_T, dS_in, reverse=True)

    def _scan(self, log_T: Tensor, U: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        b = U.shape[0]
        log_T_runs, U_runs = (t.reshape(b * self.segments, -1, *t.shape[2:]) for t in (log_T, U))
        folded = exclusive_scan(log_T_runs, U_runs, None, reverse)[1].unflatten(0, (b, -1))
        decay = log_T_runs.sum(1).unflatten(0, (b, -1))
        entering, last = exclusive_scan(*self._gather(decay, folded), None, reverse)
        states = exclusive_scan(log_T_runs, U_runs, entering[:, self.own].flatten(0, 1), reverse)[0]
        return states.reshape(U.shape), last

    def _gather(self, log_T: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of this rank's segments, [b, m, h] and [b, m, h, ...] -> those of all segments in sequence order."""
        packed = torch.cat([U.flatten(3), log_T[..., None]], -1)
        gathered = all_gather(packed, self.group)
        ordered = torch.stack([gathered[rank, :, place] for rank, place in self.layout.places], 1)
        return ordered[..., -1], ordered[..., :-1].unflatten(-1, U.shape[3:])
