"""Which ranks each axis of a mesh has."""

import pytest

from baton.configs.schema import ParallelConfig


def groups(rank, parallel):
    """Of this rank: the ranks along every axis, those that parameters and experts are sharded over, the ends of its pipeline."""
    import torch.distributed as dist

    from baton.parallel.mesh import build_mesh, build_mesh_of_one

    mesh = build_mesh(parallel, "cpu")
    found = {axis: dist.get_process_group_ranks(mesh.group(axis)) for axis in mesh.axes}
    assert all(ranks[mesh.rank(axis)] == rank for axis, ranks in found.items())
    assert all(len(ranks) == mesh.size(axis) for axis, ranks in found.items())
    found["data"] = mesh.data.mesh.tolist()
    found["expert_data"] = mesh.expert_data.mesh.tolist()
    found["expert_tensor"] = mesh.expert_tensor.mesh.tolist()
    ends = mesh.pipeline_ends() if parallel.pp > 1 else None
    found["ends"] = ends and dist.get_process_group_ranks(ends)
    alone = build_mesh_of_one("cpu")
    assert {alone.size(axis) for axis in alone.axes} == {1}
    assert dist.get_process_group_ranks(alone.group("dp_cp_tp")) == [rank]
    return found


@pytest.fixture(scope="module")
def of_rank_five(pool):
    """Rank 5 of 8, by mesh."""
    meshes = {
        "pp2 cp2 tp2": ParallelConfig(pp=2, cp=2, tp=2, ep=2),
        "hsdp": ParallelConfig(dp=4, cp=2, ep=2, replicate=2),
        "pp4": ParallelConfig(pp=4, dp=2),
    }
    return {name: pool.run(8, groups, parallel)[5] for name, parallel in meshes.items()}


def test_tp_is_innermost_and_pp_outermost(of_rank_five):
    found = of_rank_five["pp2 cp2 tp2"]
    assert [found[axis] for axis in ("pp", "dp", "cp", "tp")] == [[1, 5], [5], [5, 7], [4, 5]]
    assert [found[axis] for axis in ("dp_cp", "dp_cp_tp", "pp_dp_cp")] == [[5, 7], [4, 5, 6, 7], [1, 3, 5, 7]]
    assert (found["ep"], found["expert_data"], found["expert_tensor"]) == ([5, 7], [5], [[4, 5], [6, 7]])
    assert found["ends"] == [1, 5]


def test_copies_are_the_outermost_of_dp_and_experts_neighbours_of_cp(of_rank_five):
    found = of_rank_five["hsdp"]
    assert (found["dp"], found["cp"], found["dp_cp"]) == ([1, 3, 5, 7], [4, 5], list(range(8)))
    assert found["data"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (found["ep"], found["expert_data"]) == ([4, 5], [[1, 3], [5, 7]])


def test_ranks_between_a_pipelines_ends_have_no_end(of_rank_five):
    assert of_rank_five["pp4"]["pp"] == [1, 3, 5, 7]
    assert of_rank_five["pp4"]["ends"] is None
