"""The device mesh: named axes over all ranks and the groups made from them, handed on explicitly."""

import gc
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..configs.schema import Degrees, ParallelConfig

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Ranks arranged as pp x dp x cp x tp, tp innermost (neighbours on one node), and in other ways over the same ranks.

    axes are, by name: those of AXES; "dp_cp", over which tokens are shared out; "dp_cp_tp"; "pp_dp_cp"; "ep", runs of "dp_cp".
    data and expert_data are the axes that FSDP shards dense parameters and experts over: "dp_cp", and the ranks of it that hold the
    same experts; or with copies of the parameters (HSDP) two axes each, of which it shards over the second.
    states is this rank's cp axis, if longer than 1, in a group of its own, for exchanges that run beside the computation: a
    DeviceMesh may give axes of the same ranks one group, and collectives of two threads on one group would meet the wrong partners.
    """

    axes: dict[str, DeviceMesh]
    ranks: torch.Tensor
    """[copies, pp, dp, cp, tp], numbers in the default group."""
    data: DeviceMesh
    expert_data: DeviceMesh
    expert_tensor: DeviceMesh
    """The axes "ep" and "tp", over which stacked experts are cut."""
    states: dist.ProcessGroup | None = None
    neighbours: dict[int, dist.ProcessGroup] = field(default_factory=dict, compare=False)

    @property
    def tensor(self) -> DeviceMesh:
        """The tp axis."""
        return self.axes["tp"]

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.axes[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self.axes[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """This rank's group along an axis."""
        return self.axes[axis].get_group()

    def tensor_neighbours(self, size: int) -> dist.ProcessGroup:
        """This rank's group of `size` neighbours along tp, for what fewer than all of them share. All ranks must call it."""
        if size == self.size("tp"):
            return self.group("tp")
        if size not in self.neighbours:
            runs = self.ranks.reshape(-1, size).tolist()
            self.neighbours[size], _ = dist.new_subgroups_by_enumeration(runs)
            give_up_as_the_default_group(self.neighbours[size], self.tensor.device_type)
        return self.neighbours[size]

    def pipeline_ends(self) -> dist.ProcessGroup | None:
        """This rank's group of the first and last rank of its pipeline; None on ranks between. All ranks must call it.

        Raises ValueError without a pipeline, whose first rank is its last.
        """
        if self.size("pp") == 1:
            raise ValueError("pipeline_ends: pp is 1, allowed: 2 and more")
        ends = self.ranks[:, [0, -1]].movedim(1, -1).reshape(-1, 2).tolist()
        group, _ = dist.new_subgroups_by_enumeration(ends)
        if group is not None:
            give_up_as_the_default_group(group, self.tensor.device_type)
        return group


def build_mesh(parallel: ParallelConfig, device_type: str) -> Mesh:
    """Lays the default process group out as `parallel` says. Raises ValueError when the degrees do not multiply to it."""
    return _lay_out(parallel.degrees(dist.get_world_size()), parallel.replicate, device_type)


def build_mesh_of_one(device_type: str) -> Mesh:
    """A mesh for each rank with nobody else on it. All ranks call it."""
    return _lay_out(Degrees(tp=1, cp=1, dp=1, pp=1, ep=1), 1, device_type)


def free_meshes() -> None:
    """Frees the meshes that nothing uses, and the groups with them, once these are destroyed: for a process that goes on to others.

    A group of gloo has threads that wake up a hundred times a second, until nothing refers to it. DTensor remembers results by
    meshes, and would use them, with the groups of old, for meshes that are equal; sharded modules are cycles.
    """
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _gen_transform_infos.cache_clear()
    clear_redistribute_planner_cache()
    _clear_sharding_prop_cache()
    gc.collect()


def _lay_out(sizes: Degrees, replicate: int, device_type: str) -> Mesh:
    """As many copies of the mesh as the default group has room for."""
    world = dist.get_world_size()
    tokens = sizes.dp * sizes.cp
    copies = world // (sizes.pp * tokens * sizes.tp)
    # FSDP wants all meshes of a parameter to come of one.
    flat = init_device_mesh(device_type, (world,), mesh_dim_names=("world",))
    dense = flat._unflatten(0, (copies, sizes.pp, sizes.dp, sizes.cp, sizes.tp), ("copies", *AXES))
    axes = {axis: dense[axis] for axis in AXES}
    axes["dp_cp"] = dense["dp", "cp"]._flatten("dp_cp")
    axes["dp_cp_tp"] = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")
    axes["pp_dp_cp"] = dense["pp", "dp", "cp"]._flatten("pp_dp_cp")
    # Of the part that is cut anew alone: every axis that a mesh is made with costs groups, even a second one of the same ranks.
    alike = tokens // replicate // sizes.ep
    experts = axes["dp_cp"]._unflatten(0, (replicate, alike, sizes.ep), ("replicate", "edp_shard", "ep"))
    axes["ep"] = experts["ep"]
    data, expert_data = axes["dp_cp"], experts["edp_shard"]
    if replicate > 1:
        data = axes["dp_cp"]._unflatten(0, (replicate, tokens // replicate), ("replicate", "dp_cp_shard"))
        expert_data = experts["replicate", "edp_shard"]
    expert_tensor = DeviceMesh._concatenate([experts["ep"], dense["tp"]])
    states = None
    if sizes.cp > 1:
        runs = dense.mesh.movedim(-2, -1).reshape(-1, sizes.cp).tolist()
        states, _ = dist.new_subgroups_by_enumeration(runs, group_desc="mesh_states")
    mesh = Mesh(axes, dense.mesh, data, expert_data, expert_tensor, states)
    for axis in (*axes.values(), *(each[name] for each in (data, expert_data) for name in each.mesh_dim_names or ())):
        give_up_as_the_default_group(axis.get_group(), device_type)
    if states:
        give_up_as_the_default_group(states, device_type)
    return mesh


def give_up_as_the_default_group(group: dist.ProcessGroup, device_type: str) -> None:
    """Gives a group the default one's timeout; it was made with PyTorch's, half an hour with gloo."""
    default = dist.distributed_c10d._get_default_group()
    _set_pg_timeout(default._get_backend(torch.device(device_type)).options._timeout, group)
