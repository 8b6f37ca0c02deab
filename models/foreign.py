"""The tensors of other projects' checkpoints, each of parts of the parameters here: one table for both ways."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..configs.errors import UserError
from ..configs.schema import ModelConfig
from .hybrid import TIED, HybridModel

SEVERAL = 3
"""Names that a message lists."""
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


class Source(Protocol):
    """Where the tensors of a checkpoint there lie."""

    def names(self) -> set[str]:
        """Of all of them."""

    def shape(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """A tensor. Raises UserError."""


class ForeignCheckpoint:
    """A checkpoint of another project's, whose tensors can be asked for as ours, each read when it is."""

    def __init__(
        self, folder: Path, model: ModelConfig, theirs: list[ForeignTensor], source: Source, kind: str, config: str
    ) -> None:
        """For messages, kind: what it is of, such as `a jamba`; config: the file that says of which sizes.

        Raises UserError: tensors that are missing, too many, or of another shape.
        """
        self.folder, self.model, self.theirs, self.source = folder, model, theirs, source
        self.ours = our_tensors(model)
        self._check(kind, config)
        self.dtypes = {name: self._dtype(name) for name in self.ours}

    def read(self, name: str) -> Tensor:
        """One of our tensors, put together from theirs, in their dtype; fp32 where `is_exact`. Raises UserError."""
        out = torch.empty(self.ours[name].shape, dtype=self.dtypes[name])
        for theirs in self._sources(name):
            for part, piece in theirs.split(self.source.read(theirs.name), self.ours):
                if part.ours == name:
                    part.put(out, piece)
        return out

    def _sources(self, name: str) -> list[ForeignTensor]:
        return [theirs for theirs in self.theirs if any(part.ours == name for part in theirs.parts)]

    def _dtype(self, name: str) -> torch.dtype:
        """The widest of those that it is made of; at least fp32 where that is exact."""
        found = {self.source.shape(theirs.name)[1] for theirs in self._sources(name)}
        return functools.reduce(torch.promote_types, found, torch.float32 if is_exact(name) else found.pop())

    def _check(self, kind: str, config: str) -> None:
        """Theirs are exactly those that there must be, of the shapes that there must be."""
        expected, there = {theirs.name: theirs for theirs in self.theirs}, self.source.names()
        if missing := sorted(expected.keys() - there):
            raise UserError(f"{self.folder}: {_list(missing)} missing")
        if more := sorted(there - expected.keys()):
            raise UserError(f"{self.folder}: {_list(more)} of no part of {kind} as {config} has it")
        for name, theirs in expected.items():
            found, wanted = self.source.shape(name)[0], theirs.join(self.ours).shape
            if found != wanted:
                raise UserError(f"{self.folder}: {name} is {list(found)}, expected {list(wanted)} by {config}")


class Joined:
    """Theirs put together of ours; what is read for one is kept for the next: that of all experts is read once."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """read: one of our tensors by name."""
        self._read = read
        self._held: dict[str, Tensor] = {}

    def read(self, theirs: ForeignTensor) -> Tensor:
        """In memory of its own."""
        names = [part.ours for part in theirs.parts]
        self._held = {name: tensor for name, tensor in self._held.items() if name in names}
        for name in names:
            if name not in self._held:
                self._held[name] = self._read(name)
        return theirs.join(self._held)


def described(model: ModelConfig, theirs: list[ForeignTensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Theirs by name, without numbers: the shape of each, and the widest dtype of its parts.

    Raises AssertionError where they are not all of ours, each number once.
    """
    numbers = our_tensors(model)
    placed = {part.ours for tensor in theirs for part in tensor.parts}
    assert placed == numbers.keys(), placed ^ numbers.keys()
    widest = [max((dtypes[part.ours] for part in tensor.parts), key=lambda dtype: dtype.itemsize) for tensor in theirs]
    found = {tensor.name: tensor.join(numbers).to(dtype) for tensor, dtype in zip(theirs, widest, strict=True)}
    assert sum(tensor.numel() for tensor in found.values()) == sum(tensor.numel() for tensor in numbers.values())
    return found


def _list(names: list[str]) -> str:
    """`a, b, c and 5 more are`."""
    rest = len(names) - SEVERAL
    listed = ", ".join(names[:SEVERAL]) + (f" and {rest} more" if rest > 0 else "")
    return f"{listed} {'are' if len(names) > 1 else 'is'}"
