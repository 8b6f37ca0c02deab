"""Depthwise causal convolution and SiLU over one or more runs of tokens."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import fused
from .reference import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (2, 3, 4)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, halo: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """silu(bias + Σ_k weight[:, k] x[t - (w - 1) + k]): the last tap is the current token.

    x          [b, l, c], made of m equal runs of neighbouring tokens
    weight     [c, w]
    bias       [c] or None
    halo       [b, m, w - 1, c], the tokens before each run; None: one run, zeros before it
    positions  [b, l] int32 or int64, each token's place in its document, before whose first token nothing is seen; None: one
               document

    Returns [b, l, c]. The Triton kernels take bf16, fp16 or fp32, one for all, and widths 2 to 4, and accumulate in fp32.
    Raises ValueError, naming the argument.
    """
    _check(x, weight, bias, halo, positions)
    if fused("causal_conv", x.device, _obstacle(x, weight, bias, halo)):
        return _conv(x, weight, bias, halo, positions)
    return reference(x, weight, bias, halo, positions)


@torch.library.custom_op("baton::causal_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> Tensor:
    from .fused import conv_forward

    return conv_forward(x, weight, bias, halo, positions)


@torch.library.custom_op("baton::causal_conv_backward", mutates_args=())
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .fused import conv_backward

    return conv_backward(dy, x, weight, bias, halo, positions)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dhalo = x.new_empty(0 if halo is None else halo.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), dhalo


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, _, bias, halo, _ = ctx.saved_tensors
    dx, dweight, dbias, dhalo = _conv_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None if bias is None else dbias, None if halo is None else dhalo, None


_conv.register_autograd(_backward, setup_context=_setup)


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None) -> str | None:
    dtypes = {tensor.dtype for tensor in (x, weight, bias, halo) if tensor is not None}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"x, weight, bias and halo are {found}, allowed for the Triton kernels: bf16, fp16 or fp32, one for all"
    if weight.shape[1] not in WIDTHS:
        return f"weight is {list(weight.shape)}, allowed for the Triton kernels: [c, 2], [c, 3] and [c, 4]"
    return None


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
    if positions is not None and positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"causal_conv: positions are {positions.dtype}, allowed: int32 and int64")
    for name, tensor in {"weight": weight, "bias": bias, "halo": halo, "positions": positions}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"causal_conv: {name} is on {tensor.device}, x on {x.device}")
    if halo is None:
        return
    if halo.dim() != 4 or halo.shape[0] != b or tuple(halo.shape[2:]) != (weight.shape[1] - 1, c) or l % halo.shape[1]:
        raise ValueError(f"causal_conv: halo is {list(halo.shape)}, expected [{b}, runs, {weight.shape[1] - 1}, {c}]")
