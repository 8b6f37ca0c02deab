"""RMS norms with statistics in fp32."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dim; x [..., d], weight [d] (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def gated_group_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_over_group: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Gate first, then an RMS norm within each group of channels, as Mamba-2 has it: w · RMS_g(y · silu(z)).

    y, z, weight    [b, l, c], [b, l, c], [c]
    group_size      channels of a whole group
    sum_over_group  given when the c channels here are a part of one group: adds sums of squares [b, l, 1] up over its parts

    Returns [b, l, c] in y's dtype. Raises ValueError when c is neither whole groups nor, with sum_over_group, part of one.
    """
    channels = y.shape[-1]
    if channels % group_size and sum_over_group is None:
        raise ValueError(f"gated_group_rms_norm: {channels} channels are no whole groups of {group_size}")
    gated = y.float() if y.dtype.itemsize < 4 else y
    gated = gated * F.silu(z.to(gated.dtype))
    parts = gated.unflatten(-1, (-1, channels if sum_over_group else group_size))
    squares = parts.square().sum(-1, keepdim=True)
    if sum_over_group is not None:
        squares = sum_over_group(squares.squeeze(-1)).unsqueeze(-1)
    normed = parts * (squares / group_size + eps).rsqrt()
    return (normed.flatten(-2) * weight.to(normed.dtype)).to(y.dtype)
