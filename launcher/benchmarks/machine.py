"""What a measurement on the CPU names as its machine, and where its numbers go."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from ...configs.errors import UserError


def cpu_name() -> str:
    """The processor's name as Linux has it, else that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """As JSON, complete or not at all. Raises UserError."""
    unfinished = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
