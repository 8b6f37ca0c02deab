"""Files that are written complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..configs.errors import UserError


@contextmanager
def whole_file(file: Path, name: str) -> Iterator[Path]:
    """A path to write to, which becomes `file` when the block is complete, in place of what was there.

    Raises UserError in place of OSError; name: of the file in its message.
    """
    unfinished = file.with_name(f"{file.stem}.partial-{os.getpid()}{file.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"{name} {file}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
