"""The tensors of other projects' checkpoints, each of parts of the parameters here: one table for both ways."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..configs.schema import ModelConfig
from .hybrid import TIED, HybridModel

View = Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """A part of one of our tensors, as it lies in one of theirs."""

    ours: str
    view: View = lambda tensor: tensor
    """Of our tensor, in the order of their numbers."""
    rows: bool = False
    """Whether the view's first two dims are one dim there."""

    def take(self, tensor: Tensor) -> Tensor:
        """Our tensor -> the part as it lies there."""
        view = self.view(tensor)
        return view.flatten(0, 1) if self.rows else view

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """The reverse, in place."""
        view = self.view(tensor)
        view.copy_(part.reshape(view.shape))


class ForeignTensor(NamedTuple):
    """One tensor of a checkpoint there: its parts, one after another along a dim."""

    name: str
    parts: tuple[Part, ...]
    dim: int = 0
    rows: bool = False
    """Whether the first two dims are then one dim there."""

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """Our tensors by name -> theirs, in memory of its own."""
        joined = torch.cat([part.take(tensors[part.ours]) for part in self.parts], self.dim)
        return joined.flatten(0, 1) if self.rows else joined

    def split(self, joined: Tensor, ours: dict[str, Tensor]) -> Iterator[tuple[Part, Tensor]]:
        """Theirs -> its parts as they lie in it; ours: tensors of the shapes of ours, by name."""
        sizes = [part.take(ours[part.ours]).shape[self.dim] for part in self.parts]
        pieces = (joined.unflatten(0, (-1, sum(sizes))) if self.rows else joined).split(sizes, self.dim)
        return zip(self.parts, pieces, strict=True)


def whole(there: str, ours: str, **names: str) -> list[ForeignTensor]:
    """Tensors that are alike on both sides: by our name, with __ for a point, theirs."""
    return [ForeignTensor(f"{there}{name}", (Part(f"{ours}.{key.replace('__', '.')}"),)) for key, name in names.items()]


def rows_of(groups: int, which: int) -> View:
    """B (0) or C (1) of our rows, which lie group by group."""
    return lambda tensor: tensor.unflatten(0, (groups, 2, -1))[:, which]


def channels(view: View = lambda tensor: tensor) -> View:
    """Of a convolution's weight, which there has a dim of 1."""
    return lambda tensor: view(tensor).unsqueeze(-2)


def our_tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model by name, without numbers, in its order."""
    with torch.device("meta"):
        built = HybridModel(model)
    return {name: tensor.detach() for name, tensor in built.state_dict().items() if not (model.tied_embeddings and name in TIED)}


def is_exact(name: str) -> bool:
    """Whether one of our tensors is in fp32 whatever the others are: A_log, D and dt_bias, which bf16 would round by 0.7% in A, and
    the biases of experts."""
    return ".ssm." in name or name.endswith("feed_forward.bias")
