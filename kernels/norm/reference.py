"""RMS norms in PyTorch, with statistics in fp32."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `op.rms_norm`."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `op.add_rms_norm`."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def gated_group_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_over_group: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """As `op.gated_group_rms_norm`, of arguments that fit."""
    gated = y.float() if y.dtype.itemsize < 4 else y
    gated = gated * F.silu(z.to(gated.dtype))
    parts = gated.unflatten(-1, (-1, y.shape[-1] if sum_over_group else group_size))
    squares = parts.square().sum(-1, keepdim=True)
    if sum_over_group is not None:
        squares = sum_over_group(squares.squeeze(-1)).unsqueeze(-1)
    normed = parts * (squares / group_size + eps).rsqrt()
    return (normed.flatten(-2) * weight.to(normed.dtype)).to(y.dtype)
