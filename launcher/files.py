"""Files that are written complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..configs.errors import UserError


def check_writable(file: Path, name: str = "--json") -> None:
    """Raises UserError where the file could not be written at the end."""
    folder = file.absolute().parent
    if (file.exists() and not file.is_file()) or not file.name or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name} {file}: cannot be written; allowed: a file in a folder that exists and can be written")


@contextmanager
def whole_file(file: Path, name: str) -> Iterator[Path]:
    """A path to write to, which becomes `file` when the block is complete, in place of what was there.

    Raises UserError as `check_writable` and in place of OSError; name: of the file in its message.
    """
    check_writable(file, name)
    file = file.resolve()
    unfinished = file.with_name(f"{file.stem}.partial-{os.getpid()}{file.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"{name} {file}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
