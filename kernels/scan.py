"""Exclusive scan of affine maps along one device: what `parallel.affine_scan` continues over ranks.

Over a run of tokens a recurrence is S_out = T S_in + U. Given every run's (T, U) in sequence order, the scan gives each run
its S_in. The adjoint is the same scan in the reverse direction, with the gradients of S_in in U's place.
"""

from typing import Protocol

import torch
from torch import Tensor


class Scan(Protocol):
    """What an operation with a recurrence is given to pass its states on; `LocalScan` is the plain one.

    segments: how many contiguous runs of the sequence the tokens at hand are made of (their maps come in sequence order).
    sharded: whether the sequence goes on, on other ranks.
    """

    segments: int
    sharded: bool

    def forward(self, log_T: Tensor, U: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """log_T [b, s, h], U [b, s, h, ...], initial [b, h, ...] -> S_in as U, and the final state as initial."""

    def backward(self, log_T: Tensor, dS_in: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
        """The adjoint: the gradients of U [b, s, h, ...] and of the initial state [b, h, ...]."""


class LocalScan:
    """All of the sequence is here, in one run."""

    segments = 1
    sharded = False

    def forward(self, log_T: Tensor, U: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        return exclusive_scan(log_T, U, initial)

    def backward(self, log_T: Tensor, dS_in: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
        return exclusive_scan(log_T, dS_in, dfinal, reverse=True)


def exclusive_scan(log_T: Tensor, U: Tensor, initial: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Scans over dim 1: log_T [b, s, h] (natural log, -inf for a reset), U [b, s, h, ...], initial [b, h, ...] or None (zero).

    Returns the state before each map, as U, and the state after the last, as initial. `reverse` starts from the end.
    """
    T = log_T.exp().reshape(*log_T.shape, *[1] * (U.dim() - log_T.dim()))
    out = torch.empty_like(U)
    state = torch.zeros_like(U[:, 0]) if initial is None else initial.to(U.dtype)
    order = range(U.shape[1])
    for i in reversed(order) if reverse else order:
        out[:, i] = state
        state = torch.addcmul(U[:, i], T[:, i], state)
    return out, state
