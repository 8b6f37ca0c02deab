"""What a checkpoint holds, known without reading a tensor."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ...configs.errors import UserError
from .manifest import read_manifest

MODEL, OPTIMIZER = "model.", "optimizer."
"""How the names of the model's and the optimizer's tensors begin in a checkpoint."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the model: a parameter or a buffer."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: int
    """That it is stored in."""
    optimizer_bytes: int
    """Of what the optimizer keeps for it."""

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.shape.numel()

    @property
    def bytes(self) -> int:
        """Without the optimizer's."""
        return self.count * self.dtype.itemsize

    @property
    def part(self) -> str:
        """The layer it is in, such as `layers.3`, or `embedding` or `head`."""
        first, second, *_ = self.name.split(".")
        return f"{first}.{second}" if first == "layers" else first


@dataclass(frozen=True)
class Contents:
    """A complete checkpoint."""

    folder: Path
    facts: dict[str, Any]
    """Its manifest."""
    config: dict[str, Any]
    """Of the run, as in the file: an older one may lack keys."""
    metadata: Metadata
    entries: list[Entry]
    """Of the model, in its order."""


def read_contents(folder: Path) -> Contents:
    """What a checkpoint holds. Raises UserError where it is not complete, or damaged."""
    facts = read_manifest(folder)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        metadata = FileSystemReader(folder).read_metadata()
        return Contents(folder, facts, config, metadata, _entries(metadata))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, yaml.YAMLError, pickle.UnpicklingError):
        raise UserError(f"{folder}: config.yaml or .metadata is damaged, or of another version of baton or torch") from None


def _entries(metadata: Metadata) -> list[Entry]:
    tensors = {key: t for key, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
    states: dict[str, int] = {}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            name = key.removeprefix(OPTIMIZER).rpartition(".")[0]
            states[name] = states.get(name, 0) + tensor.size.numel() * tensor.properties.dtype.itemsize
    found = []
    for key, tensor in tensors.items():
        if key.startswith(MODEL):
            name = key.removeprefix(MODEL)
            found.append(Entry(name, tensor.size, tensor.properties.dtype, len(tensor.chunks), states.get(name, 0)))
    return sorted(found, key=_place)


def _place(entry: Entry) -> tuple[int, int, str]:
    """Embedding, layers by number, head."""
    first, second, *_ = entry.name.split(".")
    return ("embedding", "layers", "head").index(first), int(second) if first == "layers" else 0, entry.name
