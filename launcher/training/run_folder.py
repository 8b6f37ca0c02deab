"""Where a run keeps its things, and what may be overwritten: nothing that is good."""

import os
import re
from pathlib import Path

from ...configs.errors import UserError

NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The checkpoint written after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; those half written have another name."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name)) if folder.is_dir() else []


def check_run_folder(run: Path, resume: bool) -> None:
    """Raises UserError where the folder cannot be written, or a run would begin where one is already."""
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run {run}: {nearest} is no folder that can be written")
    found = checkpoints(run)
    if found and not resume:
        raise UserError(f"{run} holds a run with {found[-1].name}: give --resume to go on with it, or run=FOLDER for a new one")
