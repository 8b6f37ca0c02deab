"""A checkpoint's model as one safetensors file, one tensor in memory at a time."""

from pathlib import Path

import yaml
from rich.progress import track

from ...configs.errors import UserError
from ...models.hf.files import Described, write_file
from ..files import whole_file
from .contents import Contents
from .tensors import CheckpointTensors


def merge(contents: Contents, file: Path) -> None:
    """Writes parameters and buffers to `file`, complete or not at all. Raises UserError, also where it exists."""
    if file.exists():
        raise UserError(f"{file} exists; allowed: a file that does not")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; allowed: a file in one that exists")
    # Wide numbers first: each tensor then begins at a multiple of its numbers' size.
    entries = sorted(contents.entries, key=lambda entry: -entry.dtype.itemsize)
    table = [Described(entry.name, entry.dtype, entry.shape) for entry in entries]
    facts, reader = contents.facts, CheckpointTensors(contents)
    metadata = {"format": "pt", "step": str(facts["step"]), "baton": facts["baton"], "config": yaml.safe_dump(contents.config)}
    with whole_file(file, "OUT") as unfinished:
        tensors = (reader.read(entry.name) for entry in track(entries, "merging", transient=True))
        write_file(unfinished, table, tensors, metadata)
