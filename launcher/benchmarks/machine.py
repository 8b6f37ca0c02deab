"""What a measurement on the CPU names as its machine, and where its numbers go."""

import json
import platform
from pathlib import Path
from typing import Any

from ..files import whole_file


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
    with whole_file(file, "--json") as unfinished:
        unfinished.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
