"""Norm layers."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels.norm import add_rms_norm, gated_group_rms_norm, rms_norm
from .initialization import Initializers, ones
from .sharding import ROWS, Sharding


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, with a weight."""

    initializers: ClassVar[Initializers] = {"weight": ones}

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., d] -> [..., d]; with a residual, also [..., d]: the norm of x added to it, and the sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class GatedGroupRMSNorm(nn.Module):
    """Mamba-2's: gate, then an RMS norm within each group of channels.

    sum_over_group is None, or adds sums of squares up over the ranks that hold parts of one group.
    """

    sharding: ClassVar[Sharding] = {"weight": ROWS}
    initializers: ClassVar[Initializers] = {"weight": ones}

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.groups, self.group_size, self.eps = groups, channels // groups, eps
        self.sum_over_group: Callable[[Tensor], Tensor] | None = None

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and its gate z, [b, l, channels] -> [b, l, channels]."""
        return gated_group_rms_norm(y, z, self.weight, self.group_size, self.eps, self.sum_over_group)
