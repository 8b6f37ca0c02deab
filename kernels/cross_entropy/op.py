"""Cross entropy summed over tokens, in fp32 or wider."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ over tokens of -log softmax(logits)[label]; labels equal to IGNORED count nothing.

    logits [..., v]; labels [...] integers. Returns a scalar in fp32, or fp64 for fp64 logits.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
