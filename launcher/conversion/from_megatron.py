"""A distributed checkpoint of Megatron-LM's becomes one that any mesh begins to train from."""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...configs.errors import UserError
from ...configs.loading import load_config
from ...models.foreign import ForeignCheckpoint
from ...models.megatron_config import megatron_config
from ...models.megatron_tensors import EMBEDDING, HEAD, megatron_tensors
from ..checkpoints.tensors import StoredTensors
from .beginning import write_beginning

TRACKER = "latest_checkpointed_iteration.txt"
"""Of a run's folder: the number of its newest checkpoint, or `release`."""
OPTIMIZER = ("optimizer.", "chained_")
"""How names of what is not the model's begin."""


class MegatronFiles:
    """The model's tensors of a checkpoint."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """vocab_size: rows beyond, with which Megatron fills matrices up, are left out. Raises UserError."""
        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except (OSError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}: no distributed checkpoint of Megatron (--ckpt-format torch_dist): {error}") from None
        tensors = {name: t for name, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        self.shapes = {name: (t.size, t.properties.dtype) for name, t in tensors.items() if not name.startswith(OPTIMIZER)}
        self.stored, self.vocab_size = StoredTensors(folder, metadata), vocab_size

    def names(self) -> set[str]:
        """Of the model's tensors."""
        return {*self.shapes}

    def shape(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Without rows that fill a matrix up."""
        shape, dtype = self.shapes[name]
        if name in (EMBEDDING, HEAD) and shape[0] > self.vocab_size:
            shape = torch.Size([self.vocab_size, *shape[1:]])
        return shape, dtype

    def read(self, name: str) -> Tensor:
        """Raises UserError."""
        return self.stored.read(name, *self.shapes[name])[: self.shape(name)[0][0]]


def find_iteration(folder: Path) -> Path:
    """The newest checkpoint of a run's folder of Megatron's; any other folder as it is. Raises UserError."""
    if not (folder / TRACKER).is_file():
        return folder
    newest = (folder / TRACKER).read_text().strip()
    found = folder / (f"iter_{int(newest):07}" if newest.isdigit() else newest)
    if not found.is_dir():
        raise UserError(f"{folder / TRACKER} says {newest}, and {found} is not there")
    return found


def convert_from_megatron(folder: Path, config: str, overrides: list[str], out: Path) -> ForeignCheckpoint:
    """Writes the checkpoint `out`, complete or not at all, with a config that trains from it. Raises UserError.

    config, overrides: as of `load_config`, a run whose model is that of the checkpoint.
    """
    asked = load_config(config, overrides)
    megatron_config(asked.model)
    folder = find_iteration(folder)
    files = MegatronFiles(folder, asked.model.vocab_size)
    source = ForeignCheckpoint(folder, asked.model, megatron_tensors(asked.model), files, "the model", config)
    begins = {"start_from": out.resolve(), "run": Path(f"runs/{out.name}-trained")}
    write_beginning(source, asked.model_copy(update=begins), out, lambda partial: None)
    return source
