"""Packed documents: where they lie in the sequences of a batch, and what operations need to know of it."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of b whole sequences, and the places in them of the tokens at hand.

    cu_seqlens: for each sequence its documents' boundaries, 0 first and its length L last; on the host, the same on every rank.
    positions: [b, l] int64, each token's place in its own document.
    """

    cu_seqlens: tuple[tuple[int, ...], ...]
    positions: Tensor

    @functools.cached_property
    def resets(self) -> Tensor:
        """[b, l] bool: the tokens before which a recurrence forgets its state."""
        return self.positions == 0


def pack_documents(cu_seqlens: Sequence[Sequence[int]], index: Tensor) -> Documents:
    """Boundaries of each sequence, and the places `index` [l] of the tokens at hand in it -> `Documents`.

    Raises ValueError for boundaries that do not begin with 0, do not rise, or end before a token at hand.
    """
    rows = tuple(tuple(int(boundary) for boundary in row) for row in cu_seqlens)
    for row in rows:
        if len(row) < 2 or row[0] != 0 or any(end <= start for start, end in itertools.pairwise(row)):
            raise ValueError(f"cu_seqlens {list(row[:8])}: allowed: 0 first, each one larger than the one before")
    if index.numel() and any(row[-1] <= int(index.max()) for row in rows):
        raise ValueError(f"cu_seqlens end at {[row[-1] for row in rows]}, but token {int(index.max())} is there")
    host = index.cpu()
    boundaries = [torch.tensor(row) for row in rows]
    starts = [row[torch.searchsorted(row, host, right=True) - 1] for row in boundaries]
    return Documents(rows, (host - torch.stack(starts)).to(index.device))
