"""Cross entropy and the projection to logits as one operation, which never holds the logits of all tokens.

Tokens go through in chunks. Forward already turns a chunk's logits into their gradient and multiplies that into the gradients
of the hidden states and of the weight, so that the logits are computed once and kept by nobody; backward only scales by the
gradient that comes in (Liger Kernel does so too, arXiv 2410.10989). Under activation checkpointing forward runs twice, with all
of this. What it holds from forward to backward is the gradient of the hidden states, in their dtype (so in 16 bits it is rounded
before and after it is scaled), and of the weight, in fp32 or wider: 4·v·d bytes, also where the weight is bf16 (2.1 GB for
131,072 rows of 4096), which backward casts once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import dispatch
from . import reference
from .reference import IGNORED

Gather = Callable[[Tensor], Tensor]

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Of a chunk's logits, at most. Each chunk reads and writes the weight's fp32 gradient once: on a GPU of 790 TFLOP/s and 4.3 TB/s
that traffic takes as long as the matmul beside it with chunks of 735 tokens. 256 MiB are 1024 tokens of 131,072 bf16 logits (not
yet measured on a GPU). On the CPU, 8192 tokens of 256 channels and 32,768 fp32 logits took 6.3 s of processor time, with whole
logits 8.0 s, and 0.2 GB of memory instead of 3.1."""


def projected_cross_entropy_sum(
    x: Tensor, weight: Tensor, labels: Tensor, first_row: int = 0, gather: Gather | None = None
) -> Tensor:
    """`cross_entropy_sum` of the logits x·weightᵀ, differentiable once in x and weight, without these logits in memory.

    x          [..., d] bf16, fp16, fp32 or fp64
    weight     [v, d] in x's dtype
    labels     [...] integers; IGNORED counts nothing, any other that is no row of the vocabulary makes the loss inf
    first_row  where the vocabulary's rows are cut over ranks: the place of this rank's first
    gather     and how a tensor [3, t] of this rank becomes [ranks, 3, t], those of all; it is called once for every chunk

    Returns a scalar in fp32, or fp64 for fp64, the same on every rank. The gradient of x is then this rank's part of a sum.
    Raises ValueError for tensors that do not fit one another.
    """
    _check(x, weight, labels)
    triton = dispatch.fused("cross_entropy", x.device, _obstacle(x))
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    flat, places = x.reshape(-1, x.shape[-1]), labels.reshape(-1).long().contiguous()
    return _ProjectedCrossEntropySum.apply(flat, weight, places, first_row, gather, triton, wanted)


def _check(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    name = "projected_cross_entropy_sum"
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"{name}: x is {x.dtype} {list(x.shape)}, allowed: floating point [..., d]")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{name}: weight is {list(weight.shape)}, allowed with x {list(x.shape)}: [v, {x.shape[-1]}]")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"{name}: weight is {weight.dtype} on {weight.device}, allowed: as x, {x.dtype} on {x.device}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"{name}: labels are {list(labels.shape)}, allowed with x {list(x.shape)}: {list(x.shape[:-1])}")
    if labels.is_floating_point() or labels.device != x.device:
        raise ValueError(f"{name}: labels are {labels.dtype} on {labels.device}, allowed: integers on {x.device}")


def _obstacle(x: Tensor) -> str | None:
    if x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"x is {x.dtype}, allowed for the Triton kernels: bf16, fp16, fp32"


class _ProjectedCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        first_row: int,
        gather: Gather | None,
        triton: bool,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if wanted[1] else None
        size = chunk_size(len(x), len(weight) * x.element_size(), x.device.type)
        for start in range(0, len(x), size):
            here = slice(start, start + size)
            logits = F.linear(x[here], weight)
            losses[here], dlogits = _softmax(logits, labels[here], first_row, gather, triton, any(wanted))
            if dx is not None:
                torch.mm(dlogits, weight, out=dx[here])
            if dweight is not None:
                _add_product(dweight, dlogits, x[here])
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = x.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (None if kept is None else _scaled(kept, grad, ctx.dtype) for kept in ctx.saved_tensors)
        return dx, dweight, None, None, None, None, None


def chunk_size(tokens: int, row_bytes: int, device: str) -> int:
    """Tokens of a chunk, for logits of row_bytes a token: chunks of about one size, in whole tiles of 128 tokens where they fit."""
    most = max(1, CHUNK_BYTES[device] // row_bytes)
    even = math.ceil(tokens / max(1, math.ceil(tokens / most)))
    return max(1, min(most, math.ceil(even / 128) * 128))


def _softmax(
    logits: Tensor, labels: Tensor, first_row: int, gather: Gather | None, triton: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Logits [t, v], which are used up -> the tokens' losses [t] and, where wanted, the gradient of their sum [t, v]."""
    dtype = logits.dtype
    if triton:
        own = _statistics(logits, labels, first_row)
    else:
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        own = reference.exponentiate_(logits, labels, first_row)
    every = own[None] if gather is None else gather(own)
    highest = every[:, 0].amax(0)
    total = (every[:, 1] * (every[:, 0] - highest).exp()).sum(0)
    counted = labels != IGNORED
    # The highest logit and the label's are subtracted first: where both are large, their log-sum-exp has lost the difference.
    losses = torch.where(counted, highest - every[:, 2].amax(0) + total.log(), 0.0)
    if gradient:
        scale = torch.where(counted, (own[0] - highest).exp() / total, 0.0)
        if triton:
            _gradient_(logits, labels, own[0], scale, first_row)
        else:
            reference.gradient_(logits, scale, labels, first_row)
    return losses, logits.to(dtype)


def _add_product(total: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """total [v, d] += dlogitsᵀ·x, in total's dtype."""
    if total.dtype == x.dtype:
        total.addmm_(dlogits.T, x)
    else:
        _add_wide_product_(total, dlogits, x)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · scale, rounded to dtype once: beside a 16-bit tensor a scale without dims would itself be rounded to 16 bits."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, scale.view(1, 1), out=out)


@torch.library.custom_op("baton::cross_entropy_statistics", mutates_args=())
def _statistics(logits: Tensor, labels: Tensor, first_row: int) -> Tensor:
    from . import fused

    return fused.statistics(logits, labels, first_row)


@_statistics.register_fake
def _(logits: Tensor, labels: Tensor, first_row: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("baton::cross_entropy_gradient_", mutates_args=("logits",))
def _gradient_(logits: Tensor, labels: Tensor, highest: Tensor, scale: Tensor, first_row: int) -> None:
    from . import fused

    fused.gradient_(logits, labels, highest, scale, first_row, IGNORED)


# An op of its own because torch.compile cannot trace addmm's out_dtype (pytorch issue 163880).
@torch.library.custom_op("baton::add_wide_product_", mutates_args=("total",))
def _add_wide_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [v, d] fp32 += left [t, v]ᵀ · right [t, d] in 16 bits, whose sum is rounded nowhere but in fp32."""
    if total.device.type == "cuda":
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))
