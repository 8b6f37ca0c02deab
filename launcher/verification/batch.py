"""Random tokens, packed so that every border is hit, and which of them a rank holds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...configs.schema import Config, ParallelConfig
from ...kernels.cross_entropy import IGNORED
from ...kernels.documents import Documents
from ...models.hybrid import MicroStep
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh

UNLABELLED = 1 / 16
"""Of the tokens: their labels count nothing, so that the number of tokens and the number of labels differ."""


@dataclass(frozen=True)
class Share:
    """The tokens of a batch that a rank holds: some sequences of each micro-step, some segments of each."""

    layout: Layout
    cp: int
    dp: int
    dp_ranks: int
    tp: int = 0
    tp_ranks: int = 1
    """Ranks that share these tokens out between tensor regions."""

    @classmethod
    def of(cls, mesh: Mesh, parallel: ParallelConfig) -> list["Share"]:
        """Those of all ranks along this rank's axis "dp_cp", in its order."""
        layout, dp_ranks = Layout(parallel.layout, mesh.size("cp")), mesh.size("dp")
        tp = (mesh.rank("tp"), mesh.size("tp")) if parallel.sequence_parallel else (0, 1)
        return [cls(layout, cp, dp, dp_ranks, *tp) for dp in range(dp_ranks) for cp in range(layout.ranks)]

    @classmethod
    def all(cls) -> "Share":
        """One rank's, which has every token."""
        return cls(Layout("contiguous", 1), 0, 0, 1)

    def rows(self, sequences: int) -> slice:
        """Its sequences."""
        each = sequences // self.dp_ranks
        return slice(self.dp * each, (self.dp + 1) * each)

    def cut(self, whole: Tensor) -> Tensor:
        """[m, B, L, ...] -> [m, b, l, ...]."""
        return self.layout.shard(whole[:, self.rows(whole.shape[1])], self.cp, dim=2)

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of what `cut` gives."""
        m, sequences, length, *rest = whole
        return torch.Size([m, sequences // self.dp_ranks, length // self.layout.ranks, *rest])

    def between_regions(self, own: Tensor) -> Tensor:
        """Of its tokens [m, b, l, ...] those that it has between tensor regions."""
        return own.chunk(self.tp_ranks, 2)[self.tp]


@dataclass(frozen=True)
class Batch:
    """The tokens of one step of m micro-steps: ids and labels [m, B, L] int64 on the host.

    cu_seqlens: by micro-step and sequence, the documents' boundaries where they are packed.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: list[list[list[int]]] | None

    @property
    def labelled(self) -> int:
        """Labels that count, over all ranks and micro-steps."""
        return int((self.labels != IGNORED).sum())

    def micro_steps(self, share: Share, device: torch.device) -> list[MicroStep]:
        """What a rank's model is called with."""
        ids, labels = (share.cut(whole).to(device) for whole in (self.ids, self.labels))
        positions = share.layout.positions(share.cp, self.ids.shape[2], device)
        documents: list[Documents | None] = [None] * len(ids)
        if self.cu_seqlens is not None:
            rows = share.rows(self.ids.shape[1])
            documents = [share.layout.documents(each[rows], share.cp, device) for each in self.cu_seqlens]
        return [MicroStep(ids[i], labels[i], positions, documents[i]) for i in range(len(ids))]


def draw_batch(config: Config, segments: int) -> Batch:
    """The config's batch of sequences of data.context random tokens, the same on every rank.

    Where data.documents is packed, the documents are cut along the borders of `segments` equal segments.
    """
    m = config.batch.micro_steps
    shape = m, config.batch.sequences // m, config.data.context
    random = np.random.default_rng([config.seed, config.batch.sequences, config.data.context])
    ids = torch.from_numpy(random.integers(0, config.model.vocab_size, shape))
    labels = ids.roll(-1, -1)
    labels[torch.from_numpy(random.random(shape) < UNLABELLED)] = IGNORED
    labels[..., -1] = IGNORED
    if config.data.documents == "single":
        return Batch(ids, labels, None)
    rows = [pack(config.data.context, segments, row, random) for row in range(config.batch.sequences)]
    for sequence, boundaries in zip(labels.flatten(0, 1), rows, strict=True):
        sequence[torch.tensor(boundaries[1:]) - 1] = IGNORED
    return Batch(ids, labels, [rows[i * shape[1] : (i + 1) * shape[1]] for i in range(m)])


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
