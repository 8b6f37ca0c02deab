"""Random tokens, packed so that every border is hit, and which of them a rank holds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...configs.schema import Config
from ...kernels.cross_entropy import IGNORED
from ...kernels.documents import Documents
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh

UNLABELLED = 1 / 16
"""Of the tokens: their labels count nothing, so that the number of tokens and the number of labels differ."""


class Inputs(NamedTuple):
    """What a model is called with, on its device."""

    ids: Tensor  # [b, l] int64
    labels: Tensor  # [b, l] int64
    positions: Tensor  # [l] int64 in the whole sequence
    documents: Documents | None


@dataclass(frozen=True)
class Share:
    """The tokens of a batch that a rank holds: some of its sequences, some segments of each."""

    layout: Layout
    cp: int
    dp: int
    dp_ranks: int

    @classmethod
    def of(cls, mesh: Mesh, kind: str) -> list["Share"]:
        """Those of all ranks along the axis "dp_cp", in its order."""
        layout, dp_ranks = Layout(kind, mesh.size("cp")), mesh.size("dp")  # type: ignore[arg-type]
        return [cls(layout, cp, dp, dp_ranks) for dp in range(dp_ranks) for cp in range(layout.ranks)]

    @classmethod
    def all(cls) -> "Share":
        """One rank's, which has every token."""
        return cls(Layout("contiguous", 1), 0, 0, 1)

    def rows(self, sequences: int) -> slice:
        """Its sequences."""
        each = sequences // self.dp_ranks
        return slice(self.dp * each, (self.dp + 1) * each)

    def cut(self, whole: Tensor) -> Tensor:
        """[B, L, ...] -> [b, l, ...]."""
        return self.layout.shard(whole[self.rows(len(whole))], self.cp)


@dataclass(frozen=True)
class Batch:
    """The tokens of one step: ids and labels [B, L] int64 on the host, and the documents' boundaries where they are packed."""

    ids: Tensor
    labels: Tensor
    cu_seqlens: list[list[int]] | None

    @property
    def labelled(self) -> int:
        """Labels that count, over all ranks."""
        return int((self.labels != IGNORED).sum())

    def inputs(self, share: Share, device: torch.device) -> Inputs:
        """What a rank's model is called with."""
        ids, labels = (share.cut(whole).to(device) for whole in (self.ids, self.labels))
        positions = share.layout.positions(share.cp, self.ids.shape[1], device)
        if self.cu_seqlens is None:
            return Inputs(ids, labels, positions, None)
        rows = self.cu_seqlens[share.rows(len(self.cu_seqlens))]
        return Inputs(ids, labels, positions, share.layout.documents(rows, share.cp, device))


def draw_batch(config: Config, segments: int) -> Batch:
    """batch.sequences sequences of data.context random tokens, the same on every rank.

    Where data.documents is packed, the documents are cut along the borders of `segments` equal segments.
    """
    shape = config.batch.sequences, config.data.context
    random = np.random.default_rng([config.seed, *shape])
    ids = torch.from_numpy(random.integers(0, config.model.vocab_size, shape))
    labels = ids.roll(-1, 1)
    labels[torch.from_numpy(random.random(shape) < UNLABELLED)] = IGNORED
    labels[:, -1] = IGNORED
    if config.data.documents == "single":
        return Batch(ids, labels, None)
    cu_seqlens = [pack(shape[1], segments, row, random) for row in range(shape[0])]
    for row, boundaries in enumerate(cu_seqlens):
        labels[row, torch.tensor(boundaries[1:]) - 1] = IGNORED
    return Batch(ids, labels, cu_seqlens)


def pack(length: int, segments: int, shift: int, random: np.random.Generator) -> list[int]:
    """Boundaries [0, ..., length] of documents that hit what sharding can get wrong.

    Segments take turns, beginning with the one numbered `shift`: full of tiny documents; two in the middle of one document; and
    one between two documents of a single token. So documents begin and end on borders, and go over several of them.
    """
    pieces = segments * -(-4 // segments)
    borders = [piece * length // pieces for piece in range(pieces + 1)]
    boundaries = {0, length}
    for piece, (start, end) in enumerate(itertools.pairwise(borders)):
        turn = (piece + shift) % 4
        if turn == 0:
            boundaries.update(_tiny(start, end, random))
        elif turn == 3:
            boundaries.update({start, start + 1, end - 1})
    return sorted(boundary for boundary in boundaries if 0 <= boundary <= length)


def _tiny(start: int, end: int, random: np.random.Generator) -> Sequence[int]:
    """Boundaries from `start` to before `end`, 1 to 4 tokens apart."""
    boundaries = start + np.concatenate([[0], random.integers(1, 5, end - start).cumsum()])
    return boundaries[boundaries < end].tolist()
