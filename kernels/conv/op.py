"""Depthwise causal convolution and SiLU over one or more runs of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, halo: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """silu(bias + Σ_k weight[:, k] x[t - (w - 1) + k]): the last tap is the current token.

    x          [b, l, c], made of m equal runs of neighbouring tokens
    weight     [c, w]
    bias       [c] or None
    halo       [b, m, w - 1, c], the tokens before each run; None: one run, zeros before it
    positions  [b, l], each token's place in its document, before whose first token nothing is seen; None: one document

    Returns [b, l, c]. Raises ValueError, naming the argument.
    """
    _check(x, weight, bias, halo, positions)
    b, l, c = x.shape
    width = weight.shape[1]
    if halo is None:
        halo = x.new_zeros(b, 1, width - 1, c)
    m = halo.shape[1]
    run = l // m
    padded = torch.cat([halo, x.view(b, m, run, c)], 2)
    out = padded[:, :, width - 1 :] * weight[:, -1]
    for back in range(1, width):
        seen = padded[:, :, width - 1 - back : width - 1 - back + run]
        if positions is not None:
            # Not a product with 0: what a document must not see may be infinite.
            seen = seen.masked_fill((positions < back).view(b, m, run, 1), 0)
        out = torch.addcmul(out, seen, weight[:, -1 - back])
    if bias is not None:
        out = out + bias
    return F.silu(out).view(b, l, c)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"causal_conv: x is {list(x.shape)}, allowed: [b, l, c]")
    b, l, c = x.shape
    if weight.dim() != 2 or weight.shape[0] != c:
        raise ValueError(f"causal_conv: weight is {list(weight.shape)}, expected [{c}, width]")
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"causal_conv: bias is {list(bias.shape)}, expected [{c}]")
    if positions is not None and tuple(positions.shape) != (b, l):
        raise ValueError(f"causal_conv: positions are {list(positions.shape)}, expected [{b}, {l}]")
    if halo is None:
        return
    if halo.dim() != 4 or halo.shape[0] != b or tuple(halo.shape[2:]) != (weight.shape[1] - 1, c) or l % halo.shape[1]:
        raise ValueError(f"causal_conv: halo is {list(halo.shape)}, expected [{b}, runs, {weight.shape[1] - 1}, {c}]")
