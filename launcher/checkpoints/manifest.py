"""A checkpoint's manifest: how far the run was, and every file with its size."""

import json
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ..training.run_folder import checkpoints

MANIFEST = "manifest.json"
ORIGINAL = "hf"
"""Of a checkpoint that came from Hugging Face's, the folder of their files beside the tensors; later ones carry it along."""


def find_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run's folder; any other folder as it is."""
    found = checkpoints(folder)
    return found[-1] if found else folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, its files checked for size. Raises UserError, which names the file."""
    try:
        facts = json.loads((folder / MANIFEST).read_text())
        files = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no complete checkpoint: {MANIFEST} is missing or damaged") from None
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes where {size} were written"
            before = [p for p in folder.parent.glob("step-????????") if p.name < folder.name]
            hint = f"; remove {folder} to resume from {max(before).name}" if before else ""
            raise UserError(f"{folder} is truncated: {name} {what}{hint}")
    return facts
