"""Depthwise causal convolution and SiLU in PyTorch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rows import blocks


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> Tensor:
    """As `causal_conv`, of arguments that fit."""
    return _Conv.apply(x, weight, bias, halo, positions)


class _Conv(torch.autograd.Function):
    """Keeps its arguments alone, and goes through the tokens in blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, halo, positions)
        runs = _Runs(x, weight, bias, halo, positions)
        y = torch.empty_like(runs.x)
        for at in runs.blocks():
            y[:, at] = F.silu(runs.sums(at))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: a forward that is computed again gives them once.
        x, weight, bias, halo, positions = ctx.saved_tensors
        runs = _Runs(x, weight, bias, halo, positions)
        dy, dpadded = dy.reshape(runs.x.shape), torch.zeros_like(runs.padded)
        dtaps = torch.zeros_like(runs.taps, dtype=torch.promote_types(weight.dtype, torch.float32))
        dbias = torch.zeros_like(dtaps[0])
        for at in runs.blocks():
            d = torch.ops.aten.silu_backward(dy[:, at], runs.sums(at))
            dbias += d.sum((0, 1))
            for back in range(runs.width):
                tap, seen = runs.width - 1 - back, runs.seen(at, back)
                dtaps[tap] += (d * seen).sum((0, 1))
                hidden = runs.hidden(at, back)
                visible = d if hidden is None else d.masked_fill(hidden, 0)
                dpadded[:, at.start + tap : at.stop + tap].addcmul_(visible, runs.taps[tap])
        dhalo, dx = dpadded.split([runs.width - 1, runs.x.shape[1]], 1)
        return (
            dx.reshape(x.shape),
            dtaps.T.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if halo is None else dhalo.reshape(halo.shape),
            None,
        )


class _Runs:
    """The runs of all sequences as sequences of their own, each after its halo."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> None:
        b, l, c = x.shape
        m, self.width = 1 if halo is None else halo.shape[1], weight.shape[1]
        # One after another: a stride would keep the processor from taking several numbers at once.
        self.taps, self.bias = weight.T.contiguous(), bias
        self.x = x.reshape(b * m, l // m, c)
        before = x.new_zeros(b, self.width - 1, c) if halo is None else halo.reshape(b * m, self.width - 1, c)
        self.padded = torch.cat([before, self.x], 1)
        self.positions = None if positions is None else positions.reshape(b * m, l // m, 1)

    def blocks(self) -> Any:
        """Of tokens."""
        return blocks(self.x.shape[1], self.x.shape[0] * self.x.shape[2])

    def hidden(self, at: slice, back: int) -> Tensor | None:
        """Which tokens have no token of their document so far back."""
        return None if self.positions is None or back == 0 else self.positions[:, at] < back

    def seen(self, at: slice, back: int) -> Tensor:
        """The inputs so far back."""
        inputs = self.padded[:, at.start + self.width - 1 - back : at.stop + self.width - 1 - back]
        hidden = self.hidden(at, back)
        # Not a product with 0: what a document must not see may be infinite.
        return inputs if hidden is None else inputs.masked_fill(hidden, 0)

    def sums(self, at: slice) -> Tensor:
        """Before SiLU."""
        out = self.seen(at, 0) * self.taps[-1]
        for back in range(1, self.width):
            out.addcmul_(self.seen(at, back), self.taps[-1 - back])
        return out if self.bias is None else out.add_(self.bias)
