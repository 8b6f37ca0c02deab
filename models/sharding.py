"""How a module's parameters lie on the tensor axis: what a mixer declares beside them and `parallelize` applies.

A module with a `sharding` table is a tensor region: its input is the same on every rank of the axis, each rank works on its
part of the heads or hidden units, and unless `output_sharded` is set its outputs are summed over the ranks. Its first
`token_args` arguments (one, unless it says otherwise) are [b, l, ...]: under sequence_parallel each rank brings a part of their
tokens, which are put together, and takes a part of the output's.
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


@dataclass(frozen=True)
class SplitExperts:
    """Stacked experts: dim 0 is cut over the ep axis, and `dim` over tp."""

    dim: int


ROWS = Split(0)
COLUMNS = Split(1)

Sharding = dict[str, Split | SplitGroups | SplitExperts]
