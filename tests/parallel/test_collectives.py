"""Collectives that put parts of tokens together and share them out, with their gradients."""

import torch

from helpers import relative_error


def exchange(rank, dim, expanded):
    """Each rank's part of x goes together, is used with the rank's own weights, and the sum is shared out again."""
    import torch.distributed as dist

    from baton.parallel.collectives import gather_from, scatter_to

    world = dist.get_world_size()
    whole, weights, targets = operands(world)
    x = whole.chunk(world, dim)[rank].clone().requires_grad_()
    y = scatter_to(gather_from(x, dist.group.WORLD, dim) * weights[rank], dist.group.WORLD, dim)
    loss = y.sum() if expanded else (y * targets.chunk(world, dim)[rank]).sum()
    loss.backward()
    numbers = torch.arange(6).view(2, 3) + 10 * rank
    return y.detach(), x.grad, gather_from(numbers, dist.group.WORLD, 1).tolist()


def operands(world):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return draw(4, 8, 12), draw(world, 4, 8, 12), draw(4, 8, 12)


def test_tokens_put_together_and_shared_out(pool):
    for world, dim, expanded in ((2, 1, False), (4, 0, False), (4, 2, False), (2, 1, True)):
        found = pool.run(world, exchange, dim, expanded)
        whole, weights, targets = operands(world)
        x = whole.clone().requires_grad_()
        y = (x * weights).sum(0)
        (y.sum() if expanded else (y * targets).sum()).backward()
        assert relative_error(torch.cat([part for part, _, _ in found], dim), y.detach()) <= 1e-14
        assert relative_error(torch.cat([grad for _, grad, _ in found], dim), x.grad) <= 1e-14
        if world == 2:
            assert found[0][2] == found[1][2] == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
