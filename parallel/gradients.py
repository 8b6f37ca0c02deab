"""Norms and clipping of gradients that are sharded over a mesh."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the same fp64 scalar on every rank of the default group.

    Works across different meshes: each rank adds up its parts, counting a replicated one by its share, then one all-reduce.
    """
    parts = [_square_sum(gradient) for gradient in gradients]
    if not parts:
        raise ValueError("total_norm: no gradients")
    total = torch.stack(parts).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _square_sum(gradient: Tensor) -> Tensor:
    """Of this rank's part, by its share where others hold the same."""
    copies = 1
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        copies = math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if isinstance(placement, Replicate))
    return torch.linalg.vector_norm(local_part(gradient), dtype=torch.float64).square() / copies


def clip(gradients: Iterable[Tensor], norm: Tensor, largest: float) -> None:
    """Scales gradients in place so that a total norm above `largest` becomes it."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local_part(gradient).mul_(scale.to(gradient.dtype))
