"""RMS norms with statistics in fp32: the plain one, one with the residual's addition, and Mamba-2's gated one.

The Triton kernels take bf16, fp16 and fp32, the weight in any of them, and round their results once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_ROW, MAX_GATED_ROW = 32768, 16384
"""Bytes of the widest rows that leave registers for the sums over rows."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dim; x [..., d], weight [d] (Zhang and Sennrich, arXiv 1910.07467).

    Returns x's shape and dtype. Raises ValueError, naming the argument.
    """
    _check("rms_norm", x, {}, weight)
    if apex := dispatch.apex_rms_norm(x.device):
        return apex(x, weight, weight.shape, eps)
    if dispatch.fused("rms_norm", x.device, _obstacle({"x": x, "weight": weight}, x.shape[-1], MAX_ROW)):
        return _rms_norm(x, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of residual + x, and the sum itself; both [..., d]. Raises ValueError, naming the argument."""
    _check("add_rms_norm", x, {"residual": residual}, weight)
    if apex := dispatch.apex_rms_norm(x.device):
        total = residual + x
        return apex(total, weight, weight.shape, eps), total
    obstacle = _obstacle({"x": x, "residual": residual, "weight": weight}, x.shape[-1], MAX_ROW)
    if x.dtype != residual.dtype:
        obstacle = f"residual is {residual.dtype}, allowed for the Triton kernels: that of x, {x.dtype}"
    if dispatch.fused("add_rms_norm", x.device, obstacle):
        return _add_rms_norm(x, residual, weight, eps)[:2]
    return reference.add_rms_norm(x, residual, weight, eps)


def gated_group_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_over_group: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Gate first, then an RMS norm within each group of channels, as Mamba-2 has it: w · RMS_g(y · silu(z)).

    y, z, weight    [b, l, c], [b, l, c], [c]
    group_size      channels of a whole group
    sum_over_group  given when the c channels here are a part of one group: adds [b, l, 1] up over its parts, and their gradients,
                    of which the sums are the same

    Returns [b, l, c] in y's dtype. Raises ValueError, naming the argument; also when c is neither whole groups nor, with
    sum_over_group, part of one.
    """
    _check("gated_group_rms_norm", y, {"z": z}, weight)
    channels = y.shape[-1]
    if group_size < 1 or (channels % group_size and sum_over_group is None):
        raise ValueError(f"gated_group_rms_norm: {channels} channels are no whole groups of {group_size}")
    width = group_size if sum_over_group is None else channels
    obstacle = _obstacle({"y": y, "z": z, "weight": weight}, width, MAX_GATED_ROW)
    if not dispatch.fused("gated_group_rms_norm", y.device, obstacle):
        return reference.gated_group_rms_norm(y, z, weight, group_size, eps, sum_over_group)
    if sum_over_group is None:
        return _gated_rms_norm(y, z, weight, group_size, eps)[0]
    return _PartOfGroup.apply(y, z, weight, group_size, eps, sum_over_group)


@torch.library.custom_op("baton::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .fused import norm_forward

    normed, _, rstd = norm_forward(x, None, weight, eps)
    return normed, rstd


@torch.library.custom_op("baton::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from .fused import norm_forward

    return norm_forward(x, residual, weight, eps)


@torch.library.custom_op("baton::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dnormed: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from .fused import norm_backward

    return norm_backward(dnormed, dtotal, x, weight, rstd)


@torch.library.custom_op("baton::gated_rms_norm", mutates_args=())
def _gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    from .fused import gated_forward

    return gated_forward(y, z, weight, group_size, eps, None)


@torch.library.custom_op("baton::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dnormed: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int, products: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from .fused import gated_backward

    return gated_backward(dnormed, y, z, weight, rstd, group_size, products)


@torch.library.custom_op("baton::gated_rms_norm_sums", mutates_args=())
def _gated_sums(y: Tensor, z: Tensor, weight: Tensor, dnormed: Tensor | None) -> Tensor:
    from .fused import gated_sums

    return gated_sums(y, z, weight, dnormed)


@torch.library.custom_op("baton::gated_rms_norm_part", mutates_args=())
def _gated_part(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, squares: Tensor) -> tuple[Tensor, Tensor]:
    from .fused import gated_forward

    return gated_forward(y, z, weight, group_size, eps, squares)


def _statistic(x: Tensor, groups: int | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], *([] if groups is None else [groups])), dtype=torch.float32)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _statistic(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistic(x)


@_rms_norm_backward.register_fake
def _(dnormed: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@_gated_rms_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), _statistic(y, y.shape[-1] // group_size)


@_gated_rms_norm_backward.register_fake
def _(
    dnormed: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int, products: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


@_gated_sums.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, dnormed: Tensor | None) -> Tensor:
    return _statistic(y, 1)


@_gated_part.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, squares: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), _statistic(y, 1)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _norm_grads(ctx: Any, dnormed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if dnormed is None else (*_rms_norm_backward(dnormed, None, *ctx.saved_tensors), None)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.set_materialize_grads(False)


def _add_grads(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return dtotal, dtotal, None, None
    dx, dweight = _rms_norm_backward(dnormed, dtotal, *ctx.saved_tensors)
    return dx, dx, dweight, None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, z, weight, ctx.group_size, _ = inputs
    ctx.save_for_backward(y, z, weight, output[1])
    ctx.set_materialize_grads(False)


def _gated_grads(ctx: Any, dnormed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return None, None, None, None, None
    return *_gated_rms_norm_backward(dnormed, *ctx.saved_tensors, ctx.group_size, None), None, None


_rms_norm.register_autograd(_norm_grads, setup_context=_setup_norm)
_add_rms_norm.register_autograd(_add_grads, setup_context=_setup_add)
_gated_rms_norm.register_autograd(_gated_grads, setup_context=_setup_gated)


class _PartOfGroup(torch.autograd.Function):
    """The norm of a part of one group: what its parts must add up travels between two kernels, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        weight: Tensor,
        group_size: int,
        eps: float,
        sum_over_group: Callable[[Tensor], Tensor],
    ) -> Tensor:
        normed, rstd = _gated_part(y, z, weight, group_size, eps, sum_over_group(_gated_sums(y, z, weight, None)))
        ctx.save_for_backward(y, z, weight, rstd)
        ctx.group_size, ctx.sum_over_group = group_size, sum_over_group
        return normed

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, rstd = ctx.saved_tensors
        products = ctx.sum_over_group(_gated_sums(y, z, weight, dnormed))
        return *_gated_rms_norm_backward(dnormed, y, z, weight, rstd, ctx.group_size, products), None, None, None


def _obstacle(tensors: dict[str, Tensor], width: int, max_row: int) -> str | None:
    """width: channels of a row, the first tensor's or of a group."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, allowed for the Triton kernels: bf16, fp16 and fp32"
        if width * tensor.element_size() > max_row and name != "weight":
            return f"{name} has rows of {width * tensor.element_size()} bytes, allowed for the Triton kernels: up to {max_row}"
    return None


def _check(operation: str, x: Tensor, others: dict[str, Tensor], weight: Tensor) -> None:
    """`others` are like x, whose name is of no matter."""
    if x.dim() == 0 or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"{operation}: weight is {list(weight.shape)}, expected {list(x.shape[-1:])}")
    for name, tensor in others.items():
        if tensor.shape != x.shape:
            raise ValueError(f"{operation}: {name} is {list(tensor.shape)}, expected {list(x.shape)}")
    for name, tensor in {**others, "weight": weight}.items():
        if tensor.device != x.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {x.device}")
