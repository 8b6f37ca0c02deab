"""SwiGLU's gate in PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """Arguments as `op.swiglu`."""
    y = F.silu(gate) * up
    return y if weights is None else y * weights[..., None]
