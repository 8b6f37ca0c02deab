"""Collectives with their gradients, for tensors that mean different things on the ranks of a group.

copy_to       the same value everywhere, used differently by each rank    forward nothing   backward all-reduce
reduce_from   each rank has a part of a sum that all use alike            forward all-reduce  backward nothing
all_sum       a sum of parts that each rank uses differently              forward all-reduce  backward all-reduce
gather_from   a part each of what all then use differently                forward all-gather  backward reduce-scatter
scatter_to    each rank has a part of a sum and goes on with a part of it forward reduce-scatter  backward all-gather

They are looked up in torch.distributed when they run, where `recorder` counts them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .recorder import note_round


def gather_single(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `own`, one after another along dim 0, under the name that this torch has for it."""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, own, group=group)


def scatter_single(out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """The sum of every rank's `whole`, this rank's part of its dim 0, under the name that this torch has for it."""
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(out, whole, group=group)


def point_to_point(operations: Sequence[dist.P2POp], group: dist.ProcessGroup) -> Sequence[dist.Work]:
    """Starts one round of messages, in which this rank may have none."""
    if not operations:
        note_round("batch_isend_irecv", group)
        return []
    return dist.batch_isend_irecv(list(operations))


def copy_to(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor; its gradient is summed over the group."""
    return _CopyTo.apply(tensor, group)


def reduce_from(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group; its gradient, the same on every rank, passes as it is."""
    return _ReduceFrom.apply(tensor, group)


def all_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group; so is its gradient."""
    return _CopyTo.apply(_ReduceFrom.apply(tensor, group), group)


def gather_from(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Every rank's tensor, one after another along `dim`; the gradient is summed over the group, each rank gets its part."""
    return _GatherFrom.apply(tensor, group, dim)


def scatter_to(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over the group; the gradients of all ranks are put together."""
    return _ScatterTo.apply(tensor, group, dim)


def _gathered(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    own = tensor.detach().contiguous()
    out = own.new_empty(dist.get_world_size(group), *own.shape)
    gather_single(out.view(-1, *own.shape[1:]), own, group)
    # For a batch of one sequence, split along its tokens, this is no copy.
    return out.movedim(0, dim).flatten(dim, dim + 1)


def _scattered(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    whole = tensor.detach().unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    out = whole.new_empty(whole.shape[1:])
    scatter_single(out, whole.flatten(0, 1), group)
    return out


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.group, ctx.dim), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _scattered(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.group, ctx.dim), None, None
