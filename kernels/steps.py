"""Steps of the scans, clamp(softplus(dt + bias), low, high), in PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LIMIT = (0.0, math.inf)


def raw_steps(dt: Tensor, bias: Tensor | None) -> Tensor:
    """dt [..., h] and bias [h] -> their sum, in fp32 at least."""
    raw = dt.to(torch.promote_types(dt.dtype, torch.float32))
    return raw if bias is None else raw + bias.to(raw.dtype)


def positive_steps(dt: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    """[..., h], in fp32 at least."""
    positive = F.softplus(raw_steps(dt, bias))
    return positive if (low, high) == NO_LIMIT else positive.clamp(low, high)


def slopes(dt: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    """The derivative of `positive_steps` by dt [..., h]: 0 beyond a limit."""
    raw = raw_steps(dt, bias)
    slope = torch.sigmoid(raw)
    if (low, high) == NO_LIMIT:
        return slope
    positive = F.softplus(raw)
    return slope * ((positive >= low) & (positive <= high))
