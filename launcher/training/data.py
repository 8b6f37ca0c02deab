"""Which tokens a rank sees at which step: a function of the position in the data, so that a run resumes where it stopped."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import Config
from ...kernels.cross_entropy import IGNORED
from ...kernels.documents import Documents
from ...models.hybrid import MicroStep
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh
from .token_files import TokenStream


class Samples:
    """The samples of a token stream: runs of `context` tokens and the one after, in an order shuffled anew each epoch."""

    def __init__(self, stream: TokenStream, context: int, seed: int | None) -> None:
        """Raises UserError when the stream is shorter than one sample. Without a seed the order is that of the stream."""
        self.stream, self.context, self.seed = stream, context, seed
        self.count = (stream.length - 1) // context
        if self.count < 1:
            raise UserError(f"{stream.name} has {stream.length} tokens, fewer than one sample ({context} + 1)")
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> Tensor:
        """Tokens [context + 1] of the sample at a position, which may pass the end: then the next epoch begins."""
        return torch.from_numpy(self.stream.read(self._start(position), self.context + 1))

    def cu_seqlens(self, position: int) -> list[int]:
        """Where documents begin among the tokens [context + 1] of a sample: 0 first and context + 1 last."""
        return self.stream.cu_seqlens(self._start(position), self.context + 1)

    def _start(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(self._epoch_order(epoch)[place]) * self.context

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(self.count)
            if self.seed is not None:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._order = epoch, order
        return self._order[1]


class Loader:
    """Cuts samples for this rank of a mesh: sequences over dp, tokens over cp."""

    def __init__(self, samples: Samples, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.samples, self.batch, self.mesh, self.device = samples, config.batch, mesh, device
        self.vocab_size, self.packed = config.model.vocab_size, config.data.documents == "packed"
        self.layout = Layout(config.parallel.layout, mesh.size("cp"))
        self.positions = self.layout.positions(mesh.rank("cp"), samples.context).to(device)

    def step(self, consumed: int) -> Iterator[MicroStep]:
        """The micro-steps of the step that begins at sample `consumed`."""
        per_micro_step = self.batch.sequences // self.batch.micro_steps
        own = per_micro_step // self.mesh.size("dp")
        for micro_step in range(self.batch.micro_steps):
            first = consumed + micro_step * per_micro_step + self.mesh.rank("dp") * own
            yield self._read(range(first, first + own))

    def first(self, count: int) -> Iterator[MicroStep]:
        """The first `count` samples, one for each dp rank at a time; ranks without one get labels that count nothing."""
        dp = self.mesh.size("dp")
        for start in range(0, count, dp):
            place = start + self.mesh.rank("dp")
            micro_step = self._read([min(place, count - 1)])
            yield micro_step if place < count else micro_step._replace(labels=torch.full_like(micro_step.ids, IGNORED))

    def _read(self, places: Sequence[int]) -> MicroStep:
        tokens = torch.stack([self.samples[place] for place in places])
        if int(tokens.max()) >= self.vocab_size:
            raise UserError(f"{self.samples.stream.name} has token {int(tokens.max())}, model.vocab_size is {self.vocab_size}")
        ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
        documents = None
        if self.packed:
            cu_seqlens = [self.samples.cu_seqlens(place) for place in places]
            documents = pack(labels, cu_seqlens, self.layout, self.mesh.rank("cp"), self.device)
        ids, labels = (self.layout.shard(t, self.mesh.rank("cp")).to(self.device) for t in (ids, labels))
        return MicroStep(ids, labels, self.positions, documents)


def pack(labels: Tensor, cu_seqlens: list[list[int]], layout: Layout, rank: int, device: torch.device) -> Documents:
    """A rank's documents of whole sequences; in labels [b, L] those that another document's first token is are set to IGNORED.

    cu_seqlens are of the L + 1 tokens that ids and labels were made of.
    """
    length = labels.shape[1]
    for row, boundaries in zip(labels, cu_seqlens, strict=True):
        row[torch.tensor(boundaries[1:-1], dtype=torch.int64) - 1] = IGNORED
    inside = [[boundary for boundary in boundaries[:-1] if boundary < length] + [length] for boundaries in cu_seqlens]
    return layout.documents(inside, rank, device)
