"""A checkpoint of step 0: what a run can start from, made of tensors that come from elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...configs.schema import Config
from ...models.foreign import ForeignCheckpoint
from ...models.hf.files import new_folder
from ..checkpoints.manifest import MANIFEST
from ..checkpoints.tensors import write_tensors
from ..training.token_files import tokenizer_digest
from .report import counted

TOKENIZER = "tokenizer.json"


def write_beginning(source: ForeignCheckpoint, config: Config, out: Path, copy: Callable[[Path], None]) -> None:
    """Writes the checkpoint `out`, complete or not at all; copy: puts more into its folder. Raises UserError."""
    tensors = {name: like.to(source.dtypes[name]) for name, like in source.ours.items()}
    with new_folder(out) as partial, counted(source.read, len(tensors)) as read:
        write_tensors(partial, tensors, read)
        copy(partial)
        (partial / "config.yaml").write_text(config.to_yaml())
        (partial / MANIFEST).write_text(json.dumps(_facts(partial), indent=1))


def _facts(folder: Path) -> dict[str, Any]:
    """A manifest; the run has not begun."""
    return {
        "step": 0,
        "consumed": 0,
        "world": 1,
        "tokenizer": tokenizer_digest(folder) if (folder / TOKENIZER).exists() else None,
        "data": {},
        "baton": __version__,
        "torch": torch.__version__,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()},
    }
