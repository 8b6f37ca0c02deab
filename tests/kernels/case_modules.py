"""The modules of compiled/, which say what the tools beside this file call kernels with."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).resolve().parent / "compiled"

Case = tuple[str, Callable[[], object]]


def names(folder: Path = FOLDER) -> list[str]:
    """The ops that have a module there."""
    return sorted(file.stem for file in folder.glob("[!_]*.py"))


def cases_of(folder: Path, op: str, kind: Literal["cases", "huge"]) -> Iterator[Case]:
    """What folder/op.py yields. A module that cannot be had is a case that raises why."""
    try:
        yield from getattr(_module(folder, op), kind)()
    except Exception as failure:
        yield f"({kind})", _raising(failure)


def one_line(failure: Exception) -> str:
    """An error for a report: its type, and the end of what it says."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[-300:]


def _module(folder: Path, op: str) -> object:
    spec = importlib.util.spec_from_file_location(f"compiled_{op}", folder / f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    # Where `inspect` finds the kernels' source.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _raising(failure: Exception) -> Callable[[], object]:
    def call() -> object:
        raise failure

    return call
