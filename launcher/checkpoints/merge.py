"""A checkpoint's model as one safetensors file, one tensor in memory at a time.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian; the header, JSON with each
tensor's dtype, shape and place in what follows; the tensors' bytes, row by row, with nothing between them.
"""

import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.progress import track
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

from ...configs.errors import UserError
from .contents import MODEL, Contents, Entry

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The format's names of what models are made of."""
ALIGNMENT = 8
"""Bytes that the header is filled up to, so that tensors can be mapped into memory where they are."""


def merge(contents: Contents, file: Path) -> None:
    """Writes parameters and buffers to `file`, complete or not at all. Raises UserError, also where it exists."""
    if file.exists():
        raise UserError(f"{file} exists; allowed: a file that does not")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; allowed: a file in one that exists")
    # Wide numbers first: each tensor then begins at a multiple of its numbers' size.
    entries = sorted(contents.entries, key=lambda entry: -entry.dtype.itemsize)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as out:
            out.write(_header(contents, entries))
            for tensor in _read(contents, entries):
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.rename(partial, file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _header(contents: Contents, entries: list[Entry]) -> bytes:
    facts = contents.facts
    values = {"format": "pt", "step": str(facts["step"]), "baton": facts["baton"], "config": yaml.safe_dump(contents.config)}
    table: dict[str, object] = {"__metadata__": values}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        table[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _read(contents: Contents, entries: list[Entry]) -> Iterator[Tensor]:
    """The tensors one after another, each put together from its pieces."""
    reader = FileSystemReader(contents.folder)
    reader.set_up_storage_reader(contents.metadata, True)
    for entry in track(entries, "merging", transient=True):
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({MODEL + entry.name: tensor}, contents.metadata, True)
        try:
            reader.read_data(planner.create_local_plan(), planner)
        except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{contents.folder}: {entry.name} cannot be read: {error}") from None
        yield tensor
