"""Mixture of experts: routing, rows into the experts' order and back, and the experts' matrices. The host never waits for counts.

Counted for t tokens, k experts each, d channels; not yet measured on a GPU.

- Routing is a counting sort: two kernels that read the choices, and two sums of what they counted. torch's radix sort goes over
  64-bit keys and their positions eight times, and its bincount makes the host wait for the largest key.
- permute reads each token once and writes k rows; its gradient gathers the k rows in fp32, in the order of the choices, so there
  are no atomics and nothing is kept but the rows' numbers. repeat_interleave and indexing pass over the k rows twice more, and the
  gradient of indexing sorts the indices again. unpermute is the same two kernels the other way round.
- The router's weights are `swiglu`'s, in front of the last matrix: weighting here would keep the k rows for backward.
- grouped_linear is torch's grouped_mm where that is one kernel (`engine`), else one Triton kernel each for y, dx and dweight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import fused
from . import engine, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Routing(NamedTuple):
    """Where each token's copies lie among the rows, which are sorted by expert, then by token. All int64."""

    order: Tensor
    """[t k], the copy in each row: token * k + choice."""
    rows: Tensor
    """[t, k], the row of each copy."""
    counts: Tensor
    """[E], the rows of each expert."""


def route(chosen: Tensor, experts: int) -> Routing:
    """Sorts tokens by their chosen experts, [t, k] int64 in 0 .. experts - 1. Raises ValueError, naming the argument."""
    if chosen.ndim != 2 or chosen.dtype != torch.int64:
        raise ValueError(f"route: chosen is {list(chosen.shape)} {chosen.dtype}, allowed: [t, k] int64")
    if fused("route", chosen.device):
        return Routing(*torch.ops.baton.route(chosen, experts))
    return Routing(*reference.route(chosen, experts))


def permute(x: Tensor, routing: Routing) -> Tensor:
    """x [t, d] -> [t k, d]: row r is the token of copy order[r]. Raises ValueError, naming the argument."""
    if x.ndim != 2 or len(x) != len(routing.rows):
        raise ValueError(f"permute: x is {list(x.shape)}, allowed: [{len(routing.rows)}, d], as many rows as tokens were routed")
    if fused("permute", x.device, _obstacle(x)):
        return torch.ops.baton.permute(x, routing.rows)
    return reference.Permute.apply(x, routing.order, routing.rows)


def unpermute(y: Tensor, routing: Routing) -> Tensor:
    """y [t k, d] -> [t, d], the sum of each token's rows, added up in fp32 at least. Raises ValueError, naming the argument."""
    if y.ndim != 2 or len(y) != len(routing.order):
        raise ValueError(f"unpermute: y is {list(y.shape)}, allowed: [{len(routing.order)}, d], a row for each copy of a token")
    if fused("unpermute", y.device, _obstacle(y)):
        return torch.ops.baton.unpermute(y, routing.rows)
    return reference.Unpermute.apply(y, routing.order, routing.rows)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [r, i] whose first counts[0] rows belong to expert 0 and so on, weight [E, o, i] -> x weight_eᵀ, [r, o].

    counts [E], integers, add up to r; on a GPU this is not checked, for the host would have to wait. Raises ValueError, naming the
    argument.
    """
    if weight.ndim != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"grouped_linear: x is {list(x.shape)}, allowed for a weight {list(weight.shape)}: [r, i] and [E, o, i]")
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_linear: weight is {weight.dtype}, allowed: x's {x.dtype}")
    if counts.shape != weight.shape[:1]:
        raise ValueError(f"grouped_linear: counts is {list(counts.shape)}, allowed: [{len(weight)}], one for each expert")
    if engine.serves(x, weight):
        return engine.grouped_matmul(x, weight, counts)
    if fused("grouped_linear", x.device, _obstacle(x)):
        return torch.ops.baton.grouped_linear(x, weight, counts)
    return reference.grouped_linear(x, weight, counts)


def _obstacle(x: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"its argument is {x.dtype}, allowed: bfloat16, float16 or float32"


@torch.library.custom_op("baton::route", mutates_args=())
def _route(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from . import fused as kernels

    return kernels.route(chosen, experts)


@_route.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return chosen.new_empty(chosen.numel()), chosen.new_empty(chosen.shape), chosen.new_empty(experts)


@torch.library.custom_op("baton::permute", mutates_args=())
def _permute(x: Tensor, rows: Tensor) -> Tensor:
    from . import fused as kernels

    return kernels.permute(x, rows)


@_permute.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.numel(), x.shape[1])


@torch.library.custom_op("baton::unpermute", mutates_args=())
def _unpermute(y: Tensor, rows: Tensor) -> Tensor:
    from . import fused as kernels

    return kernels.unpermute(y, rows)


@_unpermute.register_fake
def _(y: Tensor, rows: Tensor) -> Tensor:
    return y.new_empty(rows.shape[0], y.shape[1])


def _save_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


_permute.register_autograd(lambda ctx, dy: (torch.ops.baton.unpermute(dy, *ctx.saved_tensors), None), setup_context=_save_rows)
_unpermute.register_autograd(lambda ctx, dx: (torch.ops.baton.permute(dx, *ctx.saved_tensors), None), setup_context=_save_rows)


@torch.library.custom_op("baton::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    from . import fused_linear as kernels

    return kernels.grouped_linear(x, weight, counts)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("baton::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    from . import fused_linear as kernels

    return kernels.grouped_linear(dy, weight.transpose(1, 2), counts), kernels.weight_gradient(dy, x, counts)


@_grouped_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_operands(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.baton.grouped_linear_backward(dy, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_linear_gradients, setup_context=_save_operands)
