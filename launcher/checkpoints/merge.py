"""A checkpoint's model as one safetensors file, one tensor in memory at a time."""

import os
from pathlib import Path

import yaml
from rich.progress import track

from ...configs.errors import UserError
from ...models.hf.files import Described, write_file
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
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        tensors = (reader.read(entry.name) for entry in track(entries, "merging", transient=True))
        write_file(partial, table, tensors, metadata)
        os.rename(partial, file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
