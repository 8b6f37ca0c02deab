"""SwiGLU's gate in PyTorch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rows import blocks


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """Arguments as `op.swiglu`."""
    return _SwiGLU.apply(gate, up, weights)


class _SwiGLU(torch.autograd.Function):
    """Keeps its arguments alone, and goes through them in blocks."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        g, u, w = _rows(gate), _rows(up), None if weights is None else weights.reshape(-1, 1)
        y = torch.empty_like(g)
        for at in blocks(*g.shape):
            y[at] = F.silu(g[at]).mul_(u[at]) if w is None else F.silu(g[at]).mul_(u[at]).mul_(w[at])
        return y.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weights = ctx.saved_tensors
        g, u, d, w = _rows(gate), _rows(up), _rows(dy), None if weights is None else weights.reshape(-1, 1)
        dg, du = torch.empty_like(g), torch.empty_like(u)
        dw = g.new_empty(0 if weights is None else len(g), 1)
        for at in blocks(*g.shape):
            silu, d_at = F.silu(g[at]), d[at]
            if w is not None:
                dw[at] = (silu * u[at]).mul_(d_at).sum(1, keepdim=True)
                d_at = d_at * w[at]
            dg[at] = torch.ops.aten.silu_backward(d_at * u[at], g[at])
            du[at] = silu.mul_(d_at)
        return dg.view(gate.shape), du.view(up.shape), None if weights is None else dw.view(weights.shape)


def _rows(x: Tensor) -> Tensor:
    """[..., hidden] -> [rows, hidden]."""
    return x.reshape(-1, x.shape[-1])
