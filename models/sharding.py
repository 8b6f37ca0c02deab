"""How a module's parameters lie on the tensor axis: what a mixer declares beside them and `parallelize` applies.

A module with a `sharding` table is a tensor region: its input is the same on every rank of the axis, each rank works on its
part of the heads or hidden units, and unless `output_sharded` is set its outputs are summed over the ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Cut into equal parts along a dim."""

    dim: int


@dataclass(frozen=True)
class SplitGroups:
    """Dim 0 is made of equal blocks, one a group of heads. Cut between groups; with fewer groups than ranks the parameter is
    replicated, each rank reads the block of its group, and the gradients of all ranks are summed."""

    groups: int


ROWS = Split(0)
COLUMNS = Split(1)

Sharding = dict[str, Split | SplitGroups]
