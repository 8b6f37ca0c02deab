"""A checkpoint of Hugging Face's, whose tensors can be asked for as ours, and the other way round."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ..foreign import ForeignTensor, is_exact, our_tensors
from .families import read_config, write_config
from .files import CONFIG, SHARD_BYTES, Described, TensorFiles, new_folder, read_json, write_folder
from .tensors import HEAD, hf_tensors, usual_name

SEVERAL = 3
"""Names that a message lists."""


class HFCheckpoint:
    """A folder with config.json and safetensors, each tensor read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: what is not supported, missing, too much, or of another shape."""
        self.folder = folder
        self.values = read_json(folder / CONFIG)
        self.model: ModelConfig = read_config(self.values, str(folder / CONFIG))
        self.model_type: str = self.values["model_type"]
        self.files = TensorFiles(folder, lambda name: usual_name(name, self.model_type))
        self.ours = our_tensors(self.model)
        self.theirs = hf_tensors(self.model, self.model_type)
        self._check()
        self.dtypes = {name: self._dtype(name) for name in self.ours}

    def read(self, name: str) -> Tensor:
        """One of our tensors, put together from theirs, in their dtype; fp32 where `is_exact`. Raises UserError."""
        out = torch.empty(self.ours[name].shape, dtype=self.dtypes[name])
        for theirs in self._sources(name):
            for part, piece in theirs.split(self.files.read(theirs.name), self.ours):
                if part.ours == name:
                    part.put(out, piece)
        return out

    def _sources(self, name: str) -> list[ForeignTensor]:
        return [theirs for theirs in self.theirs if any(part.ours == name for part in theirs.parts)]

    def _dtype(self, name: str) -> torch.dtype:
        """The widest of those that it is made of; at least fp32 where that is exact."""
        found = {self.files.shape(theirs.name)[1] for theirs in self._sources(name)}
        return functools.reduce(torch.promote_types, found, torch.float32 if is_exact(name) else found.pop())

    def _check(self) -> None:
        """Theirs are exactly those that there must be, of the shapes that there must be."""
        expected = {theirs.name: theirs for theirs in self.theirs}
        there = {*self.files.places}
        if self.model.tied_embeddings:
            there.discard(HEAD)
        if missing := sorted(expected.keys() - there):
            raise UserError(f"{self.folder}: {_list(missing)} missing")
        if more := sorted(there - expected.keys()):
            raise UserError(f"{self.folder}: {_list(more)} of no part of a {self.model_type} as {CONFIG} has it")
        for name, theirs in expected.items():
            found, wanted = self.files.shape(name)[0], theirs.join(self.ours).shape
            if found != wanted:
                raise UserError(f"{self.folder}: {name} is {list(found)}, expected {list(wanted)} by {CONFIG}")


def write_checkpoint(
    folder: Path,
    model: ModelConfig,
    read: Callable[[str], Tensor],
    dtypes: dict[str, torch.dtype],
    original: dict[str, Any] | None = None,
    model_type: str | None = None,
    extra: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes our tensors as a checkpoint of Hugging Face's, complete or not at all -> its model_type.

    read: one of our tensors by name; dtypes: of each. original: the config.json that the model came with, for the keys that the
    model does not know. model_type: of the family, None: the first that computes the same. extra: writes more into the folder.
    Raises UserError where no family computes the same, the folder exists, or it cannot be written; and AssertionError where what
    would be written is not what `HFCheckpoint` reads.
    """
    original = original or {}
    values = write_config(model, model_type or original.get("model_type"))
    if values["model_type"] == original.get("model_type"):
        values = original | values
    numbers = our_tensors(model)
    theirs = {tensor.name: tensor for tensor in hf_tensors(model, values["model_type"])}
    placed = [part.ours for tensor in theirs.values() for part in tensor.parts]
    assert {*placed} == numbers.keys(), {*placed} ^ numbers.keys()
    widest = {name: max((dtypes[part.ours] for part in t.parts), key=lambda dtype: dtype.itemsize) for name, t in theirs.items()}
    table = [Described(name, widest[name], tensor.join(numbers).shape) for name, tensor in theirs.items()]
    assert sum(each.shape.numel() for each in table) == sum(tensor.numel() for tensor in numbers.values())
    values["dtype"] = str(Counter(dtypes.values()).most_common(1)[0][0]).removeprefix("torch.")
    latest = _Latest(read)
    with new_folder(folder) as partial:
        write_folder(partial, table, lambda name: theirs[name].join(latest.of(theirs[name])).to(widest[name]), shard_bytes)
        if extra is not None:
            extra(partial)
        (partial / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return values["model_type"]


class _Latest:
    """Our tensors of the latest of theirs: that of all experts is read once for all of them."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.read = read
        self.held: dict[str, Tensor] = {}

    def of(self, theirs: ForeignTensor) -> dict[str, Tensor]:
        names = [part.ours for part in theirs.parts]
        self.held = {name: tensor for name, tensor in self.held.items() if name in names}
        for name in names:
            if name not in self.held:
                self.held[name] = self.read(name)
        return self.held


def _list(names: list[str]) -> str:
    """`a, b, c and 5 more are`."""
    rest = len(names) - SEVERAL
    listed = ", ".join(names[:SEVERAL]) + (f" and {rest} more" if rest > 0 else "")
    return f"{listed} {'are' if len(names) > 1 else 'is'}"
