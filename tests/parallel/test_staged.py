"""Ranks that share a device: every operation does through the host what gloo does with host tensors, and so does a whole model."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from baton.launcher.environment import process_group
from baton.parallel import staged
from helpers import compare, tiny_config

# Their names since torch 2.13, else those before.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def over_staged(rank, world, path, function, *args):
    """The function with a staged default group in place of the pool's."""
    dist.destroy_process_group()
    staged.register()
    staged.register()
    store = dist.FileStore(str(path), world)
    dist.init_process_group(staged.NAME, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    return function(rank, *args)


def operations(rank):
    """What every rank has after each operation that the project, DTensor or FSDP calls."""
    world = dist.get_world_size()
    own = torch.arange(12.0).reshape(3, 4) + 100 * rank
    results = {}
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        results[f"all_reduce {op}"] = own.clone()
        dist.all_reduce(results[f"all_reduce {op}"], op)
    results["broadcast"] = own.clone()
    dist.broadcast(results["broadcast"], 1)
    results["all_gather"] = [torch.empty(4, 3).t() for _ in range(world)]
    dist.all_gather(results["all_gather"], own)
    results["all_gather_single"] = torch.empty(3 * world, 4)
    all_gather_single(results["all_gather_single"], own)
    results["reduce_scatter"] = torch.empty(3, 4)
    dist.reduce_scatter(results["reduce_scatter"], [own + i for i in range(world)])
    results["reduce_scatter_single"] = torch.empty(3, 4)
    work = reduce_scatter_single(results["reduce_scatter_single"], own.repeat(world, 1), async_op=True)
    work.wait()
    results["all_to_all_single"] = torch.empty(world, 4)
    dist.all_to_all_single(results["all_to_all_single"], own[:1].repeat(world, 1))
    # Rank r sends 1 row to all but r + 1, which gets 3.
    sent = [3 if target == (rank + 1) % world else 1 for target in range(world)]
    received = [3 if (source + 1) % world == rank else 1 for source in range(world)]
    results["uneven"] = torch.empty(sum(received), 4)
    dist.all_to_all_single(results["uneven"], own[:1].repeat(sum(sent), 1), received, sent)
    results["gather"] = [torch.zeros(3, 4) for _ in range(world)] if rank == 2 else None
    dist.gather(own, results["gather"], dst=2)
    results["scatter"] = torch.empty(3, 4)
    dist.scatter(results["scatter"], [own * i for i in range(world)] if rank == 2 else None, src=2)
    results["objects"] = [None] * world
    dist.all_gather_object(results["objects"], {"rank": rank})
    results["functional"] = [
        functional.all_reduce(own, "sum", dist.group.WORLD) + 0,
        functional.all_to_all_single(own[:1].repeat(world, 1), None, None, dist.group.WORLD) + 0,
        functional.broadcast(own, 1, dist.group.WORLD) + 0,
    ]
    dist.barrier()
    results["point to point"] = pass_around(own, world, rank)
    return results


def pass_around(own, world, rank):
    """Two messages to each side at once, received in the other order: large ones, so that a send cannot end by itself."""
    messages = {tag: (own[:1] + tag).repeat(100_000, 1) for tag in (1, 2)}
    arriving = {tag: torch.empty(100_000, 4) for tag in (1, 2)}
    calls = [dist.P2POp(dist.isend, messages[tag], (rank + 1) % world, tag=tag) for tag in (1, 2)]
    calls += [dist.P2POp(dist.irecv, arriving[tag], (rank - 1) % world, tag=tag) for tag in (2, 1)]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return [arriving[1][::50_000].clone(), arriving[2][::50_000].clone()]


def test_operations_do_what_gloo_does(pool, tmp_path):
    expected = pool.run(3, operations)
    found = pool.run(3, over_staged, 3, tmp_path / "store", operations)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def sharded(rank, config):
    """A model's outcome, and what carried it."""
    from baton.parallel.mesh import build_mesh

    mesh = build_mesh(config.parallel, "cpu")
    groups = [mesh.group(axis) for axis in ("tp", "cp", "dp_cp")] + [dist.new_group([0, 1]), dist.group.WORLD]
    kinds = {type(group).__name__ for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER}
    return compare(rank, config), kinds


@pytest.mark.parametrize("axes", ["{tp: 2, cp: 2, dp: 1}", "{tp: 1, cp: 2, dp: 2, layout: contiguous}"])
def test_a_sharded_model_is_that_of_one_process(pool, tmp_path, axes):
    config = tiny_config([f"parallel={axes}", "precision=fp64"], 4)
    for outcome, kinds in pool.run(4, over_staged, 4, tmp_path / "store", sharded, config):
        assert kinds == {"StagedGroup"}
        assert outcome.ok, outcome.over


def test_a_process_group_on_a_shared_device():
    with process_group(share_device=True) as environment:
        assert dist.get_backend() == staged.NAME
        assert environment.device.index in (None, 0)
        total = torch.ones(2, device=environment.device)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()
