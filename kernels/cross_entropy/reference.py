"""Cross entropy in PyTorch: its definition over whole logits, and the parts of a chunk's softmax that `op` puts together."""

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


def exponentiate_(logits: Tensor, labels: Tensor, first_row: int) -> Tensor:
    """Replaces logits [t, v] by exp(logits - their row's highest), and returns the rows' statistics [3, t].

    These are the highest logit, the sum of the exponentials, and the label's own logit: -inf where the label is not one of the v
    rows of the vocabulary from first_row on. logits are fp32 or fp64, so are the statistics; labels [t] int64.
    """
    local, here = _local(labels, first_row, logits.shape[1])
    own = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~here, float("-inf"))
    highest = logits.amax(1)
    logits.sub_(highest[:, None]).exp_()
    return torch.stack([highest, logits.sum(1), own])


def gradient_(exponentials: Tensor, scale: Tensor, labels: Tensor, first_row: int) -> None:
    """Replaces what `exponentiate_` left [t, v] by the loss's gradient, exponentials · scale - (1 at the label); scale [t]."""
    local, here = _local(labels, first_row, exponentials.shape[1])
    exponentials.mul_(scale[:, None])
    exponentials.scatter_add_(1, local[:, None], -here[:, None].to(exponentials.dtype))


def _local(labels: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """The labels' places among the rows, 0 for those elsewhere, and which are here."""
    local = labels - first_row
    here = (local >= 0) & (local < rows)
    return local * here, here
