"""Text from files, folders, .jsonl and .gz, as documents."""

import codecs
import functools
import gzip
import json
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from ...configs.errors import UserError

BLOCK = 1 << 24
"""Bytes that are read at once."""
SUFFIXES = {".py", ".txt", ".md", ".rst", ".jsonl"}
"""What is read in a folder, also with .gz behind it. A file that is named itself is read whatever its suffix."""
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "encodings"}
"""What in the standard library's folder is other packages, or tables of characters rather than text."""
TEXT_KEY = "text"
"""Of a .jsonl line."""


def documents(inputs: list[str], max_bytes: int) -> Iterator[str]:
    """Documents of the inputs until `max_bytes` of text; files in an order that mixes them, the same every time.

    Raises UserError for an input that is missing, unreadable or empty.
    """
    files = [(path, True) for name in inputs for path in [Path(name)] if not path.is_dir()]
    for folder in [Path(name) for name in inputs if Path(name).is_dir()] or ([] if inputs else [standard_library()]):
        found = [path for path in sorted(folder.rglob("*")) if _is_text(path, folder)]
        if not found:
            raise UserError(f"data.input {folder}: no file that ends in {' '.join(sorted(SUFFIXES))} (or .gz of these)")
        files += [(path, False) for path in found]
    random.Random(0).shuffle(files)
    left = max_bytes
    for path, named in files:
        for text in _read(path, named, left):
            yield text
            left -= len(text.encode(errors="replace"))
            if left <= 0:
                return


@functools.cache
def standard_library() -> Path:
    """Real text that is on any machine: the sources and docstrings of Python itself."""
    return Path(sysconfig.get_paths()["stdlib"])


def _is_text(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    skipped = folder == standard_library() and NOT_THE_LIBRARY & set(parts)
    suffixes = path.suffixes[-2:-1] if path.suffix == ".gz" else path.suffixes[-1:]
    return not skipped and bool(SUFFIXES & set(suffixes)) and path.is_file()


def _read(path: Path, named: bool, most: int) -> Iterator[str]:
    """A file's documents. One that was found in a folder and is no UTF-8 is passed over, one that was named is an error."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from (text for number, line in enumerate(file, 1) if (text := _line_text(path, number, line)))
                return
            data = bytearray()
            # Block by block: a reader makes room for all that it is asked for.
            while block := file.read(min(BLOCK, most - len(data))):
                data += block
            # A file that is cut at `most` may end within a character.
            text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < most)
    except UnicodeDecodeError as error:
        if named:
            raise UserError(f"data.input {path}: no UTF-8 text at byte {error.start}") from None
        return
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.input {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if text.strip():
        yield text
    elif named:
        raise UserError(f"data.input {path}: the file is empty")


def _line_text(path: Path, number: int, line: bytes) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)[TEXT_KEY]
        value.encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'data.input {path}:{number}: allowed: a JSON object whose "{TEXT_KEY}" is a string') from None
    return value
