"""Which contiguous segments of the sequence each rank of the cp axis holds."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.documents import Documents, pack_documents


@dataclass(frozen=True)
class Layout:
    """The sequence is cut into n equal segments; a rank holds some, in ascending order, one after another.

    contiguous: n = R, rank r holds segment r.
    zigzag: n = 2R, rank r holds segments r and 2R - 1 - r, which gives every rank the same work under causal attention.
    """

    kind: Literal["contiguous", "zigzag"]
    ranks: int

    @functools.cached_property
    def owners(self) -> list[int]:
        """owners[i] is the rank that holds segment i."""
        forward = list(range(self.ranks))
        return forward + forward[::-1] if self.kind == "zigzag" and self.ranks > 1 else forward

    @property
    def segments_per_rank(self) -> int:
        """Segments that every rank holds."""
        return len(self.owners) // self.ranks

    def segments(self, rank: int) -> list[int]:
        """The segments that a rank holds, ascending."""
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    @functools.cached_property
    def places(self) -> list[tuple[int, int]]:
        """For each segment in sequence order: its rank, and its place among that rank's segments."""
        return [(rank, self.segments(rank).index(i)) for i, rank in enumerate(self.owners)]

    def positions(self, rank: int, length: int, device: torch.device | None = None) -> Tensor:
        """The places in the whole sequence, [length / ranks] int64, of a rank's tokens. Raises ValueError as `check`."""
        run = self.check(length)
        starts = torch.tensor(self.segments(rank), device=device) * run
        return (starts[:, None] + torch.arange(run, device=device)).flatten()

    def documents(self, cu_seqlens: Sequence[Sequence[int]], rank: int, device: torch.device | None = None) -> Documents:
        """A rank's `Documents` of packed sequences, each given by its boundaries [0, ..., L].

        Raises ValueError as `check` and `pack_documents`, and for sequences of different lengths.
        """
        lengths = {row[-1] for row in cu_seqlens}
        if len(lengths) != 1:
            raise ValueError(f"cu_seqlens end at {sorted(lengths)}, allowed: one length for all sequences")
        return pack_documents(cu_seqlens, self.positions(rank, lengths.pop(), device))

    def shard(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's tokens of a whole sequence along `dim`. Raises ValueError as `check`."""
        return whole.index_select(dim, self.positions(rank, whole.shape[dim], whole.device))

    def check(self, length: int) -> int:
        """The tokens in a segment. Raises ValueError when the length does not cut into equal segments."""
        n = len(self.owners)
        if length % n:
            raise ValueError(f"{length} tokens do not cut into {n} equal segments ({self.kind}, cp {self.ranks})")
        return length // n
