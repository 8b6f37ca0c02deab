"""A checkpoint here becomes one of Hugging Face's."""

import shutil
from pathlib import Path

import torch

from ...configs.errors import UserError
from ...models.foreign import is_exact
from ...models.hf import write_checkpoint
from ...models.hf.families import FAMILIES
from ...models.hf.files import CONFIG, read_json
from ..checkpoints.contents import Contents, read_contents
from ..checkpoints.manifest import ORIGINAL, find_checkpoint
from ..checkpoints.model import read_model
from ..checkpoints.tensors import CheckpointTensors
from .beginning import TOKENIZER
from .from_hf import copy_beside
from .report import counted


def convert_to_hf(checkpoint: Path, out: Path, model_type: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Writes the folder `out`, complete or not at all -> the family's model_type. Raises UserError.

    checkpoint: or a run's folder, of which the newest is taken. model_type: None: what it was imported as, or else the first family
    that computes the same. dtype: of what need not be fp32; None: as it is.
    """
    contents = read_contents(find_checkpoint(checkpoint))
    model, original = read_model(contents.folder), find_original(contents)
    values = {} if original is None else read_json(original / CONFIG)
    reader = CheckpointTensors(contents)
    dtypes = {name: dtype if dtype and not is_exact(name) else entry.dtype for name, entry in reader.entries.items()}

    def add_beside(folder: Path) -> None:
        if original is not None:
            copy_beside(original, folder)
        elif (contents.folder / TOKENIZER).is_file():
            shutil.copyfile(contents.folder / TOKENIZER, folder / TOKENIZER)

    with counted(reader.read, len(dtypes)) as read:
        return write_checkpoint(out, model, read, dtypes, values, model_type, add_beside)


def find_original(contents: Contents) -> Path | None:
    """Their files, which the checkpoint, or one that its run started from, was imported with."""
    original = contents.folder / ORIGINAL
    return original if (original / CONFIG).is_file() else None


def parse_type(model_type: str | None) -> str | None:
    """--type. Raises UserError."""
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(f"--type is {model_type!r}, allowed: {', '.join(FAMILIES)}")
    return model_type


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """--dtype. Raises UserError."""
    allowed = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype is not None and dtype not in allowed:
        raise UserError(f"--dtype is {dtype!r}, allowed: {', '.join(allowed)}")
    return None if dtype is None else allowed[dtype]
