"""SSD with its initial and final state, halo and norms over ranks, each against one process, in fp64."""

import pytest
import torch
import torch.distributed as dist

from baton.kernels.conv import causal_conv
from baton.kernels.ssd import ssd
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.collectives import all_sum
from baton.parallel.gradients import clip, local_part, total_norm
from baton.parallel.halo import SequenceHalo
from baton.parallel.layout import Layout
from helpers import relative_error


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def halo(rank, layout):
    x, weight, gradient = draw((2, 24, 3), (3, 4), (2, 24, 3))
    own = layout.shard(x, rank).requires_grad_()
    tails = own.unflatten(1, (layout.segments_per_rank, -1))[:, :, -3:]
    travelling = SequenceHalo(layout, dist.group.WORLD).start(tails)
    y = causal_conv(own, weight, halo=travelling.wait())
    y.backward(layout.shard(gradient, rank))
    return y.detach(), own.grad


@pytest.mark.parametrize(("kind", "world"), [("contiguous", 4), ("zigzag", 2), ("zigzag", 4)])
def test_halo(pool, kind, world):
    layout, (x, weight, gradient) = Layout(kind, world), draw((2, 24, 3), (3, 4), (2, 24, 3))
    y = causal_conv(x.requires_grad_(), weight)
    y.backward(gradient)
    for rank, (found, dx) in enumerate(pool.run(world, halo, layout)):
        assert relative_error(found, layout.shard(y.detach(), rank)) <= 1e-12
        assert relative_error(dx, layout.shard(x.grad, rank)) <= 1e-12


SHARED = ("A", "D", "dt_bias")
"""Operands of the scan that every rank has whole."""


def scan_operands():
    """By name: of 24 tokens in documents of which one begins on a border, with an initial state, and weights of the outputs."""
    shapes = {"x": (2, 24, 4, 3), "dt": (2, 24, 4), "B": (2, 24, 2, 5), "C": (2, 24, 2, 5), "D": (4,), "dt_bias": (4,)}
    values = dict(zip(shapes, draw(*shapes.values()), strict=True))
    initial, dy, dfinal = draw((2, 4, 3, 5), (2, 24, 4, 3), (2, 4, 3, 5), seed=1)
    resets = torch.zeros(2, 24, dtype=torch.bool)
    resets[0, [5, 12]] = True
    return values | {"A": -draw((4,), seed=2)[0].abs()}, initial, resets, dy, dfinal


def run_scan(operands, initial, resets, dy, dfinal, scan=None):
    leaves = {name: value.clone().requires_grad_() for name, value in operands.items()}
    start = initial.clone().requires_grad_()
    y, final = ssd(**leaves, initial_state=start, resets=resets, return_final_state=True, chunk_size=2, scan=scan)
    loss = (y * dy).sum() if final is None else (y * dy).sum() + (final * dfinal).sum()
    loss.backward()
    return y.detach(), None if final is None else final.detach(), {name: t.grad for name, t in leaves.items()}, start.grad


def sharded_scan(rank, layout):
    operands, initial, resets, dy, dfinal = scan_operands()
    own = {name: t if name in SHARED else layout.shard(t, rank) for name, t in operands.items()}
    scan = SequenceScan(layout, dist.group.WORLD, "sliced")
    return run_scan(own, initial, layout.shard(resets, rank), layout.shard(dy, rank), dfinal, scan)


@pytest.mark.parametrize(("kind", "world"), [("contiguous", 3), ("zigzag", 2)])
def test_ssd_with_initial_and_final_state(pool, kind, world):
    """Both are of the whole sequence: one is looked at where it begins, the other is there where it ends."""
    layout = Layout(kind, world)
    y, final, gradients, dinitial = run_scan(*scan_operands())
    found = pool.run(world, sharded_scan, layout)
    for rank, (own_y, own_final, own_gradients, own_dinitial) in enumerate(found):
        assert relative_error(own_y, layout.shard(y, rank)) <= 1e-12
        assert (own_final is not None) == (layout.owners[-1] == rank)
        assert (own_dinitial is not None) == (layout.owners[0] == rank)
        assert own_final is None or relative_error(own_final, final) <= 1e-12
        assert own_dinitial is None or relative_error(own_dinitial, dinitial) <= 1e-12
        for name in gradients.keys() - SHARED:
            assert relative_error(own_gradients[name], layout.shard(gradients[name], rank)) <= 1e-12, name
    for name in SHARED:
        assert relative_error(sum(one[2][name] for one in found), gradients[name]) <= 1e-12, name


def summed_parts(rank):
    part = torch.full((2,), float(rank + 1), dtype=torch.float64, requires_grad=True)
    total = all_sum(part, dist.group.WORLD)
    (total * (rank + 1)).sum().backward()
    return total.detach(), part.grad


def test_all_sum_sums_gradients_too(pool):
    for total, gradient in pool.run(3, summed_parts):
        assert total.tolist() == [6.0, 6.0]
        assert gradient.tolist() == [6.0, 6.0]


def norms(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    first, second = draw((5, 4), (3,))
    gradients = [distribute_tensor(first, mesh, [Shard(0), Shard(1)]), distribute_tensor(second, mesh, [Replicate(), Shard(0)])]
    norm = total_norm(gradients)
    clip(gradients, norm, 0.5)
    return float(norm), [g.full_tensor() for g in gradients], [local_part(g).shape for g in gradients]


def test_norm_and_clipping_over_a_mesh(pool):
    first, second = draw((5, 4), (3,))
    norm = torch.cat([first.flatten(), second]).norm()
    for found, clipped, _ in pool.run(4, norms):
        assert abs(found / float(norm) - 1) <= 1e-12
        for one, other in zip(clipped, (first, second), strict=True):
            assert relative_error(one, other * 0.5 / (norm + 1e-6)) <= 1e-12
