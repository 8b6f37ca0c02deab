"""The device mesh: named axes over all ranks and the groups made from them, handed on explicitly."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..configs.schema import ParallelConfig

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Ranks arranged as pp x dp x cp x tp, tp innermost (neighbours on one node).

    data is dp and cp as one axis, "dp_cp": parameters are sharded and gradients summed over it.
    states is this rank's cp axis, if longer than 1, in a group of its own, for exchanges that run beside the computation: a
    DeviceMesh may give axes of the same ranks one group, and collectives of two threads on one group would meet the wrong partners.
    """

    dense: DeviceMesh
    data: DeviceMesh
    states: dist.ProcessGroup | None = None
    neighbours: dict[int, dist.ProcessGroup] = field(default_factory=dict, compare=False)

    @property
    def tensor(self) -> DeviceMesh:
        """The tp axis."""
        return self.dense["tp"]

    def size(self, axis: str) -> int:
        """Ranks along an axis of AXES, or along "dp_cp"."""
        return (self.data if axis == "dp_cp" else self.dense[axis]).size()

    def rank(self, axis: str) -> int:
        """This rank's place along an axis."""
        return (self.data if axis == "dp_cp" else self.dense[axis]).get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """This rank's group along an axis."""
        return (self.data if axis == "dp_cp" else self.dense[axis]).get_group()

    def tensor_neighbours(self, size: int) -> dist.ProcessGroup:
        """This rank's group of `size` neighbours along tp, for what fewer than all of them share. All ranks must call it."""
        if size == self.size("tp"):
            return self.group("tp")
        if size not in self.neighbours:
            runs = self.dense.mesh.reshape(-1, size).tolist()
            self.neighbours[size], _ = dist.new_subgroups_by_enumeration(runs)
            _give_up_as_the_default_group(self.neighbours[size], self.dense.device_type)
        return self.neighbours[size]


def build_mesh(parallel: ParallelConfig, device_type: str) -> Mesh:
    """Lays the default process group out as `parallel` says. Raises ValueError when the degrees do not multiply to it."""
    sizes = parallel.degrees(dist.get_world_size())
    dense = init_device_mesh(device_type, (sizes.pp, sizes.dp, sizes.cp, sizes.tp), mesh_dim_names=AXES)
    states = None
    if sizes.cp > 1:
        axes = dense.mesh.movedim(AXES.index("cp"), -1).reshape(-1, sizes.cp).tolist()
        states, _ = dist.new_subgroups_by_enumeration(axes, group_desc="mesh_states")
    mesh = Mesh(dense, dense["dp", "cp"]._flatten("dp_cp"), states)
    for group in (*(mesh.group(axis) for axis in (*AXES, "dp_cp")), *([states] if states else [])):
        _give_up_as_the_default_group(group, device_type)
    return mesh


def _give_up_as_the_default_group(group: dist.ProcessGroup, device_type: str) -> None:
    """Gives a group the default one's timeout; it was made with PyTorch's, half an hour with gloo."""
    default = dist.distributed_c10d._get_default_group()
    _set_pg_timeout(default._get_backend(torch.device(device_type)).options._timeout, group)
