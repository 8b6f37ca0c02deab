"""Routing and the experts' matrices in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def route(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, rows and counts of `op.Routing`."""
    order = chosen.flatten().argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    return order, rows.view(chosen.shape), torch.bincount(chosen.flatten(), minlength=experts)


class Permute(torch.autograd.Function):
    """`op.permute`, whose gradient is `op.unpermute`: autograd's own adds rows up one at a time, 5 times as slow on the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(order, rows)
        return _spread(x, order, rows)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gather(dy, ctx.saved_tensors[1]), None, None


class Unpermute(torch.autograd.Function):
    """`op.unpermute`, whose gradient is `op.permute`."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(order, rows)
        return _gather(y, rows)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None, None]:
        return _spread(dx, *ctx.saved_tensors), None, None


def _spread(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, order // rows.shape[1])


def _gather(y: Tensor, rows: Tensor) -> Tensor:
    return y.index_select(0, rows.flatten()).unflatten(0, rows.shape).sum(1)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Arguments as `op.grouped_linear`; one product an expert, for which the host waits for the counts."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, expert) for part, expert in zip(parts, weight.unbind(), strict=True)])
