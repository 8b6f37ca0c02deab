"""Folders of safetensors: read by name, written one tensor after another.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian; the header, JSON with each
tensor's dtype, shape and place in what follows; the tensors' bytes, row by row, with nothing between them.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...configs.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Of a file, at most, where there are several; the hub's own limit."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The format's names of what models are made of."""
ALIGNMENT = 8
"""Bytes that the header is filled up to, so that tensors can be mapped into memory where they are."""


class Described(NamedTuple):
    """A tensor before its numbers are there."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return self.shape.numel() * self.dtype.itemsize


def write_file(file: Path, table: Sequence[Described], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors as they come, in the order of the table. Raises OSError."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for described in table:
        begin, end = end, end + described.bytes
        header[described.name] = {
            "dtype": DTYPES[described.dtype],
            "shape": list(described.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor, described in zip(tensors, table, strict=True):
            assert (tensor.dtype, tensor.shape) == (described.dtype, described.shape), described.name
            out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_folder(folder: Path, table: Sequence[Described], read: Callable[[str], Tensor], shard_bytes: int) -> None:
    """One file, or several with an index, of tensors that are read one after another. Raises OSError."""
    shards: list[list[Described]] = [[]]
    for described in table:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + described.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(described)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Wide numbers first: each tensor then begins at a multiple of its numbers' size.
        shard = sorted(shard, key=lambda each: -each.dtype.itemsize)
        write_file(folder / name, shard, (read(each.name) for each in shard), {"format": "pt"})
        places |= dict.fromkeys((each.name for each in shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(each.bytes for each in table)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


class TensorFiles:
    """The tensors of a folder, in one file or several."""

    def __init__(self, folder: Path, usual: Callable[[str], str], ignored: Container[str] = ()) -> None:
        """usual: from a name in the files, that by which it is asked for. ignored: such names, of tensors that are there twice.

        Raises UserError, also for other dtypes than DTYPES.
        """
        self.folder, self.usual, self.ignored = folder, usual, ignored
        self.places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for file, names in self._files().items():
            self._note(file, names)

    def _note(self, file: Path, names: list[str]) -> None:
        with safe_open(file, "pt") as opened:
            for name in names:
                found = opened.get_slice(name)
                dtype = next((dtype for dtype, text in DTYPES.items() if text == found.get_dtype()), None)
                if dtype is None:
                    raise UserError(f"{file}: {name} is {found.get_dtype()}, allowed: {', '.join(DTYPES.values())}")
                self.places[self.usual(name)] = file, name
                self.shapes[self.usual(name)] = torch.Size(found.get_shape()), dtype

    def _files(self) -> dict[Path, list[str]]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there; other formats are not read")
            return {self.folder / SINGLE: self._names(self.folder / SINGLE)}
        try:
            listed = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{index}: damaged: no weight_map") from None
        files = {file: self._names(file) for file in sorted({self.folder / file for file in listed.values()})}
        for name, file in listed.items():
            if name not in files[self.folder / file]:
                raise UserError(f"{self.folder / file}: {name} is missing, which {INDEX} places there")
        return files

    def _names(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None

    def names(self) -> set[str]:
        """By which tensors are asked for."""
        return {name for name in self.places if name not in self.ignored}

    def shape(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Of a tensor, without reading it."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """A tensor. Raises UserError."""
        file, own = self.places[name]
        try:
            # Opened for each: what is read of a file stays mapped into memory as long as it is open.
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(own)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {own} cannot be read: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's keys. Raises UserError."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no keys")
    return values


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which has this name when the block is complete, and is removed when it is not.

    Raises UserError where the name is taken, and in place of OSError.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; allowed: a folder that does not")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
