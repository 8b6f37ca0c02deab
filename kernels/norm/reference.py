"""RMS norms in PyTorch, with statistics in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rows import blocks


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
    return _GatedNorm.apply(y, z, weight, group_size, eps, sum_over_group)


class _GatedNorm(torch.autograd.Function):
    """Keeps its arguments and a number a group, and goes through the tokens in blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        weight: Tensor,
        group_size: int,
        eps: float,
        sum_over_group: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        gated = _Gated(y, z, group_size if sum_over_group is None else y.shape[-1])
        squares = gated.sums(lambda at: gated.product(at).square())
        if sum_over_group is not None:
            squares = sum_over_group(squares.view(*y.shape[:-1], 1)).view_as(squares)
        rstd = (squares / group_size + eps).rsqrt()
        out, wide = torch.empty_like(gated.y), weight.to(rstd.dtype).view(-1, gated.width)
        for at in gated.blocks():
            out[at] = gated.product(at).mul_(rstd[at]).mul_(wide)
        ctx.save_for_backward(y, z, weight, rstd)
        ctx.group_size, ctx.sum_over_group = group_size, sum_over_group
        return out.view(y.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, rstd = ctx.saved_tensors
        gated = _Gated(y, z, ctx.group_size if ctx.sum_over_group is None else y.shape[-1])
        wide, dout = weight.to(rstd.dtype).view(-1, gated.width), dout.reshape(gated.y.shape)
        dots = gated.sums(lambda at: gated.product(at).mul_(rstd[at]).mul_(dout[at]).mul_(wide))
        if ctx.sum_over_group is not None:
            dots = ctx.sum_over_group(dots.view(*y.shape[:-1], 1)).view_as(dots)
        dots = dots / ctx.group_size
        dy, dz, dweight = torch.empty_like(gated.y), torch.empty_like(gated.y, dtype=z.dtype), torch.zeros_like(wide)
        for at in gated.blocks():
            y_f, z_f, silu = gated.operands(at)
            normed, d = (y_f * silu).mul_(rstd[at]), dout[at].to(rstd.dtype)
            dweight += (d * normed).sum(0)
            dgated = (d * wide).sub_(normed.mul_(dots[at])).mul_(rstd[at])
            dy[at] = dgated * silu
            dz[at] = torch.ops.aten.silu_backward(dgated.mul_(y_f), z_f)
        return dy.view(y.shape), dz.view(z.shape), dweight.view(-1).to(weight.dtype), None, None, None


class _Gated:
    """y silu(z) of all tokens, [t, groups, width], in fp32 at least."""

    def __init__(self, y: Tensor, z: Tensor, width: int) -> None:
        self.width, self.wide = width, torch.promote_types(y.dtype, torch.float32)
        self.y, self.z = (t.reshape(-1, y.shape[-1] // width, width) for t in (y, z))

    def blocks(self) -> Any:
        """Of tokens."""
        return blocks(len(self.y), self.y.shape[1] * self.width)

    def operands(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """y, z and silu(z)."""
        z = self.z[at].to(self.wide)
        return self.y[at].to(self.wide), z, F.silu(z)

    def product(self, at: slice) -> Tensor:
        """y silu(z)."""
        y, _, silu = self.operands(at)
        return silu.mul_(y)

    def sums(self, of: Callable[[slice], Tensor]) -> Tensor:
        """Over each group, [t, groups, 1]."""
        out = self.y.new_empty(*self.y.shape[:2], 1, dtype=self.wide)
        for at in self.blocks():
            torch.sum(of(at), -1, keepdim=True, out=out[at])
        return out
